"""Noise-level densities and noise schedules: pure functions of tensors, without modules or random draws."""

import math
from collections.abc import Callable

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


def linear_betas(n_diffusion_steps: int, beta_min: float = 1e-4, beta_max: float = 0.02) -> th.Tensor:
    r"""
    Variances that grow linearly from ``beta_min`` to ``beta_max`` (arXiv 2006.11239, section 4), meant for 1000 steps.

    :param n_diffusion_steps: length of the chain, $T$
    :param beta_min: $\beta_1$
    :param beta_max: $\beta_T$
    :return: $\beta_1 \dots \beta_T$, shape ``(n_diffusion_steps,)``, float64
    """
    return th.linspace(beta_min, beta_max, n_diffusion_steps, dtype=th.float64)


def cosine_betas(n_diffusion_steps: int, offset: float = 0.008, max_beta: float = 0.999) -> th.Tensor:
    r"""
    The schedule of a squared cosine (arXiv 2102.09672, eq. 17): $\bar\alpha_t = f(t) / f(0)$ with
    $f(t) = \cos^2\left(\frac{t / T + s}{1 + s} \frac{\pi}{2}\right)$ and
    $\beta_t = \min(1 - \bar\alpha_t / \bar\alpha_{t-1}, \beta_{max})$.

    :param n_diffusion_steps: length of the chain, $T$
    :param offset: $s$
    :param max_beta: $\beta_{max}$
    :return: $\beta_1 \dots \beta_T$, shape ``(n_diffusion_steps,)``, float64
    """
    t = th.linspace(0.0, 1.0, n_diffusion_steps + 1, dtype=th.float64)
    f = ((t + offset) / (1.0 + offset) * math.pi / 2.0).cos().square()
    return (1.0 - f[1:] / f[:-1]).clamp(max=max_beta)


def vp_betas(n_diffusion_steps: int, beta_min: float = 0.1, beta_max: float = 10.0) -> th.Tensor:
    r"""
    The variance-preserving equation of arXiv 2011.13456 (appendix B) in $T$ steps, as Diffusion-QL takes it (arXiv
    2208.06193, section 3): $\beta_t = 1 - \exp(-\beta_{min} / T - (\beta_{max} - \beta_{min}) (2 t - 1) / (2 T^2))$.

    $\bar\alpha_T = \exp(-(\beta_{min} + \beta_{max}) / 2)$ whatever $T$ is.

    :param n_diffusion_steps: length of the chain, $T$
    :param beta_min: rate of the noise at the start
    :param beta_max: rate of the noise at the end
    :return: $\beta_1 \dots \beta_T$, shape ``(n_diffusion_steps,)``, float64
    """
    t = th.arange(1, n_diffusion_steps + 1, dtype=th.float64)
    exponent = beta_min / n_diffusion_steps + (beta_max - beta_min) * (2.0 * t - 1.0) / (2.0 * n_diffusion_steps**2)
    return -th.expm1(-exponent)


NOISE_SCHEDULES: dict[str, Callable[[int], th.Tensor]] = {"linear": linear_betas, "cosine": cosine_betas, "vp": vp_betas}
"""Noise schedules of discrete diffusion models by name."""


def noise_schedule_betas(noise_schedule: str, n_diffusion_steps: int) -> th.Tensor:
    """
    :param noise_schedule: ``"linear"``, ``"cosine"`` or ``"vp"``, with the published constants
    :param n_diffusion_steps: length of the chain, at least 1
    :return: its variances, shape ``(n_diffusion_steps,)``, float64
    :raises ValueError: if there is no such schedule or no step
    """
    if noise_schedule not in NOISE_SCHEDULES:
        raise ValueError(f"`noise_schedule` must be one of {list(NOISE_SCHEDULES)}: got {noise_schedule!r}.")
    if n_diffusion_steps < 1:
        raise ValueError(f"`n_diffusion_steps` must be at least 1: got {n_diffusion_steps}.")
    return NOISE_SCHEDULES[noise_schedule](n_diffusion_steps)


def karras_sigmas(n_sampling_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> th.Tensor:
    r"""
    Noise levels for sampling an EDM model (arXiv 2206.00364, eq. 5, without the final 0):
    $\sigma_i = (\sigma_{max}^{1/\rho} + \frac{i}{N-1} (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho}))^\rho$.

    :param n_sampling_steps: number of levels, $N$
    :param sigma_min: last level
    :param sigma_max: first level
    :param rho: how much denser the levels lie towards ``sigma_min``
    :return: falling levels, shape ``(n_sampling_steps,)``, float64
    """
    ramp = th.linspace(0.0, 1.0, n_sampling_steps, dtype=th.float64)
    return (sigma_max ** (1.0 / rho) + ramp * (sigma_min ** (1.0 / rho) - sigma_max ** (1.0 / rho))) ** rho
