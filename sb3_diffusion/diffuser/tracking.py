"""Feedback control along planned states, in the place of planned actions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sb3_diffusion.common.allowlist import register_value_class


@register_value_class
class PDTracker:
    r"""
    Proportional-derivative control towards the next planned state: $k_p (x' - x) + k_d (v' - v)$, as Diffuser's authors steer
    in mazes (jannerm/diffuser, branch maze2d). It needs an environment whose action is a force on each position.

    :param positions: indices of the positions in the observation, one per action dimension
    :param velocities: indices of the velocities, in the same order
    :param kp: $k_p$
    :param kd: $k_d$
    :param key: of the observation in a ``Dict``
    """

    def __init__(
        self,
        positions: Sequence[int] = (0, 1),
        velocities: Sequence[int] = (2, 3),
        kp: float = 1.0,
        kd: float = 1.0,
        key: str = "observation",
    ) -> None:
        self.positions, self.velocities = list(positions), list(velocities)
        self.kp, self.kd = kp, kd
        self.key = key

    def __call__(self, observations: Any, planned_next_observations: Any, planned_actions: np.ndarray) -> np.ndarray:
        """
        :param observations: where the system is, shape ``(n, obs_dim)``, or a dict with such an array
        :param planned_next_observations: where it should be at the next step, likewise
        :param planned_actions: shape ``(n, action_dim)``; only its shape and type are used
        :return: actions in env units, same shape; not clipped
        :raises ValueError: if ``positions`` and ``velocities`` do not fit the observation or the action
        """
        if isinstance(observations, dict):
            observations, planned_next_observations = observations[self.key], planned_next_observations[self.key]
        error = np.asarray(planned_next_observations) - np.asarray(observations)
        n_actions, size = math.prod(planned_actions.shape[1:]), error.shape[1]
        inside = all(-size <= index < size for index in (*self.positions, *self.velocities))
        if not inside or not len(self.positions) == len(self.velocities) == n_actions:
            raise ValueError(
                f"`positions` and `velocities` must hold {n_actions} indices each, one per action dimension, below the size "
                f"of the observation, {size}: got {self.positions} and {self.velocities}."
            )
        actions = self.kp * error[:, self.positions] + self.kd * error[:, self.velocities]
        return actions.astype(planned_actions.dtype).reshape(planned_actions.shape)
