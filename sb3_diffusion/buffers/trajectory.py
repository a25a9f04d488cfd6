"""Windows of whole episodes, for models of trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_diffusion.buffers.device_mirror import DeviceMirror
from sb3_diffusion.buffers.samples import Observations, TrajectorySamples
from sb3_diffusion.buffers.storage import EpisodeReplayBuffer
from sb3_diffusion.common.distributed import own_rows

PADDINGS = ("repeat", "zeros", None)


class TrajectoryReplayBuffer(EpisodeReplayBuffer):
    r"""
    [`EpisodeReplayBuffer`][sb3_diffusion.EpisodeReplayBuffer] that samples windows of ``horizon`` rows, for arXiv
    2205.09991, with the discounted return from each window's first step to the end of its episode.

    With ``stride`` $m$, row $h$ of a window that starts at step $t$ is step $t + hm$: its observation, the $m$ actions from
    there to the next row, and the sum of their rewards. A window never leaves its episode, nor does it go on over the write
    head. An episode of 5 steps, ``horizon=3``, ``stride=2``, ``padding="repeat"``, windows from its first and fourth step:

    ```text
    observations   s0      s2      s4        s3      s5      s5
    actions        a0 a1   a2 a3   a4 a4     a3 a4   a4 a4   a4 a4
    rewards        r0+r1   r2+r3   r4        r3+r4   0       0
    mask           1       1       1         1       0       0
    ```

    **Padding.** Rows that would begin after the episode's last step are padding, with ``mask`` 0 and reward 0.

    - `"repeat"`: their observation is the one that the last step led to (``s5`` above), so that a row's observation is always
      what the row before it led to; their action is the last one. With ``optimize_memory_usage`` that observation is not
      stored, and the one in which the last step was taken stands in its place.
    - `"zeros"`: observations and actions of the batch are 0, whatever ``env`` normalizes.
    - None: there are no such rows, as only windows that end within their episode are drawn, ``horizon * stride`` steps.

    A row that begins in the episode and ends after it (the third above) has ``mask`` 1, the rewards that there are, and
    the missing ones of its actions padded in the same way. For the buffer the end of a running episode is the write head.

    **Starts** are drawn uniformly with replacement: with padding all stored steps, without it the
    $L - \text{horizon} \cdot m + 1$ first ones of each episode of $L$ stored steps, the last of them included. (The authors'
    code leaves the last start out.) Without padding their list is made anew after each `add` that is followed by a sample,
    in time proportional to the stored steps; a dataset's once.

    **Returns** are $\sum_{k \ge 0} \gamma^k r_{t+k}$ to the end of the episode, not of the window, for a running one up to the
    write head; nothing is added for what comes after a truncation. ``termination_penalty`` is added to the last
    reward of an episode that terminated, in ``returns`` alone. They are computed in float64 when an episode has ended
    (a dataset's once), those of the running episodes at the first sample after a step. They are in the environment's
    units, even if ``env`` normalizes ``rewards``: its scale moves, and a value model is to fit one function.

    :param buffer_size: number of steps, over all environments
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: space of the actions
    :param device: where batches are needed
    :param n_envs: number of parallel environments
    :param optimize_memory_usage: do not store next observations, see above. Cannot be combined with
        ``handle_timeout_termination``.
    :param handle_timeout_termination: tell truncation (``infos[i]["TimeLimit.truncated"]``) from termination; without it,
        every end is a termination
    :param horizon: number of rows, at least 1
    :param stride: env steps from row to row, at least 1
    :param padding: "repeat", "zeros" or None
    :param gamma: discount factor of the returns, in [0, 1]
    :param termination_penalty: usually negative (the authors' value model has -100)
    :param n_steps: must be 1; it is there because other buffers have it
    :param generator: of the random starts. None makes one on ``device`` at its first use, seeded from torch's global
        generator.
    :raises ValueError: if arguments are out of range or exclude each other
    """

    state_options: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **EpisodeReplayBuffer.state_options,
        "horizon": int,
        "stride": int,
        "padding": lambda padding: padding,
        "termination_penalty": float,
    }
    sampling_options: ClassVar[tuple[str, ...]] = ("horizon", "stride", "padding", "gamma", "termination_penalty")
    required_arguments: ClassVar[tuple[str, ...]] = ("horizon",)

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        horizon: int,
        stride: int = 1,
        padding: str | None = "repeat",
        gamma: float = 0.99,
        termination_penalty: float = 0.0,
        n_steps: int = 1,
        generator: th.Generator | None = None,
    ) -> None:
        self.horizon = horizon
        self.stride = stride
        self.padding = padding
        self.termination_penalty = termination_penalty
        super().__init__(
            buffer_size,
            observation_space,
            action_space,
            device=device,
            n_envs=n_envs,
            optimize_memory_usage=optimize_memory_usage,
            handle_timeout_termination=handle_timeout_termination,
            n_steps=n_steps,
            gamma=gamma,
            generator=generator,
        )

    def _check_options(self) -> None:
        """Check the arguments, be they given to the constructor or found in a state."""
        super()._check_options()
        for name in ("horizon", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1: got {getattr(self, name)}.")
        if self.padding not in PADDINGS:
            raise ValueError(f"`padding` must be one of {PADDINGS}: got {self.padding!r}.")
        if not np.isfinite(self.termination_penalty):
            raise ValueError(f"`termination_penalty` must be finite: got {self.termination_penalty}.")
        if self.n_steps != 1:
            raise ValueError(f"`n_steps` must be 1, as windows hold the rewards of single steps: got {self.n_steps}.")

    # Returns ----------------------------------------------------------------------------------------------------------

    def _allocate_index(self, shape: tuple[int, int]) -> None:
        """
        Make the arrays that are computed from the stored ones.

        :param shape: rows and environments
        """
        super()._allocate_index(shape)
        self._returns = np.zeros(shape, dtype=np.float32)

    def _index_arrays(self) -> dict[str, np.ndarray]:
        """
        :return: the arrays of `_allocate_index`, by the names that they are gathered by
        """
        return {**super()._index_arrays(), "returns": self._returns}

    def _clear(self) -> None:
        """Forget all steps."""
        super()._clear()
        self._n_with_returns = 0  # steps that the returns of the running episodes know of
        self._starts: th.Tensor | None = None  # of the windows, if `padding` is None and they are known

    def _update_index(self) -> None:
        """Index the episodes that have ended, and compute the returns of those that still run."""
        super()._update_index()
        if self._n_with_returns < self._n_added:
            for env in np.flatnonzero(self._episode_start < self._n_added).tolist():
                self._write_returns(self._first_running(env), self._n_added - 1, env)
            self._n_with_returns = self._n_added
            self._starts = None

    def _end_episode(self, last: int, env: int) -> None:
        """
        Write the index and the returns of the running episode of one environment, unless they have been written.

        :param last: its last step
        :param env: number of the environment
        """
        first = self._first_running(env)
        super()._end_episode(last, env)
        if first <= last:
            self._write_returns(first, last, env)
            self._starts = None

    def _write_returns(self, first: int, last: int, env: int) -> None:
        """
        Compute the returns of a part of one environment's steps, as if an episode ended with the part.

        :param first: first step
        :param last: last step
        :param env: number of the environment
        """
        rows = np.arange(first, last + 1) % self.buffer_size
        remaining = np.arange(last - first, -1, -1)
        self._returns[rows, env] = discounted_returns(self._penalized_rewards(rows, env), remaining, self.gamma)
        self._index_changed_from = min(self._index_changed_from, first)

    def _index_all(self) -> None:
        """Index all stored steps anew."""
        super()._index_all()
        rows = np.arange(self._n_added - self.size(), self._n_added) % self.buffer_size
        self._returns[rows] = discounted_returns(self._penalized_rewards(rows), self._remaining[rows], self.gamma)
        self._n_with_returns = self._n_added

    def _penalized_rewards(self, rows: np.ndarray, env: int | slice = slice(None)) -> np.ndarray:
        """
        :param rows: of the arrays, ``(n,)``
        :param env: number of one environment; all by default
        :return: rewards with ``termination_penalty``, float64 ``(n,)`` or ``(n, n_envs)``
        """
        terminated = (self.dones[rows, env] != 0) & (self.timeouts[rows, env] == 0)
        return self.rewards[rows, env] + self.termination_penalty * terminated.astype(np.float64)

    def returns_to_go(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        """
        Discounted sum of the raw rewards from each step to the end of its episode, as in the class docstring.

        :param flat_index: of stored steps, any shape
        :return: float32 of the same shape, on ``device``
        """
        return self._store().gather("returns", self.as_index(flat_index))

    # Sampling ---------------------------------------------------------------------------------------------------------

    def all_starts(self) -> th.Tensor:
        """
        Every step that a window may start at, for statistics such as ``returns_to_go(all_starts())``.

        :return: flat indices, int64 ``(n_starts,)``, on ``device``
        :raises RuntimeError: if the buffer is empty, or ``padding`` is None and no episode is long enough
        """
        n_rows, first = self._drawable_rows()
        steps = self.advance(th.arange(n_rows * self.n_envs, device=self.device), first)
        if self.padding is not None:
            return steps
        lengths = self.steps_remaining(steps) + 1
        starts = steps[lengths >= self.horizon * self.stride]
        if len(starts) == 0:
            raise RuntimeError(
                f"No stored episode has the {self.horizon * self.stride} steps of a window (`horizon` {self.horizon}, "
                f'`stride` {self.stride}): the longest has {int(lengths.max())}. Lower `horizon`, or set `padding="repeat"`.'
            )
        return starts

    def draw_indices(self, batch_size: int) -> th.Tensor:
        """
        Draw first steps of windows uniformly, with replacement, from `all_starts`.

        :param batch_size: how many
        :return: flat indices, int64 ``(batch_size,)``, on ``device``
        :raises RuntimeError: as `all_starts`
        """
        if self.padding is not None:
            return super().draw_indices(batch_size)
        if self.size():
            self._store()  # drops the list of starts if steps were added or episodes ended
        if self._starts is None or self._starts.device != self.device:
            self._starts = self.all_starts()
        generator = self.generator
        n_starts = len(self._starts)
        chosen = own_rows(lambda n: th.randint(n_starts, (n,), generator=generator, device=generator.device), batch_size)
        return self._starts[chosen.to(self.device)]

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> TrajectorySamples:  # type: ignore[override]
        """
        Draw windows, uniformly with replacement from all that there are.

        :param batch_size: number of windows
        :param env: normalizes observations and rewards if given, but not ``returns``
        :return: tensors on ``device``, see [TrajectorySamples][sb3_diffusion.buffers.TrajectorySamples]
        :raises RuntimeError: if the buffer is empty, or ``padding`` is None and no episode is long enough
        """
        return self._get_samples(self.draw_indices(batch_size), env=env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: th.Tensor | np.ndarray, env: VecNormalize | None = None
    ) -> TrajectorySamples:
        """
        Make a batch of the windows that start at given steps.

        :param batch_inds: flat indices, ``(batch_size,)``
        :param env: normalizes observations and rewards if given
        :return: as `sample`
        """
        store, start = self._store(), self.as_index(batch_inds)
        left = self.steps_remaining(start).unsqueeze(1)
        steps = th.arange(self.horizon * self.stride, device=self.device)
        beyond = steps > left  # (n, horizon * stride)
        index = self.advance(start.unsqueeze(1), th.minimum(steps, left))
        beyond_rows = beyond[:, :: self.stride]
        return TrajectorySamples(
            observations=self._window_observations(store, index[:, :: self.stride], beyond_rows, env),
            actions=self._window_actions(store, index, beyond),
            rewards=self._window_rewards(store, index, beyond, env),
            mask=(~beyond_rows).float(),
            returns=store.gather("returns", start).unsqueeze(1),
            terminated=self._terminated(store, self.advance(start.unsqueeze(1), left)),
        )

    def _window_observations(
        self, store: DeviceMirror, index: th.Tensor, beyond: th.Tensor, env: VecNormalize | None
    ) -> Observations:
        """
        :param store: to gather from
        :param index: of each row's step, the last one repeated, ``(n, horizon)``
        :param beyond: whether the row is padding
        :param env: normalizes if given
        :return: ``(n, horizon, *obs_shape)``
        """
        observations = self._gather(store, "observations", index, env)
        fill: Any = 0
        if self.padding == "repeat":
            if self.optimize_memory_usage:
                return observations
            fill = self._gather(store, "next_observations", index[beyond], env)
        if isinstance(observations, dict):
            for key, values in observations.items():
                values[beyond] = fill[key] if isinstance(fill, dict) else fill
        else:
            observations[beyond] = fill
        return observations

    def _window_actions(self, store: DeviceMirror, index: th.Tensor, beyond: th.Tensor) -> th.Tensor:
        """
        :param store: to gather from
        :param index: of all steps, the last one repeated, ``(n, horizon * stride)``
        :param beyond: whether the step is padding
        :return: ``(n, horizon, stride * action_dim)``
        """
        actions = store.gather("actions", index)
        if self.padding == "zeros":
            actions[beyond] = 0
        return actions.unflatten(1, (self.horizon, self.stride)).flatten(2)

    def _window_rewards(self, store: DeviceMirror, index: th.Tensor, beyond: th.Tensor, env: VecNormalize | None) -> th.Tensor:
        """
        :param store: to gather from
        :param index: of all steps, the last one repeated, ``(n, horizon * stride)``
        :param beyond: whether the step is padding
        :param env: normalizes each reward if given
        :return: ``(n, horizon)``
        """
        rewards = self._gather(store, "rewards", index, env)
        assert isinstance(rewards, th.Tensor)
        return rewards.masked_fill(beyond, 0).unflatten(1, (self.horizon, self.stride)).sum(dim=2)


def discounted_returns(rewards: np.ndarray, remaining: np.ndarray, gamma: float) -> np.ndarray:
    r"""
    $\sum_{k=0}^{n_t} \gamma^k r_{t+k}$ for every step $t$ that $n_t$ steps of its episode follow.

    The sums over twice as many rewards are put together from two of the sums before, until they reach over all.

    :param rewards: float64, one step after the other along the first axis
    :param remaining: $n_t$; broadcasts with ``rewards``. Nothing follows the end of the array.
    :param gamma: discount factor
    :return: float64, like ``rewards``
    """
    returns = np.array(rewards, dtype=np.float64)
    length = 1  # number of rewards in each sum
    while length <= remaining.max(initial=0):
        returns[:-length] += gamma**length * np.where(remaining[:-length] >= length, returns[length:], 0.0)
        length *= 2
    return returns
