"""Evaluation: counting of episodes, seeds, normalisation, and intervals against slow ones written out."""

import copy
from collections.abc import Callable

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffusion.evaluation import EvaluationResult, bootstrap_interval, evaluate, interquartile_mean


class CountEnv(gym.Env):
    """Episodes of a fixed length; the reward of a step is the action, the observation tells length and time."""

    observation_space = spaces.Box(-10.0, 1000.0, (2,), dtype=np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), dtype=np.float32)

    def __init__(self, length: int = 3) -> None:
        self.length, self.time, self.closed = length, 0, False

    def _observation(self) -> np.ndarray:
        return np.array([self.length, self.time], dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self._observation(), {}

    def step(self, action):
        self.time += 1
        return self._observation(), float(action[0]), self.time >= self.length, False, {}

    def close(self) -> None:
        self.closed = True


class NoisyStartEnv(CountEnv):
    """The return is a number drawn at the reset."""

    def reset(self, *, seed=None, options=None):
        observation, info = super().reset(seed=seed, options=options)
        self.level = float(self.np_random.uniform())
        return observation, info

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        return observation, self.level, terminated, truncated, info


class ConstantPolicy:
    """Has `predict` and nothing else; remembers what it was called with."""

    def __init__(self, action: float = 0.5) -> None:
        self.action = action
        self.calls: list[tuple] = []

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        self.calls.append((np.array(observation), state, np.array(episode_start), deterministic))
        steps = np.zeros(len(observation)) if state is None else np.where(episode_start, 0, state[0])
        return np.full((len(observation), 1), self.action, dtype=np.float32), (steps + 1,)


class References:
    ref_min_score, ref_max_score = 1.0, 3.0

    @property
    def has_reference_scores(self):
        return self.ref_min_score is not None and self.ref_max_score is not None

    def normalized_score(self, returns):
        return 100.0 * (np.asarray(returns) - 1.0) / 2.0


@pytest.mark.parametrize("n_envs", [None, 1, 3])
@pytest.mark.parametrize("deterministic", [True, False])
def test_returns_and_lengths(n_envs: int | None, deterministic: bool):
    policy = ConstantPolicy()
    result = evaluate(policy, lambda: CountEnv(4), 5, n_envs=n_envs, deterministic=deterministic)
    np.testing.assert_array_equal(result.returns, np.full(5, 2.0))
    np.testing.assert_array_equal(result.lengths, np.full(5, 4))
    assert result.normalized_scores is None
    assert {len(call[0]) for call in policy.calls} == {n_envs or 5}
    assert {call[3] for call in policy.calls} == {deterministic}


def test_each_env_plays_its_share():
    # Two envs, of 1 and of 50 steps per episode: by order of arrival the long one would never be counted.
    lengths = iter([1, 50])
    env = DummyVecEnv([lambda: Monitor(CountEnv(next(lengths)))] * 2)
    result = evaluate(ConstantPolicy(), env, 4)
    assert sorted(result.lengths) == [1, 1, 50, 50]


def test_state_and_episode_start_are_passed():
    policy = ConstantPolicy()
    evaluate(policy, lambda: CountEnv(3), 2, n_envs=1)
    assert [bool(call[2][0]) for call in policy.calls] == [True, False, False, True, False, False]
    assert [None if call[1] is None else float(call[1][0][0]) for call in policy.calls] == [None, 1, 2, 3, 1, 2]


def test_seed_decides_the_episodes():
    def returns(seed: int) -> np.ndarray:
        return evaluate(ConstantPolicy(), NoisyStartEnv, 6, n_envs=3, seed=seed).returns

    np.testing.assert_array_equal(returns(1), returns(1))
    assert len(np.unique(returns(1))) == 6
    assert not np.isin(returns(1), returns(100)).any()


@pytest.mark.parametrize("env", ["Pendulum-v1", gym.spec("Pendulum-v1")], ids=["id", "spec"])
def test_env_by_id_and_spec(env):
    policy = ConstantPolicy(0.0)
    result = evaluate(policy, env, 2, seed=0)
    np.testing.assert_array_equal(result.lengths, [200, 200])
    assert len(policy.calls) == 200  # both at once


@pytest.mark.parametrize("wrap", [lambda env: env, Monitor], ids=["plain", "monitored"])
def test_env_that_is_passed_in_stays_open(wrap: Callable[[gym.Env], gym.Env]):
    env = CountEnv()
    assert evaluate(ConstantPolicy(), wrap(env), 2).mean == pytest.approx(1.5)
    assert not env.closed


def test_env_that_is_made_is_closed():
    made: list[CountEnv] = []

    def make() -> CountEnv:
        made.append(CountEnv())
        return made[-1]

    evaluate(ConstantPolicy(), make, 3)
    assert [env.closed for env in made] == [True] * 3


def test_normalized_scores_by_priority():
    policy = ConstantPolicy(1.0)  # return 3 in 3 steps
    assert evaluate(policy, CountEnv, 2, ref_min_score=0.0, ref_max_score=6.0).normalized_scores == pytest.approx([50.0, 50.0])
    assert evaluate(policy, CountEnv, 2, dataset=References()).normalized_scores == pytest.approx([100.0, 100.0])
    policy.dataset = References()
    assert evaluate(policy, CountEnv, 1).normalized_scores == pytest.approx([100.0])
    policy.dataset.ref_min_score = None
    assert evaluate(policy, CountEnv, 1).normalized_scores is None


def test_plain_env_gets_the_statistics_of_training():
    venv = VecNormalize(DummyVecEnv([lambda: Monitor(CountEnv(3))]))
    model = TD3("MlpPolicy", venv, learning_starts=1000, policy_kwargs=dict(net_arch=[4]))
    model.learn(30)
    mean_before, reward_var = venv.obs_rms.mean.copy(), venv.ret_rms.var.copy()
    seen: list[np.ndarray] = []
    predict = model.predict
    model.predict = lambda observation, **kwargs: (seen.append(observation.copy()), predict(observation, **kwargs))[1]
    result = evaluate(model, lambda: CountEnv(3), 2, n_envs=2)
    np.testing.assert_allclose(seen[0], venv.normalize_obs(np.array([[3.0, 0.0]] * 2, dtype=np.float32)))
    np.testing.assert_array_equal(venv.obs_rms.mean, mean_before)
    np.testing.assert_array_equal(venv.ret_rms.var, reward_var)
    assert venv.training and venv.norm_reward

    # Its own env: statistics stay as they are, and the switches come back as they were.
    own = evaluate(model, model.get_env(), 2)
    np.testing.assert_allclose(own.returns, result.returns, rtol=1e-5)
    np.testing.assert_array_equal(venv.obs_rms.mean, mean_before)
    assert venv.training and venv.norm_reward


@pytest.mark.parametrize("norm_obs", [True, False])
@pytest.mark.parametrize("own_norm_obs", [True, False])
def test_env_with_other_statistics_gets_those_of_training_for_a_while(norm_obs: bool, own_norm_obs: bool):
    def make(norm_obs: bool) -> VecNormalize:
        return VecNormalize(DummyVecEnv([lambda: Monitor(CountEnv(3))]), norm_obs=norm_obs, clip_obs=5.0 + norm_obs)

    venv, other = make(norm_obs), make(own_norm_obs)
    model = TD3("MlpPolicy", venv, learning_starts=1000, policy_kwargs=dict(net_arch=[4]))
    model.learn(30)
    if norm_obs:
        venv.obs_rms.mean[:] = 100.0
    if own_norm_obs:
        other.obs_rms.mean[:] = -7.0
    other.ret_rms.var = np.array(9.0)
    before = {name: copy.deepcopy(value) for name, value in vars(other).items() if name not in ("venv", "class_attributes")}
    seen: list[np.ndarray] = []
    predict = model.predict
    model.predict = lambda observation, **kwargs: (seen.append(observation.copy()), predict(observation, **kwargs))[1]
    result = evaluate(model, other, 2)
    raw = np.array([[3.0, 0.0]], dtype=np.float32)
    np.testing.assert_allclose(seen[0], venv.normalize_obs(raw))
    np.testing.assert_allclose(result.returns, evaluate(model, lambda: CountEnv(3), 2).returns, rtol=1e-5)
    assert other.training and other.norm_reward and other.norm_obs == own_norm_obs
    assert hasattr(other, "obs_rms") == own_norm_obs and other.clip_obs == before["clip_obs"]
    if own_norm_obs:
        np.testing.assert_array_equal(other.obs_rms.mean, before["obs_rms"].mean)
        assert other.obs_rms.count == before["obs_rms"].count
    assert (other.ret_rms.var, other.ret_rms.count) == (9.0, before["ret_rms"].count)

    # A model that was trained without any sees what the env shows.
    policy = ConstantPolicy()
    evaluate(policy, other, 1)
    np.testing.assert_allclose(policy.calls[0][0], other.normalize_obs(raw))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(n_episodes=0), "`n_episodes` must be at least 1: got 0"),
        (dict(n_envs=0), "`n_envs` must be at least 1: got 0"),
        (dict(ref_min_score=1.0), "Expected both `ref_min_score` and `ref_max_score`"),
        (dict(ref_min_score=1.0, ref_max_score=1.0), "must differ"),
    ],
)
def test_bad_arguments(kwargs: dict, match: str):
    with pytest.raises(ValueError, match=match):
        evaluate(ConstantPolicy(), CountEnv, **kwargs)


