"""
Published settings of Diffuser by D4RL task (the authors' ``config/locomotion.py`` and, on the branch ``maze2d``,
``config/maze2d.py``, jannerm/diffuser), and those of a report on its executed window.
"""

from typing import Any

from sb3_diffusion.diffuser.tracking import PDTracker

PUBLISHED: dict[str, Any] = dict(
    tau=0.005,
    ema_start=2_000,
    ema_interval=10,
    padding="zeros",
    count_padding=True,
)
"""
What all published runs share, where it is not our default. That has their batch size, 64: the authors add up the gradients of
two batches of 32.
"""


def _locomotion(**changes: Any) -> dict[str, Any]:
    return {**PUBLISHED, "n_value_steps": 200_000, **changes}


def _halfcheetah() -> dict[str, Any]:
    return _locomotion(
        horizon=4,
        guidance_scale=0.001,
        t_stopgrad=4,
        policy_kwargs=dict(net_kwargs=dict(multipliers=[1, 4, 8], attention=True)),
    )


def _maze2d(horizon: int, n_diffusion_steps: int) -> dict[str, Any]:
    return dict(
        PUBLISHED,
        horizon=horizon,
        n_diffusion_steps=n_diffusion_steps,
        goal_conditioned=True,
        normalization="limits",
        clip_denoised=1.0,
        padding=None,
        action_weight=1.0,
        n_action_steps=horizon,
        tracker=PDTracker(),
        policy_kwargs=dict(net_kwargs=dict(multipliers=[1, 4, 8])),
        default_total_timesteps=2_000_000,
    )


PRESETS: dict[str, dict[str, Any]] = {
    **{f"hopper-{data}": _locomotion() for data in ("medium", "medium-replay")},
    "hopper-medium-expert": _locomotion(guidance_scale=1e-4, t_stopgrad=4),
    **{f"walker2d-{data}": _locomotion() for data in ("medium", "medium-replay", "medium-expert")},
    **{f"halfcheetah-{data}": _halfcheetah() for data in ("medium", "medium-replay", "medium-expert")},
    "maze2d-umaze": _maze2d(128, 64),
    "maze2d-medium": _maze2d(256, 256),
    "maze2d-large": _maze2d(384, 256),
    "walker2d-expert": dict(  # yibhu/Generative-RL, as its report and notebooks say
        horizon=8,
        learning_rate=4e-5,
        batch_size=32,
        tau=1.0,
        action_weight=1.0,
        normalization="limits",
        clip_denoised=1.0,
        n_candidates=1,
        guidance_scale=0.0,
        train_value=False,
        default_total_timesteps=500_000,
    ),
}
