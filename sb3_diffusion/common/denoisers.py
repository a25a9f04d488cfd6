r"""
Denoisers: estimates of clean data from noisy data at a known noise level, in one interface.

Every diffusion model here corrupts data as $x = \alpha\, x_0 + \sigma\, \epsilon$ and is asked for $x_0$. A denoiser
says which $(\alpha, \sigma)$ belongs to a noise level and turns its network's output into an estimate of $x_0$; what
the network itself predicts stays inside. Samplers use nothing else, so that each serves every model.
"""

from abc import ABC, abstractmethod

import torch as th
from torch import nn


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
    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        """
        Estimate the clean data.

        :param noisy: shape ``(batch_size, ...)``
        :param level: noise levels, shape ``(batch_size,)``
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
    """

    def __init__(self, net: nn.Module, sigma_data: float = 0.5, clip: float | None = None) -> None:
        super().__init__(net)
        if not sigma_data > 0.0:
            raise ValueError(f"`sigma_data` must be positive: got {sigma_data}.")
        self.sigma_data = sigma_data
        self.clip = clip

    def scales(self, level: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return th.ones_like(level), level

    def loss_weight(self, level: th.Tensor) -> th.Tensor:
        return (level.square() + self.sigma_data**2) / (level * self.sigma_data).square()

    def corrupt(self, clean: th.Tensor, noise: th.Tensor, level: th.Tensor) -> th.Tensor:
        return th.addcmul(clean, append_dims(level, clean.dim()), noise)

    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        sigma = append_dims(level, noisy.dim())
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        c_skip = (self.sigma_data * c_in).square()
        c_out = sigma * self.sigma_data * c_in
        denoised = c_skip * noisy + c_out * self.net(c_in * noisy, condition, level.log() / 4.0)
        return denoised if self.clip is None else denoised.clamp(-self.clip, self.clip)
