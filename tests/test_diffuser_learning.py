"""Diffuser learns lines in two directions, plans along them, and acts on its plans, also through wrappers."""

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from diffuser_models import ACTION_DIM, HORIZON, box, make_dataset, make_model, some_observations, spy
from envs import RandomEnv
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_diffusion import Diffuser, OfflineDataset, PDTracker, Plan, PlanningWrapper, VecPlanningWrapper

# ---------------------------------------------------------------- lines in two directions

STEP, LINE_HORIZON, LINE_LENGTH = 0.2, 8, 12


class LineEnv(gym.Env):
    """A point in the plane, moved by the action; upwards is rewarded."""

    observation_space, action_space = box(2, 10.0), box(2)

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.time = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32), 0
        return self.position.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action.copy())
        self.position, self.time = (self.position + 2.0 * STEP * action).astype(np.float32), self.time + 1
        return self.position.copy(), float(2.0 * action[1]), False, self.time == LINE_LENGTH, {}


def line_dataset(n_episodes: int = 200) -> OfflineDataset:
    """Half of the episodes go right, the others up, which is rewarded by 1 a step."""
    rng = np.random.default_rng(0)
    up = np.repeat(np.arange(n_episodes) % 2, LINE_LENGTH)
    directions = np.eye(2, dtype=np.float32)[up]
    times = np.tile(np.arange(LINE_LENGTH), n_episodes)
    starts = np.repeat(rng.uniform(-1.0, 1.0, (n_episodes, 2)), LINE_LENGTH, axis=0)
    positions = (starts + STEP * times[:, None] * directions).astype(np.float32)
    ends = times == LINE_LENGTH - 1
    return OfflineDataset(
        positions,
        0.5 * directions,
        up.astype(np.float32),
        positions + np.float32(STEP) * directions,
        np.zeros_like(ends),
        ends,
        observation_space=LineEnv.observation_space,
        action_space=LineEnv.action_space,
    )


def train_on_lines(**kwargs: Any) -> Diffuser:
    model = make_model(
        line_dataset(),
        stirred=False,
        horizon=LINE_HORIZON,
        n_diffusion_steps=20,
        padding=None,
        learning_rate=2e-3,
        batch_size=64,
        tau=0.01,
        policy_kwargs=dict(net_kwargs=dict(width=32, n_layers=1, n_heads=2)),
        **kwargs,
    )
    model.train(1_000)
    return model


@pytest.fixture(scope="module")
def _trained_on_lines() -> Diffuser:
    return train_on_lines()


@pytest.fixture
def line_model(_trained_on_lines: Diffuser) -> Iterator[Diffuser]:
    """Plans one line from where it stands; each test may change how, the weights are trained once."""
    _trained_on_lines.set_planning(n_candidates=1, guidance_scale=0.0, n_action_steps=1, tracker=None)
    yield _trained_on_lines


def line_starts(n: int = 200) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1.0, 1.0, (n, 2)).astype(np.float32)


def goes_up(plan: Plan) -> np.ndarray:
    moves = plan.observations[:, -1] - plan.observations[:, 0]
    return moves[:, 1] > moves[:, 0]


def test_plans_are_lines_of_the_data(line_model: Diffuser) -> None:
    plan = line_model.plan(line_starts(), seed=0)
    np.testing.assert_allclose(plan.observations[:, 0], line_starts(), atol=1e-6)
    assert 0.4 < goes_up(plan).mean() < 0.6
    moves = np.diff(plan.observations, axis=1)
    lengths = np.linalg.norm(moves, axis=2)
    assert lengths.mean() == pytest.approx(STEP, rel=0.1)
    assert (np.abs(lengths - STEP) < 0.5 * STEP).mean() > 0.95
    whole = np.sort(np.abs(moves.sum(axis=1)), axis=1)
    assert whole[:, 1].mean() == pytest.approx(STEP * (LINE_HORIZON - 1), rel=0.05)
    assert whole[:, 0].mean() < 0.1 * whole[:, 1].mean()  # along one axis
    np.testing.assert_allclose(2.0 * STEP * plan.actions[:, :-1].mean(axis=1), moves.mean(axis=1), atol=0.03)


