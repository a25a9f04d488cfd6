"""Each algorithm learns a bandit whose best action is known: the observation itself."""

from typing import Any

import numpy as np
from algos import AlgoSpec
from envs import BanditEnv

from sb3_diffusion import OfflineDataset

N_STEPS = 600
RANDOM_ERROR = 0.6
"""Mean distance of a uniform action from the observation, uniform in [-0.8, 0.8]; that of the action 0 is 0.4."""


def bandit_data(sign: float = 1.0, n: int = 2_000) -> OfflineDataset:
    """Uniform actions: cloning them is of no use. The best action is ``sign`` times the observation."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-0.8, 0.8, (n, 1)).astype(np.float32)
    actions = rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32)
    rewards = -np.abs(actions - sign * observations)[:, 0]
    ended = np.ones(n, bool)
    return OfflineDataset(
        observations,
        actions,
        rewards,
        observations,
        ended,
        ~ended,
        observation_space=BanditEnv.observation_space,
        action_space=BanditEnv.action_space,
    )


def error(model: Any, sign: float = 1.0) -> float:
    """Mean distance from the best action."""
    observations = np.linspace(-0.8, 0.8, 41, dtype=np.float32)[:, None]
    return float(np.abs(model.predict(observations, deterministic=True)[0] - sign * observations).mean())


def test_offline(spec: AlgoSpec) -> None:
    model = spec.make(BanditEnv(), dataset=bandit_data(), **spec.bandit)
    before = error(model)
    model.learn(N_STEPS)
    assert error(model) < 0.15 < before


def test_rewards_decide(spec: AlgoSpec) -> None:
    """With the rewards of the opposite bandit it learns the opposite, from the same observations and actions."""
    model = spec.make(BanditEnv(), dataset=bandit_data(-1.0), **spec.bandit).learn(N_STEPS)
    assert error(model, -1.0) < 0.15 and error(model) > RANDOM_ERROR


def test_online(spec: AlgoSpec) -> None:
    spec.need("learns_online")
    model = spec.make(BanditEnv(), **{**spec.bandit, "learning_starts": 100}).learn(N_STEPS + 100)
    assert error(model) < 0.2