def test_bad_env():
    with pytest.raises(ValueError, match="`n_envs` must be 1 or None"):
        evaluate(ConstantPolicy(), CountEnv(), n_envs=2)
    with pytest.raises(TypeError, match="got int"):
        evaluate(ConstantPolicy(), 3)


def test_interquartile_mean():
    assert interquartile_mean([0, 1, 2, 3, 4, 5, 6, 700]) == pytest.approx(3.5)
    assert interquartile_mean(np.array([[0.0, 1.0], [2.0, 300.0]])) == pytest.approx(1.5)
    assert interquartile_mean([1.0, 2.0, 6.0]) == pytest.approx(3.0)  # too few to cut
    with pytest.raises(ValueError, match="at least one score"):
        interquartile_mean([])


@pytest.mark.parametrize("statistic", ["iqm", "mean", "median"])
def test_bootstrap_against_a_loop(statistic: str):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(8, 3)) * 0.1 + np.array([0.0, 10.0, 20.0])

    def average(pooled: np.ndarray) -> float:
        if statistic == "iqm":
            cut = len(pooled) // 4
            return np.sort(pooled)[cut : len(pooled) - cut].mean()
        return {"mean": np.mean, "median": np.median}[statistic](pooled)

    resampled = []
    for _ in range(4000):  # runs are drawn within each task
        columns = [scores[rng.integers(8, size=8), task] for task in range(3)]
        resampled.append(average(np.concatenate(columns)))
    expected = np.percentile(resampled, [5.0, 95.0])
    interval = bootstrap_interval(scores, statistic=statistic, level=0.9)
    np.testing.assert_allclose(interval, expected, atol=0.012)
    # Without strata the mean would move by units, not by hundredths.
    assert interval[1] - interval[0] < 0.3
    assert interval == bootstrap_interval(scores, statistic=statistic, level=0.9)


