"""Partial observation: environments that hide velocities."""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

KEPT: dict[str, tuple[int, ...]] = {
    "Pendulum": (0, 1),  # cosine and sine of the angle
    "MountainCarContinuous": (0,),
    "InvertedDoublePendulum": (0, 1, 2, 3, 4),  # position of the cart, sines and cosines
    "Reacher": (0, 1, 2, 3, 4, 5, 8, 9),  # cosines, sines, target, vector to the target
    "Pusher": (0, 1, 2, 3, 4, 5, 6, *range(14, 23)),  # joints, coordinates of tip, object and goal
}
"""Entries that are no velocities, by the name of the environment without its version."""


class VelocityMask(gym.ObservationWrapper, gym.utils.RecordConstructorArgs):
    """
    Shows the positions in an observation and hides the velocities, so that one observation no longer tells the state.

    The MuJoCo tasks of Gymnasium from v5 on say themselves which of their entries are positions (forces are hidden as well);
    for a few others the entries are known by name. Stack observations, by SB3's ``VecFrameStack``, to give an agent a chance:

    ```python
    env = VecFrameStack(make_vec_env(lambda: VelocityMask(gym.make("Hopper-v5"))), n_stack=3)
    ```

    :param env: environment with a vector (a Box with one axis) as observation
    :param keep: indices of the entries to show, in this order; None for those of the positions
    :raises ValueError: if the observation is no vector, an index lies outside it, or the positions are not known
    """

    def __init__(self, env: gym.Env, keep: Sequence[int] | None = None) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, keep=keep)
        gym.ObservationWrapper.__init__(self, env)
        space = env.observation_space
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise ValueError(f"VelocityMask needs a vector as observation, a Box with one axis: got {space}.")
        kept = list(position_entries(env) if keep is None else keep)
        if not kept or not all(0 <= index < space.shape[0] for index in kept):
            raise ValueError(f"`keep` must hold indices from 0 to {space.shape[0] - 1}, at least one: got {kept}.")
        self.kept = np.array(kept)
        dtype: Any = space.dtype
        self.observation_space = spaces.Box(space.low[self.kept], space.high[self.kept], dtype=dtype)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        """
        :param observation: of the wrapped environment
        :return: its positions
        """
        return observation[self.kept]


def position_entries(env: gym.Env) -> Sequence[int]:
    """
    :param env: environment with a vector as observation
    :return: indices of the entries that are positions
    :raises ValueError: if they are not known
    """
    structure = getattr(env.unwrapped, "observation_structure", None)
    if structure is not None and "qpos" in structure:
        return range(structure["qpos"])
    name = "" if env.spec is None else env.spec.id.rpartition("/")[2].rpartition("-v")[0]
    if name not in KEPT:
        raise ValueError(
            f"It is not known which observations of {env} are positions: pass their indices as `keep`. Known are the MuJoCo "
            f"tasks of Gymnasium from v5 on and {', '.join(sorted(KEPT))}."
        )
    return KEPT[name]
