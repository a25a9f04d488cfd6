"""Planning wrappers, with planners that know the dynamics of the env, so that the truth is known."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
from envs import POINT_GOAL_ENV, RandomEnv
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from stable_baselines3 import SAC
from stable_baselines3.common.env_checker import check_env as check_sb3_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor, VecNormalize

from sb3_diffusion import PlanningWrapper, VecPlanningWrapper

TIME_STEP, LIMIT = 0.1, 20


class Plan(NamedTuple):
    """What a planner returns."""

    observations: Any
    actions: np.ndarray


class PointMass(gym.Env):
    """
    A point mass in the plane, pushed by the action and by ``wind``; everything in float64, actions in a column.

    :param wind: velocity gained per step along the first axis, which no planner knows of
    :param render_mode: frames are grey
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}
    observation_space = spaces.Box(-10.0, 10.0, (4,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2, 1), np.float64)

    def __init__(self, wind: float = 0.0, render_mode: str | None = None) -> None:
        self.wind, self.render_mode = wind, render_mode

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.actions: list[np.ndarray] = []
        self.state = self.np_random.uniform(-1.0, 1.0, 4) + (options or {}).get("shift", 0.0)
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.state = move(self.state, action[:, 0]) + np.array([0.0, 0.0, self.wind, 0.0])
        return self.state.copy(), -float(np.linalg.norm(self.state[:2])), False, False, {"time": len(self.actions)}

    def render(self) -> Any:
        return "a point" if self.render_mode == "ansi" else np.full((200, 300, 3), 127, np.uint8)


def move(states: np.ndarray, accelerations: np.ndarray) -> np.ndarray:
    """The next states, for any leading axes."""
    positions, velocities = states[..., :2], states[..., 2:]
    return np.concatenate([positions + TIME_STEP * velocities, velocities + TIME_STEP * accelerations], axis=-1)


class PointMassPlanner:
    """Integrates the point mass exactly, under a linear law that leads it to the goal, by default the origin."""

    def __init__(self, horizon: int = 8) -> None:
        self.horizon = horizon
        self.calls: list[tuple[np.ndarray, Any]] = []

    def plan(self, observations: np.ndarray, goal: np.ndarray | None = None) -> Plan:
        self.calls.append((observations, goal))
        states, actions = [observations], []
        for _ in range(self.horizon):
            error = states[-1] - (0.0 if goal is None else np.concatenate([goal, 0.0 * goal], axis=-1))
            actions.append(np.clip(-2.0 * error[:, :2] - 3.0 * error[:, 2:], -1.0, 1.0))
            states.append(move(states[-1], actions[-1]))
        return Plan(np.stack(states[:-1], axis=1), np.stack(actions, axis=1)[..., None])


class RandomPlanner:
    """Stays where it is and draws actions from the space; serves every env."""

    def __init__(self, action_space: spaces.Box, length: int = 6) -> None:
        self.action_space, self.length = action_space, length
        self.seeds: list[int | None] = []

    def plan(self, observations: Any, goal: Any = None, *, seed: int | None = None) -> Plan:
        self.seeds.append(seed)
        arrays = list(observations.values()) if isinstance(observations, dict) else [observations]
        shape = (len(arrays[0]), self.length, *self.action_space.shape)
        actions = np.random.default_rng(seed).uniform(self.action_space.low, self.action_space.high, shape)
        if isinstance(observations, dict):
            return Plan({key: self._repeat(array) for key, array in observations.items()}, actions)
        return Plan(self._repeat(observations), actions)

    def _repeat(self, array: np.ndarray) -> np.ndarray:
        return np.repeat(array[:, None], self.length, axis=1)


class ConstantPlanner:
    """Plans one action over and over; needs no seed and cannot be copied."""

    def __init__(self, action: Any, length: int = 6) -> None:
        self.action, self.length = np.asarray(action), length

    def plan(self, observations: np.ndarray, goal: Any = None) -> Plan:
        actions = np.broadcast_to(self.action, (len(observations), self.length, *self.action.shape))
        return Plan(np.repeat(observations[:, None], self.length, axis=1), actions)

    def __deepcopy__(self, memo: dict) -> Any:
        raise AssertionError("the model was copied")


def point_mass(wind: float = 0.0, limit: int = LIMIT, **kwargs: Any) -> gym.Env:
    return gym.wrappers.TimeLimit(PointMass(wind, **kwargs), limit)


def play(env: gym.Env, seed: int | None = 0, action: Any = None) -> list[tuple]:
    """One episode; each entry is what ``step`` returned."""
    env.reset(seed=seed)
    steps = [env.step(action)]
    while not (steps[-1][2] or steps[-1][3]):
        steps.append(env.step(action))
    return steps


def play_vec(env: Any, n_steps: int, seed: int = 0) -> list[tuple]:
    env.seed(seed)
    env.reset()
    return [env.step() for _ in range(n_steps)]


# ---------------------------------------------------------------- following


