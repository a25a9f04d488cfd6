"""Acting by plans: wrappers that turn anything with a method ``plan`` into a controller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_diffusion.wrappers.plan_executor import Arrays, Overlay, PlanExecutor, Tracker, each


class PlanningWrapper(gym.Wrapper, gym.utils.RecordConstructorArgs):
    """
    Act by plans of a trained model: the env is stepped with planned actions, and every ``n_action_steps`` steps a new
    plan is made from what the env shows.

    ```python
    env = PlanningWrapper(gym.make("Walker2d-v5"), model, n_action_steps=4)
    observation, info = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step()
    ```

    ``model`` is anything with ``plan(observations, goal=None) -> plan`` for a batch of observations, arrays with a leading
    axis of n (for Dict spaces a dict of such arrays). ``plan.observations`` has shape ``(n, L, *obs_shape)``, or is a dict
    of these, ``plan.actions`` has shape ``(n, L, *action_shape)``, both in units of the env; L is 1 or more. Step 0 belongs
    to the observation that was given. ``goal`` is passed only if there is one, with the same leading axis, and ``seed``, an
    integer, only if ``plan`` accepts it. Without it the wrapper cannot make random plans repeatable.

    ``mode`` says what the action of ``step`` means, and with it which the ``action_space`` is:

    - ``"follow"``: nothing. It may be None or left out. The space stays the env's, so that wrappers outside and agents
      that give actions anyway still work.
    - ``"residual"``: it is added to the planned action, times ``residual_scale``. The space is a Box around 0 with half the
      range of the env's Box on either side: the same Box where that is symmetric.
    - ``"goal"``: the goal planned towards, clipped to its Box. It is taken at the steps at which a plan is made and not
      used at the others.

    Whatever the mode, the result is clipped to the env's Box.

    ``info`` tells at each step, in new arrays:

    - ``plan_observations``, ``plan_actions``: the current plan, ``(L, ...)``, actions as planned, before any clipping
    - ``replanned``: whether the action of this step is the first one of a plan
    - ``plan_deviation``: Euclidean distance of the observation acted in from the one planned for this step, in units of
      the env; of Dict observations over all keys but ``desired_goal``. It is the distribution shift that grows while a
      plan is executed, and of no size at the first step of a plan: see there with ``n_action_steps`` above 1.

    A plan ends with its episode, and when the ``desired_goal`` of a Dict observation is no longer the one it was made for,
    unless goals come from ``goal`` or from the agent. ``reset(seed=...)`` seeds planning too: equal seeds give equal runs;
    without a seed the stream of random numbers goes on. ``render`` adds to RGB frames of at least 200 pixels a side an inset
    of planned against realised states since the last plan.

    The constructor arguments are recorded in ``spec``, from which `gymnasium.make` builds the wrapped env again; the
    model is neither copied nor pickled for it.

    :param env: env with a Box of actions, and observations that are a Box or a flat Dict
    :param model: the planner
    :param n_action_steps: actions executed per plan, at least 1 and at most the length of a plan; checked at once where the
        model has a ``horizon``, counted in rows of ``stride`` env steps if it has that, too
    :param goal: where to plan to, a vector or a dict of vectors, without a batch axis
    :param mode: ``"follow"``, ``"residual"`` or ``"goal"``
    :param deviation_coef: subtracts this times ``plan_deviation`` from the reward, so that an agent over the planner learns
        to stay where plans hold
    :param tracker: feedback controller ``tracker(observations, planned_next_observations, planned_actions) -> actions``
        on batches, whose actions take the place of the planned ones; the second argument is the planned observation one
        step on, at the end of a plan its last. None: ``model.tracker``, if there is one
    :param goal_space: Box of the actions in mode ``"goal"``. None: ``model.goal_space``, if there is one, else the env's
        Box of observations (of ``desired_goal`` for Dict observations), if it is finite
    :param residual_scale: factor of the actions in mode ``"residual"``
    :param overlay: ``overlay(frame, plan_observations, realised_observations) -> frame`` draws in place of the inset;
        observations with a leading axis of steps, the realised ones from the start of the plan up to now
    :param render_dims: one or two dimensions of the observation that the inset shows; those of a Dict are counted through
        its keys in the order of the space, without ``desired_goal``. None for no inset
    :raises TypeError: if the model has no ``plan``, or the spaces are of other kinds
    :raises ValueError: on arguments out of range, ``n_action_steps`` above the model's ``horizon``, shapes of the env that are
        not the model's, or no space for goals
    """

    def __init__(
        self,
        env: gym.Env,
        model: Any,
        n_action_steps: int = 1,
        goal: Arrays | None = None,
        mode: str = "follow",
        *,
        deviation_coef: float = 0.0,
        tracker: Tracker | None = None,
        goal_space: spaces.Box | None = None,
        residual_scale: float = 1.0,
        overlay: Overlay | None = None,
        render_dims: Sequence[int] | None = (0, 1),
    ) -> None:
        arguments = dict(
            model=model,
            n_action_steps=n_action_steps,
            goal=goal,
            mode=mode,
            deviation_coef=deviation_coef,
            tracker=tracker,
            goal_space=goal_space,
            residual_scale=residual_scale,
            overlay=overlay,
            render_dims=render_dims,
        )
        gym.utils.RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        self._saved_kwargs = _SharedArguments(self._saved_kwargs)
        gym.Wrapper.__init__(self, env)
        self._executor = PlanExecutor(
            observation_space=env.observation_space, action_space=env.action_space, n_envs=1, **arguments
        )
        self._episode_ended = False
        if mode != "follow":
            self.action_space = self._executor.action_space

    @property
    def compute_reward(self) -> Callable[..., Any]:
        """``compute_reward`` of a goal environment, where SB3 looks for it; it knows no ``deviation_coef``."""
        return self.env.get_wrapper_attr("compute_reward")

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        Start an episode; the plan is dropped.

        :param seed: of the env and of planning; None lets both streams go on
        :param options: for the env
        :return: observation and info of the env
        """
        observation, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self._executor.seed(seed)
        self._executor.clear()
        self._executor.observe(_batch_of_one(observation))
        self._episode_ended = False
        return observation, info

    def step(self, action: np.ndarray | None = None) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """
        Execute one step of the plan; makes a new plan first if that is due.

        :param action: what ``mode`` says
        :return: observation, reward, terminated, truncated, info
        :raises RuntimeError: before the first ``reset``
        :raises ValueError: if the mode needs an action and there is none, or the plan has not the expected shapes
        """
        # An env that resets itself does so in the step after the last one: nothing planned before holds after it.
        if self._episode_ended:
            self._executor.clear()
        (command,), (plan_info,) = self._executor.act(None if action is None else np.asarray(action)[None])
        observation, reward, terminated, truncated, info = self.env.step(command)
        self._executor.observe(_batch_of_one(observation))
        if self._episode_ended:
            self._executor.clear()
        self._episode_ended = bool(terminated or truncated)
        if self._executor.deviation_coef:
            reward = reward - self._executor.deviation_coef * plan_info["plan_deviation"]  # type: ignore[operator]
        return observation, reward, terminated, truncated, {**info, **plan_info}

    def render(self) -> Any:
        """
        Render the env.

        :return: what the env renders; RGB frames with the plan drawn in once there is one
        :raises ImportError: without matplotlib; names the extra to install
        """
        return self._executor.draw(self.env.render())


