"""
Settings of Diff-SR: those of the authors' two code bases for states, and two of our own with small networks for a CPU.

The code for the DeepMind control suite is typoverflow/spectral-rl2, that for MuJoCo haotiansun14/rl-rep (``diffsrsac``).
"""

from typing import Any

from stable_baselines3.common.utils import LinearSchedule
from torch import nn

SMALL: dict[str, Any] = dict(
    batch_size=256,
    feature_dim=64,
    score_net_width=128,
    n_frequencies=128,
    critic_learning_rate=1e-3,
    feature_learning_rate=1e-3,
    policy_kwargs=dict(net_arch=dict(pi=[256, 256], qf=[128], psi=[256], zeta=[128]), activation_fn=nn.ELU),
)

LOCOMOTION: dict[str, Any] = dict(
    SMALL,
    learning_rate=LinearSchedule(3e-4, 0.0, end_fraction=1.0),
    critic_learning_rate=LinearSchedule(1e-3, 0.0, end_fraction=1.0),
    feature_learning_rate=LinearSchedule(1e-3, 0.0, end_fraction=1.0),
    default_total_timesteps=20_000,
)
"""
For logged data, as the presets of this name of other methods: all rates end, or the actor goes on to follow the errors of its
values after it has learned what there is to learn.
"""

PRESETS: dict[str, dict[str, Any]] = {
    "dmcontrol": dict(learning_starts=5_000, default_total_timesteps=500_000),
    "mujoco": dict(
        actor_type="sac",
        ent_coef=0.1,
        learning_starts=25_000,
        batch_size=256,
        n_feature_steps=4,
        target_update_interval=2,
        feature_dim=256,
        score_net_width=512,
        n_frequencies=128,
        feature_loss="displacement",
        noise_scale=0.449,
        noise_schedule="beta_law",
        n_diffusion_steps=1_000,
        feature_learning_rate=3e-3,
        reward_coef=0.0,
        target_features=False,
        normalize_observations=False,
        policy_kwargs=dict(net_arch=dict(pi=[256, 256], qf=[256], psi=[256], zeta=[512]), activation_fn=nn.ELU),
        default_total_timesteps=200_000,
    ),
    "small": SMALL,
    "locomotion": LOCOMOTION,
}