@pytest.mark.parametrize("n_action_steps", [1, 3, 8])
def test_plans_are_followed(n_action_steps: int) -> None:
    """Where the planner knows the dynamics, the env goes through the planned states."""
    env = point_mass()
    planner = PointMassPlanner()
    steps = play(PlanningWrapper(env, planner, n_action_steps))
    assert len(steps) == LIMIT and len(planner.calls) == math.ceil(LIMIT / n_action_steps)
    for t, (observation, _, _, _, info) in enumerate(steps):
        j = t % n_action_steps
        assert info["replanned"] is (j == 0)
        assert info["plan_deviation"] < 1e-12 and isinstance(info["plan_deviation"], float)
        assert info["plan_observations"].shape == (8, 4) and info["plan_actions"].shape == (8, 2, 1)
        assert info["time"] == t + 1
        np.testing.assert_array_equal(env.unwrapped.actions[t], info["plan_actions"][j])
        if j < 7:
            np.testing.assert_allclose(observation, info["plan_observations"][j + 1], atol=1e-12)


def test_deviation_is_the_distance_from_the_plan() -> None:
    """
    Wind w per step, unknown to the planner: j steps into a plan the velocity is off by j w and the position by
    dt w (0 + 1 + ... + j - 1).
    """
    wind, coef = 0.03, 0.5
    penalised = play(PlanningWrapper(point_mass(wind), PointMassPlanner(), 5, deviation_coef=coef))
    free = play(PlanningWrapper(point_mass(wind), PointMassPlanner(), 5))
    for t, (step, free_step) in enumerate(zip(penalised, free, strict=True)):
        j = t % 5
        expected = wind * math.hypot(j, TIME_STEP * j * (j - 1) / 2)
        assert step[4]["plan_deviation"] == pytest.approx(expected, abs=1e-12)
        assert step[1] == pytest.approx(free_step[1] - coef * expected, abs=1e-12)


def test_mujoco_env_is_balanced() -> None:
    """A linear law balances the pole when each plan starts from the state that is really there."""
    pytest.importorskip("mujoco")

    class PolePlanner:
        """Holds a feedback law for one step, then lets go: its later actions are those of a pole that stays upright."""

        def plan(self, observations: np.ndarray, goal: Any = None) -> Plan:
            actions = np.zeros((len(observations), 20, 1))
            actions[:, 0, 0] = observations @ [0.5, 25.0, 1.0, 3.0]
            return Plan(np.repeat(observations[:, None], 20, axis=1), actions)

    lengths = [len(play(PlanningWrapper(gym.make("InvertedPendulum-v5"), PolePlanner(), n))) for n in (1, 20)]
    assert lengths[0] == 1000 and lengths[1] < 500


def test_infos_share_nothing() -> None:
    """Arrays in an info are nobody else's: neither of the wrapper nor of another step."""
    untouched = play(PlanningWrapper(point_mass(), PointMassPlanner(), 4))
    env = PlanningWrapper(point_mass(), PointMassPlanner(), 4)
    env.reset(seed=0)
    for expected in untouched:
        observation, *_, info = env.step()
        np.testing.assert_array_equal(info["plan_actions"], expected[4]["plan_actions"])
        np.testing.assert_array_equal(observation, expected[0])
        for array in (info["plan_actions"], info["plan_observations"], observation):
            array += 100.0


def test_actions_are_clipped() -> None:
    env = point_mass()
    step = play(PlanningWrapper(env, ConstantPlanner([[5.0], [-0.25]])))[0]
    np.testing.assert_array_equal(env.unwrapped.actions[0], [[1.0], [-0.25]])
    np.testing.assert_array_equal(step[4]["plan_actions"][0], [[5.0], [-0.25]])


def test_flat_actions_take_the_shape_of_the_space() -> None:
    env = point_mass()
    play(PlanningWrapper(env, ConstantPlanner([0.5, -0.25])))
    np.testing.assert_array_equal(env.unwrapped.actions[0], [[0.5], [-0.25]])


def test_plan_of_one_step() -> None:
    planner = PointMassPlanner(horizon=1)
    steps = play(PlanningWrapper(point_mass(), planner, tracker=lambda observations, planned, actions: actions))
    assert len(planner.calls) == LIMIT and all(step[4]["replanned"] for step in steps)


def test_plan_ends_with_the_episode() -> None:
    env = PlanningWrapper(point_mass(), PointMassPlanner(), 8)
    env.reset(seed=0)
    env.step()
    env.reset(options={"shift": 3.0})
    info = env.step()[4]
    assert info["replanned"] and info["plan_deviation"] == 0.0
    assert info["plan_observations"][0].min() > 1.9


def test_time_limit_inside_or_outside() -> None:
    inside = PlanningWrapper(point_mass(0.02, limit=10), PointMassPlanner(), 4)
    outside = gym.wrappers.TimeLimit(PlanningWrapper(PointMass(0.02), PointMassPlanner(), 4), 10)
    for seed in (0, None):
        if seed is None:
            outside.unwrapped.np_random.bit_generator.state = inside.unwrapped.np_random.bit_generator.state
        for one, other in zip(play(inside, seed), play(outside, seed), strict=True):
            np.testing.assert_array_equal(one[0], other[0])
            assert one[1:4] == other[1:4]
            np.testing.assert_equal({**one[4], "time": 0}, {**other[4], "time": 0})


