"""The registry of algorithms: one line here gives an algorithm the whole suite."""

from typing import Any

import pytest
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from sb3_diffusion import DTQL, BellmanDiffusion, DiffSR, Diffuser, DiffusionQL, OfflineAlgorithm

FEATURES = (
    "images",
    "her",
    "n_steps",
    "multi_discrete",
    "learns_online",
    "reward_transform",
    "pretraining",
    "extractors",
    "stateless",
    "critics",
)


class AlgoSpec:
    """
    An algorithm, small enough for tests.

    :param cls: class of the algorithm
    :param name: name in the report; by default that of the class
    :param lacks: which of ``FEATURES`` it does not have
    :param bandit: arguments with which it learns the bandit of ``test_identity.py`` well
    :param kwargs: constructor arguments
    """

    def __init__(
        self,
        cls: type[OfflineAlgorithm],
        name: str | None = None,
        lacks: tuple[str, ...] = (),
        bandit: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        assert set(lacks) <= set(FEATURES), lacks
        self.cls, self.name, self.lacks, self.bandit = cls, name or cls.__name__, lacks, bandit or {}
        self.kwargs = {"batch_size": 8, "learning_starts": 10, "buffer_size": 1_000, "seed": 0, "device": "cpu", **kwargs}

    def make(self, env: Any = None, dataset: Any = None, policy: str | None = None, **kwargs: Any) -> Any:
        """
        Build the algorithm with small networks; ``policy_kwargs`` are merged into the small ones.

        :param env: as in the constructor
        :param dataset: as in the constructor
        :param policy: by default the alias that fits the observations
        :param kwargs: further constructor arguments
        :return: the model
        """
        if policy is None:
            space = getattr(env if env is not None else dataset, "observation_space", None)
            policy = "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy"
            policy = "CnnPolicy" if space is not None and is_image_space(space) else policy
        policy_kwargs = {**self.kwargs.get("policy_kwargs", {}), **kwargs.pop("policy_kwargs", {})}
        return self.cls(policy, env, dataset=dataset, **{**self.kwargs, **kwargs, "policy_kwargs": policy_kwargs})

    def pretraining(self, n_steps: int) -> dict[str, Any]:
        """:return: constructor arguments of a pretraining phase, none if the algorithm has no such phase"""
        return {} if "pretraining" in self.lacks else {"n_pretrain_steps": n_steps}

    def need(self, *features: str) -> None:
        """Skip the running test if the algorithm lacks one of the features."""
        for feature in features:
            if feature in self.lacks:
                pytest.skip(f"{self.name} has no {feature}")


WITHOUT_IN_DIFFUSER = (
    "images",
    "her",
    "n_steps",
    "multi_discrete",
    "reward_transform",
    "pretraining",
    "extractors",
    "stateless",
    "critics",
)

WITHOUT_IN_BELLMAN_DIFFUSION = ("images", "her", "n_steps", "multi_discrete", "reward_transform", "critics")

ALGOS = [
    AlgoSpec(
        DTQL,
        bandit=dict(policy_kwargs=dict(net_arch=[32, 32]), learning_rate=3e-3, q_coef=5.0, batch_size=64),
        n_imitation_steps=0,
        policy_kwargs=dict(net_arch=[16]),
    ),
    AlgoSpec(
        DiffusionQL,
        bandit=dict(policy_kwargs=dict(net_arch=[32, 32]), learning_rate=3e-3, q_coef=5.0, batch_size=64),
        n_imitation_steps=0,
        n_diffusion_steps=3,
        policy_kwargs=dict(net_arch=[16]),
    ),
    AlgoSpec(
        Diffuser,
        lacks=WITHOUT_IN_DIFFUSER,
        bandit=dict(
            horizon=2,
            n_diffusion_steps=20,
            sampler="ddim",
            n_sampling_steps=4,
            n_candidates=64,
            learning_rate=2e-3,
            tau=0.02,
            batch_size=64,
        ),
        horizon=4,
        n_diffusion_steps=3,
        n_candidates=1,
        guidance_scale=0.0,
        policy_kwargs=dict(net_kwargs=dict(base_width=32, multipliers=[1, 2])),
    ),
    AlgoSpec(
        DiffSR,
        bandit=dict(
            policy_kwargs=dict(net_arch=[32, 32]),
            learning_rate=3e-3,
            feature_learning_rate=3e-3,
            feature_dim=16,
            n_frequencies=32,
            tau=0.02,
            batch_size=64,
        ),
        feature_dim=8,
        score_net_width=16,
        n_frequencies=8,
        n_diffusion_steps=5,
        policy_kwargs=dict(net_arch=[16], time_embedding_dim=8),
    ),
    AlgoSpec(
        BellmanDiffusion,
        lacks=WITHOUT_IN_BELLMAN_DIFFUSION,
        bandit=dict(
            policy_kwargs=dict(net_arch=[32, 32]), learning_rate=3e-3, batch_size=64, temperature=0.15, max_weight=1e4
        ),
        n_diffusion_steps=3,
        policy_kwargs=dict(net_arch=[16]),
    ),
]

VARIANTS = [  # further settings of the algorithms for the tests of the life cycle
    *ALGOS,
    AlgoSpec(
        DTQL,
        name="DTQL-implicit-KL",
        actor_type="implicit",
        regularizer="kl",
        n_action_samples=3,
        n_imitation_steps=3,
        normalize_observations=False,
        policy_kwargs=dict(net_arch=[16]),
    ),
    AlgoSpec(
        DiffusionQL,
        name="DiffusionQL-candidates",
        n_diffusion_steps=6,
        noise_schedule="cosine",
        prediction_type="v",
        sampler="ddim",
        n_sampling_steps=2,
        n_action_samples=3,
        candidate_choice="argmax",
        max_q_backup=True,
        n_backup_actions=2,
        n_imitation_steps=3,
        max_grad_norm=1.0,
        policy_kwargs=dict(net_arch=[16]),
    ),
    AlgoSpec(
        Diffuser,
        name="Diffuser-guided",
        lacks=WITHOUT_IN_DIFFUSER,
        horizon=4,
        n_diffusion_steps=4,
        n_candidates=3,
        guidance_scaling="std",
        n_guidance_steps=1,
        t_stopgrad=1,
        n_action_steps=2,
        ema_start=2,
        ema_interval=2,
        n_value_steps=4,
        policy_kwargs=dict(net_kwargs=dict(base_width=32, multipliers=[1, 2], attention=True)),
    ),
    AlgoSpec(
        Diffuser,
        name="Diffuser-transformer",
        lacks=WITHOUT_IN_DIFFUSER,
        horizon=3,
        stride=2,
        n_diffusion_steps=6,
        prediction_type="v",
        sampler="ddim",
        n_sampling_steps=2,
        backbone="transformer",
        normalization="limits",
        n_candidates=1,
        guidance_scale=0.0,
        n_action_steps=4,
        warm_start=0.5,
        padding="zeros",
        max_grad_norm=1.0,
        normalize_observations=False,
        policy_kwargs=dict(net_kwargs=dict(width=16, n_layers=1, n_heads=2)),
    ),
    AlgoSpec(
        DiffSR,
        name="DiffSR-SAC",
        actor_type="sac",
        feature_dim=8,
        score_net_width=16,
        n_frequencies=8,
        trainable_frequencies=False,
        feature_loss="weighted_score",
        noise_schedule="linear",
        n_diffusion_steps=5,
        decorrelation_coef=0.1,
        critic_trains_features=True,
        exploration_coef=0.1,
        policy_delay=2,
        target_update_interval=2,
        max_grad_norm=1.0,
        policy_kwargs=dict(net_arch=dict(pi=[16], qf=[16, 8], psi=[16, 16]), time_embedding_dim=8),
    ),
    AlgoSpec(
        BellmanDiffusion,
        name="BellmanDiffusion-candidates",
        lacks=WITHOUT_IN_BELLMAN_DIFFUSION,
        measured_policy="actor",
        scheme="renoised",
        n_diffusion_steps=6,
        noise_schedule="vp",
        prediction_type="noise",
        sampler="dpm_solver",
        n_sampling_steps=3,
        level_weighting="ddpm",
        n_action_samples=3,
        n_future_samples=2,
        max_grad_norm=1.0,
        policy_kwargs=dict(net_arch=[16]),
    ),
    AlgoSpec(
        BellmanDiffusion,
        name="BellmanDiffusion-horizon",
        lacks=WITHOUT_IN_BELLMAN_DIFFUSION,
        horizon=5,
        n_diffusion_steps=3,
        alive_flag=False,
        normalize_observations=False,
        policy_kwargs=dict(net_arch=dict(pi=[16], qf=[16, 8])),
    ),
    AlgoSpec(
        BellmanDiffusion,
        name="BellmanDiffusion-rebrac",
        lacks=WITHOUT_IN_BELLMAN_DIFFUSION,
        agent="rebrac",
        measure_penalty="states",
        measured_policy="actor",
        n_diffusion_steps=3,
        policy_kwargs=dict(net_arch=[16]),
    ),
    AlgoSpec(
        BellmanDiffusion,
        name="BellmanDiffusion-n-steps",
        lacks=WITHOUT_IN_BELLMAN_DIFFUSION,
        n_steps=3,
        n_diffusion_steps=3,
        policy_kwargs=dict(net_arch=[16], layer_norm=False),
    ),
]
