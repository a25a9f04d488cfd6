"""Systems whose discounted and finite-horizon measures are known in closed form: a chain, a ring, a linear Gaussian system."""

from typing import NamedTuple

import numpy as np
from gymnasium import spaces

from sb3_diffusion import OfflineDataset

N_DATA = 20_000
"""Logged steps of each system."""


class Law(NamedTuple):
    """
    The exact measure at some states and actions: mixtures of Gaussians with diagonal covariances, in env units.

    :ivar states: shape ``(n, dim)``
    :ivar actions: shape ``(n, 1)``
    :ivar masses: of the components, shape ``(n, n_components)``
    :ivar means: shape ``(n, n_components, dim)``
    :ivar variances: shape ``(n, n_components)``
    """

    states: np.ndarray
    actions: np.ndarray
    masses: np.ndarray
    means: np.ndarray
    variances: np.ndarray

    def sample(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """
        :param n: samples of each row
        :param rng: source of randomness
        :return: shape ``(len(self.states), n, dim)``
        """
        chosen = np.stack([rng.choice(len(mass), n, p=mass / mass.sum()) for mass in self.masses])
        means = np.take_along_axis(self.means, chosen[:, :, None], axis=1)
        return means + np.sqrt(np.take_along_axis(self.variances, chosen, axis=1))[:, :, None] * rng.normal(size=means.shape)


def as_dataset(states: np.ndarray, actions: np.ndarray, next_states: np.ndarray, length: int) -> OfflineDataset:
    """
    :param states: shape ``(n, dim)``
    :param actions: shape ``(n, action_dim)``
    :param next_states: shape ``(n, dim)``
    :param length: of episodes, which are truncated
    :return: logged steps without rewards
    """
    n = len(states)
    return OfflineDataset(
        states.astype(np.float32),
        actions.astype(np.float32),
        np.zeros(n),
        next_states.astype(np.float32),
        np.zeros(n, bool),
        np.arange(1, n + 1) % length == 0,
        observation_space=spaces.Box(-5.0, 5.0, states.shape[1:], np.float32),
        action_space=spaces.Box(-1.0, 1.0, actions.shape[1:], np.float32),
    )


# Chain and ring -------------------------------------------------------------------------------------------------------


def circle(n: int) -> np.ndarray:
    """:return: ``n`` states on the unit circle, shape ``(n, 2)``"""
    angles = 2.0 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def shift(n: int, by: int) -> np.ndarray:
    """:return: transition matrix of ``by`` steps around ``n`` states"""
    return np.roll(np.eye(n), by, axis=1)


LEFT_RIGHT = np.stack(
    [0.1 * shift(5, 1) + 0.1 * shift(5, 0) + 0.8 * shift(5, -1), 0.7 * shift(5, 1) + 0.1 * shift(5, 0) + 0.2 * shift(5, -1)]
)
"""Transition matrices of the chain's two actions, -1 and 1."""


def chain_data(right: float) -> OfflineDataset:
    """:return: steps of the chain, to the right with probability ``right``"""
    rng = np.random.default_rng(0)
    actions, index = (rng.uniform(size=N_DATA) < right).astype(int), [0]
    for action in actions:
        index.append(int(rng.choice(5, p=LEFT_RIGHT[action, index[-1]])))
    states = circle(5)[index]
    return as_dataset(states[:-1], 2.0 * actions[:, None] - 1.0, states[1:], N_DATA)


def chain_law(gamma: float, right: float, n: int | None = None) -> Law:
    """
    :param gamma: discount
    :param right: probability of the right action
    :param n: remaining states, for the finite-horizon form
    :return: the measure of both actions in all states
    """
    mean = (1.0 - right) * LEFT_RIGHT[0] + right * LEFT_RIGHT[1]
    if n is None:
        measure = (1.0 - gamma) * LEFT_RIGHT @ np.linalg.inv(np.eye(5) - gamma * mean)
    else:
        measure = sum(LEFT_RIGHT @ np.linalg.matrix_power(mean, k) for k in range(n)) / n
    return _of_atoms(circle(5), measure)


def _of_atoms(atoms: np.ndarray, measure: np.ndarray) -> Law:
    """The law of ``measure``, shape ``(2, n, n)``, in all states and both actions."""
    n = len(atoms)
    return Law(
        np.tile(atoms, (2, 1)),
        np.repeat([-1.0, 1.0], n)[:, None],
        measure.reshape(2 * n, n),
        np.broadcast_to(atoms, (2 * n, n, 2)),
        np.zeros((2 * n, n)),
    )


def ring_data() -> OfflineDataset:
    """:return: steps around the ring, whatever the action"""
    index = np.arange(N_DATA + 1) % 8
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (N_DATA, 1))
    return as_dataset(circle(8)[index[:-1]], actions, circle(8)[index[1:]], N_DATA)


def ring_law(gamma: float, n: int | None = None) -> Law:
    """:return: masses that fall by ``gamma`` from one state to the next, or over ``n`` states equal ones"""
    masses = gamma ** np.arange(8) if n is None else (np.arange(8) < n).astype(float)
    rows = sum(mass / masses.sum() * shift(8, k + 1) for k, mass in enumerate(masses))
    return _of_atoms(circle(8), np.stack([rows, rows]))


# Linear Gaussian system -----------------------------------------------------------------------------------------------

DYNAMICS = 0.98 * np.array([[0.9, 0.2], [-0.2, 0.9]])
"""A turn and a contraction: covariances stay multiples of the identity."""
NOISE = 0.05
LINEAR_STATES = np.array([[2.0, 0.0], [0.0, 2.0], [-1.0, -1.0], [1.0, -1.5], [0.0, 0.5]])


def linear_data() -> OfflineDataset:
    """:return: episodes of 20 steps from all over the square, whatever the action"""
    rng = np.random.default_rng(0)
    episodes = [rng.uniform(-2.5, 2.5, (N_DATA // 20, 2))]
    for _ in range(20):
        episodes.append(episodes[-1] @ DYNAMICS.T + np.sqrt(NOISE) * rng.normal(size=episodes[-1].shape))
    states = np.stack(episodes, axis=1)
    actions = rng.uniform(-1.0, 1.0, (N_DATA, 1))
    return as_dataset(states[:, :-1].reshape(-1, 2), actions, states[:, 1:].reshape(-1, 2), 20)


def linear_law(gamma: float, n_components: int = 300) -> Law:
    """:return: the measure at ``LINEAR_STATES``, cut off after ``n_components`` steps"""
    k = np.arange(1, n_components + 1)
    contraction = float((DYNAMICS @ DYNAMICS.T)[0, 0])
    means = np.stack([LINEAR_STATES @ np.linalg.matrix_power(DYNAMICS, step).T for step in k], axis=1)
    n = len(LINEAR_STATES)
    return Law(
        LINEAR_STATES,
        np.zeros((n, 1)),
        np.broadcast_to((1.0 - gamma) * gamma ** (k - 1), (n, n_components)),
        means,
        np.broadcast_to(NOISE * (1.0 - contraction**k) / (1.0 - contraction), (n, n_components)),
    )