def test_env_that_resets_itself() -> None:
    """The step after the last one of an episode is the reset; the plan must start anew behind it."""
    autoreset = getattr(gym.wrappers, "Autoreset", None) or gym.wrappers.AutoResetWrapper
    env = PlanningWrapper(autoreset(point_mass(limit=6)), PointMassPlanner(), 8)
    env.reset(seed=0)
    deviations, ends = [], []
    for _ in range(30):
        _, _, terminated, truncated, info = env.step()
        deviations.append(info["plan_deviation"])
        ends.append(terminated or truncated)
    assert sum(ends) >= 4 and max(deviations) < 1e-12


def test_options_reach_the_env() -> None:
    env = PlanningWrapper(point_mass(), PointMassPlanner())
    assert env.reset(seed=0, options={"shift": 5.0})[0] == pytest.approx(env.reset(seed=0)[0] + 5.0)


# ---------------------------------------------------------------- residual, goal, tracker


def test_residual_is_added() -> None:
    env = point_mass()
    wrapped = PlanningWrapper(env, ConstantPlanner([[0.5], [0.25]]), mode="residual", residual_scale=0.5)
    assert wrapped.action_space == env.action_space
    wrapped.reset(seed=0)
    wrapped.step(np.array([[0.2], [-1.0]]))
    wrapped.step(np.array([[1.0], [1.0]]) * 3.0)
    np.testing.assert_allclose(env.unwrapped.actions, [[[0.6], [-0.25]], [[1.0], [1.0]]])
    with pytest.raises(ValueError, match="expected an action, got None"):
        wrapped.step()


def test_space_of_residuals_lies_around_zero() -> None:
    """Half the range of the Box on either side: an agent that does nothing leaves the plan as it is."""
    env = gym.make(POINT_GOAL_ENV)
    space = PlanningWrapper(env, RandomPlanner(env.action_space), mode="residual").action_space
    assert space == spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 2.0], np.float32))


def test_goal_is_planned_towards() -> None:
    """The goal goes to the planner with a batch axis, and the mass goes to the goal."""
    planner = PointMassPlanner()
    steps = play(PlanningWrapper(point_mass(limit=150), planner, 4, goal=[2.0, -1.0]))
    np.testing.assert_array_equal(planner.calls[0][1], [[2.0, -1.0]])
    np.testing.assert_allclose(steps[-1][0], [2.0, -1.0, 0.0, 0.0], atol=0.02)


def test_action_is_the_goal() -> None:
    planner = PointMassPlanner()
    box = spaces.Box(-2.0, 2.0, (2,), np.float32)
    env = PlanningWrapper(point_mass(), planner, 3, mode="goal", goal_space=box)
    assert env.action_space == box
    env.reset(seed=0)
    for goal in ([0.5, 1.0], [9.0, 9.0], None, [1.5, -7.0]):
        env.step(None if goal is None else np.array(goal, np.float32))
    np.testing.assert_array_equal([goal for _, goal in planner.calls], [[[0.5, 1.0]], [[1.5, -2.0]]])
    env.reset()
    with pytest.raises(ValueError, match="plans towards the action"):
        env.step()


def test_where_the_space_of_goals_comes_from() -> None:
    env, goal_env = point_mass(), gym.make(POINT_GOAL_ENV)
    planner = PointMassPlanner()
    assert PlanningWrapper(env, planner, mode="goal").action_space == env.observation_space
    of_dict = PlanningWrapper(goal_env, planner, mode="goal").action_space
    assert of_dict == goal_env.observation_space["desired_goal"]
    planner.goal_space = spaces.Box(-1.0, 1.0, (2,))  # type: ignore[attr-defined]
    assert PlanningWrapper(env, planner, mode="goal").action_space == planner.goal_space  # type: ignore[attr-defined]
    unbounded = RandomEnv(spaces.Box(-np.inf, np.inf, (2,)), spaces.Box(-1.0, 1.0, (1,)))
    with pytest.raises(ValueError, match="Pass `goal_space=`"):
        PlanningWrapper(unbounded, PointMassPlanner(), mode="goal")


def velocity_tracker(observations: np.ndarray, planned: np.ndarray, actions: np.ndarray) -> np.ndarray:
    """The acceleration that leads to the planned velocity in one step."""
    return (planned[:, 2:, None] - observations[:, 2:, None]) / TIME_STEP


@pytest.mark.parametrize("by_model", [False, True])
def test_tracker_holds_the_plan(by_model: bool) -> None:
    """Feedback on the planned velocity leaves the error of one step of wind, where plain actions add them up."""
    wind, planner = 0.02, PointMassPlanner(horizon=20)
    if by_model:
        planner.tracker = velocity_tracker  # type: ignore[attr-defined]
    tracked = play(PlanningWrapper(point_mass(wind), planner, 20, tracker=None if by_model else velocity_tracker))
    plain = play(PlanningWrapper(point_mass(wind), PointMassPlanner(horizon=20), 20))
    errors = [
        [abs(step[4]["plan_observations"][t + 1, 2] - step[0][2]) for t, step in enumerate(steps[:-1])]
        for steps in (tracked, plain)
    ]
    np.testing.assert_allclose(errors[0], wind, atol=1e-12)
    np.testing.assert_allclose(errors[1], wind * np.arange(1, 20), atol=1e-12)