def test_the_best_of_several_plans_earns_more(line_model: Diffuser) -> None:
    shares = [goes_up(line_model.plan(line_starts(100), n_candidates=n, seed=0)).mean() for n in (1, 3, 16)]
    assert shares[0] + 0.15 < shares[1] < shares[2]
    assert shares[2] > 0.95


def test_guidance_earns_more(line_model: Diffuser) -> None:
    shares = []
    for guidance_scale in (0.0, 0.1, 1.0):
        line_model.set_planning(guidance_scale=guidance_scale)
        plan = line_model.plan(line_starts(), seed=0)
        shares.append(goes_up(plan).mean())
        lengths = np.linalg.norm(np.diff(plan.observations, axis=1), axis=2)
        assert lengths.mean() == pytest.approx(STEP, rel=0.1)  # still lines of the data
    assert shares[0] + 0.1 < shares[1] < shares[2]
    assert shares[2] > 0.95


def test_values_are_the_returns_of_the_data(line_model: Diffuser) -> None:
    plan = line_model.plan(line_starts(), seed=0)
    up = goes_up(plan)
    # From a step that is equally likely one of those whose window ends within the episode
    expected = np.mean([sum(0.997**k for k in range(n)) for n in range(LINE_HORIZON, LINE_LENGTH + 1)])
    assert plan.values[up].mean() == pytest.approx(expected, rel=0.1)
    assert np.abs(plan.values[~up]).mean() < 0.1 * expected


def test_acting_on_plans_earns_the_best_return(line_model: Diffuser) -> None:
    line_model.set_planning(n_candidates=16, n_action_steps=4)
    env = DummyVecEnv([LineEnv for _ in range(5)])
    env.seed(0)
    mean, _ = evaluate_policy(line_model, env, n_eval_episodes=5, deterministic=False, warn=False)
    assert mean > 0.9 * LINE_LENGTH
    line_model.set_planning(n_candidates=1)
    env.seed(0)
    assert evaluate_policy(line_model, env, n_eval_episodes=5, deterministic=False, warn=False)[0] < 0.8 * LINE_LENGTH


def test_plans_to_a_goal_are_continuous() -> None:
    model = train_on_lines(goal_conditioned=True)
    starts = line_starts()
    directions = np.eye(2, dtype=np.float32)[np.arange(len(starts)) % 2]
    goals = starts + np.float32(STEP * (LINE_HORIZON - 1)) * directions
    plan = model.plan(starts, goals, seed=0)
    np.testing.assert_allclose(plan.observations[:, 0], starts, atol=1e-6)
    np.testing.assert_allclose(plan.observations[:, -1], goals, atol=1e-6)
    lengths = np.linalg.norm(np.diff(plan.observations, axis=1), axis=2)
    assert lengths.max() < 2.0 * STEP
    assert lengths.mean() == pytest.approx(STEP, rel=0.1)
    np.testing.assert_allclose(2.0 * plan.actions[:, :-1].mean(axis=1), directions, atol=0.15)


# ---------------------------------------------------------------- wrappers


class Deterministic:
    """Plans of a model that draw nothing at random."""

    def __init__(self, model: Diffuser) -> None:
        self.model, self.horizon, self.tracker = model, model.horizon, model.tracker

    def plan(self, observations: np.ndarray) -> Plan:
        return self.model.plan(observations, deterministic=True)


