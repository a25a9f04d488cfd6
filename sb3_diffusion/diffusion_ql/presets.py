"""
Published settings of Diffusion-QL by D4RL task (the authors' ``main.py``, Zhendong-Wang/Diffusion-Policies-for-Offline-RL),
and one of our own.
"""

from typing import Any

from stable_baselines3.common.utils import LinearSchedule

from sb3_diffusion.common.utils import CosineSchedule

PUBLISHED: dict[str, Any] = dict(
    n_imitation_steps=0,
    critic_layer_norm=False,
    normalize_observations=False,
    n_action_samples=50,
    acts_with_average=False,
    ema_start=1_000,
    ema_interval=5,
    critic_learning_rate=CosineSchedule(3e-4),
)
"""What all published runs share, where it is not our default."""


def _preset(
    q_coef: float,
    max_grad_norm: float,
    n_epochs: int,
    learning_rate: float = 3e-4,
    max_q_backup: bool = False,
    reward_transform: str | None = None,
) -> dict[str, Any]:
    return dict(
        PUBLISHED,
        learning_rate=CosineSchedule(learning_rate),
        q_coef=q_coef,
        max_q_backup=max_q_backup,
        reward_transform=reward_transform,
        max_grad_norm=max_grad_norm,
        default_total_timesteps=1_000 * n_epochs,
    )


def _antmaze(q_coef: float, max_grad_norm: float, learning_rate: float = 3e-4, max_q_backup: bool = True) -> dict[str, Any]:
    return _preset(q_coef, max_grad_norm, 1000, learning_rate, max_q_backup, "cql_antmaze")


LOCOMOTION: dict[str, Any] = dict(
    learning_rate=LinearSchedule(3e-4, 0.0, end_fraction=0.25),
    gamma=0.995,
    n_steps=5,
    ema_decay=0.9995,
    default_total_timesteps=50_000,
)
"""
Our own for dense rewards and long episodes, as DTQL's of the same name: values that see a fall that is 200 steps away and
travel there fast enough, a longer average, and learning rates that end before the policy follows what the critic does not
know. The action value reaches the actor better through two steps of the chain of five (``n_sampling_steps=2``), which pays on
data of one middling behaviour; on others the policy falls at once.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": LOCOMOTION,
    "halfcheetah-medium": _preset(1.0, 9.0, 2000),
    "hopper-medium": _preset(1.0, 9.0, 2000),
    "walker2d-medium": _preset(1.0, 1.0, 2000),
    "halfcheetah-medium-replay": _preset(1.0, 2.0, 2000),
    "hopper-medium-replay": _preset(1.0, 4.0, 2000),
    "walker2d-medium-replay": _preset(1.0, 4.0, 2000),
    "halfcheetah-medium-expert": _preset(1.0, 7.0, 2000),
    "hopper-medium-expert": _preset(1.0, 5.0, 2000),
    "walker2d-medium-expert": _preset(1.0, 5.0, 2000),
    "antmaze-umaze": _antmaze(0.5, 2.0, max_q_backup=False),
    "antmaze-umaze-diverse": _antmaze(2.0, 3.0),
    "antmaze-medium-play": _antmaze(2.0, 2.0, 1e-3),
    "antmaze-medium-diverse": _antmaze(3.0, 1.0),
    "antmaze-large-play": _antmaze(4.5, 10.0),
    "antmaze-large-diverse": _antmaze(3.5, 7.0),
    "pen-human": _preset(0.15, 7.0, 1000, 3e-5, reward_transform="normalize"),
    "pen-cloned": _preset(0.1, 8.0, 1000, 3e-5, reward_transform="normalize"),
    "kitchen-complete": _preset(0.005, 9.0, 250),
    "kitchen-partial": _preset(0.005, 10.0, 1000),
    "kitchen-mixed": _preset(0.005, 10.0, 1000),
}