def test_what_the_tracker_sees() -> None:
    """States now, planned states one step on (the last one at the end), planned actions; its actions are clipped."""
    seen: list[tuple] = []

    def tracker(*arguments: np.ndarray) -> np.ndarray:
        seen.append(arguments)
        return arguments[2] + 10.0

    planner = PointMassPlanner(horizon=3)
    env = VecPlanningWrapper(DummyVecEnv([point_mass, point_mass]), planner, 3, tracker=tracker)
    steps = play_vec(env, 3)
    infos = steps[-1][3]
    planned = np.stack([info["plan_observations"] for info in infos])
    for j, (observations, next_observations, actions) in enumerate(seen):
        np.testing.assert_array_equal(observations, planned[:, 0] if j == 0 else steps[j - 1][0])
        np.testing.assert_array_equal(next_observations, planned[:, min(j + 1, 2)])
        np.testing.assert_array_equal(actions, np.stack([info["plan_actions"][j] for info in infos]))
    np.testing.assert_array_equal(env.venv.envs[0].unwrapped.actions, np.ones((3, 2, 1)))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 1\): got \(2, 1\)"):
        play_vec(VecPlanningWrapper(env.venv, planner, tracker=lambda o, n, a: a[:, 0]), 1)


def test_goal_observations() -> None:
    """All keys but the goal count for the deviation."""

    class Wishful(RandomPlanner):
        def plan(self, observations: Any, goal: Any = None, *, seed: int | None = None) -> Plan:
            plan = super().plan(observations, goal, seed=seed)
            plan.observations["desired_goal"] += 5.0
            return plan

    env = gym.make(POINT_GOAL_ENV)
    steps = play(PlanningWrapper(env, Wishful(env.action_space), 6))
    before, moved = 0.0, 0
    for t, (observation, *_, info) in enumerate(steps):
        assert info["plan_deviation"] == pytest.approx(before, abs=1e-6)
        start = info["plan_observations"]["observation"][0]
        # position and achieved goal are the same point, and the plan stays at the start
        before = 0.0 if t % 6 == 5 else math.sqrt(2.0) * float(np.linalg.norm(observation["observation"] - start))
        moved += before > 0.01
    assert moved > 0


class MovingGoals(gym.ObservationWrapper):
    """The goal jumps in the third step of each episode."""

    def reset(self, **kwargs: Any) -> Any:
        self.n_steps = 0
        return super().reset(**kwargs)

    def step(self, action: np.ndarray) -> Any:
        self.n_steps += 1
        return super().step(action)

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**observation, "desired_goal": np.full(2, float(self.n_steps >= 3), np.float32)}


def test_a_goal_that_moves_is_planned_to_at_once() -> None:
    """Unless the goal is given from outside."""

    def replanned(**kwargs: Any) -> list[bool]:
        env = MovingGoals(gym.make(POINT_GOAL_ENV))
        planner = RandomPlanner(env.action_space, length=10)  # type: ignore[arg-type]
        return [info["replanned"] for *_, info in play(PlanningWrapper(env, planner, 4, **kwargs))[:8]]

    assert replanned() == [True, False, False, True, False, False, False, True]
    assert replanned(goal=[0.0, 0.0]) == [True, False, False, False, True, False, False, False]


# ---------------------------------------------------------------- seeds


def test_reset_seeds_planning() -> None:
    """Equal seeds, equal runs; without a seed the stream goes on, the same way behind the same seed."""
    planner = RandomPlanner(spaces.Box(-2.0, 2.0, (1,)))
    env = PlanningWrapper(gym.make("Pendulum-v1", max_episode_steps=12), planner, 4)
    seeds, rewards = [], []
    for seed in (7, 7, None, 7, None, 8):
        planner.seeds.clear()
        rewards.append([step[1] for step in play(env, seed)])
        seeds.append(tuple(planner.seeds))
    assert all(len(set(run)) == 3 for run in seeds)
    assert seeds[0] == seeds[1] == seeds[3] and seeds[2] == seeds[4]
    assert rewards[0] == rewards[1] == rewards[3] and rewards[2] == rewards[4]
    assert len({seeds[0], seeds[2], seeds[5]}) == 3


@pytest.mark.parametrize("how", ["wrapper", "venv", "make_vec_env"])
def test_seed_of_vec_env(how: str) -> None:
    def seeds_of_a_run() -> list[int | None]:
        venv = make_vec_env("Pendulum-v1", 2, seed=3 if how == "make_vec_env" else None)
        planner = RandomPlanner(venv.action_space)
        env = VecPlanningWrapper(venv, planner, 2)
        if how != "make_vec_env":
            (env if how == "wrapper" else venv).seed(3)
        env.reset()
        for _ in range(4):
            env.step()
        env.reset()
        env.step()
        return planner.seeds

    seeds = seeds_of_a_run()
    assert seeds == seeds_of_a_run() and len(set(seeds)) == 3


