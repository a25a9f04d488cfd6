"""
Published settings of DTQL by D4RL task (the authors' ``main.py``, TianyuCodings/Diffusion_Trusted_Q_Learning), and one of
our own.
"""

from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_diffusion.common.utils import CosineSchedule

PUBLISHED: dict[str, Any] = dict(
    n_pretrain_steps=50_000,
    pretrain_actor=False,
    n_imitation_steps=0,
    sync_target_after_pretraining=False,
    q_coef=1.0,
    q_normalization=None,
    ema_decay=0.0,
    normalize_observations=False,
    n_action_samples=1024,
    critic_learning_rate=3e-4,
)
"""What all published runs share, where it is not our default."""


def _preset(
    learning_rate: float,
    trust_region_coef: float,
    decay: bool,
    n_epochs: int,
    expectile: float = 0.7,
    nll_coef: float = 0.0,
    batch_size: int = 256,
    reward_transform: str | None = None,
) -> dict[str, Any]:
    settings = dict(
        PUBLISHED,
        learning_rate=learning_rate,
        trust_region_coef=trust_region_coef,
        expectile=expectile,
        nll_coef=nll_coef,
        batch_size=batch_size,
        reward_transform=reward_transform,
        default_total_timesteps=PUBLISHED["n_pretrain_steps"] + 1_000 * n_epochs,
    )
    if decay:
        settings.update(
            learning_rate=CosineSchedule(learning_rate),
            critic_learning_rate=CosineSchedule(PUBLISHED["critic_learning_rate"]),
        )
    return settings


def _antmaze(learning_rate: float, trust_region_coef: float, decay: bool, n_epochs: int) -> dict[str, Any]:
    return _preset(learning_rate, trust_region_coef, decay, n_epochs, 0.9, 1.0, 2048, "iql_antmaze")


LOCOMOTION: dict[str, Any] = dict(
    learning_rate=LinearSchedule(3e-4, 0.0, end_fraction=0.4),
    gamma=0.995,
    n_steps=5,
    ema_decay=0.9995,
    default_total_timesteps=50_000,
)
"""
Our own for dense rewards and long episodes: values that see a fall that is 200 steps away and travel there fast enough, a
longer average, and learning rates that end before the critic learns the noise of the data by heart.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": LOCOMOTION,
    "halfcheetah-medium": _preset(3e-4, 1.0, False, 1000),
    "halfcheetah-medium-replay": _preset(3e-4, 5.0, False, 1000),
    "halfcheetah-medium-expert": _preset(3e-4, 50.0, False, 1000),
    "hopper-medium": _preset(1e-4, 5.0, True, 1000),
    "hopper-medium-replay": _preset(3e-4, 5.0, False, 1000),
    "hopper-medium-expert": _preset(3e-4, 20.0, False, 1000),
    "walker2d-medium": _preset(3e-4, 5.0, True, 1000),
    "walker2d-medium-replay": _preset(3e-4, 5.0, True, 1000),
    "walker2d-medium-expert": _preset(3e-4, 5.0, True, 1000),
    "antmaze-umaze": _antmaze(3e-4, 1.0, False, 500),
    "antmaze-umaze-diverse": _antmaze(3e-5, 1.0, True, 500),
    "antmaze-medium-play": _antmaze(3e-4, 1.0, False, 400),
    "antmaze-medium-diverse": _antmaze(3e-4, 1.0, False, 400),
    "antmaze-large-play": _antmaze(3e-4, 1.0, False, 350),
    "antmaze-large-diverse": _antmaze(3e-4, 0.5, False, 300),
    "pen-human": _preset(3e-5, 1500.0, True, 300, expectile=0.9),
    "pen-cloned": _preset(1e-5, 1500.0, False, 200),
    "kitchen-complete": _preset(1e-4, 200.0, True, 500),
    "kitchen-partial": _preset(1e-4, 100.0, True, 1000),
    "kitchen-mixed": _preset(3e-4, 200.0, True, 500),
}
