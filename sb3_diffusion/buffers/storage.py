"""Storage of transitions that knows where episodes begin and end, under the interface of SB3's ``ReplayBuffer``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_diffusion.buffers.device_mirror import DeviceMirror
from sb3_diffusion.common.distributed import own_rows
from sb3_diffusion.common.utils import check_action_space

if TYPE_CHECKING:
    from sb3_diffusion.datasets.offline_dataset import OfflineDataset

try:
    import psutil  # type: ignore[import-untyped]
except ImportError:
    psutil = None  # type: ignore[assignment]

BufferT = TypeVar("BufferT", bound="EpisodeReplayBuffer")


class EpisodeReplayBuffer(ReplayBuffer):
    """
    Replay buffer that knows episodes: SB3's ``ReplayBuffer`` for Box-like and Dict observations, n-step returns, logged
    data, and an index that says for every stored step how much of its episode follows.

    Arrays have SB3's names and shapes, ``(buffer_size // n_envs, n_envs, ...)``, and hold raw observations and rewards,
    and actions scaled to [-1, 1]. Floating point data is kept as float32, integers keep their type. On the CPU, batches
    are gathered from these arrays directly. On another device a copy is made at the first sample and then kept up to date
    with the rows that were added; images (uint8) and what does not fit in the free device memory stay on the host.
    Do not write into the arrays from outside; the one exception, which SB3's algorithms make use of, is to set ``dones``
    of the last row.

    Sampling is uniform with replacement over the stored steps, by the buffer's own ``generator`` (assign another
    one at any time).

    **Episodes.** A step is addressed by its flat index ``row * n_envs + env``. An episode ends at a step with ``dones`` or
    ``timeouts`` set. The running one ends, for the time being, at the write head. Call `truncate_last_trajectory`
    when the environment is reset before its episode is over. Overwriting takes an episode from its start, so that the
    future of a stored step is always stored as well.

    **Own samplers** are subclasses that override `_get_samples`, over the same storage:

    ```python
    class WindowBuffer(EpisodeReplayBuffer):
        horizon = 8

        def _get_samples(self, batch_inds, env=None):
            start = self.as_index(batch_inds)  # (n,)
            offsets = th.arange(self.horizon, device=self.device)
            left = self.steps_remaining(start).unsqueeze(1)  # (n, 1), 0 at an episode's last step
            slots = self.advance(start.unsqueeze(1), th.minimum(offsets, left))  # (n, horizon), ends repeat
            return self.gather("observations", slots, env), self.gather("actions", slots), offsets <= left
    ```

    A state ``k >= 1`` steps after each drawn one is
    ``gather("next_observations", advance(index, k - 1))`` with ``k <= steps_remaining(index) + 1``; `is_complete` tells
    whether this bound can still grow, and `terminated` at ``advance(index, steps_remaining(index))`` how the episode ended.

    :param buffer_size: number of steps, over all environments
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: space of the actions
    :param device: where batches are needed
    :param n_envs: number of parallel environments
    :param optimize_memory_usage: do not store next observations but read them from the following step; the step at the
        write head is then never sampled. Cannot be combined with ``handle_timeout_termination``.
    :param handle_timeout_termination: tell truncation (``infos[i]["TimeLimit.truncated"]``) from termination; a truncated
        step is sampled with ``dones`` 0
    :param n_steps: length of the returns in ``rewards``. Above 1, ``rewards`` is the discounted sum of up to ``n_steps``
        rewards, ``next_observations`` and ``dones`` belong to the last of these steps, and ``discounts`` is ``gamma`` to
        the power of their number. They end early where the episode does, and at the write head.
    :param gamma: discount factor, for ``n_steps`` above 1
    :param generator: of the random indices. None makes one on ``device`` at its first use, seeded from torch's global
        generator.
    :raises ValueError: if arguments are out of range or exclude each other
    """

    observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]
    next_observations: np.ndarray | dict[str, np.ndarray]  # type: ignore[assignment]

    state_options: ClassVar[dict[str, Callable[[Any], Any]]] = {
        "buffer_size": int,
        "n_envs": int,
        "pos": int,
        "full": bool,
        "read_only": bool,
        "optimize_memory_usage": bool,
        "handle_timeout_termination": bool,
        "n_steps": int,
        "gamma": float,
    }
    """Attributes that belong to the state beside the arrays, and what converts a saved value."""
    sampling_options: ClassVar[tuple[str, ...]] = ("n_steps", "gamma")
    """The ``state_options`` that say what is made of the stored steps, not what is stored."""
    required_arguments: ClassVar[tuple[str, ...]] = ()
    """Constructor arguments without a default, among the ``state_options``; a file needs them to make a buffer."""

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 0.99,
        generator: th.Generator | None = None,
    ) -> None:
        # ReplayBuffer's own constructor allocates one array for the observations, which a Dict space does not allow
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps = n_steps
        self.gamma = gamma
        self.read_only = False
        self._generator = generator
        self._check_options()
        self._allocate(max(buffer_size // n_envs, 1))

    def _check_options(self) -> None:
        """
        Check the arguments, be they given to the constructor or found in a state; a subclass adds its own, and sets them
        before it calls this constructor.

        :raises ValueError: if arguments are out of range or exclude each other
        """
        if self.n_envs < 1:
            raise ValueError(f"`n_envs` must be at least 1: got {self.n_envs}.")
        if self.n_steps < 1:
            raise ValueError(f"`n_steps` must be at least 1: got {self.n_steps}; 1 gives single transitions.")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"`gamma` must lie in [0, 1]: got {self.gamma}.")
        if self.optimize_memory_usage and self.handle_timeout_termination:
            raise ValueError(
                f"{type(self).__name__} does not support optimize_memory_usage = True and handle_timeout_termination = True "
                "simultaneously: the observation after a timeout is not stored. Set one of the two to False."
            )

    @classmethod
    def from_dataset(
        cls: type[BufferT],
        dataset: OfflineDataset,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_steps: int = 1,
        gamma: float = 0.99,
        generator: th.Generator | None = None,
        **kwargs: Any,
    ) -> BufferT:
        """
        Make a full, read-only buffer of logged data, in the dataset's order.

        Nothing is copied that has the right type already: observations and rewards share the dataset's memory, actions
        too if their Box is [-1, 1]. Images recorded with channels last are seen through a transposed view if
        ``observation_space`` has them first (as ``VecTransposeImage`` gives).

        :param dataset: the data
        :param observation_space: of the environment
        :param action_space: of the environment, a Box with finite bounds, low < high
        :param device: where batches are needed
        :param n_steps: see the class
        :param gamma: see the class
        :param generator: see the class
        :param kwargs: further arguments of a subclass
        :return: buffer with ``buffer_size == len(dataset)`` and ``n_envs == 1``; ``add`` raises
        :raises ValueError: if the spaces do not fit the data, or the bounds of the actions are infinite
        """
        dataset.check_spaces(observation_space, action_space)
        buffer = cls(
            1, observation_space, action_space, device=device, n_steps=n_steps, gamma=gamma, generator=generator, **kwargs
        )
        if buffer.n_envs != 1 or buffer.optimize_memory_usage:
            raise ValueError(
                "A buffer of a dataset has `n_envs` 1 and `optimize_memory_usage` False: "
                f"got {buffer.n_envs} and {buffer.optimize_memory_usage}; leave them out."
            )
        buffer._adopt(dataset)
        return buffer

    @property
    def generator(self) -> th.Generator:
        """Draws the indices; may be replaced."""
        if self._generator is None:
            self._generator = th.Generator(self.device).manual_seed(int(th.randint(2**62, (1,)).item()))
        return self._generator

    @generator.setter
    def generator(self, generator: th.Generator) -> None:
        self._generator = generator

    # Storage ----------------------------------------------------------------------------------------------------------

    def _allocate(self, n_rows: int) -> None:
        """
        Make empty arrays (the system hands out the memory as it is written to) and forget all steps.

        :param n_rows: steps per environment
        """
        shape = (n_rows, self.n_envs)
        action_dtype = _storage_dtype(self.action_space)
        self.buffer_size = n_rows
        self.observations = self._observation_arrays(shape)
        if not self.optimize_memory_usage:
            self.next_observations = self._observation_arrays(shape)
        self.actions = np.zeros((*shape, self.action_dim), dtype=action_dtype)
        self.rewards = np.zeros(shape, dtype=np.float32)
        self.dones = np.zeros(shape, dtype=np.float32)
        self.timeouts = np.zeros(shape, dtype=np.float32)
        self._allocate_index(shape)
        self._list_observations()
        self._clear()
        self._warn_if_too_large()

    def _allocate_index(self, shape: tuple[int, int]) -> None:
        """
        Make the arrays that are computed from the stored ones.

        :param shape: rows and environments
        """
        # steps to the episode's last one and since its first one; written once it has ended
        self._remaining = np.zeros(shape, dtype=np.int32)
        self._elapsed = np.zeros(shape, dtype=np.int32)

    def _index_arrays(self) -> dict[str, np.ndarray]:
        """
        :return: the arrays of `_allocate_index`, by the names that they are gathered by
        """
        return {"remaining": self._remaining, "elapsed": self._elapsed}

    def _observation_arrays(self, shape: tuple[int, int]) -> np.ndarray | dict[str, np.ndarray]:
        """
        :param shape: rows and environments
        :return: zeros for observations, a dict of arrays if they are one
        """
        if isinstance(self.observation_space, spaces.Dict):
            return {
                key: np.zeros((*shape, *self.obs_shape[key]), dtype=_storage_dtype(space))  # type: ignore[call-overload]
                for key, space in self.observation_space.spaces.items()
            }
        return np.zeros((*shape, *self.obs_shape), dtype=_storage_dtype(self.observation_space))

    def _adopt(self, dataset: OfflineDataset) -> None:
        """
        Put the arrays of a dataset in place of the own ones.

        :param dataset: has passed ``check_spaces``
        """
        n_rows = self.buffer_size = len(dataset)
        for field in ("observations", "next_observations"):
            data = getattr(dataset, field)
            if isinstance(self.observation_space, spaces.Dict):
                arrays: Any = {
                    key: _as_rows(data[key], self.obs_shape[key], _storage_dtype(space))  # type: ignore[call-overload]
                    for key, space in self.observation_space.spaces.items()
                }
            else:
                arrays = _as_rows(data, self.obs_shape, _storage_dtype(self.observation_space))
            setattr(self, field, arrays)
        self.actions = _scale_actions(dataset.actions, self.action_space).reshape(n_rows, 1, self.action_dim)
        self.rewards = np.asarray(dataset.rewards, dtype=np.float32).reshape(n_rows, 1)
        self.timeouts = dataset.truncations.astype(np.float32).reshape(n_rows, 1)
        self.dones = dataset.terminations.astype(np.float32).reshape(n_rows, 1) + self.timeouts
        self._allocate_index((n_rows, 1))
        self._clear()
        self.full = True
        self.read_only = True
        self._n_added = n_rows
        self._index_all()

    def _list_observations(self) -> None:
        """Note, for `add`, every array of observations: its key, what to reshape to, the array, the one of the next ones."""
        parts = (
            self.observation_space.spaces
            if isinstance(self.observation_space, spaces.Dict)
            else {None: self.observation_space}
        )
        self._parts: list[tuple[Any, tuple[int, int] | None, np.ndarray, np.ndarray]] = []
        following = self.observations if self.optimize_memory_usage else self.next_observations
        for key, space in parts.items():
            # numpy cannot broadcast (n_envs,) integers to (n_envs, 1)
            shape = (self.n_envs, 1) if isinstance(space, spaces.Discrete) else None
            pair: Any = (self.observations, following)
            if key is not None:
                pair = (self.observations[key], following[key])  # type: ignore[index]
            self._parts.append((key, shape, *pair))

    def _arrays(self) -> dict[str, np.ndarray]:
        """
        :return: all arrays by name, ``"observations.<key>"`` for a Dict
        """
        arrays: dict[str, np.ndarray] = {}
        for field in ("observations",) if self.optimize_memory_usage else ("observations", "next_observations"):
            value = getattr(self, field)
            if isinstance(value, dict):
                arrays.update({f"{field}.{key}": array for key, array in value.items()})
            else:
                arrays[field] = value
        for field in ("actions", "rewards", "dones", "timeouts"):
            arrays[field] = getattr(self, field)
        return arrays

    def _warn_if_too_large(self) -> None:
        """Warn, as SB3 does, if the full buffer will not fit in the memory of this machine."""
        if psutil is None:
            return
        total, available = sum(array.nbytes for array in self._arrays().values()), psutil.virtual_memory().available
        if total > available:
            warnings.warn(
                "This system does not have apparently enough memory to store the complete "
                f"replay buffer {total / 1e9:.2f}GB > {available / 1e9:.2f}GB",
                stacklevel=4,
            )

    def _clear(self) -> None:
        """Forget all steps."""
        super().reset()
        # Steps are counted from the last reset: step c of an environment lies in row c % buffer_size
        self._n_added = 0
        self._n_indexed = 0  # steps that the index of episodes knows of
        self._episode_start = np.zeros(self.n_envs, dtype=np.int64)  # first step of the running episodes
        self._last_done = 0  # number of flags in `dones` of the last row when it was indexed
        self._mirror: DeviceMirror | None = None
        self._n_mirrored = 0  # steps that the mirror has
        self._index_changed_from = 0  # first step whose index has changed since the mirror was refreshed

    def reset(self) -> None:
        """
        Forget all steps; the memory is kept.

        :raises RuntimeError: if the buffer holds a dataset
        """
        self._check_writable()
        self._clear()

    def _check_writable(self) -> None:
        """
        :raises RuntimeError: if the buffer holds a dataset
        """
        if self.read_only:
            raise RuntimeError(
                f"This {type(self).__name__} holds a dataset and is read-only; add new transitions to a second buffer "
                "and join batches of both with `concat_samples`."
            )

    def add(
        self,
        obs: np.ndarray | dict[str, np.ndarray],  # type: ignore[override]
        next_obs: np.ndarray | dict[str, np.ndarray],  # type: ignore[override]
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """
        Add one step of every environment, in place of the oldest one if the buffer is full. All is copied.

        :param obs: raw observations, ``(n_envs, *obs_shape)``, or a dict of such arrays
        :param next_obs: observations after the step (after the last step of an episode: its terminal observation)
        :param action: scaled to [-1, 1], ``(n_envs, *action_shape)``
        :param reward: raw rewards, ``(n_envs,)``
        :param done: whether the episodes ended, by termination or truncation, ``(n_envs,)``
        :param infos: one dict per environment; ``"TimeLimit.truncated"`` is read
        :raises RuntimeError: if the buffer holds a dataset
        """
        if self.read_only:
            self._check_writable()
        row = self.pos
        next_row = (row + 1) % self.buffer_size if self.optimize_memory_usage else row
        for key, shape, array, following in self._parts:
            value: Any = obs if key is None else obs[key]
            next_value: Any = next_obs if key is None else next_obs[key]
            if shape is not None:
                value, next_value = value.reshape(shape), next_value.reshape(shape)
            array[row] = value
            following[next_row] = next_value
        self.actions[row] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[row] = reward
        self.dones[row] = done
        if self.handle_timeout_termination:
            self.timeouts[row] = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self._n_added += 1
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

    # Episodes ---------------------------------------------------------------------------------------------------------

    def _update_index(self) -> None:
        """
        Index the episodes that have ended since the last call, by what was added and by a ``dones`` flag that was set in
        the last row from outside (as SB3's ``learn`` does). Costs O(1) per step, whenever it is called.
        """
        n_new = self._n_added - self._n_indexed
        last_done = np.count_nonzero(self.dones[self.pos - 1])
        if n_new == 0 and last_done == self._last_done:
            return
        self._n_indexed, self._last_done = self._n_added, int(last_done)
        first = max(self._n_added - min(n_new + 1, self.buffer_size), 0)
        rows = np.arange(first, self._n_added) % self.buffer_size
        for offset, env in np.argwhere((self.dones[rows] != 0) | (self.timeouts[rows] != 0)):
            self._end_episode(first + int(offset), env)

    def _end_episode(self, last: int, env: int) -> None:
        """
        Write the index of the running episode of one environment; does nothing if it has been written.

        :param last: its last step
        :param env: number of the environment
        """
        start, first = int(self._episode_start[env]), self._first_running(env)
        if last < first:
            return
        steps = np.arange(first, last + 1)
        rows = steps % self.buffer_size
        self._remaining[rows, env] = last - steps
        self._elapsed[rows, env] = steps - start
        self._episode_start[env] = last + 1
        self._index_changed_from = min(self._index_changed_from, first)

    def _first_running(self, env: int) -> int:
        """
        :param env: number of the environment
        :return: first step of its running episode that is still stored
        """
        return max(int(self._episode_start[env]), self._n_added - self.buffer_size)

    def _index_all(self) -> None:
        """Index all stored steps anew."""
        n_rows = self.size()
        oldest = self._n_added - n_rows
        order = np.arange(oldest, self._n_added) % self.buffer_size
        ends = ((self.dones != 0) | (self.timeouts != 0))[order]
        steps = np.arange(n_rows, dtype=np.int32)[:, None]
        end_at = np.minimum.accumulate(np.where(ends, steps, n_rows)[::-1])[::-1]
        start_at = np.zeros((n_rows + 1, self.n_envs), dtype=np.int32)
        np.maximum.accumulate(np.where(ends, steps + 1, 0), out=start_at[1:])
        self._remaining[order] = end_at - steps
        self._elapsed[order] = steps - start_at[:-1]
        self._episode_start = oldest + start_at[-1].astype(np.int64)
        self._n_indexed, self._index_changed_from = self._n_added, 0
        self._last_done = int(np.count_nonzero(self.dones[self.pos - 1]))

    def truncate_last_trajectory(self) -> None:
        """
        End the running episodes: mark their last stored steps as truncated (as done, where timeouts are not handled).

        To be called when the environment has been reset before its episode was over, so that n-step returns and windows
        do not go on over the gap. Does nothing if no episode runs.
        """
        if self.read_only or self._n_added == 0:
            return
        self._update_index()
        running, last = self._episode_start < self._n_added, self.pos - 1
        self.dones[last, running] = 1
        if self.handle_timeout_termination:
            self.timeouts[last, running] = 1
        self._update_index()

    def _steps_to_head(self, index: th.Tensor) -> tuple[th.Tensor, th.Tensor | int]:
        """
        :param index: of stored steps, on the device
        :return: number of later steps of the same environment; length of that environment's running episode
        """
        to_head = (self.pos - 1 - index // self.n_envs) % self.buffer_size
        lengths = self._n_added - self._episode_start
        if self.n_envs == 1:
            return to_head, int(lengths[0])
        return to_head, th.as_tensor(lengths, device=self.device)[index % self.n_envs]

    def as_index(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        """
        Bring indices to the device.

        :param flat_index: integers ``row * n_envs + env``, of any shape
        :return: the same as int64 on ``device``
        """
        return th.as_tensor(flat_index, dtype=th.int64, device=self.device)

    def advance(self, flat_index: th.Tensor | np.ndarray, n_steps: th.Tensor | int) -> th.Tensor:
        """
        Index of the step that is ``n_steps`` later in the same environment, whatever the episode.

        :param flat_index: integers of any shape
        :param n_steps: integers that broadcast with them
        :return: int64, on ``device``
        """
        index = self.as_index(flat_index)
        return (index + n_steps * self.n_envs) % (self.buffer_size * self.n_envs)

    def steps_remaining(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        """
        How many stored steps of the same episode follow each step; for a running episode, up to the write head.

        :param flat_index: of stored steps, any shape
        :return: int64 of the same shape, 0 for the last step of an episode, on ``device``
        """
        store, index = self._store(), self.as_index(flat_index)
        remaining = store.gather("remaining", index).long()
        if self.read_only:
            return remaining
        to_head, length = self._steps_to_head(index)
        return th.where(to_head < length, to_head, remaining)

    def steps_elapsed(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        """
        How many stored steps of the same episode precede each step. Steps that have been overwritten do not count.

        :param flat_index: of stored steps, any shape
        :return: int64 of the same shape, 0 for the first (stored) step of an episode, on ``device``
        """
        store, index = self._store(), self.as_index(flat_index)
        elapsed = store.gather("elapsed", index).long()
        if self.read_only:
            return elapsed
        to_head, length = self._steps_to_head(index)
        elapsed = th.where(to_head < length, length - 1 - to_head, elapsed)
        return th.minimum(elapsed, self.size() - 1 - to_head)

    def is_complete(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        """
        Whether the episode of each step has ended, so that `steps_remaining` is final.

        :param flat_index: of stored steps, any shape
        :return: bool of the same shape, on ``device``
        """
        self._store()
        to_head, length = self._steps_to_head(self.as_index(flat_index))
        return to_head >= length

    def terminated(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        """
        Whether each step led to a terminal state: done, and not by a timeout.

        :param flat_index: of stored steps, any shape
        :return: float32 of the same shape, 0 or 1, on ``device``
        """
        return self._terminated(self._store(), self.as_index(flat_index))

    def _terminated(self, store: DeviceMirror, index: th.Tensor) -> th.Tensor:
        """
        :param store: to gather from
        :param index: flat, on the device
        :return: as `terminated`
        """
        dones = store.gather("dones", index)
        if not self.handle_timeout_termination:
            return dones
        return th.addcmul(dones, dones, store.gather("timeouts", index), value=-1)

    # Sampling ---------------------------------------------------------------------------------------------------------

    def _make_mirror(self, arrays: dict[str, np.ndarray], n_rows: int) -> DeviceMirror:
        """
        :param arrays: of all columns, by name
        :param n_rows: rows in use
        :return: what rows are gathered from
        """
        return DeviceMirror(arrays, self.device, n_rows)

    def _store(self) -> DeviceMirror:
        """
        :return: what rows are gathered from, up to date with all that was added
        :raises RuntimeError: if the buffer is empty
        """
        if self.size() == 0:
            raise RuntimeError("The replay buffer is empty: add transitions before sampling.")
        if not self.read_only:
            self._update_index()
        mirror = self._mirror
        # the next observation of the newest step may lie one row further on
        ahead = int(self.optimize_memory_usage)
        if mirror is None or mirror.device != self.device:
            arrays = {**self._arrays(), **self._index_arrays()}
            mirror = self._mirror = self._make_mirror(arrays, min(self._n_added + ahead, self.buffer_size))
        elif mirror.copied and min(self._n_mirrored, self._index_changed_from) < self._n_added:
            index_arrays = self._index_arrays()
            for name in mirror.copied:
                # one more than is new, as `dones` of the last row may have been set since
                first = self._index_changed_from if name in index_arrays else max(self._n_mirrored - 1, 0)
                mirror.refresh(name, first, self._n_added + ahead - first)
        self._n_mirrored = self._index_changed_from = self._n_added
        return mirror

    def _drawable_rows(self) -> tuple[int, int]:
        """
        :return: number of rows whose steps may be drawn, and the first of them
        :raises RuntimeError: if there is none
        """
        n_rows, first = self.size(), 0
        if self.optimize_memory_usage and self.full:
            n_rows, first = n_rows - 1, self.pos + 1
        if n_rows == 0:
            raise RuntimeError(
                "There is no transition to sample: the replay buffer is empty"
                + (", as a capacity of 1 leaves none with `optimize_memory_usage`." if self.full else "; add some first.")
            )
        return n_rows, first

    def draw_indices(self, batch_size: int) -> th.Tensor:
        """
        Draw steps uniformly, with replacement, from all that are stored (without the one at the write head if next
        observations are not stored).

        :param batch_size: how many
        :return: flat indices, int64 ``(batch_size,)``, on ``device``
        :raises RuntimeError: if there is no step to draw
        """
        n_rows, first = self._drawable_rows()
        generator = self.generator
        n_steps = n_rows * self.n_envs
        index = own_rows(lambda n: th.randint(n_steps, (n,), generator=generator, device=generator.device), batch_size)
        if first:
            index = (index + first * self.n_envs) % (self.buffer_size * self.n_envs)
        return index if generator.device == self.device else index.to(self.device)

    def gather(
        self, field: str, flat_index: th.Tensor | np.ndarray, env: VecNormalize | None = None
    ) -> th.Tensor | dict[str, th.Tensor]:
        """
        Values of one field at given steps.

        :param field: ``"observations"``, ``"next_observations"``, ``"actions"``, ``"rewards"``, ``"dones"`` or ``"timeouts"``
        :param flat_index: of stored steps, any shape
        :param env: normalizes observations and rewards if given
        :return: new tensor ``(*flat_index.shape, ...)`` on ``device``; a dict of tensors for Dict observations
        """
        return self._gather(self._store(), field, self.as_index(flat_index), env)

    def _gather(
        self, store: DeviceMirror, field: str, index: th.Tensor, env: VecNormalize | None
    ) -> th.Tensor | dict[str, th.Tensor]:
        """
        :param store: to gather from
        :param field: as for `gather`
        :param index: on the device
        :param env: normalizes if given
        :return: as `gather`
        """
        is_observation = field in ("observations", "next_observations")
        if field == "next_observations" and self.optimize_memory_usage:
            field, index = "observations", self.advance(index, 1)
        values: th.Tensor | dict[str, th.Tensor]
        if is_observation and isinstance(self.observations, dict):
            values = {key: store.gather(f"{field}.{key}", index) for key in self.observations}
        else:
            values = store.gather(field, index)
        if env is None:
            return values
        if is_observation:
            arrays = {k: v.cpu().numpy() for k, v in values.items()} if isinstance(values, dict) else values.cpu().numpy()
            normalized = env.normalize_obs(arrays)
            if isinstance(normalized, dict):
                return {key: self._from_numpy(array) for key, array in normalized.items()}
            return self._from_numpy(normalized)
        if field == "rewards":
            assert isinstance(values, th.Tensor)
            return self._from_numpy(env.normalize_reward(values.cpu().numpy()))
        return values

    def _from_numpy(self, array: np.ndarray) -> th.Tensor:
        """
        :param array: any
        :return: tensor on the device, floating point numbers as float32
        """
        dtype = th.float32 if array.dtype.kind == "f" else None
        return th.as_tensor(array, dtype=dtype, device=self.device)

    def sample(  # type: ignore[override]
        self, batch_size: int, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        """
        Draw transitions uniformly with replacement from all stored steps.

        At an episode's last step ``next_observations`` is its last observation; ``dones`` is 1 only if it was terminal.

        :param batch_size: number of transitions
        :param env: normalizes observations and rewards if given
        :return: tensors on ``device``: ``observations`` and ``next_observations`` ``(batch_size, *obs_shape)`` (dicts for
            Dict observations) in the stored type, ``actions`` ``(batch_size, action_dim)``, ``dones`` and ``rewards``
            ``(batch_size, 1)`` float32; ``discounts`` ``(batch_size, 1)`` if ``n_steps`` is above 1, else None
        :raises RuntimeError: if the buffer is empty
        """
        return self._get_samples(self.draw_indices(batch_size), env=env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: th.Tensor | np.ndarray, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        """
        Make a batch of the transitions that start at given steps.

        :param batch_inds: flat indices, ``(batch_size,)``
        :param env: normalizes observations and rewards if given
        :return: as `sample`
        """
        store, index = self._store(), self.as_index(batch_inds)
        last, discounts = index, None
        if self.n_steps == 1:
            rewards = self._gather(store, "rewards", index, env).unsqueeze(1)  # type: ignore[union-attr]
        else:
            rewards, last, discounts = self._n_step_returns(store, index, env)
        samples: Any = DictReplayBufferSamples if isinstance(self.observations, dict) else ReplayBufferSamples
        return samples(
            observations=self._gather(store, "observations", index, env),
            actions=store.gather("actions", index),
            next_observations=self._gather(store, "next_observations", last, env),
            dones=self._terminated(store, last).unsqueeze(1),
            rewards=rewards,
            discounts=discounts,
        )

    def _n_step_returns(
        self, store: DeviceMirror, index: th.Tensor, env: VecNormalize | None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        r"""
        $\sum_{i<k} \gamma^i r_{t+i}$ over $k = \min(n, \text{steps left} + 1)$ steps.

        :param store: to gather from
        :param index: of the first steps, ``(batch_size,)``
        :param env: normalizes each reward if given
        :return: returns ``(batch_size, 1)``, index of the last steps ``(batch_size,)``, $\gamma^k$ ``(batch_size, 1)``
        """
        length = (self.steps_remaining(index) + 1).clamp(max=self.n_steps)
        steps = th.arange(self.n_steps, device=self.device)
        powers = th.pow(self.gamma, th.arange(self.n_steps + 1, device=self.device, dtype=th.float64)).float()
        rewards = self._gather(store, "rewards", self.advance(index.unsqueeze(1), steps), env)
        assert isinstance(rewards, th.Tensor)
        rewards = th.where(steps < length.unsqueeze(1), rewards * powers[:-1], 0.0)
        return rewards.sum(dim=1, keepdim=True), self.advance(index, length - 1), powers[length].unsqueeze(1)

    # State ------------------------------------------------------------------------------------------------------------

    def get_state(self) -> dict[str, Any]:
        """
        Everything that `set_state` needs to restore this buffer exactly, as numpy arrays, numbers and strings.

        :return: arrays cut to the stored rows, under ``"observations"`` and so on (``"observations.<key>"`` for a Dict),
            the ``state_options`` and the state of the generator. Arrays are views: write or copy them before the
            next `add`.
        """
        n_rows = self.size()
        n_observations = min(n_rows + int(self.optimize_memory_usage), self.buffer_size)
        arrays = {
            name: array[: n_observations if name.startswith("observations") else n_rows]
            for name, array in self._arrays().items()
        }
        return {
            **arrays,
            **{name: getattr(self, name) for name in self.state_options},
            "generator_device": self.generator.device.type,
            "generator_state": self.generator.get_state().numpy(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """
        Become the buffer that `get_state` was called on: capacity, ``n_envs``, options, steps, episodes and generator.

        Spaces and device stay; the spaces have to be those of that buffer. A generator state of another kind of device is
        left out. Nothing changes if the state does not fit.

        :param state: from `get_state`; its arrays are copied
        :raises ValueError: if something is missing or does not fit; says what
        """
        missing = [name for name in (*self.state_options, "generator_device", "generator_state") if name not in state]
        if missing:
            raise ValueError(f"The state of a replay buffer must have {missing}: it has {sorted(state)}.")
        options = {name: convert(state[name]) for name, convert in self.state_options.items()}
        n_rows, pos, full = options["buffer_size"], options["pos"], options["full"]
        if not 0 <= pos < n_rows:
            raise ValueError(f"The numbers in the state of the replay buffer do not fit each other: {options}.")
        generator = self._restored_generator(str(state["generator_device"]), state["generator_state"])
        fresh: EpisodeReplayBuffer = object.__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        fresh.__dict__.update(options)
        fresh._check_options()
        fresh._allocate(n_rows)
        fresh.pos, fresh.full = pos, full
        n_filled = n_rows if full else pos
        n_observations = min(n_filled + int(fresh.optimize_memory_usage), n_rows)
        for name, array in fresh._arrays().items():
            length = n_observations if name.startswith("observations") else n_filled
            _fill(array[:length], state.get(name), name)
        fresh._n_added = n_filled + (pos if full else 0)
        fresh._index_all()
        fresh._generator = generator
        self.__dict__ = fresh.__dict__

    def _restored_generator(self, device_type: str, generator_state: Any) -> th.Generator | None:
        """
        :param device_type: kind of device of the state
        :param generator_state: uint8 array
        :return: a new generator at that state, or what is there now if the state is for another kind of device
        """
        device = self.device if self._generator is None else self._generator.device
        if device_type != device.type:
            return self._generator
        generator = th.Generator(device)
        try:
            generator.set_state(th.tensor(np.asarray(generator_state, dtype=np.uint8)))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"`generator_state` is not the state of a {device_type} generator: {error}") from error
        return generator

    def __getstate__(self) -> dict[str, Any]:
        """
        :return: attributes for copying; without the mirror, whose views would not follow
        """
        return {**self.__dict__, "_generator": self.generator, "_mirror": None}


def _fill(array: np.ndarray, values: Any, name: str) -> None:
    """
    Copy saved values.

    :param array: to copy to
    :param values: saved ones
    :param name: for messages
    :raises ValueError: if they do not fit
    """
    if not isinstance(values, np.ndarray) or values.shape != array.shape or values.dtype != array.dtype:
        got = f"{values.dtype} of shape {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(
            f"`{name}` of the saved replay buffer must be {array.dtype} of shape {array.shape}: got {got}. "
            "Load it into a buffer with the same observation and action spaces."
        )
    array[...] = values


def _storage_dtype(space: spaces.Space) -> np.dtype:
    """
    :param space: of one observation, or of the actions
    :return: float32 for floating point spaces, the space's own type otherwise
    """
    dtype = np.dtype(space.dtype)
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def _as_rows(array: np.ndarray, shape: Any, dtype: np.dtype) -> np.ndarray:
    """
    :param array: ``(n_rows, ...)``
    :param shape: of one observation
    :param dtype: of the result
    :return: ``(n_rows, 1, *shape)``, a view if the type is right; images with channels last are transposed if need be
    """
    if array.shape[1:] != shape and array.ndim == 4:
        forward, backward = np.moveaxis(array, 3, 1), np.moveaxis(array, 1, 3)
        array = forward if forward.shape[1:] == shape else backward
    return array.astype(dtype, copy=False).reshape(len(array), 1, *shape)


def _scale_actions(actions: np.ndarray, space: spaces.Space) -> np.ndarray:
    """
    :param actions: in the units of the environment, ``(N, *shape)``
    :param space: their Box
    :return: in [-1, 1]; the array itself if it is that already
    """
    check_action_space("A buffer of logged data", space)
    assert isinstance(space, spaces.Box)
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    scaled: np.ndarray = actions.astype(np.float32, copy=False)
    if not ((low == -1).all() and (high == 1).all()):
        scaled = 2.0 * ((scaled - low) / (high - low)) - 1.0
    if np.abs(scaled).max() > 1:
        scaled = np.clip(scaled, -1.0, 1.0)
    return scaled
