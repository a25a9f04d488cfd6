"""Noise-level densities and noise schedules: pure functions of tensors, without modules or random draws."""

import math

import torch as th


def log_logistic_sigmas(
    uniform: th.Tensor, sigma_data: float = 0.5, sigma_min: float = 0.002, sigma_max: float = 80.0, scale: float = 0.5
) -> th.Tensor:
    r"""
    Noise levels of a log-logistic law with location $\ln\sigma_{data}$, truncated to ``[sigma_min, sigma_max]``.

    The inverse distribution function: with $u$ uniform between $F(\sigma_{min})$ and $F(\sigma_{max})$,
    $\sigma = \sigma_{data} (u / (1 - u))^{scale}$. At ``scale=0.5`` this makes
    $\sigma^2 / (\sigma^2 + \sigma_{data}^2)$ uniform.

    :param uniform: draws from the uniform law on [0, 1), of any shape
    :param sigma_data: standard deviation of the clean data; the median of the levels
    :param sigma_min: smallest level
    :param sigma_max: largest level
    :param scale: spread of $\ln\sigma$
    :return: noise levels, same shape as ``uniform``
    """

    def distribution(sigma: float) -> float:
        return 1.0 / (1.0 + math.exp(-(math.log(sigma) - math.log(sigma_data)) / scale))

    low, high = distribution(sigma_min), distribution(sigma_max)
    u = low + (high - low) * uniform
    sigmas = sigma_data * (u / (1.0 - u)) ** scale
    return sigmas.clamp(sigma_min, sigma_max)