def test_bootstrap_of_one_run_is_unknown():
    assert np.isnan(bootstrap_interval([3.0])).all()
    assert np.isnan(bootstrap_interval([[3.0, 4.0]])).all()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(scores=[]), "shape"),
        (dict(scores=np.zeros((2, 2, 2))), "shape"),
        (dict(scores=[1.0, 2.0], level=95), "`level` must be between 0 and 1: got 95"),
        (dict(scores=[1.0, 2.0], statistic="mode"), "`statistic` must be one of"),
    ],
)
def test_bootstrap_bad_arguments(kwargs: dict, match: str):
    with pytest.raises(ValueError, match=match):
        bootstrap_interval(**kwargs)


def test_result_summaries():
    result = EvaluationResult(np.array([1.0, 2.0, 3.0, 10.0]), np.array([1, 1, 1, 1]), np.array([10.0, 20.0, 30.0, 100.0]))
    assert result.mean == 4.0 and result.iqm == 2.5
    assert result.std == pytest.approx(np.std([1, 2, 3, 10]))
    low, high = result.confidence_interval(statistic="mean")
    assert 1.0 <= low < 4.0 < high <= 10.0
    assert result.confidence_interval(statistic="mean", normalized=True) == pytest.approx((10 * low, 10 * high))
    assert result.to_dict()["returns"] == [1.0, 2.0, 3.0, 10.0]
    with pytest.raises(ValueError, match="no normalised scores"):
        EvaluationResult(result.returns, result.lengths).confidence_interval(normalized=True)
