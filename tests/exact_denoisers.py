"""Denoisers that are exact for data whose law is known, and expectations over the noise without random draws."""

from collections.abc import Sequence
from itertools import product

import torch as th
from torch import nn

from sb3_diffusion.common.denoisers import Denoiser, DiscreteDenoiser, append_dims
from sb3_diffusion.common.schedules import karras_sigmas, log_logistic_sigmas


class MixtureDenoiser(Denoiser):
    """
    Posterior mean of clean data from a mixture of isotropic normal laws; the condition is ignored.

    The noise levels are those of EDM. A subclass with its own ``scales`` and ``loss_weight`` is exact for these, for the
    posterior mean is written in terms of ``scales``.

    :param means: shape ``(n_components, dim)``
    :param stds: one for all components, or one each
    :param weights: probabilities of the components; equal if None
    :param sigma_data: of the loss weight
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]],
        stds: float | Sequence[float],
        weights: Sequence[float] | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__(nn.Identity())
        self.means = th.tensor(means, dtype=th.float64)
        n = len(self.means)
        self.stds = th.as_tensor(stds, dtype=th.float64).expand(n)
        self.log_weights = th.tensor([1.0 / n] * n if weights is None else weights, dtype=th.float64).log()
        self.sigma_data = sigma_data

    def scales(self, level: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return th.ones_like(level), level

    def loss_weight(self, level: th.Tensor) -> th.Tensor:
        return 1.0 / level.square() + 1.0 / self.sigma_data**2

    def sampling_levels(self, n_sampling_steps: int) -> th.Tensor:
        return karras_sigmas(n_sampling_steps)

    def prior(self, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        return append_dims(level, noise.dim()) * noise

    def log_density(self, noisy: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param noisy: shape ``(batch_size, dim)``
        :param level: shape ``(batch_size,)``
        :return: log-density of the noisy data, shape ``(batch_size,)``
        """
        return self._log_joint(noisy, level).logsumexp(dim=1)

    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        alpha, sigma = (append_dims(scale, 3) for scale in self.scales(level))
        variances = self.stds.square()[:, None]
        gain = alpha * variances / (alpha.square() * variances + sigma.square())
        posterior_means = self.means + gain * (noisy.unsqueeze(1) - alpha * self.means)
        responsibilities = self._log_joint(noisy, level).softmax(dim=1)
        return (responsibilities.unsqueeze(2) * posterior_means).sum(dim=1)

    def _log_joint(self, noisy: th.Tensor, level: th.Tensor) -> th.Tensor:
        """Log of weight times density of each component, shape ``(batch_size, n_components)``."""
        alpha, sigma = (append_dims(scale, 3) for scale in self.scales(level))
        std = (alpha.square() * self.stds.square()[:, None] + sigma.square()).sqrt()
        components = th.distributions.Normal(alpha * self.means, std)
        return self.log_weights + components.log_prob(noisy.unsqueeze(1)).sum(dim=2)


class NormalDenoiser(MixtureDenoiser):
    r"""
    Posterior mean of clean data from $N(m, s^2)$ in each dimension: $(s^2 x + \sigma^2 m) / (s^2 + \sigma^2)$ for EDM.

    :param mean: of each dimension
    :param std: of all dimensions
    :param sigma_data: of the loss weight
    """

    def __init__(self, mean: Sequence[float], std: float, sigma_data: float = 0.5) -> None:
        super().__init__([list(mean)], std, sigma_data=sigma_data)


