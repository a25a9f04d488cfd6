"""Acting: shapes, types, bounds, repeatability, rows that do not know of each other."""

import random
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algos import AlgoSpec
from conftest import image_env
from envs import POINT_ENV, POINT_GOAL_ENV, RandomEnv
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.utils import get_device
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_diffusion import OfflineDataset

OBSERVATIONS = spaces.Box(-1.0, 1.0, (4,), np.float32)
ACTIONS = {
    "narrow": spaces.Box(-0.5, 0.25, (2,), np.float32),
    "uneven": spaces.Box(np.array([-3.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32)),
    "matrix": spaces.Box(-2.0, 2.0, (2, 3), np.float32),
    "float64": spaces.Box(-2.0, 5.0, (2,), np.float64),
}


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("deterministic", [True, False])
def test_shape_type_and_bounds(variant: AlgoSpec, actions: str, deterministic: bool) -> None:
    env = RandomEnv(OBSERVATIONS, ACTIONS[actions])
    model = variant.make(env)
    for tensor in model.policy.state_dict().values():  # also with large weights
        tensor.mul_(5.0)
    OBSERVATIONS.seed(0)
    batch = np.stack([OBSERVATIONS.sample() for _ in range(50)])
    single, state = model.predict(batch[0], deterministic=deterministic)
    assert (state is None) == ("stateless" not in variant.lacks)
    assert single.shape == env.action_space.shape and single.dtype == env.action_space.dtype
    acted, _ = model.predict(batch, deterministic=deterministic)
    assert isinstance(acted, np.ndarray)
    assert acted.shape == (50, *env.action_space.shape) and acted.dtype == env.action_space.dtype
    assert all(env.action_space.contains(action) for action in [*acted, single])


def test_observations_of_all_kinds(spec: AlgoSpec) -> None:
    for make in [
        lambda: gym.make(POINT_GOAL_ENV),
        *([] if "images" in spec.lacks else [image_env]),
        lambda: RandomEnv(spaces.Box(-1.0, 1.0, (3,), np.float64), ACTIONS["narrow"]),
    ]:
        env = make()
        model = spec.make(env, buffer_size=10)
        observation, _ = env.reset(seed=0)
        assert env.action_space.contains(model.predict(observation)[0])
        vec_env = DummyVecEnv([make, make])
        assert model.predict(vec_env.reset())[0].shape == (2, *env.action_space.shape)


@pytest.mark.parametrize("trained", [False, True])
def test_deterministic_actions_are_repeatable(variant: AlgoSpec, trained: bool, box_dataset: OfflineDataset) -> None:
    model = variant.make(dataset=box_dataset)
    if trained:
        model.learn(3)
    observations = box_dataset.observations[:6]
    first = model.predict(observations, deterministic=True)[0]
    model.predict(observations)
    th.manual_seed(3)
    np.testing.assert_array_equal(model.predict(observations, deterministic=True)[0], first)
    drawn = [model.predict(observations)[0] for _ in range(2)]
    assert not np.array_equal(*drawn), "and the others are drawn"


def test_rows_are_independent(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """A row's deterministic action depends on that row alone: not on its neighbours, its place or their number."""
    model = variant.make(dataset=box_dataset).learn(3)
    observations = box_dataset.observations[:7]
    together = model.predict(observations, deterministic=True)[0]
    alone = np.stack([model.predict(row, deterministic=True)[0] for row in observations])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(7)
    np.testing.assert_allclose(
        model.predict(observations[order], deterministic=True)[0], together[order], rtol=1e-4, atol=1e-5
    )
    others = observations.copy()
    others[1:] = 0.0
    np.testing.assert_allclose(model.predict(others, deterministic=True)[0][0], together[0], rtol=1e-4, atol=1e-5)
    same = model.predict(np.repeat(observations[:1], 4, axis=0), deterministic=True)[0]
    np.testing.assert_allclose(same, np.repeat(together[:1], 4, axis=0), rtol=1e-4, atol=1e-5)


def test_drawn_actions_differ_between_equal_rows(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    model = variant.make(dataset=box_dataset)
    acted, _ = model.predict(np.repeat(box_dataset.observations[:1], 8, axis=0))
    assert len(np.unique(acted, axis=0)) > 1


def test_acting_leaves_the_process_alone(variant: AlgoSpec, box_dataset: OfflineDataset) -> None:
    """Neither the generators of the process nor those of the updates are drawn from, and no gradients are kept."""
    model = variant.make(dataset=box_dataset)

    def state() -> list[Any]:
        generators = (th.get_rng_state(), model.generator.get_state())
        return [str(np.random.get_state()), random.getstate(), *(generator.tolist() for generator in generators)]

    before = state()
    acted = [model.predict(box_dataset.observations[:3], deterministic=d)[0] for d in (True, False)]
    model.policy.actor.predict(box_dataset.observations[:3])
    assert state() == before
    assert all(parameter.grad is None for parameter in model.policy.parameters())
    twin = variant.make(dataset=box_dataset)
    th.manual_seed(99)
    np.random.seed(99)
    for ours, deterministic in zip(acted, (True, False), strict=True):
        theirs = twin.predict(box_dataset.observations[:3], deterministic=deterministic)[0]
        np.testing.assert_array_equal(ours, theirs)


def test_mixing_the_gym_apis(spec: AlgoSpec) -> None:
    env = gym.make(POINT_ENV)
    model = spec.make(env)
    with pytest.raises(ValueError, match=r"mixing Gym API"):
        model.predict(env.reset())


def test_wrong_observation_shape(spec: AlgoSpec) -> None:
    with pytest.raises(ValueError, match="shape"):
        spec.make(POINT_ENV).predict(np.zeros(5, np.float32))


def test_actor_is_a_policy_of_its_own(spec: AlgoSpec, box_dataset: OfflineDataset) -> None:
    model = spec.make(dataset=box_dataset)
    observations = box_dataset.observations[:3]
    np.testing.assert_array_equal(
        model.policy.actor.predict(observations, deterministic=True)[0], model.predict(observations, deterministic=True)[0]
    )


@pytest.mark.parametrize("direct_policy", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_evaluate_policy(spec: AlgoSpec, direct_policy: bool, n_envs: int) -> None:
    env = make_vec_env(POINT_ENV, n_envs, seed=0)
    model = spec.make(env)
    seen: list[int] = []

    def callback(local: dict[str, Any], _globals: dict[str, Any]) -> None:
        assert local["new_observations"] is not local["observations"]
        seen.append(1)

    returns, lengths = evaluate_policy(
        model.policy if direct_policy else model, env, 4, callback=callback, return_episode_rewards=True
    )
    assert len(returns) == len(lengths) == 4 and sum(lengths) <= len(seen)
    with pytest.raises(AssertionError):
        evaluate_policy(model, env, 2, reward_threshold=1.0)


@pytest.mark.parametrize("device", ["cpu", "cuda", "auto"])
def test_device(spec: AlgoSpec, device: str) -> None:
    if device == "cuda" and not th.cuda.is_available():
        pytest.skip("there is no CUDA device")
    model = spec.make(POINT_ENV, device=device).learn(15)
    assert model.device.type == model.policy.device.type == get_device(device).type
    assert all(tensor.device.type == model.device.type for tensor in model.policy.state_dict().values())
    assert model.sample_batch(3).rewards.device.type == model.device.type


def test_statistics_of_the_data_are_part_of_the_policy(spec: AlgoSpec, random_dataset: Callable[..., OfflineDataset]) -> None:
    """One policy acts on raw observations: shifted and scaled data leads to the same actions."""
    small = spaces.Box(-1.0, 1.0, (3,), np.float32)
    large = spaces.Box(-1e4, 1e4, (3,), np.float32)
    data = random_dataset(small, spaces.Box(-1.0, 1.0, (2,), np.float32))
    moved = OfflineDataset(
        1000.0 + 100.0 * data.observations,
        data.actions,
        data.rewards,
        1000.0 + 100.0 * data.next_observations,
        data.terminations,
        data.truncations,
        observation_space=large,
        action_space=data.action_space,
    )
    models = [spec.make(dataset=source, normalize_observations=True).learn(5) for source in (data, moved)]
    acted = [
        model.predict(source.observations[:5], deterministic=True)[0]
        for model, source in zip(models, (data, moved), strict=True)
    ]
    np.testing.assert_allclose(*acted, atol=1e-2)
    with pytest.raises(ValueError, match="twice"):
        from stable_baselines3.common.vec_env import VecNormalize

        spec.make(VecNormalize(make_vec_env(POINT_ENV)), normalize_observations=True)
