r"""Networks and losses of Diff-SR that know shapes only: $\psi$, $\zeta$ and heads of Fourier features."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_diffusion.common.schedules import NOISE_SCHEDULES
from sb3_diffusion.common.torch_layers import EnsembleLayerNorm, EnsembleLinear, Mish, embed_levels
from sb3_diffusion.common.utils import check_choice

FEATURE_LOSSES = ("noise", "score", "weighted_score", "displacement")
"""The forms of the feature loss, see [feature_errors][sb3_diffusion.diffsr.networks.feature_errors]."""


class ResidualMLP(nn.Module):
    """
    Multilayer perceptron whose layers of equal width add to what they are given; each is normalised first (arXiv 2002.04745).

    :param in_features: size of the input
    :param out_features: size of the output
    :param net_arch: sizes of the hidden layers; none makes it linear
    :param activation_fn: activation of each hidden layer
    """

    def __init__(
        self, in_features: int, out_features: int, net_arch: Sequence[int], activation_fn: type[nn.Module] = Mish
    ) -> None:
        super().__init__()
        sizes = [in_features, *net_arch, out_features]
        self.first = nn.Linear(sizes[0], sizes[1])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(size), activation_fn(), nn.Linear(size, following))
            for size, following in pairwise(sizes[1:])
        )
        self.adds = [size == following for size, following in pairwise(net_arch)] + [False] * (len(net_arch) > 0)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(batch_size, in_features)``
        :return: shape ``(batch_size, out_features)``
        """
        x = self.first(x)
        for block, adds in zip(self.blocks, self.adds, strict=True):
            x = x + block(x) if adds else block(x)
        return x


class SpectralScore(nn.Module):
    r"""
    $f = \psi^\top \zeta(\tilde s, k)$: the score of the perturbed next state, up to a factor of the level. All that it is
    told of state and action is $\psi(s, a)$, which therefore must hold what the next state depends on.

    It has the form of a network inside a [DiscreteDenoiser][sb3_diffusion.common.denoisers.DiscreteDenoiser], whose
    condition is $\psi$.

    :param state_dim: size of the state, $d_s$
    :param feature_dim: size of $\psi$, $d$
    :param net_arch: sizes of the hidden layers of $\zeta$; ``net_arch[-1] * feature_dim * state_dim`` weights follow the last
    :param activation_fn: activation after each of them
    :param time_embedding_dim: size of the embedding of the noise level
    """

    def __init__(
        self,
        state_dim: int,
        feature_dim: int,
        net_arch: Sequence[int],
        activation_fn: type[nn.Module] = Mish,
        time_embedding_dim: int = 128,
    ) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        self.time_embedding = embed_levels(time_embedding_dim, activation_fn)
        self.zeta = ResidualMLP(state_dim + time_embedding_dim, feature_dim * state_dim, net_arch, activation_fn)

    def forward(self, noisy: th.Tensor, psi: th.Tensor, level: th.Tensor) -> th.Tensor:
        r"""
        :param noisy: $\tilde s$, shape ``(batch_size, state_dim)``
        :param psi: $\psi(s, a)$, shape ``(batch_size, feature_dim)``
        :param level: indices of the noise levels, shape ``(batch_size,)``, or ``(1,)`` for all rows
        :return: $f$, shape ``(batch_size, state_dim)``
        """
        embedding = self.time_embedding(level).expand(len(noisy), -1)
        zeta = self.zeta(th.cat([noisy, embedding], dim=-1)).unflatten(1, (self.feature_dim, -1))
        return th.bmm(psi.unsqueeze(1), zeta).squeeze(1)


def beta_law_betas(n_diffusion_steps: int, a: float = 0.3, b: float = 0.1, margin: float = 1e-3) -> th.Tensor:
    r"""
    The schedule of the authors' code for MuJoCo: $1 - \bar\alpha$ is the distribution function of a beta law at equal
    distances in [``margin``, 1 - ``margin``], so that $\bar\alpha$ falls from 0.967 to 0.391. Levels this far from pure
    noise cannot start a sampler.

    :param n_diffusion_steps: number of levels, $T$
    :param a: first parameter of the law
    :param b: second parameter
    :param margin: how far the levels stay from the ends of the law, below 0.5
    :return: $\beta_1 \dots \beta_T$, shape ``(n_diffusion_steps,)``, float64
    """
    x = th.linspace(margin, 1.0 - margin, n_diffusion_steps, dtype=th.float64)
    lower, upper = _beta_law_tail(x.clamp(max=0.5), a, b), _beta_law_tail((1.0 - x).clamp(max=0.5), b, a)
    alphas_bar = th.where(x <= 0.5, 1.0 - lower, upper)
    return 1.0 - alphas_bar / th.cat([alphas_bar.new_ones(1), alphas_bar[:-1]])


