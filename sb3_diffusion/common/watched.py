"""Training that is watched: losses for the log, and a stop with a reason where numbers are no longer finite."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.buffers import ReplayBuffer

from sb3_diffusion.common.policies import DiffusionPolicy
from sb3_diffusion.common.savable import SavableAlgorithm
from sb3_diffusion.common.serialization import PathOrFile
from sb3_diffusion.common.utils import NonFiniteError, minimize

DEFERRED_CHECK_INTERVAL = 100
"""Updates between looks at losses on a GPU, which waits at each look for the device."""
DIVERGED = 10.0
"""
Mean size of the targets of action values above which they are reported, in shares of what the rewards allow, or of what an
untrained critic told where that is more: while all rewards are 0, they allow nothing.
"""


class WatchedAlgorithm(SavableAlgorithm):
    """
    An algorithm whose losses are averaged for the log and that stops, with what is known, where one of them is not finite.

    On the CPU training stops before the step; on a GPU, and where a gradient goes wrong without a loss, some updates later.
    What is not finite is never saved, so that the last file stays good.
    """

    policy: DiffusionPolicy  # type: ignore[assignment]
    max_grad_norm: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._loss_sums: dict[str, tuple[th.Tensor, int]] = {}
        self._reward_size: th.Tensor | None = None  # of the largest reward
        self._first_target_size: th.Tensor | None = None
        self._diverges = False
        self._last_batch: Any = None

    # ---------------------------------------------------------------- updates

    def _minimize(
        self, name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, parts: Mapping[str, th.Tensor] | None = None
    ) -> None:
        """One step of ``optimizer``, and the loss with its ``parts`` to the log."""
        for part_name, part in (parts or {}).items():
            self._add_loss(part_name, part.detach())
        try:
            self._add_loss(name, minimize(optimizer, loss, self.max_grad_norm))
        except NonFiniteError as error:
            raise NonFiniteError(self._describe(f"`{name}` {error}")) from None
        if loss.device.type != "cpu" and self._n_updates % DEFERRED_CHECK_INTERVAL == 0:
            self._mean_losses()

    def _mean_losses(self) -> dict[str, float]:
        """Means since the last log, all of them finite."""
        means = {name: float(total) / count for name, (total, count) in self._loss_sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise NonFiniteError(self._describe(f"`{name}` has become {mean}"))
        return means

    def _describe(self, what: str) -> str:
        """A message with ``what``, and all else that is not finite. Losses begin anew, if training is taken up again."""
        self._loss_sums.clear()
        batch = {} if self._last_batch is None else self._last_batch._asdict()
        others = [f"`{name}` of the batch" for name, value in batch.items() if not all_finite(value)]
        others += [f"weights of `{name}`" for name, net in self.policy.networks() if not all_finite(net.state_dict())]
        return (
            f"Training stops in update {self._n_updates + 1}, at timestep {self.num_timesteps}: {what}. "
            + (f"Not finite are also {', '.join(others)}. " if others else "")
            + ("Nothing was saved yet. " if self._last_saved is None else f"The last good file is {self._last_saved}. ")
            + "Look for rewards and observations that are far too large, lower `learning_rate`, or set `max_grad_norm`."
        )

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: np.ndarray,
        new_obs: np.ndarray | dict[str, np.ndarray],
        reward: np.ndarray,
        dones: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        ends = [info["terminal_observation"] for info in infos if info.get("terminal_observation") is not None]
        for name, value in (("reward", reward), ("observation", [new_obs, *ends]), ("action", buffer_action)):
            if not all_finite(value):
                raise NonFiniteError(
                    f"The {name} at timestep {self.num_timesteps} is not finite: {value}. The transition is not kept; mend "
                    "the environment, or end its episodes before it comes to this."
                )
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    # ---------------------------------------------------------------- logging

    def _add_loss(self, name: str, loss: th.Tensor) -> None:
        """Add a detached scalar to the mean that the next log shows; nothing is read from the device before that."""
        total, count = self._loss_sums.get(name, (None, 0))
        # A copy, as a CUDA graph writes its next loss where the last one lay
        self._loss_sums[name] = (loss.clone() if total is None else total + loss, count + 1)

    def _watch_targets(self, targets: th.Tensor, rewards: th.Tensor) -> None:
        """Log the mean size of the targets of action values; the next log compares it with the largest reward."""
        target_size, reward_size = targets.abs().mean(), rewards.abs().max()
        self._add_loss("target_size", target_size)
        if self._reward_size is None:
            self._reward_size, self._first_target_size = reward_size, target_size.clone()
        else:
            self._reward_size = th.maximum(self._reward_size, reward_size)

    def _record_losses(self) -> None:
        means = self._mean_losses()
        for name, mean in means.items():
            self.logger.record(f"train/{name}", mean)
        self._loss_sums.clear()
        if self._reward_size is not None and "target_size" in means and not self._diverges:
            assert self._first_target_size is not None
            allowed = float(self._reward_size) / max(1.0 - self.gamma, 1e-3)
            self._diverges = means["target_size"] > DIVERGED * max(allowed, float(self._first_target_size)) + 1.0
            if self._diverges:
                warnings.warn(
                    f"Action values diverge: at timestep {self.num_timesteps} the mean size of their targets is "
                    f"{means['target_size']:.3g}, where rewards and `gamma` allow {allowed:.3g}. Lower `learning_rate`, stay "
                    "nearer to the data, or use more critics.",
                    stacklevel=3,
                )

    def dump_logs(self) -> None:
        """Write the log, mean losses since the last one included."""
        self._record_losses()
        super().dump_logs()

    # ---------------------------------------------------------------- files

    def _check_before_saving(self, path: PathOrFile) -> None:
        for name, parameter in self.policy.named_parameters():
            if not all_finite(parameter):
                part = name.partition(".")[0]
                raise NonFiniteError(f"Weights of `{part}` are not finite, so that nothing is saved: {path} is as it was.")

    def _excluded_save_params(self) -> list[str]:
        of_the_run = "_loss_sums", "_reward_size", "_first_target_size", "_diverges", "_last_batch"
        return [*super()._excluded_save_params(), *of_the_run]


def all_finite(value: Any) -> bool:
    """
    :param value: array, tensor, None, or a dict, list or tuple of these
    :return: whether all numbers in it are finite
    """
    if isinstance(value, dict):
        return all(all_finite(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(all_finite(part) for part in value)
    if isinstance(value, th.Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    return value is None or np.asarray(value).dtype.kind != "f" or bool(np.isfinite(value).all())
