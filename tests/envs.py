"""Small environments of the tests; importing this module registers the goal environments with Gymnasium."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

POINT_ENV, POINT_GOAL_ENV = "SB3DiffusionPoint-v0", "SB3DiffusionPointGoal-v0"
EPISODE_LENGTH = 12


class PointGoalEnv(gym.Env):
    """
    A point in the square [-1, 1]^2 moves to a goal. The action Box is neither symmetric nor of unit size.

    An episode terminates at the goal, which gives reward 0; every other step costs the distance from it.

    :param as_dict: observations in the three keys of goal environments, otherwise position and goal in one vector
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space = spaces.Box(np.array([-0.5, -2.0], np.float32), np.array([1.5, 2.0], np.float32))

    def __init__(self, as_dict: bool = True, render_mode: str | None = None) -> None:
        self.as_dict, self.render_mode = as_dict, render_mode
        point = spaces.Box(-1.0, 1.0, (2,), np.float32)
        if as_dict:
            self.observation_space: spaces.Space = spaces.Dict(observation=point, achieved_goal=point, desired_goal=point)
        else:
            self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1.0, 1.0, (2, 2)).astype(np.float32)
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        step = 0.3 * (action - [0.5, 0.0]) / [1.0, 2.0]
        self.position = np.clip(self.position + step, -1.0, 1.0).astype(np.float32)
        reward = float(self.compute_reward(self.position, self.goal, {}))
        return self._observation(), reward, reward == 0.0, False, {"is_success": reward == 0.0}

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: Any) -> np.ndarray:
        distance = np.linalg.norm(achieved_goal - desired_goal, axis=-1)
        return -np.where(distance > 0.25, distance, 0.0).astype(np.float32)

    def _observation(self) -> Any:
        if not self.as_dict:
            return np.concatenate([self.position, self.goal])
        return {
            "observation": self.position.copy(),
            "achieved_goal": self.position.copy(),
            "desired_goal": self.goal.copy(),
        }

    def render(self) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)


class RandomEnv(gym.Env):
    """Observations drawn from any space; the reward falls with the size of the action."""

    def __init__(self, observation_space: spaces.Space, action_space: spaces.Space, length: int = EPISODE_LENGTH) -> None:
        self.observation_space, self.action_space, self.length = observation_space, action_space, length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.time = 0
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.time += 1
        return self.observation_space.sample(), -float(np.square(action).sum()), False, self.time >= self.length, {}


class BanditEnv(gym.Env):
    """One step per episode; the reward is the negative distance of the action from the observation."""

    observation_space = action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.8, 0.8, 1).astype(np.float32)
        return self.state.copy(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.state.copy(), -float(np.abs(action - self.state).sum()), True, False, {}


class CountingWrapper(gym.Wrapper):
    """Counts the calls of ``reset`` and ``step``."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.n_resets = self.n_steps = 0

    def reset(self, **kwargs: Any) -> Any:
        self.n_resets += 1
        return super().reset(**kwargs)

    def step(self, action: Any) -> Any:
        self.n_steps += 1
        return super().step(action)


for name, as_dict in ((POINT_ENV, False), (POINT_GOAL_ENV, True)):
    if name not in gym.registry:
        gym.register(name, "envs:PointGoalEnv", max_episode_steps=EPISODE_LENGTH, kwargs={"as_dict": as_dict})