def _beta_law_tail(x: th.Tensor, a: float, b: float) -> th.Tensor:
    """Distribution function of the beta law up to the middle, by the power series of its density."""
    total, coefficient = th.zeros_like(x), 1.0
    for n in range(64):  # a term is less than half the one before
        total = total + coefficient * x**n / (a + n)
        coefficient *= (n + 1.0 - b) / (n + 1.0)
    return x**a * total * math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))


FEATURE_NOISE_SCHEDULES: dict[str, Callable[[int], th.Tensor]] = {**NOISE_SCHEDULES, "beta_law": beta_law_betas}
"""Noise schedules of the features by name: those of the package, and one that only serves a model that is never sampled."""


def feature_noise_betas(noise_schedule: str, n_diffusion_steps: int) -> th.Tensor:
    """
    :param noise_schedule: ``"vp"``, ``"linear"``, ``"cosine"`` or ``"beta_law"``
    :param n_diffusion_steps: number of levels, at least 1
    :return: their variances, shape ``(n_diffusion_steps,)``, float64
    :raises ValueError: if there is no such schedule
    """
    check_choice("noise_schedule", noise_schedule, list(FEATURE_NOISE_SCHEDULES))
    return FEATURE_NOISE_SCHEDULES[noise_schedule](n_diffusion_steps)


def feature_errors(
    form: str, f: th.Tensor, noise: th.Tensor, sigma: th.Tensor, noise_scale: float = 1.0, feature_dim: int = 1
) -> th.Tensor:
    r"""
    Squared errors of the feature loss in one of four forms, with $\tilde s = \sqrt{\bar\alpha} s' + \sqrt{1 - \bar\alpha}\,
    \eta \epsilon$ and $\eta$ = ``noise_scale``. They have the same optimum up to a factor of the level that $\zeta$ takes up:

    * ``"noise"``, $\|f - \epsilon\|^2$: $f$ comes to $-\sqrt{1 - \bar\alpha}\, \eta$ times the score (Spectral-RL, arXiv
      2512.15036);
    * ``"score"``, $\|f + (\tilde s - \sqrt{\bar\alpha} s') / (1 - \bar\alpha)\|^2$: to $\eta^2$ times the score (arXiv
      2406.16121, algorithm 1); errors at the smallest noise outweigh all others;
    * ``"weighted_score"``, $\|\sqrt{1 - \bar\alpha} f / d + \epsilon\|^2$: $f / d$ comes to $\eta$ times the score (the
      authors' code for images);
    * ``"displacement"``, $\|(1 - \bar\alpha) \eta f + (\tilde s - \sqrt{\bar\alpha} s')\|^2$: to $\eta$ times the score
      (the authors' code for MuJoCo).

    :param form: one of ``FEATURE_LOSSES``
    :param f: $\psi^\top \zeta(\tilde s, k)$, shape ``(batch_size, state_dim)``
    :param noise: $\epsilon$, standard normal, same shape
    :param sigma: $\sqrt{1 - \bar\alpha_k}$ of each row, shape ``(batch_size, 1)``
    :param noise_scale: $\eta$
    :param feature_dim: $d$
    :return: same shape as ``f``
    """
    if form == "noise":
        errors = f - noise
    elif form == "score":
        errors = f + noise_scale * noise / sigma
    elif form == "weighted_score":
        errors = sigma * f / feature_dim + noise
    else:
        errors = noise_scale * (sigma.square() * f + sigma * noise)
    return errors.square()


