r"""
Samplers: from noise to data along falling noise levels, by free functions.

They know a [Denoiser][sb3_diffusion.common.denoisers.Denoiser] and nothing of its network, so that each serves every model.

Each can be guided: a [Guide][sb3_diffusion.common.samplers.Guide] changes the noisy data before each step.

All but Heun's take steps of one form, $x \leftarrow a\, x + b\, D(x) + c\, z$, with numbers $a, b, c$ that depend on the
levels alone. Write $\alpha, \sigma$ for the scales of the level a step leaves and $\alpha', \sigma'$ for those of the level it
reaches; the last step reaches the clean data, $\alpha' = 1$ and $\sigma' = 0$.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch as th

from sb3_diffusion.common.denoisers import Denoiser

Guide = Callable[[int, th.Tensor], th.Tensor]
"""Changes the noisy data before a step: ``guide(k, x) -> x`` with the number ``k`` of the step, from 0."""


class Steps(NamedTuple):
    """
    Scales at both ends of each step, each of shape ``(n_sampling_steps,)``.

    :ivar alpha: of the level that a step leaves
    :ivar sigma: of the level that a step leaves
    :ivar next_alpha: of the level that it reaches
    :ivar next_sigma: of the level that it reaches
    """

    alpha: th.Tensor
    sigma: th.Tensor
    next_alpha: th.Tensor
    next_sigma: th.Tensor

    @property
    def variance(self) -> th.Tensor:
        r"""$\sigma^2 - (\alpha / \alpha')^2 \sigma'^2$: what a step adds; $\beta_i$ where no level is left out."""
        return (self.sigma.square() - (self.alpha / self.next_alpha * self.next_sigma).square()).clamp(min=0.0)

    @property
    def posterior_std(self) -> th.Tensor:
        """Standard deviation of the level that a step reaches, given the one it leaves and the clean data."""
        return self.variance.sqrt() * self.next_sigma / self.sigma


def steps_between(denoiser: Denoiser, levels: th.Tensor) -> Steps:
    """
    :param denoiser: model
    :param levels: falling noise levels, shape ``(n_sampling_steps,)``
    :return: the scales at both ends of each step
    """
    alpha, sigma = denoiser.scales(levels)
    return Steps(alpha, sigma, th.cat([alpha[1:], alpha.new_ones(1)]), th.cat([sigma[1:], sigma.new_zeros(1)]))


def sample_ddpm(
    denoiser: Denoiser,
    x: th.Tensor,
    levels: th.Tensor,
    condition: th.Tensor,
    noises: th.Tensor | None = None,
    posterior_variance: bool = True,
    guide: Guide | None = None,
) -> th.Tensor:
    r"""
    Ancestral sampling (arXiv 2006.11239, algorithm 2): each step draws from the posterior of the next level given the
    estimate of the clean data (eqs. 6 and 7), also where levels are left out.

    :param denoiser: model
    :param x: noisy data at the first level, shape ``(batch_size, ...)``
    :param levels: falling noise levels, shape ``(n_sampling_steps,)``
    :param condition: shape ``(batch_size, condition_dim)``
    :param noises: standard normal, shape ``(n_sampling_steps - 1, batch_size, ...)``; None follows the means. The last
        step adds none.
    :param posterior_variance: variance $\tilde\beta_i$; False takes the larger $\beta_i$
    :param guide: changes the noisy data before each step
    :return: samples, same shape as ``x``; the gradient flows through the whole chain
    """
    steps = steps_between(denoiser, levels)
    variance = steps.variance
    keep = steps.alpha / steps.next_alpha * (steps.next_sigma / steps.sigma).square()
    pull = steps.next_alpha * variance / steps.sigma.square()
    std = steps.posterior_std if posterior_variance else variance.sqrt()
    for k in range(len(levels)):
        x = x if guide is None else guide(k, x)
        x = keep[k] * x + pull[k] * denoiser(x, levels[k : k + 1], condition)
        if noises is not None and k < len(levels) - 1:
            x = x + std[k] * noises[k]
    return x


def sample_ddim(
    denoiser: Denoiser,
    x: th.Tensor,
    levels: th.Tensor,
    condition: th.Tensor,
    noises: th.Tensor | None = None,
    eta: float = 0.0,
    guide: Guide | None = None,
) -> th.Tensor:
    """
    DDIM (arXiv 2010.02502, eqs. 12 and 16): ``eta=0`` is deterministic, ``eta=1`` equals ancestral sampling.

    :param denoiser: model
    :param x: noisy data at the first level, shape ``(batch_size, ...)``
    :param levels: falling noise levels, shape ``(n_sampling_steps,)``
    :param condition: shape ``(batch_size, condition_dim)``
    :param noises: standard normal, shape ``(n_sampling_steps - 1, batch_size, ...)``; None adds none
    :param eta: how much of the posterior standard deviation is drawn anew
    :param guide: changes the noisy data before each step
    :return: samples, same shape as ``x``
    """
    steps = steps_between(denoiser, levels)
    std = eta * steps.posterior_std
    keep = (steps.next_sigma.square() - std.square()).clamp(min=0.0).sqrt() / steps.sigma
    pull = steps.next_alpha - steps.alpha * keep
    for k in range(len(levels)):
        x = x if guide is None else guide(k, x)
        x = keep[k] * x + pull[k] * denoiser(x, levels[k : k + 1], condition)
        if eta > 0.0 and noises is not None and k < len(levels) - 1:
            x = x + std[k] * noises[k]
    return x


def sample_dpm_solver(
    denoiser: Denoiser,
    x: th.Tensor,
    levels: th.Tensor,
    condition: th.Tensor,
    noises: th.Tensor | None = None,
    guide: Guide | None = None,
) -> th.Tensor:
    r"""
    DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): a DDIM step on an estimate that is extrapolated from the last two,
    in $\lambda = \ln(\alpha / \sigma)$. The last step, where $\lambda$ ends at infinity, is of first order. It pays once the
    levels lie close; over long chains in few steps it overshoots where DDIM falls short.

    :param denoiser: model
    :param x: noisy data at the first level, shape ``(batch_size, ...)``
    :param levels: falling noise levels, shape ``(n_sampling_steps,)``
    :param condition: shape ``(batch_size, condition_dim)``
    :param noises: not used: the solver is deterministic
    :param guide: changes the noisy data before each step
    :return: samples, same shape as ``x``
    """
    steps = steps_between(denoiser, levels)
    keep = steps.next_sigma / steps.sigma
    pull = steps.next_alpha - steps.alpha * keep
    step_sizes = (steps.alpha / steps.sigma).log().diff()  # of all steps but the last
    last_denoised = x
    for k in range(len(levels)):
        x = x if guide is None else guide(k, x)
        denoised = extrapolated = denoiser(x, levels[k : k + 1], condition)
        if 0 < k < len(levels) - 1:
            extrapolated = denoised + 0.5 * step_sizes[k] / step_sizes[k - 1] * (denoised - last_denoised)
        x = keep[k] * x + pull[k] * extrapolated
        last_denoised = denoised
    return x


def sample_heun(
    denoiser: Denoiser,
    x: th.Tensor,
    levels: th.Tensor,
    condition: th.Tensor,
    noises: th.Tensor | None = None,
    guide: Guide | None = None,
) -> th.Tensor:
    r"""
    Heun's method of second order on the probability-flow equation (arXiv 2206.00364, algorithm 1), in the coordinates
    $x / \alpha$ and $\sigma / \alpha$, in which every model looks like EDM's: $2 n - 1$ evaluations for $n$ steps.

    On a discrete chain $\sigma / \alpha$ starts in the hundreds (cosine schedule) and falls fast: with few steps the first
    one is too long for a method of second order, and DDIM does better. Rounding may miss a bound of the estimates.

    :param denoiser: model
    :param x: noisy data at the first level, shape ``(batch_size, ...)``
    :param levels: falling noise levels, shape ``(n_sampling_steps,)``
    :param condition: shape ``(batch_size, condition_dim)``
    :param noises: not used: the solver is deterministic
    :param guide: changes the noisy data before each step
    :return: samples, same shape as ``x``
    """
    steps = steps_between(denoiser, levels)
    sigma, next_sigma = steps.sigma / steps.alpha, steps.next_sigma / steps.next_alpha
    x = x / steps.alpha[0]
    for k in range(len(levels)):
        x = x if guide is None else guide(k, steps.alpha[k] * x) / steps.alpha[k]
        slope = (x - denoiser(steps.alpha[k] * x, levels[k : k + 1], condition)) / sigma[k]
        step = next_sigma[k] - sigma[k]
        if k < len(levels) - 1:
            ahead = x + step * slope
            denoised = denoiser(steps.next_alpha[k] * ahead, levels[k + 1 : k + 2], condition)
            slope = 0.5 * (slope + (ahead - denoised) / next_sigma[k])
        x = x + step * slope
    return x


SAMPLERS: dict[str, Callable[..., th.Tensor]] = {
    "ddpm": sample_ddpm,
    "ddim": sample_ddim,
    "dpm_solver": sample_dpm_solver,
    "heun": sample_heun,
}
"""Samplers by name, all called as ``sampler(denoiser, x, levels, condition, noises, guide=guide)``."""

STOCHASTIC_SAMPLERS = ("ddpm",)
"""Those that, with their default arguments, draw noise on the way."""