class VecPlanningWrapper(VecEnvWrapper):
    """
    [PlanningWrapper][sb3_diffusion.PlanningWrapper] for an SB3 ``VecEnv``: all envs that need a plan at a step get theirs from
    one call of ``model.plan``.

    Modes, ``info`` and rewards are those of ``PlanningWrapper``, env by env. At the last step of an episode they still belong
    to its plan, although the observation is already the first of the next episode. ``seed`` seeds planning at the next
    ``reset``, as it does the envs; seeds given to ``venv`` before it was wrapped count, too. Put ``VecNormalize`` and
    ``VecMonitor`` outside: the planner sees what ``venv`` shows.

    :param venv: envs with a Box of actions, and observations that are a Box or a flat Dict
    :param model: the planner
    :param n_action_steps: actions executed per plan, at least 1 and at most the length of a plan
    :param goal: where to plan to, a vector or a dict of vectors: ``(goal_dim,)`` for all envs, or ``(n_envs, goal_dim)``
    :param mode: ``"follow"``, ``"residual"`` or ``"goal"``
    :param deviation_coef: subtracts this times ``plan_deviation`` from the reward
    :param tracker: feedback controller; None: ``model.tracker``, if there is one
    :param goal_space: Box of the actions in mode ``"goal"``
    :param residual_scale: factor of the actions in mode ``"residual"``
    :param overlay: draws the plan in a frame in place of the inset
    :param render_dims: one or two dimensions of the observation that the inset shows; None for no inset
    :raises TypeError: if the model has no ``plan``, or the spaces are of other kinds
    :raises ValueError: on arguments out of range, ``n_action_steps`` above the model's ``horizon``, shapes of the env that are
        not the model's, or no space for goals
    """

    def __init__(
        self,
        venv: VecEnv,
        model: Any,
        n_action_steps: int = 1,
        goal: Arrays | None = None,
        mode: str = "follow",
        *,
        deviation_coef: float = 0.0,
        tracker: Tracker | None = None,
        goal_space: spaces.Box | None = None,
        residual_scale: float = 1.0,
        overlay: Overlay | None = None,
        render_dims: Sequence[int] | None = (0, 1),
    ) -> None:
        self._executor = PlanExecutor(
            model,
            venv.observation_space,
            venv.action_space,
            venv.num_envs,
            n_action_steps=n_action_steps,
            goal=goal,
            mode=mode,
            deviation_coef=deviation_coef,
            tracker=tracker,
            goal_space=goal_space,
            residual_scale=residual_scale,
            overlay=overlay,
            render_dims=render_dims,
        )
        self._plan_infos: list[dict[str, Any]] = []
        super().__init__(venv, action_space=self._executor.action_space)

    def reset(self) -> VecEnvObs:
        """
        Start an episode in each env; all plans are dropped.

        :return: observations
        """
        seed = self.unwrapped._seeds[0]  # waits there for this reset
        if seed is not None:
            self._executor.seed(seed)
        observations = self.venv.reset()
        self._executor.clear()
        self._executor.observe(observations)
        return observations

    def step(self, actions: np.ndarray | None = None) -> VecEnvStepReturn:
        """
        Execute one step of each plan; makes new plans first where that is due, all in one call.

        :param actions: what ``mode`` says, with a leading axis of ``num_envs``
        :return: observations, rewards, dones, infos
        :raises RuntimeError: before the first ``reset``
        :raises ValueError: if the mode needs actions and there are none, or the plan has not the expected shapes
        """
        return super().step(actions)  # type: ignore[arg-type]

    def step_async(self, actions: np.ndarray | None) -> None:
        """
        Plan, and start the step.

        :param actions: what ``mode`` says
        """
        commands, self._plan_infos = self._executor.act(None if actions is None else np.asarray(actions))
        self.venv.step_async(commands)

    def step_wait(self) -> VecEnvStepReturn:
        """
        Wait for the step.

        :return: observations, rewards, dones, infos
        """
        observations, rewards, dones, infos = self.venv.step_wait()
        self._executor.observe(observations)
        self._executor.clear(np.flatnonzero(dones))
        if self._executor.deviation_coef:
            deviations = np.array([plan_info["plan_deviation"] for plan_info in self._plan_infos])
            rewards = (rewards - self._executor.deviation_coef * deviations).astype(rewards.dtype)
        return observations, rewards, dones, [{**info, **plan} for info, plan in zip(infos, self._plan_infos, strict=True)]

    def render(self, mode: str | None = None) -> np.ndarray | None:
        """
        Render all envs in one image.

        :param mode: as for every ``VecEnv``
        :return: tiled frames with the plans drawn in, if the envs render RGB frames
        """
        return VecEnv.render(self, mode)  # takes the frames from `get_images`, where that of VecEnvWrapper asks `venv`

    def get_images(self) -> Sequence[np.ndarray | None]:
        """
        Render each env.

        :return: frames, with the plans drawn in
        :raises ImportError: without matplotlib; names the extra to install
        """
        return [self._executor.draw(frame, env) for env, frame in enumerate(self.venv.get_images())]


class _SharedArguments(dict):
    """Arguments that copies of a ``spec`` share: wrappers further out copy it, and a model is not to be copied with it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedArguments:
        return self


def _batch_of_one(observation: Arrays) -> Arrays:
    return each(lambda array: np.asarray(array)[None], observation)