class FourierHeads(nn.Module):
    r"""
    Functions of $\psi$ that are nearly linear in its random Fourier features $\sin(\omega^\top \psi)$,
    $\cos(\omega^\top \psi)$: normalisation, frequencies, both waves, hidden layers with normalisation and ELU, one number.

    :param n_heads: number of functions, evaluated in one batched pass
    :param feature_dim: size of $\psi$, $d$
    :param n_frequencies: number of frequencies of each head; there are twice as many features
    :param net_arch: sizes of the hidden layers above the features
    :param trainable: learn the frequencies, starting as a linear layer does; otherwise they stay what was drawn from
        $N(0, I / d)$
    """

    def __init__(
        self, n_heads: int, feature_dim: int, n_frequencies: int, net_arch: Sequence[int], trainable: bool = True
    ) -> None:
        super().__init__()
        self.norm = EnsembleLayerNorm(n_heads, feature_dim)
        if trainable:
            self.frequencies: nn.Module | None = EnsembleLinear(n_heads, feature_dim, n_frequencies)
        else:
            self.frequencies = None
            drawn = th.randn(n_heads, feature_dim, n_frequencies) / math.sqrt(feature_dim)
            self.register_buffer("fixed_frequencies", drawn)
        sizes = [2 * n_frequencies, *net_arch, 1]
        self.first = EnsembleLinear(n_heads, sizes[0], sizes[1])
        rest: list[nn.Module] = []
        for size, following in pairwise(sizes[1:]):
            rest += [EnsembleLayerNorm(n_heads, size), nn.ELU(), EnsembleLinear(n_heads, size, following)]
        self.rest = nn.Sequential(*rest)

    def fourier_features(self, psi: th.Tensor) -> th.Tensor:
        """
        :param psi: shape ``(batch_size, feature_dim)``
        :return: sines, then cosines, shape ``(n_heads, batch_size, 2 * n_frequencies)``
        """
        normalized = self.norm(psi)
        if self.frequencies is None:
            angles = th.bmm(normalized, self.get_buffer("fixed_frequencies"))
        else:
            angles = self.frequencies(normalized)
        return th.cat([angles.sin(), angles.cos()], dim=-1)

    def hidden(self, psi: th.Tensor) -> th.Tensor:
        """
        :param psi: shape ``(batch_size, feature_dim)``
        :return: the first linear map of the Fourier features, shape ``(n_heads, batch_size, net_arch[0])``
        """
        return self.first(self.fourier_features(psi))

    def forward(self, psi: th.Tensor) -> th.Tensor:
        """
        :param psi: shape ``(batch_size, feature_dim)``
        :return: shape ``(n_heads, batch_size, 1)``
        """
        return self.rest(self.hidden(psi))


def decorrelation_penalty(g: th.Tensor) -> th.Tensor:
    r"""
    $\mathrm{mean}_{i \neq j} (g_i^\top g_j)^2 - 2\, \mathrm{mean}_i \|g_i\|^2 / h + 1 / h$: smallest, 0 up to sampling
    error, where the second moment of $g$ over the batch is $I / h$ (the authors' code; its constant $c$ is 1).

    :param g: rows of each head, shape ``(n_heads, batch_size, h)`` with at least 2 rows
    :return: penalty of each head, shape ``(n_heads,)``
    """
    n, h = g.shape[1:]
    squared_norms = g.square().sum(dim=-1)
    products = th.bmm(g, g.transpose(1, 2)).square().sum(dim=(1, 2)) - squared_norms.square().sum(dim=1)
    return products / (n * (n - 1)) - 2.0 * squared_norms.mean(dim=1) / h + 1.0 / h


def unit_features(psi: th.Tensor) -> th.Tensor:
    r"""
    :param psi: shape ``(batch_size, feature_dim)``
    :return: the same normalised as the heads see it, and divided by $\sqrt{d}$: length 1 or less
    """
    return F.layer_norm(psi, psi.shape[-1:]) / math.sqrt(psi.shape[-1])


def elliptical_bonus(features: th.Tensor, covariance: th.Tensor, n_samples: float, ridge: float = 1.0) -> th.Tensor:
    r"""
    $\sqrt{\phi^\top \Lambda^{-1} \phi}$ with $\Lambda = n C + \lambda I$: how far features lie from those seen, the bonus of
    optimism in linear MDPs (arXiv 1907.05388, algorithm 1).

    :param features: $\phi$, shape ``(batch_size, feature_dim)``
    :param covariance: $C$, mean of $\phi \phi^\top$ over what was seen, or its moving average from 0, shape
        ``(feature_dim, feature_dim)``
    :param n_samples: $n$, how much was seen
    :param ridge: $\lambda$
    :return: shape ``(batch_size, 1)``, at most $\|\phi\| / \sqrt{\lambda}$
    """
    precision = n_samples * covariance + ridge * th.eye(len(covariance), device=covariance.device)
    factor = th.linalg.cholesky(precision)
    whitened = th.linalg.solve_triangular(factor, features.T, upper=False)
    return whitened.square().sum(dim=0).sqrt().unsqueeze(1)
