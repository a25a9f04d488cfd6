"""One flat structure for logged data: arrays over all steps, and an index of where the episodes end."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, overload
from warnings import warn

import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec

from sb3_diffusion.datasets.arrays import (
    Observations,
    as_column,
    check_flags,
    chunks,
    count_bad_rows,
    count_rows,
    delayed,
    flatten_observations,
    leaves,
    place_of,
    statistics,
    take_rows,
    with_shape,
)
from sb3_diffusion.datasets.spaces import (
    check_action_space,
    flatten_observation_space,
    integer_bounds,
    space_mismatch,
    stacked_space,
    stacks_first,
)

# Actions this far outside of the Box (as a share of its width) are rounding of a lower precision, and are put on the bound.
ACTION_TOLERANCE = 1e-3
# Share of the width of the Box next to a bound in which an action counts as saturated.
SATURATION_MARGIN = 0.01


class Episode(NamedTuple):
    """
    One episode of an [OfflineDataset][sb3_diffusion.OfflineDataset]: views into its arrays, nothing is copied.

    With T steps ``observations[t]``, ``actions[t]`` lead to ``rewards[t]``, ``next_observations[t]``.

    :ivar observations: ``(T, *obs_shape)``, or a dict of such arrays
    :ivar actions: ``(T, *action_shape)`` in env units
    :ivar rewards: ``(T,)``
    :ivar next_observations: ``(T, *obs_shape)``, or a dict of such arrays
    :ivar terminated: whether the last step reached a terminal state
    :ivar truncated: whether the episode was cut (time limit, end of the recording) instead
    """

    observations: Observations
    actions: np.ndarray
    rewards: np.ndarray
    next_observations: Observations
    terminated: bool
    truncated: bool

    @property
    def n_steps(self) -> int:
        """Number of steps T."""
        return len(self.rewards)

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the rewards."""
        return float(self.rewards.sum(dtype=np.float64))


