"""
Published settings: those of the paper's version 2, by the authors' code (schrammlb2/Bellman-Diffusion-Offline-RL), and those
of the same loss in arXiv 2503.09817, where it is called TD$^2$-DD (its noise rises to a rate of 20; ``"vp"`` ends at 10);
and one of our own.
"""

from typing import Any

import torch as th
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

VERSION_2: dict[str, Any] = dict(
    learning_rate=1e-3,
    batch_size=1024,
    measured_policy="actor",
    scheme="renoised",
    agent="rebrac",
    tau=0.0025,
    policy_kwargs=dict(net_arch=dict(pi=[256] * 3, qf=[512] * 2), activation_fn=nn.ReLU),
)
"""
Averages of the published code follow by 0.005 every second update. Its ten diffusion steps along the means are not taken over:
they draw conditional means instead of samples.
"""

LOCOMOTION: dict[str, Any] = dict(
    learning_rate=LinearSchedule(3e-4, 0.0, end_fraction=0.4),
    temperature=3.0,
    max_weight=100.0,
    default_total_timesteps=50_000,
)
"""
Our own, as DTQL's of the same name: learning rates that end before the actor climbs values that overrate its actions, and a
temperature for advantages that are mostly errors of the values.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "locomotion": LOCOMOTION,
    "rebrac-states": dict(
        VERSION_2,
        prediction_type="sample",
        actor_bc_coef=0.01,
        critic_bc_coef=0.01,
        measure_coef=0.1,
        measure_penalty="states",
    ),
    "rebrac-futures": dict(
        VERSION_2,
        prediction_type="noise",
        actor_bc_coef=1.0,
        critic_bc_coef=1.0,
        measure_coef=1.0,
        measure_penalty="futures",
    ),
    "td2-dd": dict(
        learning_rate=1e-4,
        batch_size=1024,
        tau=1e-3,
        train_agent=False,
        prediction_type="noise",
        noise_schedule="vp",
        n_diffusion_steps=1000,
        n_sampling_steps=20,
        policy_kwargs=dict(
            net_arch=[512] * 3,
            time_embedding_dim=256,
            optimizer_class=th.optim.AdamW,
            optimizer_kwargs=dict(eps=1e-4, weight_decay=1e-3),
        ),
        default_total_timesteps=3_000_000,
    ),
}
