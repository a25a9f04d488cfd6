"""Equal seeds give equal runs, and different ones do not."""

from typing import Any

import numpy as np
import pytest
import torch as th
from algos import AlgoSpec
from envs import POINT_ENV
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

from sb3_diffusion import OfflineDataset


def trace(model: Any, n_steps: int = 20) -> list[np.ndarray]:
    """Actions and rewards of a model in its environment."""
    env = model.get_env()
    observations, seen = env.reset(), []
    for _ in range(n_steps):
        actions, _ = model.predict(observations)
        observations, rewards, _, _ = env.step(actions)
        seen += [actions, rewards]
    return seen


def run(spec: AlgoSpec, mode: str, seed: int, data: OfflineDataset) -> list[np.ndarray]:
    """Learn and act."""
    env = make_vec_env(POINT_ENV, n_envs=2)
    noise = NormalActionNoise(np.zeros(2), 0.1 * np.ones(2))
    model = spec.make(env, dataset=None if mode == "online" else data, seed=seed, action_noise=noise)
    if mode != "online":
        model.learn(6)
    if mode != "offline":
        model.learn(30, offline=False, reset_num_timesteps=False)
    parameters = [tensor.numpy() for tensor in model.policy.state_dict().values()]
    return [*trace(model), *parameters]


@pytest.mark.parametrize("mode", ["offline", "online", "fine-tune"])
def test_equal_seeds(spec: AlgoSpec, mode: str, box_dataset: OfflineDataset) -> None:
    first = run(spec, mode, 3, box_dataset)
    for a, b in zip(first, run(spec, mode, 3, box_dataset), strict=True):
        np.testing.assert_array_equal(a, b)
    other = run(spec, mode, 4, box_dataset)
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_offline_updates_do_not_depend_on_what_else_is_drawn(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """Evaluating, and drawing from the generators of the process, does not change what is learned."""
    quiet = variant.make(dataset=box_dataset).learn(8)
    model = variant.make(dataset=box_dataset)

    def disturb(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        th.rand(3)
        np.random.rand(3)
        model.predict(box_dataset.observations[:3])
        return True

    model.learn(8, callback=disturb)
    for (name, a), b in zip(quiet.policy.state_dict().items(), model.policy.state_dict().values(), strict=True):
        assert th.equal(a, b), name


def test_set_random_seed(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    model = spec.make(dataset=box_dataset)
    draws = []
    for _ in range(2):
        model.set_random_seed(5)
        draws.append([model.predict(box_dataset.observations[:3])[0], model.sample_batch(4).actions.numpy()])
    for a, b in zip(*draws, strict=True):
        np.testing.assert_array_equal(a, b)


def test_no_seed_means_a_random_one(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    draws = [spec.make(dataset=box_dataset, seed=None).sample_batch(8).observations for _ in range(2)]
    assert not th.equal(*draws)