# ---------------------------------------------------------------- vectorised


def test_vec_wrapper_equals_the_wrapper() -> None:
    """Env by env the same observations, rewards and infos, through several episodes that end at different times."""
    limits, n_steps = (5, 7, 20), 40
    kwargs: dict[str, Any] = dict(n_action_steps=3, deviation_coef=0.5, goal=[0.5, -0.5])
    planner = PointMassPlanner()
    venv = VecPlanningWrapper(
        DummyVecEnv([lambda limit=limit: point_mass(0.03, limit) for limit in limits]), planner, **kwargs
    )
    steps = play_vec(venv, n_steps)
    # one call at most per step, for exactly those envs that need a plan
    replanned = np.array([[info["replanned"] for info in infos] for *_, infos in steps])
    assert [len(observations) for observations, _ in planner.calls] == [n for n in replanned.sum(axis=1) if n > 0]
    assert len({len(observations) for observations, _ in planner.calls}) > 1

    for i, limit in enumerate(limits):
        env = PlanningWrapper(point_mass(0.03, limit), PointMassPlanner(), **kwargs)
        env.reset(seed=i)
        for observations, rewards, dones, infos in steps:
            observation, reward, terminated, truncated, info = env.step()
            assert rewards[i] == pytest.approx(reward, rel=1e-6) and dones[i] == (terminated or truncated)
            vec_info = dict(infos[i])
            assert vec_info.pop("TimeLimit.truncated") is (truncated and not terminated)
            if dones[i]:
                np.testing.assert_array_equal(vec_info.pop("terminal_observation"), observation)
                observation = env.reset()[0]
            np.testing.assert_array_equal(observations[i], observation)
            np.testing.assert_equal(vec_info, info)


def test_first_step_after_an_autoreset_has_a_new_plan() -> None:
    env = VecPlanningWrapper(DummyVecEnv([lambda: point_mass(limit=5)]), PointMassPlanner(), 8)
    steps = play_vec(env, 11)
    assert [infos[0]["replanned"] for *_, infos in steps] == [t % 5 == 0 for t in range(11)]
    np.testing.assert_array_equal(steps[5][3][0]["plan_observations"][0], steps[4][0][0])
    np.testing.assert_array_equal(steps[4][3][0]["plan_observations"], steps[0][3][0]["plan_observations"])


def test_goals_of_several_envs() -> None:
    goals = np.array([[1.0, 2.0], [3.0, 4.0]])
    for given, expected in ((goals, goals), ([1.0, 2.0], goals[[0, 0]])):
        planner = PointMassPlanner()
        play_vec(VecPlanningWrapper(DummyVecEnv([point_mass] * 2), planner, goal=given), 1)
        np.testing.assert_array_equal(planner.calls[0][1], expected)
    with pytest.raises(ValueError, match=r"\(2, goal_dim\): got \(3, 2\)"):
        VecPlanningWrapper(DummyVecEnv([point_mass] * 2), PointMassPlanner(), goal=np.zeros((3, 2)))
    planner = PointMassPlanner()
    box = spaces.Box(-9.0, 9.0, (2,), np.float64)
    venv = DummyVecEnv([point_mass, lambda: point_mass(limit=2)])
    env = VecPlanningWrapper(venv, planner, 3, mode="goal", goal_space=box)
    env.reset()
    for t in range(3):
        env.step(np.array([[t, t], [t + 1.0, t + 1.0]]))
    # at the third step only the second env needs a plan: its episode has ended
    np.testing.assert_array_equal(planner.calls[0][1], [[0.0, 0.0], [1.0, 1.0]])
    np.testing.assert_array_equal(planner.calls[1][1], [[3.0, 3.0]])


def test_infos_of_the_envs_are_unchanged() -> None:
    """Against the same envs without the wrapper, stepped with the same actions."""
    venv = DummyVecEnv([lambda: point_mass(limit=4)] * 2)
    steps = play_vec(VecPlanningWrapper(venv, ConstantPlanner([[0.5], [0.5]]), 3), 9)
    bare = DummyVecEnv([lambda: point_mass(limit=4)] * 2)
    bare.seed(0)
    bare.reset()
    for observations, rewards, dones, infos in steps:
        expected = bare.step(np.full((2, 2, 1), 0.5))
        np.testing.assert_array_equal(observations, expected[0])
        np.testing.assert_array_equal(rewards, expected[1])
        np.testing.assert_array_equal(dones, expected[2])
        for info, expected_info in zip(infos, expected[3], strict=True):
            np.testing.assert_equal({key: info[key] for key in expected_info}, expected_info)
            own = {"plan_observations", "plan_actions", "replanned", "plan_deviation"}
            assert info.keys() - expected_info.keys() == own
        assert rewards.dtype == np.float32


def test_envs_in_other_processes() -> None:
    env = VecPlanningWrapper(SubprocVecEnv([point_mass, point_mass]), PointMassPlanner(), 4)
    try:
        for *_, infos in play_vec(env, LIMIT + 2):
            assert max(info["plan_deviation"] for info in infos) < 1e-12
    finally:
        env.close()


