"""Each algorithm learns a bandit whose best action is known: the observation itself."""

from typing import Any

import numpy as np
import pytest
from algos import AlgoSpec
from envs import BanditEnv

from sb3_diffusion import OfflineDataset

N_STEPS = 1_500
RANDOM_ERROR = 0.57
"""Mean distance of a uniform action from the observation, uniform in [-0.8, 0.8]."""


def bandit_data(n: int = 2_000) -> OfflineDataset:
    """Uniform actions: cloning them is of no use."""
    rng = np.random.default_rng(0)
    observations = rng.uniform(-0.8, 0.8, (n, 1)).astype(np.float32)
    actions = rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32)
    rewards = -np.abs(actions - observations)[:, 0]
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


def error(model: Any) -> float:
    """Mean distance from the best action."""
    observations = np.linspace(-0.8, 0.8, 41, dtype=np.float32)[:, None]
    return float(np.abs(model.predict(observations, deterministic=True)[0] - observations).mean())


def test_offline(spec: AlgoSpec) -> None:
    model = spec.make(BanditEnv(), dataset=bandit_data(), **spec.bandit)
    model.learn(N_STEPS)
    assert error(model) < 0.3 * RANDOM_ERROR


def test_online(spec: AlgoSpec) -> None:
    spec.need("learns_online")
    model = spec.make(BanditEnv(), **{**spec.bandit, "learning_starts": 100}).learn(N_STEPS)
    assert error(model) < 0.4 * RANDOM_ERROR


def test_rewards_are_what_it_learns_from(spec: AlgoSpec) -> None:
    """With the rewards of another bandit, whose best action is the opposite, it learns that one."""
    data = bandit_data()
    rewards = -np.abs(data.actions + data.observations)[:, 0]
    arrays = (data.observations, data.actions, rewards, data.next_observations, data.terminations, data.truncations)
    opposite = OfflineDataset(*arrays, observation_space=data.observation_space, action_space=data.action_space)
    model = spec.make(BanditEnv(), dataset=opposite, **spec.bandit).learn(N_STEPS)
    observations = np.array([[-0.6], [0.6]], np.float32)
    acted = model.predict(observations, deterministic=True)[0]
    assert acted[0, 0] > 0.2 and acted[1, 0] < -0.2


@pytest.mark.parametrize("key", ["critic_loss"])
def test_the_critic_loss_falls(spec: AlgoSpec, key: str) -> None:
    model = spec.make(BanditEnv(), dataset=bandit_data(), **spec.bandit)
    losses = []

    def note(local: dict[str, Any], _globals: dict[str, Any]) -> bool:
        model = local["self"]
        if model.num_timesteps % 100 == 0:
            model.dump_logs()
        return True

    from stable_baselines3.common.logger import KVWriter, Logger

    class Writer(KVWriter):
        def write(self, key_values: dict[str, Any], key_excluded: dict[str, Any], step: int = 0) -> None:
            losses.extend(value for name, value in key_values.items() if name == f"train/{key}")

        def close(self) -> None:
            pass

    model.set_logger(Logger(None, [Writer()]))
    model.learn(500, callback=note, log_interval=None)
    if not losses:
        pytest.skip(f"{spec.name} logs no {key}")
    assert losses[-1] < 0.5 * losses[0]