@pytest.mark.parametrize("n_action_steps", [1, 3, LINE_HORIZON])
@pytest.mark.parametrize("tracker", [None, PDTracker([0, 1], [0, 1], kp=2.0, kd=0.25)])
def test_wrapper_acts_as_predict_does(line_model: Diffuser, n_action_steps: int, tracker: PDTracker | None) -> None:
    line_model.set_planning(n_candidates=4, guidance_scale=0.1, n_action_steps=n_action_steps, tracker=tracker)
    wrapped = PlanningWrapper(LineEnv(), Deterministic(line_model), n_action_steps=n_action_steps)
    env = LineEnv()
    for episode in range(2):
        wrapped.reset(seed=episode)
        observation, _ = env.reset(seed=episode)
        state, start = None, np.array([True])
        for _ in range(LINE_LENGTH):
            wrapped.step()
            action, state = line_model.predict(observation, state, start, deterministic=True)
            observation, start = env.step(action)[0], np.array([False])
    actions = np.stack(env.actions)
    np.testing.assert_allclose(np.stack(wrapped.unwrapped.actions), actions, rtol=1e-4, atol=1e-5)
    assert actions.std(axis=0).max() > 1e-3


def test_wrapper_of_several_envs_acts_as_predict_does(line_model: Diffuser) -> None:
    line_model.set_planning(n_candidates=4, n_action_steps=3)
    wrapped = VecPlanningWrapper(DummyVecEnv([LineEnv] * 3), Deterministic(line_model), n_action_steps=3)
    venv = DummyVecEnv([LineEnv] * 3)
    for each in (wrapped, venv):
        each.seed(0)
    planned = spy(line_model, "plan")
    wrapped.reset()
    observations, state, starts = venv.reset(), None, np.ones(3, bool)
    for _ in range(2 * LINE_LENGTH):
        wrapped.step()
        actions, state = line_model.predict(observations, state, starts, deterministic=True)
        observations, _, starts, _ = venv.step(actions)
    assert [len(arguments[0]) for arguments, _ in planned] == [3] * (2 * LINE_LENGTH // 3)
    for first, second in zip(wrapped.unwrapped.envs, venv.envs, strict=True):
        np.testing.assert_allclose(np.stack(first.actions), np.stack(second.actions), rtol=1e-4, atol=1e-5)
    del line_model.plan


def test_wrapper_seeds_plans_of_the_model_itself(line_model: Diffuser) -> None:
    runs = []
    for seed in (0, 0, 1):
        env = PlanningWrapper(LineEnv(), line_model, n_action_steps=2)
        env.reset(seed=seed)
        env.unwrapped.position = np.zeros(2, np.float32)
        for _ in range(LINE_LENGTH):
            *_, info = env.step()
        runs.append(np.stack(env.unwrapped.actions))
        assert info["plan_observations"].shape == (LINE_HORIZON, 2)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 1e-3


def test_wrapper_passes_goals_on() -> None:
    model = make_model(goal_conditioned=True)
    space = make_dataset().observation_space
    goal = some_observations(1)[0]
    env = PlanningWrapper(RandomEnv(space, box(ACTION_DIM)), model, goal=goal)
    env.reset(seed=0)
    *_, info = env.step()
    np.testing.assert_allclose(info["plan_observations"][-1], goal, rtol=1e-5)
    chosen = PlanningWrapper(RandomEnv(space, box(ACTION_DIM)), model, mode="goal")
    assert chosen.action_space == model.goal_space
    chosen.reset(seed=0)
    *_, info = chosen.step(model.goal_space.high)
    np.testing.assert_allclose(info["plan_observations"][-1], model.goal_space.high, rtol=1e-4)


def test_goals_with_several_candidates_train_the_value_that_chooses() -> None:
    """Several plans, or guidance, need a value; where neither is asked for, a model for goals has none."""
    assert make_model(goal_conditioned=True).value is None
    model = make_model(goal_conditioned=True, n_candidates=3)
    assert model.value is not None and model.guidance_scale == 0.0
    observations = make_dataset().observations[:2]
    plan = model.plan(obs=observations, goal=observations[::-1], n_candidates=4)
    assert plan.observations.shape[:2] == (2, HORIZON) and plan.values.shape == (2,)
    np.testing.assert_allclose(plan.observations[:, -1], observations[::-1], rtol=1e-3, atol=1e-3)
    assert make_model(goal_conditioned=True, guidance_scale=0.1).value is not None