def test_vec_wrapper_among_others() -> None:
    """`VecMonitor` and `VecNormalize` outside; methods and attributes of the envs reached through all."""
    venv = DummyVecEnv([lambda: point_mass(0.1)] * 2)
    planner = PointMassPlanner()
    env = VecNormalize(VecMonitor(VecPlanningWrapper(venv, planner, 4)))
    env.seed(0)
    observations = env.reset()
    raw = env.get_original_obs()
    for _ in range(LIMIT):
        *_, dones, infos = env.step(None)
    assert dones.all() and [info["episode"]["l"] for info in infos] == [LIMIT, LIMIT]
    np.testing.assert_array_equal(planner.calls[0][0], raw)  # the planner sees units of the env
    assert not np.allclose(observations, raw)
    assert env.get_attr("wind") == [0.1, 0.1] and len(env.env_method("has_wrapper_attr", "wind")) == 2
    env.set_attr("marker", 5, indices=0)
    assert venv.envs[0].marker == 5
    env.close()


# ---------------------------------------------------------------- with SB3


@pytest.mark.parametrize("vectorised", [False, True])
def test_agent_learns_over_the_planner(vectorised: bool) -> None:
    """SAC's residuals reach the env, and its replay buffer holds the penalised rewards."""
    planner = PointMassPlanner()
    kwargs: dict[str, Any] = dict(n_action_steps=4, mode="residual", residual_scale=0.2, deviation_coef=2.0)
    env: Any = (
        VecPlanningWrapper(DummyVecEnv([lambda: point_mass(0.1)] * 2), planner, **kwargs)
        if vectorised
        else PlanningWrapper(point_mass(0.1), planner, **kwargs)
    )
    model = SAC("MlpPolicy", env, learning_starts=20, batch_size=8, policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu")
    before = {key: value.clone() for key, value in model.actor.state_dict().items()}
    model.learn(60)
    assert any(not value.equal(before[key]) for key, value in model.actor.state_dict().items())
    n_rows = model.replay_buffer.pos
    observations, rewards = model.replay_buffer.next_observations[:n_rows], model.replay_buffer.rewards[:n_rows]
    free = -np.linalg.norm(observations[..., :2], axis=-1)
    penalties = free - rewards
    assert np.all(penalties > -1e-5) and penalties.max() > 0.1


def test_agent_chooses_goals() -> None:
    planner = PointMassPlanner()
    box = spaces.Box(-2.0, 2.0, (2,), np.float32)
    env = PlanningWrapper(point_mass(), planner, mode="goal", goal_space=box)
    model = SAC("MlpPolicy", env, learning_starts=10, batch_size=8, policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu")
    model.learn(40)
    assert len(planner.calls) == 40 and np.ptp([goal for _, goal in planner.calls]) > 1.0
    assert evaluate_policy(model, model.get_env(), n_eval_episodes=2)[0] < 0.0


def test_evaluate_policy_follows_the_plan() -> None:
    """In mode "follow" it does not matter which actions come."""

    class Idle:
        def predict(self, observation: np.ndarray, state: Any = None, *args: Any, **kwargs: Any) -> tuple[np.ndarray, Any]:
            return np.zeros((len(observation), 2, 1)), state

    env = VecMonitor(VecPlanningWrapper(DummyVecEnv([lambda: point_mass(limit=100)] * 2), PointMassPlanner(), 8))
    env.seed(0)
    returns, lengths = evaluate_policy(Idle(), env, n_eval_episodes=4, return_episode_rewards=True)
    assert lengths == [100] * 4
    bare = VecMonitor(DummyVecEnv([lambda: point_mass(limit=100)] * 2))
    bare.seed(0)
    assert np.mean(returns) > 0.5 * np.mean(evaluate_policy(Idle(), bare, 4, return_episode_rewards=True)[0])


# ---------------------------------------------------------------- a valid env


MAKERS: dict[str, Callable[[], gym.Env]] = {
    "pendulum": lambda: gym.make("Pendulum-v1"),
    "mujoco": lambda: gym.make("InvertedPendulum-v5"),
    "goal env": lambda: gym.make(POINT_GOAL_ENV),
    "float64": lambda: gym.make("tests/PointMass-v0"),
}


@pytest.mark.filterwarnings("ignore")  # the checkers give advice on the envs themselves
@pytest.mark.parametrize("mode", ["follow", "residual", "goal"])
@pytest.mark.parametrize("name", MAKERS)
def test_checkers(name: str, mode: str) -> None:
    if name == "mujoco":
        pytest.importorskip("mujoco")
    env = MAKERS[name]()
    goal_space = spaces.Box(-1.0, 1.0, (2,), np.float32) if mode == "goal" else None
    wrapped = PlanningWrapper(env, RandomPlanner(env.action_space), 2, mode=mode, goal_space=goal_space)
    check_gymnasium_env(wrapped, skip_render_check=name != "float64")
    check_sb3_env(wrapped)


def test_spec_makes_the_env_again() -> None:
    """The recorded arguments hold the model itself: no wrapper further out copies it."""
    model = ConstantPlanner([[0.5], [0.5]])
    env = gym.wrappers.TimeLimit(PlanningWrapper(gym.make("tests/PointMass-v0"), model, n_action_steps=2), 5)
    again = gym.make(env.spec)
    np.testing.assert_array_equal([step[0] for step in play(env)], [step[0] for step in play(again)])
    recorded = next(w for w in env.spec.additional_wrappers if w.name == "PlanningWrapper").kwargs
    assert recorded["model"] is model and recorded["n_action_steps"] == 2
    env.close()
    again.close()


# ---------------------------------------------------------------- pictures


def test_inset_shows_the_plan() -> None:
    pytest.importorskip("matplotlib")
    env = PlanningWrapper(PointMass(0.1, render_mode="rgb_array"), PointMassPlanner(), 4)
    env.reset(seed=0)
    plain = env.render()
    assert np.all(plain == 127)
    frames = []
    for _ in range(2):
        env.step()
        frames.append(env.render())
    for frame in frames:
        assert frame.shape == plain.shape and frame.dtype == np.uint8
        changed = np.argwhere((frame != plain).any(axis=-1))
        assert changed[:, 0].max() < 80 and changed[:, 1].min() >= 220  # 40 % of the 200 rows, at the right
        assert len(changed) > 1000
    assert (frames[0] != frames[1]).any()
    env.reset()
    np.testing.assert_array_equal(env.render(), plain)


def test_own_overlay() -> None:
    def overlay(frame: np.ndarray, planned: np.ndarray, realised: np.ndarray) -> np.ndarray:
        seen.append((planned, realised))
        return 255 - frame

    seen: list[tuple] = []
    env = PlanningWrapper(point_mass(render_mode="rgb_array"), PointMassPlanner(), 3, overlay=overlay)
    observations = [env.reset(seed=0)[0]]
    for t in range(LIMIT):
        observation, *_, info = env.step()
        observations.append(observation)
        assert np.all(env.render() == 128)
        planned, realised = seen[-1]
        np.testing.assert_array_equal(planned, info["plan_observations"])
        np.testing.assert_array_equal(realised, observations[t - t % 3 :])
    assert len(seen) == LIMIT  # the frame of the last step, too


def test_frames_of_several_envs() -> None:
    pytest.importorskip("matplotlib")
    venv = DummyVecEnv([lambda: point_mass(limit=3, render_mode="rgb_array"), lambda: point_mass(render_mode="rgb_array")])
    env = VecPlanningWrapper(venv, PointMassPlanner(), 8)
    play_vec(env, 3)
    first, second = env.get_images()
    assert np.all(first == 127)  # this env starts a new episode
    assert np.any(second != 127)
    assert np.any(env.render() != 127)


@pytest.mark.parametrize(("size", "dims"), [(1, (0, 1)), (3, (2,))])
def test_one_dimension_is_drawn_over_time(size: int, dims: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")

    class Grey(RandomEnv):
        render_mode = "rgb_array"

        def render(self) -> np.ndarray:
            return np.zeros((200, 200, 3), np.uint8)

    env = Grey(spaces.Box(-1.0, 1.0, (size,)), spaces.Box(-1.0, 1.0, (1,)))
    wrapped = PlanningWrapper(env, RandomPlanner(env.action_space), render_dims=dims)
    wrapped.reset(seed=0)
    wrapped.step()
    assert wrapped.render().max() > 0


@pytest.mark.filterwarnings("ignore:.*No render fps")
def test_other_frames_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no RGB image, or too small, or has the inset turned off; matplotlib is not asked for."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rgb: dict[str, Any] = dict(render_mode="rgb_array")
    for env, kwargs, expected in (
        (point_mass(render_mode="ansi"), {}, "a point"),
        (point_mass(**rgb), {"render_dims": None}, np.full((200, 300, 3), 127)),
        (gym.make(POINT_GOAL_ENV, **rgb), {}, np.zeros((8, 8, 3))),
    ):
        wrapped = PlanningWrapper(env, RandomPlanner(env.action_space), **kwargs)
        wrapped.reset()
        wrapped.step()
        np.testing.assert_array_equal(wrapped.render(), expected)
    wrapped = PlanningWrapper(point_mass(**rgb), PointMassPlanner())
    wrapped.reset()
    wrapped.step()
    with pytest.raises(ImportError, match=r"sb3-diffusion\[plots\]"):
        wrapped.render()


# ---------------------------------------------------------------- mistakes


def test_step_before_reset() -> None:
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step\(\)"):
        PlanningWrapper(point_mass(), PointMassPlanner()).step()
    with pytest.raises(RuntimeError, match=r"call reset\(\) before step\(\)"):
        VecPlanningWrapper(DummyVecEnv([point_mass]), PointMassPlanner()).step()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(n_action_steps=0), "`n_action_steps` must lie in"),
        (dict(n_action_steps=9), "at most the length of a plan, 8: got 9"),
        (dict(mode="track"), "`mode` must be one of"),
        (dict(mode="goal", goal=[0.0, 0.0]), "leave out `goal`"),
        (dict(deviation_coef=-1.0), "`deviation_coef` must lie in"),
        (dict(goal=np.zeros((1, 2, 3))), "`goal` must have the shape"),
        (dict(render_dims=(0, 4)), "`render_dims` must be one or two numbers below 4"),
        (dict(render_dims=(0, 1, 2)), "`render_dims` must be one or two numbers"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanningWrapper(point_mass(), PointMassPlanner(), **kwargs)
    with pytest.raises(ValueError, match=message):
        VecPlanningWrapper(DummyVecEnv([point_mass]), PointMassPlanner(), **kwargs)


def test_horizon_in_strides() -> None:
    """Rows of a model with a stride are several env steps apart; its plans have one row per env step."""
    planner = PointMassPlanner()
    planner.stride = 2  # type: ignore[attr-defined]
    PlanningWrapper(point_mass(), planner, n_action_steps=16)
    with pytest.raises(ValueError, match="at most the length of a plan, 16: got 17"):
        PlanningWrapper(point_mass(), planner, n_action_steps=17)


@pytest.mark.parametrize(
    ("observation_space", "action_space", "message"),
    [
        (spaces.Box(-1.0, 1.0, (3,)), PointMass.action_space, r"must show what the model plans from, Box.*: got Box"),
        (spaces.Dict(observation=PointMass.observation_space), PointMass.action_space, "must show what the model plans from"),
        (
            PointMass.observation_space,
            spaces.Box(-1.0, 1.0, (3,)),
            r"must take the actions that the model plans, Box.*: got Box",
        ),
    ],
)
def test_model_of_another_env(observation_space: spaces.Space, action_space: spaces.Box, message: str) -> None:
    planner = PointMassPlanner()
    planner.observation_space, planner.action_space = observation_space, action_space  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        PlanningWrapper(point_mass(), planner)
    with pytest.raises(ValueError, match=message):
        VecPlanningWrapper(DummyVecEnv([point_mass]), planner)


def test_model_of_an_env_without_the_goal() -> None:
    """The goal is no part of the state: it may be in the env and not in the model, as nothing else may."""
    env = gym.make(POINT_GOAL_ENV)
    planner = RandomPlanner(env.action_space)
    parts = dict(env.observation_space.spaces)
    for key in ("desired_goal", "achieved_goal"):
        planner.observation_space = spaces.Dict({name: part for name, part in parts.items() if name != key})  # type: ignore[attr-defined]
        if key == "desired_goal":
            PlanningWrapper(env, planner).reset()
        else:
            with pytest.raises(ValueError, match="must show what the model plans from"):
                PlanningWrapper(env, planner)


def test_wrong_kinds() -> None:
    with pytest.raises(TypeError, match="must have a method `plan"):
        PlanningWrapper(point_mass(), object())
    with pytest.raises(TypeError, match="actions of a Box"):
        PlanningWrapper(gym.make("CartPole-v1"), PointMassPlanner())
    nested = spaces.Dict(a=spaces.Dict(b=spaces.Box(-1.0, 1.0, (2,))))
    with pytest.raises(TypeError, match="not nested"):
        PlanningWrapper(RandomEnv(nested, spaces.Box(-1.0, 1.0, (1,))), PointMassPlanner())


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (np.zeros((1, 2, 4)), np.zeros((1, 2, 2, 1)), "at most the length of a plan, 2: got 3"),
        (np.zeros((1, 3, 4)), np.zeros((3, 2, 1)), r"actions .* shape \(1, L, 2, 1\): got \(3, 2, 1\)"),
        (np.zeros((1, 3, 5)), np.zeros((1, 3, 2, 1)), r"observations .* shape \(1, L, 4\): got \(1, 3, 5\)"),
        (np.zeros((1, 4, 4)), np.zeros((1, 3, 2, 1)), r"as many observations as actions \(3\)"),
        (np.zeros((1, 3, 4)), np.full((1, 3, 2, 1), np.nan), "not finite"),
        ({"observation": np.zeros((1, 3, 4))}, np.zeros((1, 3, 2, 1)), "must be an array, as the env's are: got dict"),
    ],
)
def test_wrong_plans(observations: Any, actions: np.ndarray, message: str) -> None:
    class Planner:
        def plan(self, given: np.ndarray) -> Plan:
            return Plan(observations, actions)

    env = PlanningWrapper(point_mass(), Planner(), 3)
    env.reset()
    with pytest.raises(ValueError, match=message):
        env.step()


def test_plan_for_dict_observations_lacks_a_key() -> None:
    class Planner:
        def plan(self, given: dict[str, np.ndarray]) -> Plan:
            return Plan({"observation": given["observation"][:, None]}, np.zeros((1, 1, 2)))

    env = PlanningWrapper(gym.make(POINT_GOAL_ENV), Planner())
    env.reset()
    with pytest.raises(ValueError, match=r"must have the keys \['observation', 'achieved_goal'\]: got \['observation'\]"):
        env.step()


if "tests/PointMass-v0" not in gym.registry:
    gym.register("tests/PointMass-v0", PointMass, max_episode_steps=LIMIT)
