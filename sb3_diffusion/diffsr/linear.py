"""Linear functions of features: any reward or value, fitted by ridge regression."""

import math
from typing import NamedTuple

import torch as th


class LinearFit(NamedTuple):
    r"""
    A linear function of features, or of their random Fourier features.

    :ivar weights: shape ``(n_inputs, 1)``
    :ivar bias: shape ``()``
    :ivar r2: share of the variance of the targets that it explains, on the rows that it was fitted to
    :ivar mean: of the features, shape ``(feature_dim,)``
    :ivar scale: standard deviation of the features, shape ``(feature_dim,)``
    :ivar frequencies: $\omega$, shape ``(feature_dim, n_frequencies)``; None if it is linear in the features themselves
    """

    weights: th.Tensor
    bias: th.Tensor
    r2: float
    mean: th.Tensor
    scale: th.Tensor
    frequencies: th.Tensor | None

    def predict(self, features: th.Tensor) -> th.Tensor:
        """
        :param features: shape ``(batch_size, feature_dim)``
        :return: shape ``(batch_size,)``, float64
        """
        inputs = _inputs(features.double(), self.mean, self.scale, self.frequencies)
        return (inputs @ self.weights).squeeze(1) + self.bias


def _inputs(features: th.Tensor, mean: th.Tensor, scale: th.Tensor, frequencies: th.Tensor | None) -> th.Tensor:
    standard = (features - mean) / scale
    if frequencies is None:
        return standard
    angles = standard @ frequencies
    return th.cat([angles.sin(), angles.cos()], dim=1)


def fit_linear(
    features: th.Tensor,
    targets: th.Tensor,
    ridge: float = 1e-6,
    n_frequencies: int = 0,
    length_scale: float | None = None,
    seed: int = 0,
) -> LinearFit:
    r"""
    Ridge regression of targets on features, in float64.

    Linear in the random Fourier features of $\psi$ is what the theory promises of every reward and every action value
    (arXiv 2406.16121); linear in $\psi$ itself, ``n_frequencies=0``, is less.

    :param features: $\psi$, shape ``(n, feature_dim)``, standardised before use
    :param targets: shape ``(n,)`` or ``(n, 1)``
    :param ridge: penalty of the squared weights, in units of the mean squared input
    :param n_frequencies: number of frequencies $\omega \sim N(0, I / \ell^2)$, each of which gives a sine and a cosine
    :param length_scale: $\ell$; None for $\sqrt{d}$
    :param seed: of the frequencies
    :return: the fit
    :raises ValueError: if there are not as many targets as rows
    """
    x, y = features.detach().double(), targets.detach().double().reshape(-1, 1)
    if len(x) != len(y):
        raise ValueError(f"There must be one target for each row of features: got {len(y)} targets and {len(x)} rows.")
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    scale = th.where(std > 1e-8, std, th.ones_like(std))
    frequencies = None
    if n_frequencies > 0:
        drawn = th.randn(x.shape[1], n_frequencies, generator=th.Generator().manual_seed(seed), dtype=th.float64)
        frequencies = drawn.to(x.device) / (math.sqrt(x.shape[1]) if length_scale is None else length_scale)
    inputs = _inputs(x, mean, scale, frequencies)
    centered, center = inputs - inputs.mean(dim=0), y.mean()
    penalty = ridge * centered.square().mean() * len(x)
    rows = th.cat([centered, penalty.sqrt() * th.eye(inputs.shape[1], dtype=th.float64, device=x.device)])
    wanted = th.cat([y - center, y.new_zeros(inputs.shape[1], 1)])
    weights = th.linalg.lstsq(rows, wanted).solution
    bias = center - (inputs.mean(dim=0) @ weights).squeeze()
    residual = (centered @ weights - (y - center)).square().sum()
    total = (y - center).square().sum()
    r2 = 1.0 - (residual / total).item() if total > 0.0 else 1.0
    return LinearFit(weights, bias, r2, mean, scale, frequencies)
