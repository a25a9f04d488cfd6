"""Transitions with a state of their own future, for models of the successor measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize

from sb3_diffusion.buffers.samples import FutureStateSamples, Observations
from sb3_diffusion.buffers.storage import EpisodeReplayBuffer
from sb3_diffusion.common.distributed import own_rows
from sb3_diffusion.common.utils import check_range

OFFSET_DISTRIBUTIONS = ("truncated_geometric", "geometric", "uniform", "n_step")


class FutureStateReplayBuffer(EpisodeReplayBuffer):
    r"""
    [`EpisodeReplayBuffer`][sb3_diffusion.EpisodeReplayBuffer] whose batches also hold, for each transition, the state ``k``
    steps on in its episode.

    Steps $t$ are drawn uniformly. With $s_T$ the last state of the episode (for a running one: the newest), $n = T - t
    \ge 1$ states follow, and the offset $k$ is drawn by ``offset_distribution``, with $\gamma$ = ``gamma``:

    | | $P(k)$ | over |
    |---|---|---|
    | `"truncated_geometric"` | $(1-\gamma)\,\gamma^{k-1} / (1-\gamma^n)$, for $\gamma = 1$: $1/n$ | $1 \le k \le n$ |
    | `"geometric"` | $(1-\gamma)\,\gamma^{k-1}$ | $k \ge 1$ |
    | `"uniform"` | $1/n$ | $1 \le k \le n$ |
    | `"n_step"` | $(1-\gamma)\,\gamma^{k-1} / (1-\gamma^l)$ | $1 \le k \le l = \min(m, n)$, $m$ = ``n_steps`` |

    The first is what drawing a geometric offset anew until it lies inside of the episode gives. Within an episode,
    ``future_observations`` is $s_{t+k}$. Only with `"geometric"` or a ``horizon`` can $k$ be above $n$; it is then $s_T$, and

    - ``absorbed`` is 1 if the episode terminated: the state is $s_T$ for good. A model of states with an "alive" flag learns
      $s_T$ with the flag 1 at $k = n$ and 0 here.
    - ``unknown`` is 1 if the episode was truncated or still runs. As the geometric distribution has no memory, what lies
      $k$ steps on has the law of the future of $s_T$: draw it from the model at $s_T$ and the policy's action there.

    For the finite-horizon recursion of arXiv 2407.12163v1, Algorithm 1, draw `"uniform"`: ``offsets == 1`` comes with
    probability $1/n$, and given ``offsets > 1`` the future state is one of the $n-1$ that follow ``next_observations``,
    uniformly, on the path that goes on with ``next_actions``. There $n$ is large in long episodes; ``horizon`` $= h$ draws
    it uniformly too, from $1$ to $\min(h, T - t)$, or to $h$ where the episode terminated and $s_T$ lasts for good.
    ``n_future`` is the $n$ that was drawn. `"geometric"` gives the same for the discounted measure, with
    probability $1-\gamma$ for ``offsets == 1`` and no need of $n$; `"truncated_geometric"` for the discounted measure over
    the $n$ states alone, which a model has to be told. Tell the branches apart by ``offsets``, never by comparing states.

    With ``n_steps`` $= m$ above 1, SB3's fields are those of the n-step transition, ``next_actions`` belong to its
    ``next_observations``, and offsets still count single steps from $s_t$: up to ``offsets == m`` the future state comes
    no later than ``next_observations``, and `"n_step"` draws no others: with weight $1-\gamma^l$ for these and $\gamma^l$ for
    what follows ``next_observations`` they make up the discounted measure.

    It also works as ``replay_buffer_class`` of SB3's algorithms: its samples begin with SB3's fields, in SB3's order.

    Several future states per step, say 16, come from the methods that `sample` is made of:

    ```python
    index = buffer.draw_indices(256).unsqueeze(1).expand(-1, 16)
    offsets = buffer.draw_offsets(index)
    states = buffer.future_observations(index, offsets)  # (256, 16, *obs_shape)
    ```

    :param buffer_size: number of steps, over all environments
    :param observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of these
    :param action_space: space of the actions
    :param device: where batches are needed
    :param n_envs: number of parallel environments
    :param optimize_memory_usage: must be False, as an episode's last state would not be stored
    :param handle_timeout_termination: tell truncation (``infos[i]["TimeLimit.truncated"]``) from termination; without it,
        every end is a termination
    :param n_steps: length of the returns in ``rewards``
    :param gamma: discount factor, in [0, 1], of the offsets and of the returns; below 1 for `"geometric"`
    :param generator: of the random numbers. None makes one on ``device`` at its first use, seeded from torch's global
        generator.
    :param offset_distribution: one of the above
    :param horizon: with `"uniform"`, the largest number of future states that offsets are drawn over; None for all
    :raises ValueError: if arguments are out of range or exclude each other
    """

    state_options: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **EpisodeReplayBuffer.state_options,
        "offset_distribution": str,
        "horizon": lambda horizon: None if horizon is None else int(horizon),
    }
    sampling_options: ClassVar[tuple[str, ...]] = (*EpisodeReplayBuffer.sampling_options, "offset_distribution", "horizon")

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
        *,
        offset_distribution: str = "truncated_geometric",
        horizon: int | None = None,
    ) -> None:
        self.offset_distribution = offset_distribution
        self.horizon = horizon
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
        if self.optimize_memory_usage:
            raise ValueError(
                f"{type(self).__name__} needs the last state of each episode, which is not stored with "
                "`optimize_memory_usage=True`: leave it False."
            )
        super()._check_options()
        if self.offset_distribution not in OFFSET_DISTRIBUTIONS:
            raise ValueError(f"`offset_distribution` must be one of {OFFSET_DISTRIBUTIONS}: got {self.offset_distribution!r}.")
        if self.offset_distribution == "geometric" and self.gamma == 1:
            raise ValueError(
                "`gamma` must be below 1 for geometric offsets: got 1; "
                'lower it, or set `offset_distribution` to "uniform" or "truncated_geometric".'
            )
        if self.horizon is not None:
            check_range("horizon", self.horizon, 1)
            if self.offset_distribution != "uniform":
                raise ValueError(
                    f'`horizon` is for `offset_distribution="uniform"`: got {self.offset_distribution!r}; leave it None.'
                )

    def _draw_uniform(self, shape: th.Size) -> th.Tensor:
        """:return: numbers in [0, 1), float64 of that shape, on ``device``"""
        device, generator = self.generator.device, self.generator
        drawn = own_rows(lambda n: th.rand(n, generator=generator, device=device, dtype=th.float64), shape.numel())
        return drawn.view(shape).to(self.device)

    def draw_n_future(self, flat_index: th.Tensor | np.ndarray) -> th.Tensor:
        r"""
        Over how many future states offsets are drawn: $n$, or with a ``horizon`` a number up to it, drawn uniformly.

        :param flat_index: of stored steps, any shape
        :return: int64 of the same shape, on ``device``, at least 1
        """
        left = self.steps_remaining(flat_index)
        if self.offset_distribution == "n_step":
            return (left + 1).clamp(max=self.n_steps)
        if self.horizon is None:
            return left + 1
        for_good = self.terminated(self.advance(flat_index, left)) > 0
        most = (left + 1).clamp(max=self.horizon).masked_fill(for_good, self.horizon)
        return th.minimum((self._draw_uniform(most.shape) * most).floor().long() + 1, most)

    def draw_offsets(self, flat_index: th.Tensor | np.ndarray, n_future: th.Tensor | None = None) -> th.Tensor:
        r"""
        Draw how many steps ahead to look, by inverting the distribution function.

        $1 + \lfloor \log u / \log \gamma \rfloor$ is geometric if $u$ is uniform on $(0, 1]$, and truncated to $n$ if $u$ is
        uniform on $(\gamma^n, 1]$.

        :param flat_index: of stored steps, any shape
        :param n_future: over how many states; None draws it by `draw_n_future`
        :return: offsets $k \ge 1$, int64 of the same shape, on ``device``; the distribution is in the class docstring
        """
        n_future = self.draw_n_future(flat_index) if n_future is None else n_future
        uniform = self._draw_uniform(n_future.shape)
        log_gamma = math.log(max(self.gamma, 1e-300))
        if self.offset_distribution == "uniform" or log_gamma == 0:
            offsets = uniform * n_future
        elif self.offset_distribution == "geometric":
            offsets = th.log1p(-uniform) / log_gamma
        else:
            offsets = th.log1p(uniform * th.expm1(n_future * log_gamma)) / log_gamma
        offsets = offsets.floor().long() + 1
        return offsets if self.offset_distribution == "geometric" else th.minimum(offsets, n_future)

    def future_observations(
        self, flat_index: th.Tensor | np.ndarray, offsets: th.Tensor, env: VecNormalize | None = None
    ) -> Observations:
        """
        The states some steps ahead; where the episode is over by then, its last state.

        :param flat_index: of stored steps, any shape
        :param offsets: number of steps, at least 1, of the same shape
        :param env: normalizes if given
        :return: ``(*flat_index.shape, *obs_shape)``, a dict of such tensors for Dict observations
        """
        ahead = th.minimum(offsets - 1, self.steps_remaining(flat_index))
        return self.gather("next_observations", self.advance(flat_index, ahead), env)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> FutureStateSamples:  # type: ignore[override]
        """
        Draw transitions uniformly with replacement from all stored steps, and for each a state of its future.

        :param batch_size: number of transitions
        :param env: normalizes observations and rewards if given
        :return: tensors on ``device``, see [FutureStateSamples][sb3_diffusion.buffers.FutureStateSamples]
        :raises RuntimeError: if the buffer is empty
        """
        return self._get_samples(self.draw_indices(batch_size), env=env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: th.Tensor | np.ndarray, env: VecNormalize | None = None
    ) -> FutureStateSamples:
        """
        Draw an offset for each given step, and make the batch.

        :param batch_inds: flat indices, ``(batch_size,)``
        :param env: normalizes observations and rewards if given
        :return: as `sample`
        """
        index = self.as_index(batch_inds)
        left, n_future = self.steps_remaining(index), self.draw_n_future(index)
        offsets = self.draw_offsets(index, n_future)
        terminated = self.terminated(self.advance(index, left))
        next_actions, has_next_actions = self._next_actions(index, left)
        beyond = offsets > left + 1
        return FutureStateSamples(
            **super()._get_samples(index, env=env)._asdict(),
            future_observations=self.future_observations(index, offsets, env),
            offsets=offsets.unsqueeze(1),
            steps_remaining=left.unsqueeze(1) + 1,
            next_actions=next_actions,
            has_next_actions=has_next_actions,
            absorbed=(beyond * terminated).unsqueeze(1),
            unknown=(beyond * (1 - terminated)).unsqueeze(1),
            step_rewards=self._step_rewards(index, env),
            n_future=n_future.unsqueeze(1),
        )

    def _step_rewards(self, index: th.Tensor, env: VecNormalize | None) -> th.Tensor:
        """
        :param index: flat indices, ``(batch_size,)``
        :param env: normalizes if given
        :return: rewards of single steps, ``(batch_size, 1)``
        """
        rewards = self.gather("rewards", index, env)
        assert isinstance(rewards, th.Tensor)
        return rewards.unsqueeze(1)

    def _next_actions(self, index: th.Tensor, left: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param index: flat indices, ``(batch_size,)``
        :param left: their `steps_remaining`
        :return: actions ``n_steps`` later, zeros where the episode has none; 1 or 0 for whether it has, ``(batch_size, 1)``
        """
        exists = left >= self.n_steps
        actions = self.gather("actions", self.advance(index, th.where(exists, self.n_steps, 0)))
        assert isinstance(actions, th.Tensor)
        exists = exists.unsqueeze(1)
        return actions * exists, exists.float()
