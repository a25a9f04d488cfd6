"""Acting by the plans of anything with a method ``plan``: observations of several envs in, actions for them out."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_diffusion.common.utils import check_choice, check_integer, check_range
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


def each(function: Callable[..., Any], *values: Arrays) -> Arrays:
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
    return each(lambda array: np.array(array[rows]), values)


def _stack(values: Sequence[Arrays]) -> Arrays:
    """
    :param values: of equal shapes
    :return: all of them, with a new leading axis
    """
    return each(lambda *arrays: np.stack(arrays), *values)


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
        return each(lambda array: array[min(self.step + 1, len(array) - 1)], self.observations)

    def info(self, deviation: float) -> dict[str, Any]:
        """
        :param deviation: of the last visited observation
        :return: what ``info`` tells of the plan; arrays are copies
        """
        return {
            "plan_observations": each(np.array, self.observations),
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
        _check_model_spaces(model, observation_space, action_space)
        check_choice("mode", mode, MODES)
        check_range("deviation_coef", deviation_coef, 0.0)
        check_integer("n_action_steps", n_action_steps, 1)
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
        self.goals = None if goal is None else each(lambda array: _goal_rows(array, n_envs), goal)
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
        self.observations = each(np.array, observations)

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
        planned = each(lambda array: array[plan.step], plan.observations)
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
            return self.overlay(frame, each(np.array, plan.observations), realised)
        if not self.render_dims:
            return frame
        return _add_inset(frame, self._drawn(plan.observations), self._drawn(realised), self.render_dims)

    def _drawn(self, observations: Arrays) -> np.ndarray:
        """The dimensions to draw, ``(n_steps, n_dims)``."""
        n_steps = len(observations[self.state_keys[0]] if isinstance(observations, dict) else observations)
        states = np.stack([self._state(_rows(observations, step)) for step in range(n_steps)])
        return states[:, list(self.render_dims)]


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


def _check_model_spaces(model: Any, observation_space: spaces.Space, action_space: spaces.Box) -> None:
    """
    :param model: the planner, which may know its spaces
    :param observation_space: of the env
    :param action_space: of the env
    :raises ValueError: if the shapes are others
    """
    known = getattr(model, "observation_space", None)
    if isinstance(known, spaces.Space):
        ours, theirs = _observation_shapes(known), _observation_shapes(observation_space)
        if ours != {key: shape for key, shape in theirs.items() if key != GOAL_KEY or key in ours}:
            raise ValueError(f"The env must show what the model plans from, {known}: got {observation_space}.")
    known = getattr(model, "action_space", None)
    if isinstance(known, spaces.Box) and math.prod(known.shape) != math.prod(action_space.shape):
        raise ValueError(f"The env must take the actions that the model plans, {known}: got {action_space}.")


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