class OfflineDataset:
    """
    Logged episodes as flat numpy arrays in environment units.

    Steps of one episode stand one after the other in time order, episodes follow each other without a gap:

    ```text
    row               0    1    2    3    4    5    6
    observations      a0   a1   a2   b0   b1   b2   b3
    next_observations a1   a2   a3   b1   b2   b3   b4
    terminations      .    .    x    .    .    .    .
    truncations       .    .    .    .    .    .    x        episode_ends = [2, 6]
    ```

    The constructor checks everything: equal lengths, shapes against the spaces, no NaN or infinity, integer observations
    inside of their space, actions inside of their Box. Each row has at most one of the two flags (a termination wins over a
    truncation), the last row of the data always has one. Arrays of the right type are kept as they are, without a copy;
    floating observations become float32, integer ones (images, Discrete, MultiBinary, MultiDiscrete spaces) keep their type;
    a nested Dict of observations becomes a flat one whose keys are joined by ``"."``.

    :param observations: ``(N, *obs_shape)``, or a dict of such arrays for a Dict space
    :param actions: ``(N, *action_shape)`` in the units of the env
    :param rewards: ``(N,)`` or ``(N, 1)``
    :param next_observations: like ``observations``; the observation that each step led to
    :param terminations: ``(N,)`` or ``(N, 1)``, true where a terminal state was reached
    :param truncations: ``(N,)`` or ``(N, 1)``, true where an episode was cut without reaching one
    :param observation_space: space of the observations as recorded
    :param action_space: a Box
    :param env_spec: what the environment can be made from, if known
    :param ref_min_score: return that counts as 0 % in ``normalized_score`` (a random policy by custom)
    :param ref_max_score: return that counts as 100 % (an expert by custom)
    :param score_label: where the two reference scores come from
    :param name: for ``repr``, pictures and messages
    :param clip_actions: clip actions outside of the Box, with one warning, instead of refusing them; deviations up to
        0.1 % of the width of the Box are always clipped
    :raises ValueError: on bad data; says which field, and where: episode, step and value
    :raises TypeError: on spaces that are not supported (actions other than Box, Tuple observations)
    """

    def __init__(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminations: Any,
        truncations: Any,
        *,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        env_spec: EnvSpec | None = None,
        ref_min_score: float | None = None,
        ref_max_score: float | None = None,
        score_label: str | None = None,
        name: str = "",
        clip_actions: bool = False,
    ) -> None:
        check_action_space(action_space)
        assert isinstance(action_space, spaces.Box)
        self.observation_space = flatten_observation_space(observation_space)
        self.action_space: spaces.Box = action_space
        self.env_spec = env_spec
        self.ref_min_score = None if ref_min_score is None else float(ref_min_score)
        self.ref_max_score = None if ref_max_score is None else float(ref_max_score)
        self.score_label = score_label if score_label is not None or ref_max_score is None else "given"
        self.name = name
        self.n_stack = 1  # observations put together in each one, see `stack`

        actions = np.asarray(actions)
        observations, next_observations = flatten_observations(observations), flatten_observations(next_observations)
        columns = {"rewards": rewards, "terminations": terminations, "truncations": truncations}
        columns = {field: as_column(array, field) for field, array in columns.items()}
        count_rows({"observations": observations, "next_observations": next_observations, "actions": actions, **columns})
        with np.errstate(invalid="ignore"):
            self.terminations = columns["terminations"].astype(bool)
            self.truncations = columns["truncations"].astype(bool) & ~self.terminations
        self.truncations[-1] |= not self.terminations[-1]
        self.episode_ends: np.ndarray = np.flatnonzero(self.terminations | self.truncations)
        self.episode_starts: np.ndarray = np.concatenate([[0], self.episode_ends[:-1] + 1])
        for field in ("terminations", "truncations"):
            check_flags(columns[field], field, self.episode_ends)

        self.observations = self._checked_observations(observations, "observations")
        self.next_observations = self._checked_observations(next_observations, "next_observations")
        self.rewards = self._checked_floats(columns["rewards"], "rewards")
        self.actions = self._checked_actions(actions, clip_actions)

    # Checks -----------------------------------------------------------------------------------------------------------

    def _where(self, row: int) -> str:
        return place_of(row, self.episode_ends)

    def _checked_floats(self, array: np.ndarray, field: str) -> np.ndarray:
        """
        Convert to float32 and refuse NaN and infinity.

        :param array: numbers with the steps as first axis
        :param field: its name
        :return: the array itself if it was float32 already
        """
        if array.dtype.kind not in "fiub":
            raise ValueError(f"`{field}` must hold numbers: got dtype {array.dtype}.")
        for start, chunk in chunks(array):
            with np.errstate(over="ignore"):
                finite = np.isfinite(chunk.astype(np.float32, copy=False)).reshape(len(chunk), -1)
            if not finite.all():
                index = int(np.argmin(finite.all(axis=1)))
                value = chunk[index].reshape(-1)[int(np.argmin(finite[index]))]
                count = count_bad_rows(array)
                raise ValueError(
                    f"`{field}` must be finite in float32: got {value} at {self._where(start + index)}; {count} of "
                    f"{len(array)} steps are affected. Drop or repair these episodes before loading."
                )
        return array.astype(np.float32, copy=False)

    def _checked_observations(self, observations: Any, field: str) -> Observations:
        """
        Check observations against the space.

        :param observations: array or flat dict of arrays
        :param field: its name
        :return: the same structure with its final types
        """
        if isinstance(self.observation_space, spaces.Dict):
            if not isinstance(observations, dict) or set(observations) != set(self.observation_space.spaces):
                got = sorted(observations) if isinstance(observations, dict) else "one array"
                raise ValueError(f"`{field}` must have the keys {sorted(self.observation_space.spaces)}: got {got}.")
            return {
                key: self._checked_leaf(observations[key], space, f"{field}[{key!r}]")
                for key, space in self.observation_space.spaces.items()
            }
        if isinstance(observations, dict):
            raise ValueError(f"`{field}` is a dict with keys {sorted(observations)}, the space is {self.observation_space}.")
        return self._checked_leaf(observations, self.observation_space, field)

    def _checked_leaf(self, array: np.ndarray, space: spaces.Space, field: str) -> np.ndarray:
        """
        Check one array of observations against its space.

        :param array: with the steps as first axis
        :param space: space of one observation
        :param field: its name
        :return: the array with its final type
        """
        assert space.shape is not None
        array = with_shape(array, space.shape, field)
        if isinstance(space, spaces.Box) and space.dtype.kind == "f":
            return self._checked_floats(array, field)
        if array.dtype.kind not in "iu":  # integers that came as floats or booleans
            self._checked_floats(array, field)
        self._check_inside(array, space, field)
        if array.dtype.kind in "iu":
            return array
        integers = array.astype(space.dtype)
        if (integers != array).any():
            raise ValueError(f"`{field}` must hold integers for the space {space}: got dtype {array.dtype} with fractions.")
        return integers

    def _check_inside(self, array: np.ndarray, space: spaces.Space, field: str) -> None:
        """
        Refuse numbers that a space of integers does not have: stored in its type they would silently become others.

        :param array: numbers with the steps as first axis
        :param space: space of one observation
        :param field: its name
        """
        low, high = integer_bounds(space)
        if array.dtype.kind in "iu":
            stored = np.iinfo(array.dtype)
            if (low <= stored.min).all() and (high >= stored.max).all():  # such as bytes of a picture: no need to look
                return
        for start, chunk in chunks(array):
            if (chunk.min(axis=0) >= low).all() and (chunk.max(axis=0) <= high).all():
                continue
            outside = ((chunk < low) | (chunk > high)).reshape(len(chunk), -1)
            index = int(np.argmax(outside.any(axis=1)))
            entry = int(np.argmax(outside[index]))
            value, lowest, highest = (part.reshape(-1)[entry] for part in (chunk[index], low, high))
            raise ValueError(
                f"`{field}` must lie inside of the space {space}: got {value} at {self._where(start + index)}, allowed "
                f"{lowest} to {highest}. Give the right `observation_space`, or repair these episodes before loading."
            )

    def _checked_actions(self, actions: np.ndarray, clip_actions: bool) -> np.ndarray:
        """
        Check actions against the Box.

        :param actions: ``(N, *action_shape)``
        :param clip_actions: whether to clip what lies outside
        :return: float32, inside of the Box
        """
        actions = self._checked_floats(with_shape(actions, self.action_space.shape, "actions"), "actions")
        low, high = self.action_space.low.astype(np.float32), self.action_space.high.astype(np.float32)
        if (actions.min(axis=0) >= low).all() and (actions.max(axis=0) <= high).all():
            return actions
        with np.errstate(invalid="ignore", over="ignore"):
            width = high.astype(np.float64) - low
        slack = np.where(np.isfinite(width), ACTION_TOLERANCE * width, 0.0)
        outside = (actions < low - slack) | (actions > high + slack)
        rows = np.flatnonzero(outside.reshape(len(actions), -1).any(axis=1))
        if len(rows):
            row = rows[0]
            first = np.flatnonzero(outside[row].reshape(-1))[0]
            bounds = f"[{low.reshape(-1)[first]}, {high.reshape(-1)[first]}]"
            found = (
                f"{len(rows)} of {len(actions)} actions lie outside of the action space, the first at {self._where(row)}: "
                f"{actions[row].reshape(-1)[first]} in dimension {first}, allowed {bounds}"
            )
            if not clip_actions:
                raise ValueError(f"{found}. Give the right `action_space`, or pass `clip_actions=True` to clip them.")
            warn(f"{found}; they are clipped.", stacklevel=4)
        return np.clip(actions, low, high)

    def check_spaces(self, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        """
        Check that an environment fits the data.

        Shapes, kinds (float or integer), Dict keys and the bounds of the actions must agree. Precision and the bounds of
        observations may differ, an image may have its channels on the other side, and a nested Dict counts as flattened.

        :param observation_space: of the environment
        :param action_space: of the environment
        :raises ValueError: says both spaces and what to do
        """
        problem = space_mismatch(self.observation_space, observation_space)
        if problem:
            raise ValueError(
                f"The environment's observation space does not match the dataset {self.name!r}: {problem}. "
                f"Dataset: {self.observation_space}; environment: {observation_space}.{self._stacking_hint(observation_space)}"
            )
        problem = space_mismatch(self.action_space, action_space, bounds=True)
        if problem:
            raise ValueError(
                f"The environment's action space does not match the dataset {self.name!r}: {problem}. "
                f"Dataset: {self.action_space}; environment: {action_space}. Use the environment that the data comes from, "
                "or convert the actions to its units and give `action_space` to `load_dataset`."
            )

    def _stacking_hint(self, observation_space: spaces.Space) -> str:
        """
        :param observation_space: of an env that does not fit
        :return: advice, or nothing
        """
        if isinstance(self.observation_space, spaces.Box) and isinstance(observation_space, spaces.Box):
            for n in range(2, 17):
                if stacked_space(self.observation_space, n).shape == observation_space.shape:
                    return f" If the environment stacks {n} frames, use `dataset.stack({n})`."
        return " Use the environment that the data comes from (`make_env`)."

    # Episodes ---------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def n_episodes(self) -> int:
        """Number of episodes."""
        return len(self.episode_ends)

    @property
    def episodes(self) -> Sequence[Episode]:
        """All episodes as views; made when they are asked for."""
        return _Episodes(self)

    @property
    def episode_lengths(self) -> np.ndarray:
        """Steps per episode, ``(n_episodes,)`` int64."""
        return self.episode_ends - self.episode_starts + 1

    @property
    def episode_returns(self) -> np.ndarray:
        """Undiscounted return per episode, ``(n_episodes,)`` float64."""
        return np.add.reduceat(self.rewards, self.episode_starts, dtype=np.float64)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together."""
        arrays = [*dict(leaves(self.observations, "")).values(), *dict(leaves(self.next_observations, "")).values()]
        arrays += [self.actions, self.rewards, self.terminations, self.truncations, self.episode_ends, self.episode_starts]
        return sum(array.nbytes for array in arrays)

    @property
    def has_reference_scores(self) -> bool:
        """Whether both ``ref_min_score`` and ``ref_max_score`` are known, which ``normalized_score`` needs."""
        return self.ref_min_score is not None and self.ref_max_score is not None

    def normalized_score(self, returns: float | Sequence[float] | np.ndarray) -> Any:
        """
        Express returns in percent between the two reference scores (0: ``ref_min_score``, 100: ``ref_max_score``).

        :param returns: one undiscounted return or an array of them
        :return: a float for one return, else an array of the same shape
        :raises ValueError: without reference scores
        """
        if self.ref_min_score is None or self.ref_max_score is None:
            raise ValueError(
                f"The dataset {self.name!r} has no reference scores: expected `ref_min_score` and `ref_max_score`, got "
                f"{self.ref_min_score} and {self.ref_max_score}. Set both attributes, for instance to the mean returns of a "
                "random and of an expert policy."
            )
        if self.ref_max_score == self.ref_min_score:
            raise ValueError(f"`ref_min_score` and `ref_max_score` must differ: both are {self.ref_min_score}.")
        scores = (
            100.0 * (np.asarray(returns, dtype=np.float64) - self.ref_min_score) / (self.ref_max_score - self.ref_min_score)
        )
        return float(scores) if scores.ndim == 0 else scores

    def stack(self, n_stack: int) -> OfflineDataset:
        """
        Put the last ``n_stack`` observations into each observation, as SB3's VecFrameStack does.

        The newest one comes last; before the start of an episode stand zeros. Vectors and channels-last images grow along
        the last axis, channels-first images along the first.

        :param n_stack: number of observations put together, at least 1
        :return: a new dataset; actions, rewards and flags are shared with this one
        :raises ValueError: if ``n_stack`` is smaller than 1, or the observations are stacked already
        :raises TypeError: if a space cannot be stacked (all but Box and Dicts of Box)
        """
        if n_stack < 1:
            raise ValueError(f"`n_stack` must be at least 1: got {n_stack}.")
        if self.n_stack > 1:
            raise ValueError(
                f"The observations are stacked already, {self.n_stack} of them: stack the dataset of single ones."
            )
        space = stacked_space(self.observation_space, n_stack)
        if isinstance(self.observation_space, spaces.Dict):
            assert isinstance(self.observations, dict) and isinstance(self.next_observations, dict)
            pairs = {
                key: self._stack_leaf(self.observations[key], self.next_observations[key], subspace, n_stack)
                for key, subspace in self.observation_space.spaces.items()
            }
            observations: Observations = {key: pair[0] for key, pair in pairs.items()}
            next_observations: Observations = {key: pair[1] for key, pair in pairs.items()}
        else:
            assert isinstance(self.observations, np.ndarray) and isinstance(self.next_observations, np.ndarray)
            observations, next_observations = self._stack_leaf(
                self.observations, self.next_observations, self.observation_space, n_stack
            )
        stacked = OfflineDataset(
            observations,
            self.actions,
            self.rewards,
            next_observations,
            self.terminations,
            self.truncations,
            observation_space=space,
            action_space=self.action_space,
            env_spec=self.env_spec,
            ref_min_score=self.ref_min_score,
            ref_max_score=self.ref_max_score,
            score_label=self.score_label,
            name=self.name,
        )
        stacked.n_stack = n_stack
        return stacked

    def _stack_leaf(
        self, observations: np.ndarray, next_observations: np.ndarray, space: spaces.Space, n_stack: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Stack one array of observations.

        :param observations: ``(N, *shape)``
        :param next_observations: ``(N, *shape)``
        :param space: space of one observation
        :param n_stack: number of observations put together
        :return: both arrays stacked
        """
        assert isinstance(space, spaces.Box)
        axis = 1 if stacks_first(space) else observations.ndim - 1
        width = observations.shape[axis]
        shape = list(observations.shape)
        shape[axis] *= n_stack
        stacked, stacked_next = np.zeros(shape, observations.dtype), np.zeros(shape, observations.dtype)
        steps = np.arange(len(self)) - np.repeat(self.episode_starts, self.episode_lengths)
        for age in range(n_stack):  # the observation `age` steps ago goes to slot n_stack - 1 - age
            slot = [slice(None)] * observations.ndim
            slot[axis] = slice((n_stack - 1 - age) * width, (n_stack - age) * width)
            stacked[tuple(slot)] = delayed(observations, steps, age)
            # one step later each of them is one step older
            stacked_next[tuple(slot)] = next_observations if age == 0 else delayed(observations, steps, age - 1)
        return stacked, stacked_next

    # What people look at ----------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """
        Describe the data in plain numbers, ready for JSON.

        :return: sizes, flags, quantiles of returns and lengths, normalised mean return (None without reference scores),
            ranges of rewards and actions, and per action dimension the share of steps within 1 % of a bound
        """
        returns, lengths = self.episode_returns, self.episode_lengths
        saturation = self._saturation()
        flat = self.actions.reshape(len(self), -1)
        return {
            "name": self.name,
            "env_id": None if self.env_spec is None else self.env_spec.id,
            "n_episodes": self.n_episodes,
            "n_steps": len(self),
            "megabytes": round(self.nbytes / 1e6, 1),
            "observation_space": str(self.observation_space),
            "action_space": str(self.action_space),
            "returns": statistics(returns),
            "lengths": statistics(lengths),
            "n_terminated": int(self.terminations.sum()),
            "n_truncated": int(self.truncations.sum()),
            "rewards": statistics(self.rewards),
            "nonzero_rewards": float(np.count_nonzero(self.rewards) / len(self)),
            "action_min": flat.min(axis=0).tolist(),
            "action_max": flat.max(axis=0).tolist(),
            "action_saturation": saturation.tolist(),
            "ref_min_score": self.ref_min_score,
            "ref_max_score": self.ref_max_score,
            "score_label": self.score_label,
            "normalized_return": float(self.normalized_score(returns.mean())) if self.has_reference_scores else None,
        }

    def _saturation(self) -> np.ndarray:
        """Share of steps with an action within 1 % of a bound, per (flattened) dimension."""
        low, high = self.action_space.low.reshape(-1), self.action_space.high.reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            margin = np.where(np.isfinite(high - low), SATURATION_MARGIN * (high - low), 0.0)
        flat = self.actions.reshape(len(self), -1)
        return ((flat <= low + margin) | (flat >= high - margin)).mean(axis=0)

    def __repr__(self) -> str:
        env = "" if self.env_spec is None else f", env={self.env_spec.id}"
        return f"OfflineDataset({self.name!r}, {self.n_episodes} episodes, {len(self)} steps{env})"

    def __str__(self) -> str:
        summary = self.summary()

        def row(label: str, text: str) -> str:
            return f"  {label:<18} {text}"

        def spread(stats: dict[str, float]) -> str:
            return "mean {mean:.6g}, std {std:.4g}, min {min:.6g}, median {median:.6g}, max {max:.6g}".format(**stats)

        def numbers(values: list[float]) -> str:
            shown = ", ".join(f"{value:.3g}" for value in values[:12])
            return f"[{shown}{', ...' if len(values) > 12 else ''}]"

        lines = [
            f"OfflineDataset {self.name!r}",
            row("environment", summary["env_id"] or "unknown"),
            row("size", f"{self.n_episodes} episodes, {len(self)} steps, {summary['megabytes']} MB"),
            row("observations", summary["observation_space"]),
            row("actions", summary["action_space"]),
            row("returns", spread(summary["returns"])),
            row("lengths", spread(summary["lengths"])),
            row("ends", f"{summary['n_terminated']} terminated, {summary['n_truncated']} truncated"),
            row("rewards", f"{spread(summary['rewards'])}, {summary['nonzero_rewards']:.1%} not zero"),
            row("action min", numbers(summary["action_min"])),
            row("action max", numbers(summary["action_max"])),
            row("action saturation", numbers(summary["action_saturation"])),
        ]
        if summary["normalized_return"] is not None:
            references = f"0 = {self.ref_min_score:.6g}, 100 = {self.ref_max_score:.6g}; {self.score_label}"
            lines.append(row("normalized return", f"{summary['normalized_return']:.1f} ({references})"))
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str]) -> Path:
        """
        Draw returns, lengths, rewards and actions into one picture.

        :param path: file to write; the suffix decides the format (png, pdf, svg), without one it becomes ``.png``
        :return: the path written
        :raises ImportError: without matplotlib
        """
        from sb3_diffusion.datasets.plotting import plot_dataset

        return plot_dataset(self, path)


class _Episodes(Sequence[Episode]):
    """
    The episodes of a dataset, cut out when asked for.

    :param dataset: where the arrays are
    """

    def __init__(self, dataset: OfflineDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return self._dataset.n_episodes

    @overload
    def __getitem__(self, index: int) -> Episode: ...

    @overload
    def __getitem__(self, index: slice) -> list[Episode]: ...

    def __getitem__(self, index: int | slice) -> Episode | list[Episode]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"The dataset has {len(self)} episodes: got index {index}.")
        data = self._dataset
        start, end = int(data.episode_starts[index]), int(data.episode_ends[index])
        rows = slice(start, end + 1)
        return Episode(
            take_rows(data.observations, rows),
            data.actions[rows],
            data.rewards[rows],
            take_rows(data.next_observations, rows),
            bool(data.terminations[end]),
            bool(data.truncations[end]),
        )

    def __repr__(self) -> str:
        return f"<{len(self)} episodes of {self._dataset!r}>"
