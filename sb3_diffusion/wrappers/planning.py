"""Acting by plans: wrappers that turn anything with a method ``plan`` into a controller."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from sb3_diffusion.common.utils import check_choice, check_range
from sb3_diffusion.plotting import BLUE, ORANGE

MODES = ("follow", "residual", "goal")
"""What the action argument of ``step`` means."""
GOAL_KEY = "desired_goal"
"""Key of the goal in the observations of goal environments; it is no part of the state."""

# The inset covers this share of the shorter side of a frame; below so many pixels nobody could read it.
_INSET_SHARE, _MIN_INSET = 0.4, 80

Arrays = Any  # an array, or a dict of arrays for Dict spaces
Tracker = Callable[[Arrays, Arrays, np.ndarray], np.ndarray]
Overlay = Callable[[np.ndarray, Arrays, Arrays], np.ndarray]


def _each(function: Callable[..., Any], *values: Arrays) -> Arrays:
    """
    :param function: of arrays
    :param values: arrays, or dicts of arrays
    :return: ``function`` of the arrays, for dicts key by key of the first
    """
    if isinstance(values[0], dict):
        return {key: function(*(value[key] for value in values)) for key in values[0]}
    return function(*values)


def _rows(values: Arrays, rows: Any) -> Arrays:
    """
    :param values: with a leading axis
    :param rows: index, or indices, on that axis
    :return: these rows, copied
    """
    return _each(lambda array: np.array(array[rows]), values)


def _stack(values: Sequence[Arrays]) -> Arrays:
    """
    :param values: of equal shapes
    :return: all of them, with a new leading axis
    """
    return _each(lambda *arrays: np.stack(arrays), *values)


class CurrentPlan:
    """
    The plan that one env follows.

    :param observations: planned, ``(L, *obs_shape)``
    :param actions: planned, ``(L, *action_shape)``
    :param goal: ``desired_goal`` that the env asked for when the plan was made; None if it asked for none, or was not asked
    """

    def __init__(self, observations: Arrays, actions: np.ndarray, goal: np.ndarray | None = None) -> None:
        self.observations = observations
        self.actions = actions
        self.goal = goal
        self.visited: list[Arrays] = []
        """Observations acted in since the plan was made."""

    @property
    def step(self) -> int:
        """Step of the plan that the last visited observation belongs to."""
        return len(self.visited) - 1

    def next_observation(self) -> Arrays:
        """:return: planned observation of the following step, at the end of the plan its last one"""
        return _each(lambda array: array[min(self.step + 1, len(array) - 1)], self.observations)

    def info(self, deviation: float) -> dict[str, Any]:
        """
        :param deviation: of the last visited observation
        :return: what ``info`` tells of the plan; arrays are copies
        """
        return {
            "plan_observations": _each(np.array, self.observations),
            "plan_actions": np.array(self.actions),
            "replanned": self.step == 0,
            "plan_deviation": deviation,
        }


class PlanExecutor:
    """
    What both wrappers share: observations of n envs in, actions for them out. Arguments as for
    [PlanningWrapper][sb3_diffusion.PlanningWrapper].

    :param model: the planner
    :param observation_space: of one env
    :param action_space: of one env
    :param n_envs: number of envs
    """

    def __init__(
        self,
        model: Any,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        n_envs: int,
        *,
        n_action_steps: int,
        goal: Arrays | None,
        mode: str,
        deviation_coef: float,
        tracker: Tracker | None,
        goal_space: spaces.Box | None,
        residual_scale: float,
        overlay: Overlay | None,
        render_dims: Sequence[int] | None,
    ) -> None:
        if not callable(getattr(model, "plan", None)):
            raise TypeError(f"`model` must have a method `plan(observations, goal=None)`: got {type(model).__name__}.")
        if not isinstance(action_space, spaces.Box):
            raise TypeError(f"Plans hold actions of a Box: got an env with the action space {action_space}.")
        check_choice("mode", mode, MODES)
        check_range("deviation_coef", deviation_coef, 0.0)
        check_range("n_action_steps", n_action_steps, 1)
        if getattr(model, "horizon", None) is not None:
            _check_length(n_action_steps, model.horizon * getattr(model, "stride", 1))
        if goal is not None and mode == "goal":
            raise ValueError(
                'In mode "goal" the goals are the actions: leave out `goal`, or choose mode "follow" or "residual".'
            )
        self.model = model
        self.observation_shapes = _observation_shapes(observation_space)
        self.state_keys = [key for key in self.observation_shapes if key != GOAL_KEY]
        self.env_action_space = action_space
        self.n_action_steps = n_action_steps
        self.mode = mode
        self.goals = None if goal is None else _each(lambda array: _goal_rows(array, n_envs), goal)
        self.goal_space = _find_goal_space(goal_space, model, observation_space) if mode == "goal" else None
        self.deviation_coef = deviation_coef
        self.tracker = getattr(model, "tracker", None) if tracker is None else tracker
        self.residual_scale = residual_scale
        self.overlay = overlay
        self.render_dims = self._check_dims(render_dims)
        self.takes_seed = _accepts(model.plan, "seed")
        self.generator = np.random.default_rng()
        self.observations: Arrays = None
        self.plans: list[CurrentPlan | None] = [None] * n_envs

    @property
    def action_space(self) -> spaces.Box:
        """Space of the action argument of ``step``."""
        box = self.env_action_space
        if self.mode == "residual":
            half_range = ((box.high - box.low) / 2).astype(box.dtype)
            return spaces.Box(-half_range, half_range, dtype=box.dtype.type)  # type: ignore[arg-type]
        return box if self.goal_space is None else self.goal_space

    # ---------------------------------------------------------------- what happens in the envs

    def seed(self, seed: int) -> None:
        """
        :param seed: of the seeds that plans are made with from now on
        """
        self.generator = np.random.default_rng(seed)

    def observe(self, observations: Arrays) -> None:
        """
        :param observations: what the envs show now, with a leading axis of n; copied
        """
        self.observations = _each(np.array, observations)

    def clear(self, envs: Iterable[int] | None = None) -> None:
        """
        Drop plans: the next step makes new ones.

        :param envs: whose; None for all
        """
        for i in range(len(self.plans)) if envs is None else envs:
            self.plans[i] = None

    # ---------------------------------------------------------------- actions

    def act(self, actions: np.ndarray | None) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """
        Decide on one step of each env.

        :param actions: of the agent, with a leading axis of n, or None
        :return: actions for the envs, inside their Box; what ``info`` tells of each plan
        :raises RuntimeError: before the first observation
        :raises ValueError: if an action is needed and there is none
        """
        if self.observations is None:
            raise RuntimeError("Nothing was observed yet to plan from: call reset() before step().")
        if actions is None and self.mode == "residual":
            raise ValueError('Mode "residual" adds the action to the planned one: expected an action, got None.')
        plans = self._current_plans(actions)
        for i, plan in enumerate(plans):
            plan.visited.append(_rows(self.observations, i))
        commands = self._commands(plans)
        if self.mode == "residual":
            commands = commands + self.residual_scale * np.reshape(np.asarray(actions), commands.shape)
        box = self.env_action_space
        return np.clip(commands, box.low, box.high).astype(box.dtype), [plan.info(self._deviation(plan)) for plan in plans]

    def _commands(self, plans: list[CurrentPlan]) -> np.ndarray:
        """The planned actions, or what the tracker makes of them."""
        planned = np.stack([plan.actions[plan.step] for plan in plans])
        if self.tracker is None:
            return planned
        commands = np.asarray(self.tracker(self.observations, _stack([plan.next_observation() for plan in plans]), planned))
        if commands.shape != planned.shape:
            raise ValueError(f"The tracker must return actions of shape {planned.shape}: got {commands.shape}.")
        return commands

    def _deviation(self, plan: CurrentPlan) -> float:
        """Euclidean distance of the state acted in from the planned one, in units of the env."""
        planned = _each(lambda array: array[plan.step], plan.observations)
        return float(np.linalg.norm(self._state(plan.visited[-1]) - self._state(planned)))

    def _state(self, observation: Arrays) -> np.ndarray:
        """An observation as one vector: of a Dict all keys, one behind the other, but the goal."""
        parts = [observation[key] for key in self.state_keys] if isinstance(observation, dict) else [observation]
        return np.concatenate([np.asarray(part, dtype=np.float64).ravel() for part in parts])

    # ---------------------------------------------------------------- plans

    def _current_plans(self, actions: np.ndarray | None) -> list[CurrentPlan]:
        """The plan of each env; a new one, all in one call, where there is none, its window is executed, or the goal moved."""
        due = [
            i
            for i, (plan, asked) in enumerate(zip(self.plans, self._asked_goals(), strict=True))
            if plan is None or len(plan.visited) >= self.n_action_steps or not _equal(plan.goal, asked)
        ]
        if due:
            for i, plan in zip(due, self._make_plans(due, actions), strict=True):
                self.plans[i] = plan
        return [plan for plan in self.plans if plan is not None]

    def _make_plans(self, envs: list[int], actions: np.ndarray | None) -> list[CurrentPlan]:
        kwargs: dict[str, Any] = {}
        goals = self._goals(actions)
        if goals is not None:
            kwargs["goal"] = _rows(goals, envs)
        if self.takes_seed:
            kwargs["seed"] = int(self.generator.integers(2**31))
        plan = self.model.plan(_rows(self.observations, envs), **kwargs)
        actions_planned = _check_steps("actions", plan.actions, len(envs), self.env_action_space.shape)
        _check_length(self.n_action_steps, actions_planned.shape[1])
        if not np.isfinite(actions_planned).all():
            raise ValueError("The plan holds actions that are not finite: check the model, or the observations it plans from.")
        observations_planned = self._check_observations(plan.observations, actions_planned)
        asked = self._asked_goals()
        return [
            CurrentPlan(_rows(observations_planned, i), np.array(actions_planned[i]), asked[env]) for i, env in enumerate(envs)
        ]

    def _asked_goals(self) -> Sequence[np.ndarray | None]:
        """The goal that each env shows; None where the goal comes from elsewhere, or there is none."""
        if self.goals is not None or self.goal_space is not None or GOAL_KEY not in self.observation_shapes:
            return [None] * len(self.plans)
        return list(self.observations[GOAL_KEY])

    def _check_observations(self, observations: Arrays, actions: np.ndarray) -> Arrays:
        """
        :param observations: of a plan
        :param actions: of the same plan
        :return: the observations as arrays of the expected shapes
        """
        n_rows, length = actions.shape[:2]
        shapes = self.observation_shapes
        if isinstance(observations, dict) != (None not in shapes):
            kind = "a dict of arrays" if None not in shapes else "an array"
            raise ValueError(
                f"The observations of a plan must be {kind}, as the env's are: got {type(observations).__name__}."
            )
        named = observations if isinstance(observations, dict) else {None: observations}
        if not set(self.state_keys) <= set(named):
            raise ValueError(f"The observations of a plan must have the keys {self.state_keys}: got {sorted(named)}.")
        arrays = {key: _check_steps("observations", named[key], n_rows, shapes[key]) for key in named if key in shapes}
        if any(array.shape[1] != length for array in arrays.values()):
            raise ValueError(f"A plan must have as many observations as actions ({length}): check the model's `plan`.")
        return arrays if isinstance(observations, dict) else arrays[None]

    def _goals(self, actions: np.ndarray | None) -> Arrays | None:
        """Where each env should go, with a leading axis of n; None if plans are made without goals."""
        if self.goal_space is None:
            return self.goals
        if actions is None:
            raise ValueError('Mode "goal" plans towards the action: expected one whenever a plan is made, got None.')
        goals = np.reshape(actions, (len(self.plans), *self.goal_space.shape))
        return np.clip(goals, self.goal_space.low, self.goal_space.high)

    # ---------------------------------------------------------------- pictures

    def _check_dims(self, dims: Sequence[int] | None) -> tuple[int, ...]:
        """
        :param dims: as given
        :return: dimensions to draw; an observation of one dimension is drawn over the steps of the plan
        """
        size = sum(math.prod(self.observation_shapes[key]) for key in self.state_keys)
        dims = () if dims is None else tuple(dims)
        if dims == (0, 1) and size == 1:
            return (0,)
        if len(dims) > 2 or not all(0 <= dim < size for dim in dims):
            raise ValueError(f"`render_dims` must be one or two numbers below {size}, or None for no picture: got {dims}.")
        return dims

    def draw(self, frame: Any, env: int = 0) -> Any:
        """
        Show the current plan of one env, and where the env really went, in a frame.

        :param frame: what the env renders
        :param env: which one
        :return: a new image; ``frame`` itself if it is no RGB image or there is no plan
        :raises ImportError: without matplotlib; names the extra to install
        """
        plan = self.plans[env]
        if plan is None or not isinstance(frame, np.ndarray) or frame.ndim != 3 or frame.shape[-1] != 3:
            return frame
        realised = _stack([*plan.visited, _rows(self.observations, env)])
        if self.overlay is not None:
            return self.overlay(frame, _each(np.array, plan.observations), realised)
        if not self.render_dims:
            return frame
        return _add_inset(frame, self._drawn(plan.observations), self._drawn(realised), self.render_dims)

    def _drawn(self, observations: Arrays) -> np.ndarray:
        """The dimensions to draw, ``(n_steps, n_dims)``."""
        n_steps = len(observations[self.state_keys[0]] if isinstance(observations, dict) else observations)
        states = np.stack([self._state(_rows(observations, step)) for step in range(n_steps)])
        return states[:, list(self.render_dims)]


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
    :raises ValueError: on arguments out of range, ``n_action_steps`` above the model's ``horizon``, or no space for goals
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
    :raises ValueError: on arguments out of range, ``n_action_steps`` above the model's ``horizon``, or no space for goals
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
    return _each(lambda array: np.asarray(array)[None], observation)


def _equal(goal: np.ndarray | None, other: np.ndarray | None) -> bool:
    return other is None if goal is None else other is not None and np.array_equal(goal, other)


def _accepts(function: Callable[..., Any], name: str) -> bool:
    """
    :param function: to inspect
    :param name: of an argument
    :return: whether it may be passed by this name
    """
    parameters = inspect.signature(function).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def _observation_shapes(space: spaces.Space) -> dict[str | None, tuple[int, ...]]:
    """
    :param space: of the observations
    :return: shapes by key; a space that is no Dict has the key None
    :raises TypeError: for nested Dicts and for Tuples
    """
    parts: dict[str | None, spaces.Space] = dict(space.spaces.items()) if isinstance(space, spaces.Dict) else {None: space}
    if any(part.shape is None for part in parts.values()):
        raise TypeError(f"Observations must be arrays, or a Dict of arrays that is not nested: got the space {space}.")
    return {key: tuple(part.shape or ()) for key, part in parts.items()}


def _find_goal_space(goal_space: spaces.Box | None, model: Any, observation_space: spaces.Space) -> spaces.Box:
    """
    :param goal_space: as given
    :param model: the planner, which may know one
    :param observation_space: of the env
    :return: space of the actions that are goals
    :raises ValueError: if there is no finite Box
    """
    given = getattr(model, "goal_space", None) if goal_space is None else goal_space
    if given is None:
        given = observation_space.spaces.get(GOAL_KEY) if isinstance(observation_space, spaces.Dict) else observation_space
    if not isinstance(given, spaces.Box) or not given.is_bounded():
        raise ValueError(
            f'Mode "goal" needs a finite Box of goals: got {given}. Pass `goal_space=`, for instance with the bounds of the '
            "data that the model was trained on."
        )
    return given


def _goal_rows(goal: Any, n_envs: int) -> np.ndarray:
    """
    :param goal: ``(goal_dim,)`` or ``(n_envs, goal_dim)``
    :param n_envs: number of envs
    :return: ``(n_envs, goal_dim)``
    """
    array = np.atleast_1d(np.asarray(goal))
    if array.ndim > 2 or (array.ndim == 2 and len(array) != n_envs):
        raise ValueError(f"`goal` must have the shape (goal_dim,) or ({n_envs}, goal_dim): got {array.shape}.")
    return np.array(np.broadcast_to(array, (n_envs, array.shape[-1])))


def _check_length(n_action_steps: int, length: int) -> None:
    """
    :param n_action_steps: actions to execute per plan
    :param length: of a plan
    :raises ValueError: if the plan is too short
    """
    if n_action_steps > length:
        raise ValueError(f"`n_action_steps` must be at most the length of a plan, {length}: got {n_action_steps}.")


def _check_steps(name: str, values: Any, n_rows: int, shape: tuple[int, ...]) -> np.ndarray:
    """
    :param name: of the values in a plan
    :param values: ``(n_rows, L, *shape)``; the axes after the second may be one
    :param n_rows: number of observations planned from
    :param shape: of the values at one step
    :return: array ``(n_rows, L, *shape)``
    :raises ValueError: on other shapes
    """
    array = np.asarray(values)
    size = math.prod(shape)
    if array.ndim < 2 or len(array) != n_rows or math.prod(array.shape[2:]) != size:
        expected = ", ".join(map(str, (n_rows, "L", *shape)))
        raise ValueError(f"The {name} of a plan must have the shape ({expected}): got {array.shape}.")
    return array.reshape(*array.shape[:2], *shape)


def _add_inset(frame: np.ndarray, planned: np.ndarray, realised: np.ndarray, dims: tuple[int, ...]) -> np.ndarray:
    """
    Draw two paths in the upper right corner.

    :param frame: image, ``(height, width, 3)`` in 0 to 255
    :param planned: ``(L, n_dims)``
    :param realised: ``(n_steps, n_dims)``
    :param dims: for the labels; with one dimension it is drawn over the steps
    :return: new image; ``frame`` itself if it is too small
    :raises ImportError: without matplotlib
    """
    side = int(_INSET_SHARE * min(frame.shape[:2]))
    if side < _MIN_INSET:
        return frame
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Drawing plans needs the package matplotlib: pip install "sb3-diffusion[plots]"; or pass `render_dims=None`.'
        ) from error
    figure = Figure(figsize=(side / 100, side / 100), dpi=100, facecolor=(1.0, 1.0, 1.0, 0.85), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    font_size = side / 25
    axis = figure.subplots()
    axis.set_facecolor("none")
    for path, color, style, label in ((planned, BLUE, "o--", "planned"), (realised, ORANGE, "o-", "realised")):
        x, y = path.T if len(dims) == 2 else (np.arange(len(path)), path[:, 0])
        axis.plot(x, y, style, color=color, label=label, linewidth=side / 150, markersize=side / 100)
    labels = [f"dimension {dim}" for dim in dims] if len(dims) == 2 else ["step of the plan", f"dimension {dims[0]}"]
    axis.set_xlabel(labels[0], fontsize=font_size)
    axis.set_ylabel(labels[1], fontsize=font_size)
    axis.tick_params(labelsize=0.8 * font_size, length=2, pad=1)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=0.8 * font_size, frameon=False)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())
    image = frame.copy()
    height, width = drawn.shape[:2]
    corner = image[:height, -width:]
    opacity = drawn[..., 3:] / 255.0
    corner[:] = (opacity * drawn[..., :3] + (1.0 - opacity) * corner).round().astype(frame.dtype)
    return image