class ChainDenoiser(MixtureDenoiser):
    r"""
    Posterior mean of data from a mixture on the noise levels of a chain of discrete steps that keep the variance.

    :param betas: variances of the steps, shape ``(n_diffusion_steps,)``
    :param means: shape ``(n_components, dim)``
    :param stds: one for all components, or one each
    :param weights: probabilities of the components; equal if None
    """

    def __init__(
        self,
        betas: th.Tensor,
        means: Sequence[Sequence[float]],
        stds: float | Sequence[float],
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(means, stds, weights)
        alphas_bar, product = [], 1.0
        for beta in betas.tolist():
            product *= 1.0 - beta
            alphas_bar.append(product)
        self.alphas_bar = th.tensor(alphas_bar, dtype=th.float64)

    def scales(self, level: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.alphas_bar[level].sqrt(), (1.0 - self.alphas_bar[level]).sqrt()

    def loss_weight(self, level: th.Tensor) -> th.Tensor:
        return th.ones_like(self.alphas_bar[level])

    def sampling_levels(self, n_sampling_steps: int) -> th.Tensor:
        return th.linspace(len(self.alphas_bar) - 1, 0, n_sampling_steps, dtype=th.float64).round().long()

    def prior(self, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        return noise


class ExactNetwork(nn.Module):
    r"""
    What a perfectly trained network tells: $\epsilon$, $x_0$ or $v = \alpha\, \epsilon - \sigma\, x_0$ in the mean.

    :param denoiser: posterior mean
    :param prediction_type: ``"noise"``, ``"sample"`` or ``"v"``
    """

    def __init__(self, denoiser: Denoiser, prediction_type: str) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.prediction_type = prediction_type

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        alpha, sigma = (append_dims(scale, x.dim()) for scale in self.denoiser.scales(level))
        denoised = self.denoiser(x, level, condition)
        noise = (x - alpha * denoised) / sigma
        return {"noise": noise, "sample": denoised, "v": alpha * noise - sigma * denoised}[self.prediction_type]


def exact_chain(
    betas: th.Tensor,
    means: Sequence[Sequence[float]],
    stds: float | Sequence[float],
    weights: Sequence[float] | None = None,
    prediction_type: str = "noise",
) -> DiscreteDenoiser:
    """
    The package's discrete model around a perfectly trained network.

    :param betas: variances of the steps, shape ``(n_diffusion_steps,)``
    :param means: shape ``(n_components, dim)``
    :param stds: one for all components, or one each
    :param weights: probabilities of the components; equal if None
    :param prediction_type: ``"noise"``, ``"sample"`` or ``"v"``
    """
    return DiscreteDenoiser(ExactNetwork(ChainDenoiser(betas, means, stds, weights), prediction_type), betas, prediction_type)


def grid_mixture(sigma_data: float = 0.5) -> MixtureDenoiser:
    """25 equally likely normal laws of standard deviation 0.3, centred on {-10, -5, 0, 5, 10}^2."""
    axis = [-10.0, -5.0, 0.0, 5.0, 10.0]
    return MixtureDenoiser(list(product(axis, axis)), 0.3, sigma_data=sigma_data)


def midpoints(n: int) -> th.Tensor:
    """:return: centres of ``n`` equal parts of [0, 1], shape ``(n,)``, float64"""
    return (th.arange(n, dtype=th.float64) + 0.5) / n


def normal_quantiles(n: int) -> th.Tensor:
    """
    :return: centres of ``n`` equally likely parts of the standard normal law, scaled to variance 1, shape ``(n,)``
    """
    quantiles = th.special.ndtri(midpoints(n))
    return quantiles / quantiles.square().mean().sqrt()


def expected_loss(
    denoiser: Denoiser, points: th.Tensor, n_levels: int = 1000, n_noises: int = 51, sigma_data: float = 0.5
) -> th.Tensor:
    """
    Expectation of the loss at each point over the log-logistic noise levels and the noise, a mean over dimensions.

    All dimensions share one noise: exact where an entry of the estimate depends on the same entry of the input alone, as
    for normal data and for mixtures on a full grid.

    :param denoiser: what to evaluate
    :param points: clean data, shape ``(n_points, dim)``
    :param n_levels: noise levels
    :param n_noises: draws of the noise at each level
    :param sigma_data: of the law of the levels
    :return: shape ``(n_points,)``, differentiable in ``points``
    """
    n = n_levels * n_noises
    level = log_logistic_sigmas(midpoints(n_levels), sigma_data).repeat_interleave(n_noises)
    noise = normal_quantiles(n_noises).repeat(n_levels).unsqueeze(1).expand(n, points.shape[1])
    condition = th.zeros(n, 0)
    return th.stack([denoiser.loss(point.expand(n, -1), noise, level, condition).mean() for point in points])
