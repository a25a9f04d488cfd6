r"""
Denoisers: estimates of clean data from noisy data at a known noise level, in one interface.

Every diffusion model here corrupts data as $x = \alpha\, x_0 + \sigma\, \epsilon$ and is asked for $x_0$. A denoiser
says which $(\alpha, \sigma)$ belongs to a noise level and turns its network's output into an estimate of $x_0$; what
the network itself predicts stays inside. Samplers use nothing else, so that each serves every model.
"""

from abc import ABC, abstractmethod

import torch as th
from torch import nn

from sb3_diffusion.common.schedules import karras_sigmas

PREDICTION_TYPES = ("noise", "sample", "v")
"""What the network of a discrete model is trained to tell."""


def append_dims(x: th.Tensor, ndim: int) -> th.Tensor:
    """Shape ``(batch_size,)`` to ``(batch_size, 1, ...)`` with ``ndim`` axes, to broadcast against data."""
    return x.reshape(x.shape + (1,) * (ndim - x.dim()))


class Denoiser(nn.Module, ABC):
    r"""
    Wraps a network that is told a noisy array, a condition and a noise level.

    :param net: ``net(x, condition, level) -> array like x``
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @abstractmethod
    def scales(self, level: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        r"""
        :param level: noise levels, shape ``(batch_size,)``
        :return: $\alpha$ and $\sigma$ of $x = \alpha\, x_0 + \sigma\, \epsilon$, each of shape ``(batch_size,)``
        """

    @abstractmethod
    def loss_weight(self, level: th.Tensor) -> th.Tensor:
        """
        :param level: noise levels, shape ``(batch_size,)``
        :return: weight of the squared error of the estimate of clean data, shape ``(batch_size,)``
        """

    @abstractmethod
    def sampling_levels(self, n_sampling_steps: int) -> th.Tensor:
        """
        Where a sampler stops on its way from noise to data.

        :param n_sampling_steps: number of levels
        :return: falling noise levels, shape ``(n_sampling_steps,)``; after the last one comes the clean data
        """

    @abstractmethod
    def prior(self, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        What sampling starts from.

        :param noise: standard normal, shape ``(batch_size, ...)``
        :param level: first of the sampling levels, shape ``(1,)``
        :return: noisy data at that level, same shape as ``noise``
        """

    @abstractmethod
    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        Estimate the clean data.

        :param noisy: shape ``(batch_size, ...)``
        :param level: noise levels, shape ``(batch_size,)``, or ``(1,)`` for all rows
        :param condition: what the data depends on, shape ``(batch_size, condition_dim)``
        :return: same shape as ``noisy``
        """

    def corrupt(self, clean: th.Tensor, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        r"""
        $\alpha\, x_0 + \sigma\, \epsilon$.

        :param clean: $x_0$, shape ``(batch_size, ...)``
        :param noise: $\epsilon$, standard normal, same shape
        :param level: noise levels, shape ``(batch_size,)``
        :return: same shape
        """
        alpha, sigma = self.scales(level)
        return append_dims(alpha, clean.dim()) * clean + append_dims(sigma, clean.dim()) * noise

    def loss(self, clean: th.Tensor, noise: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        r"""
        $w \|D(\alpha\, x_0 + \sigma\, \epsilon) - x_0\|^2$ of each entry; the gradient flows through both $x_0$.

        :param clean: $x_0$, shape ``(batch_size, ...)``
        :param noise: $\epsilon$, same shape
        :param level: noise levels, shape ``(batch_size,)``
        :param condition: shape ``(batch_size, condition_dim)``
        :return: weighted squared errors, same shape as ``clean``
        """
        error = self(self.corrupt(clean, noise, level), level, condition) - clean
        return append_dims(self.loss_weight(level), clean.dim()) * error.square()


class EDMDenoiser(Denoiser):
    r"""
    The preconditioned denoiser of EDM (arXiv 2206.00364, eq. 7 and table 1); noise levels are $\sigma$ itself.

    $D(x, \sigma) = c_{skip} x + c_{out} F(c_{in} x, \ln(\sigma) / 4)$ with $c_{skip} = \sigma_d^2 / (\sigma^2 + \sigma_d^2)$,
    $c_{out} = \sigma \sigma_d / \sqrt{\sigma^2 + \sigma_d^2}$, $c_{in} = 1 / \sqrt{\sigma^2 + \sigma_d^2}$, and the loss
    weight $1 / c_{out}^2$.

    :param net: the network $F$
    :param sigma_data: $\sigma_d$, standard deviation of the clean data
    :param clip: largest absolute value of an estimate; None for no bound. Where it bites, the gradient is zero.
    :param sigma_min: last level when sampling
    :param sigma_max: first level when sampling
    """

    def __init__(
        self,
        net: nn.Module,
        sigma_data: float = 0.5,
        clip: float | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        super().__init__(net)
        if not sigma_data > 0.0:
            raise ValueError(f"`sigma_data` must be positive: got {sigma_data}.")
        self.sigma_data = sigma_data
        self.clip = clip
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def scales(self, level: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return th.ones_like(level), level

    def loss_weight(self, level: th.Tensor) -> th.Tensor:
        return (level.square() + self.sigma_data**2) / (level * self.sigma_data).square()

    def sampling_levels(self, n_sampling_steps: int) -> th.Tensor:
        if n_sampling_steps < 1:
            raise ValueError(f"`n_sampling_steps` must be at least 1: got {n_sampling_steps}.")
        sigmas = karras_sigmas(n_sampling_steps, self.sigma_min, self.sigma_max)
        return sigmas.to(next(self.net.parameters(), sigmas).device, th.float32)

    def prior(self, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        return append_dims(level, noise.dim()) * noise

    def corrupt(self, clean: th.Tensor, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        return th.addcmul(clean, append_dims(level, clean.dim()), noise)

    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        sigma = append_dims(level, noisy.dim())
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        c_skip = (self.sigma_data * c_in).square()
        c_out = sigma * self.sigma_data * c_in
        denoised = c_skip * noisy + c_out * self.net(c_in * noisy, condition, level.log() / 4.0)
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)


class DiscreteDenoiser(Denoiser):
    r"""
    A model of $T$ discrete steps that keep the variance (DDPM, arXiv 2006.11239, eq. 4):
    $x = \sqrt{\bar\alpha_i}\, x_0 + \sqrt{1 - \bar\alpha_i}\, \epsilon$. Noise levels are the indices $i = 0 \dots T - 1$.

    The network is told the index. By ``prediction_type`` it estimates $\epsilon$ (``"noise"``), $x_0$ (``"sample"``) or
    $v = \sqrt{\bar\alpha_i}\, \epsilon - \sqrt{1 - \bar\alpha_i}\, x_0$ (``"v"``, arXiv 2202.00512, section 4), and the
    loss is the plain squared error of that.

    :param net: ``net(x, condition, index) -> array like x``
    :param betas: variances $\beta_i$ of the steps, shape ``(n_diffusion_steps,)``, see
        [noise_schedule_betas][sb3_diffusion.common.schedules.noise_schedule_betas]
    :param prediction_type: ``"noise"``, ``"sample"`` or ``"v"``
    :param clip: largest absolute value of an estimate of $x_0$; None for no bound. Where it bites, the gradient is zero.
    """

    alphas: th.Tensor
    r"""$\sqrt{\bar\alpha_i}$, shape ``(n_diffusion_steps,)``."""
    sigmas: th.Tensor
    r"""$\sqrt{1 - \bar\alpha_i}$, shape ``(n_diffusion_steps,)``."""

    def __init__(self, net: nn.Module, betas: th.Tensor, prediction_type: str = "noise", clip: float | None = None) -> None:
        super().__init__(net)
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"`prediction_type` must be one of {list(PREDICTION_TYPES)}: got {prediction_type!r}.")
        self.prediction_type = prediction_type
        self.clip = clip
        alphas_bar = (1.0 - betas.double()).cumprod(dim=0)
        self.register_buffer("alphas", alphas_bar.sqrt().float(), persistent=False)
        self.register_buffer("sigmas", (1.0 - alphas_bar).sqrt().float(), persistent=False)

    @property
    def n_diffusion_steps(self) -> int:
        """Length of the chain, $T$."""
        return len(self.alphas)

    def scales(self, level: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.alphas[level], self.sigmas[level]

    def loss_weight(self, level: th.Tensor) -> th.Tensor:
        alpha, sigma = self.scales(level)
        return {"noise": alpha / sigma, "sample": th.ones_like(alpha), "v": 1.0 / sigma}[self.prediction_type].square()

    def sampling_levels(self, n_sampling_steps: int) -> th.Tensor:
        """
        Indices at equal distances, the first and the last of the chain among them (of one step, the first).

        :param n_sampling_steps: number of levels, at most ``n_diffusion_steps``
        :return: falling indices, shape ``(n_sampling_steps,)``, int64
        :raises ValueError: if the chain has fewer steps
        """
        if not 1 <= n_sampling_steps <= self.n_diffusion_steps:
            raise ValueError(
                f"`n_sampling_steps` must lie in [1, {self.n_diffusion_steps}], the length of the chain: "
                f"got {n_sampling_steps}."
            )
        levels = th.linspace(self.n_diffusion_steps - 1, 0, n_sampling_steps, dtype=th.float64)
        return levels.round().long().to(self.alphas.device)

    def prior(self, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        return noise

    def target(self, clean: th.Tensor, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        r"""
        What the network should tell.

        :param clean: $x_0$, shape ``(batch_size, ...)``
        :param noise: $\epsilon$, same shape
        :param level: indices, shape ``(batch_size,)``
        :return: same shape
        """
        if self.prediction_type == "noise":
            return noise
        if self.prediction_type == "sample":
            return clean
        alpha, sigma = (append_dims(scale, clean.dim()) for scale in self.scales(level))
        return alpha * noise - sigma * clean

    def loss(self, clean: th.Tensor, noise: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        r"""
        Squared error of the network's own estimate: equal to $w \|D(x) - x_0\|^2$ without a bound on $D$, and free of
        the division by a small $\sqrt{\bar\alpha_i}$.

        :param clean: $x_0$, shape ``(batch_size, ...)``
        :param noise: $\epsilon$, same shape
        :param level: indices, shape ``(batch_size,)``
        :param condition: shape ``(batch_size, condition_dim)``
        :return: squared errors, same shape as ``clean``
        """
        prediction = self.net(self.corrupt(clean, noise, level), condition, level)
        return (prediction - self.target(clean, noise, level)).square()

    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        prediction = self.net(noisy, condition, level)
        alpha, sigma = (append_dims(scale, noisy.dim()) for scale in self.scales(level))
        if self.prediction_type == "noise":
            denoised = (noisy - sigma * prediction) / alpha
        elif self.prediction_type == "sample":
            denoised = prediction
        else:
            denoised = alpha * noisy - sigma * prediction
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)
