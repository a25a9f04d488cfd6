"""Networks that know shapes only: activations, time embeddings, conditional and ensemble multilayer perceptrons."""

import math
from collections.abc import Sequence
from typing import Any

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


class _MishFunction(th.autograd.Function):
    r"""
    Mish and its derivative $w + x (1 - w^2) p$, in the terms of `mish`.

    The derivative is made on the way forward and alone is kept, which halves the memory that waits for the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor) -> th.Tensor:
        p, w = _mish_factors(x)
        y = x * w
        slope = th.addcmul(x, y, w, value=-1.0)  # x (1 - w^2)
        ctx.save_for_backward(w.addcmul_(slope, p))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> th.Tensor:
        (derivative,) = ctx.saved_tensors
        return grad_output * derivative


def _mish_factors(x: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
    p = x.sigmoid()
    q = (2.0 - p).mul_(p)
    return p, q.div_(2.0 - q)


def mish(x: th.Tensor) -> th.Tensor:
    r"""
    $x \tanh(\mathrm{softplus}(x))$ (arXiv 1908.08681), equal to ``torch.nn.functional.mish`` within rounding.

    With $p = \mathrm{sigmoid}(x)$ and $q = p (2 - p)$ the factor is $w = \tanh(\mathrm{softplus}(x)) = q / (2 - q)$, exactly:
    one exponential instead of two, a logarithm and a hyperbolic tangent, and no overflow to guard against. Passes over memory
    are what it costs; on a CPU that is several times less than the built-in operator, which costs as much as the matrix
    product beside it.

    :param x: floating tensor of any shape
    :return: tensor of the same shape; it can be differentiated once
    """
    if th.is_grad_enabled() and x.requires_grad:
        return _MishFunction.apply(x)
    return _mish_factors(x)[1].mul_(x)


class Mish(nn.Module):
    """[mish][sb3_diffusion.common.torch_layers.mish] as a module."""

    def forward(self, x: th.Tensor) -> th.Tensor:
        return mish(x)


class SinusoidalEmbedding(nn.Module):
    """
    Sine and cosine features of a scalar, with frequencies from 1 down to 1/10,000 (arXiv 1706.03762, section 3.5).

    :param dim: number of features, even and at least 4
    """

    frequencies: th.Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"The size of a sinusoidal embedding must be even and at least 4: got {dim}.")
        half = dim // 2
        frequencies = th.exp(-math.log(10_000.0) * th.arange(half, dtype=th.float32) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: scalars, shape ``(batch_size,)``
        :return: features, shape ``(batch_size, dim)``
        """
        angles = x.to(self.frequencies.dtype).unsqueeze(-1) * self.frequencies
        return th.cat([angles.sin(), angles.cos()], dim=-1)


def embed_levels(dim: int, activation_fn: type[nn.Module]) -> nn.Sequential:
    """
    :param dim: size of the embedding, even
    :param activation_fn: activation of the layer behind the sines and cosines
    :return: network from noise levels, shape ``(batch_size,)``, to shape ``(batch_size, dim)``
    """
    return nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, 2 * dim), activation_fn(), nn.Linear(2 * dim, dim))


class ConditionalMLP(nn.Module):
    """
    Multilayer perceptron on ``[x, condition, embedding of a noise level]``, the network inside a denoiser of vectors.

    :param dim: size of ``x`` and of the output
    :param condition_dim: size of the condition
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each hidden layer
    :param time_embedding_dim: size of the embedding of the noise level
    :param linear_first_layer: no activation after the first hidden layer
    :param layer_norm: layer normalisation before each activation
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int,
        net_arch: Sequence[int] = (256, 256, 256),
        activation_fn: type[nn.Module] = Mish,
        time_embedding_dim: int = 16,
        linear_first_layer: bool = False,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.time_embedding = embed_levels(time_embedding_dim, activation_fn)
        layers: list[nn.Module] = []
        size = dim + condition_dim + time_embedding_dim
        for i, width in enumerate(net_arch):
            layers.append(nn.Linear(size, width))
            if i > 0 or not linear_first_layer:
                layers += [nn.LayerNorm(width)] if layer_norm else []
                layers.append(activation_fn())
            size = width
        self.trunk = nn.Sequential(*layers, nn.Linear(size, dim))

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(batch_size, dim)``
        :param condition: shape ``(batch_size, condition_dim)``
        :param level: noise level as the network is told it, shape ``(batch_size,)``, or ``(1,)`` for all rows, which is
            embedded once
        :return: shape ``(batch_size, dim)``
        """
        embedding = self.time_embedding(level).expand(len(x), -1)
        return self.trunk(th.cat([x, condition, embedding], dim=-1))


class EnsembleLinear(nn.Module):
    """
    ``n_members`` linear layers as one batched matrix product.

    :param n_members: number of layers
    :param in_features: size of each input
    :param out_features: size of each output
    """

    def __init__(self, n_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        # The law of nn.Linear: uniform on +-1/sqrt(in_features) for weights and biases
        bound = 1.0 / math.sqrt(in_features) if in_features > 0 else 0.0
        self.weight = nn.Parameter(th.empty(n_members, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(n_members, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, in_features)``, or ``(batch_size, in_features)`` shared by all members
        :return: shape ``(n_members, batch_size, out_features)``
        """
        if x.dim() == 2:
            x = x.expand(self.weight.shape[0], *x.shape)
        return th.baddbmm(self.bias, x, self.weight)


class EnsembleLayerNorm(nn.Module):
    """
    Layer normalisation (arXiv 1607.06450) with a scale and a shift for each member.

    :param n_members: number of members
    :param features: size of the last axis
    """

    def __init__(self, n_members: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(th.ones(n_members, 1, features))
        self.bias = nn.Parameter(th.zeros(n_members, 1, features))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(n_members, batch_size, features)``
        :return: same shape
        """
        return th.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


def ensemble_mlp(
    n_members: int,
    in_features: int,
    net_arch: Sequence[int],
    activation_fn: type[nn.Module] = Mish,
    layer_norm: bool = False,
) -> nn.Sequential:
    """
    ``n_members`` perceptrons with one output each, evaluated in one batched pass.

    :param n_members: number of perceptrons
    :param in_features: size of the input
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation after each hidden layer
    :param layer_norm: layer normalisation before each activation
    :return: module from ``(batch_size, in_features)`` to ``(n_members, batch_size, 1)``
    """
    layers: list[nn.Module] = []
    size = in_features
    for width in net_arch:
        layers.append(EnsembleLinear(n_members, size, width))
        if layer_norm:
            layers.append(EnsembleLayerNorm(n_members, width))
        layers.append(activation_fn())
        size = width
    return nn.Sequential(*layers, EnsembleLinear(n_members, size, 1))
