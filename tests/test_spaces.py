"""Which spaces are accepted, and what is said about the others."""

from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from algos import AlgoSpec
from envs import RandomEnv
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_diffusion import OfflineDataset
from sb3_diffusion.buffers import EpisodeReplayBuffer

FLOAT32, FLOAT64 = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Box(-1.0, 1.0, (2,), np.float64)
OBSERVATIONS = {
    "float32": FLOAT32,
    "float64": FLOAT64,
    "unbounded": spaces.Box(-np.inf, np.inf, (3,), np.float32),
    "matrix": spaces.Box(-1.0, 1.0, (2, 3), np.float32),
    "dict": spaces.Dict({"a": FLOAT32, "b": spaces.Box(-1.0, 1.0, (1,), np.float32)}),
    "dict64": spaces.Dict({"a": FLOAT32, "b": FLOAT64}),
    "flattened": spaces.Dict({"goal.place": FLOAT32, "goal.time": spaces.Box(-1.0, 1.0, (1,), np.float32), "here": FLOAT64}),
}
DISCRETE_OBSERVATIONS = {
    "multi_discrete": spaces.MultiDiscrete([4, 3]),
    "multi_binary": spaces.MultiBinary(8),
    "multi_binary_2d": spaces.MultiBinary((3, 2)),
    "discrete": spaces.Discrete(5),
}
ACTIONS = {
    "float32": FLOAT32,
    "float64": FLOAT64,
    "matrix": spaces.Box(-2.0, 0.5, (2, 2), np.float32),
    "uneven": spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 0.1], np.float32)),
}


def check(spec: AlgoSpec, observation_space: spaces.Space, action_space: spaces.Box, make_data: Callable) -> None:
    """Learn offline and online, act and evaluate; the env itself checks its actions."""
    data: OfflineDataset = make_data(observation_space, action_space)
    env = RandomEnv(observation_space, action_space)
    model = spec.make(env, dataset=data)
    model.learn(2)
    scaled = model.sample_batch(40).actions
    assert len(scaled) == 40 and scaled.shape[-1] % int(np.prod(action_space.shape)) == 0
    assert -1.0 <= scaled.min() < -0.5 and 0.5 < scaled.max() <= 1.0, "scaled to [-1, 1]"
    model.learn(16, offline=False)
    action, _ = model.predict(env.reset()[0])
    assert action.dtype == action_space.dtype and action.shape == action_space.shape
    evaluate_policy(model, env, n_eval_episodes=1, warn=False)


@pytest.mark.parametrize("observations", OBSERVATIONS)
def test_observations(spec: AlgoSpec, observations: str, random_dataset: Callable) -> None:
    check(spec, OBSERVATIONS[observations], FLOAT32, random_dataset)


@pytest.mark.parametrize("observations", DISCRETE_OBSERVATIONS)
def test_discrete_observations(spec: AlgoSpec, observations: str, random_dataset: Callable) -> None:
    spec.need("multi_discrete")
    check(spec, DISCRETE_OBSERVATIONS[observations], FLOAT32, random_dataset)


@pytest.mark.parametrize("space", [DISCRETE_OBSERVATIONS["discrete"], spaces.Box(0, 255, (36, 36, 1), np.uint8)])
def test_observations_that_are_no_vectors_are_refused(spec: AlgoSpec, space: spaces.Space) -> None:
    if {"images", "multi_discrete"} - set(spec.lacks):
        pytest.skip(f"{spec.name} takes them")
    refused = r"vectors: observations must be a Box that is no image.*DTQL, DiffusionQL and DiffSR take images and discrete"
    with pytest.raises(ValueError, match=refused):
        spec.make(RandomEnv(space, FLOAT32))


@pytest.mark.parametrize("actions", ACTIONS)
def test_actions(variant: AlgoSpec, actions: str, random_dataset: Callable) -> None:
    check(variant, FLOAT32, ACTIONS[actions], random_dataset)


@pytest.mark.parametrize("space", [spaces.Discrete(3), spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)])
def test_discrete_actions_are_refused(spec: AlgoSpec, space: spaces.Space) -> None:
    """With the error that SB3's algorithms raise, which tells what was expected."""
    refused = rf"{spec.cls.__name__} needs a Box action space with finite bounds: got {type(space).__name__}"
    with pytest.raises(AssertionError, match=refused):
        spec.make(RandomEnv(FLOAT32, space))
    with pytest.raises(AssertionError, match=r"got Discrete\(2\)"):
        spec.make("CartPole-v1")


def test_unbounded_actions_are_refused(spec: AlgoSpec) -> None:
    with pytest.raises(AssertionError, match=r"with finite bounds: got Box\(-inf, inf"):
        spec.make(RandomEnv(FLOAT32, spaces.Box(-np.inf, np.inf, (2,), np.float32)))


@pytest.mark.parametrize(
    ("low", "high", "dtype"), [(0.5, 0.5, np.float32), (-3e38, 3e38, np.float32), (1.0, 1.0 + 1e-12, np.float64)]
)
def test_actions_that_cannot_be_scaled_are_refused(
    spec: AlgoSpec, low: float, high: float, dtype: type, random_dataset: Callable
) -> None:
    """A dimension without width, or with one that float32 cannot tell, would make actions that are not finite."""
    space = spaces.Box(np.array([-1.0, low], dtype), np.array([1.0, high], dtype), dtype=dtype)
    with pytest.raises(ValueError, match=rf"{spec.cls.__name__} scales actions .* low < high .*got Box"):
        spec.make(RandomEnv(FLOAT32, space))
    with pytest.raises(ValueError, match=r"logged data scales actions .* low < high"):
        EpisodeReplayBuffer.from_dataset(random_dataset(FLOAT32, space), FLOAT32, space)


def test_nested_observations_are_refused(spec: AlgoSpec) -> None:
    nested = spaces.Dict({"a": spaces.Dict({"b": FLOAT32})})
    with pytest.raises(NotImplementedError):
        spec.make(RandomEnv(nested, FLOAT32))
    with pytest.raises(NotImplementedError):
        spec.make(RandomEnv(spaces.Tuple([FLOAT32, FLOAT32]), FLOAT32))


def test_data_that_does_not_fit_the_environment(spec: AlgoSpec, random_dataset: Callable) -> None:
    data = random_dataset(FLOAT32, FLOAT32)
    for env in (
        RandomEnv(spaces.Box(-1.0, 1.0, (3,), np.float32), FLOAT32),
        RandomEnv(FLOAT32, spaces.Box(-1.0, 1.0, (3,), np.float32)),
        RandomEnv(spaces.Dict({"a": FLOAT32}), FLOAT32),
    ):
        with pytest.raises(ValueError, match="(?i)space"):
            spec.make(env, dataset=data)


def test_subclassed_spaces(spec: AlgoSpec, tmp_path: object) -> None:
    class OwnBox(spaces.Box):
        pass

    env = RandomEnv(OwnBox(-1.0, 1.0, (2,), np.float32), OwnBox(-1.0, 1.0, (2,), np.float32))
    model = spec.make(env).learn(15)
    model.save(f"{tmp_path}/model")
    spec.cls.load(f"{tmp_path}/model", env=env)


def test_env_id_of_gymnasium(spec: AlgoSpec) -> None:
    model = spec.make(gym.make("Pendulum-v1")).learn(15)
    assert model.predict(np.zeros(3, np.float32))[0].shape == (1,)
