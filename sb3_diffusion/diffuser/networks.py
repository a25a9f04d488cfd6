"""
Networks on windows of steps: temporal U-Net and transformer, each with a value model beside it. They know shapes only.

Every network takes windows ``(batch_size, horizon, dim)`` and one noise level per window, or one for all. The U-Nets
compute on ``(horizon, batch_size, width)``: any run of steps is then one contiguous matrix, so that a convolution is a sum
of matrix products that reads no copies and skips the padding.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch as th
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from sb3_diffusion.common.torch_layers import Mish, SinusoidalEmbedding

N_GROUPS = 8
"""Groups of channels in a group normalisation."""


def check_horizon(horizon: int, n_levels: int) -> None:
    """
    Refuse a horizon that a [TemporalUnet][sb3_diffusion.diffuser.networks.TemporalUnet] cannot halve and double back.

    :param horizon: number of steps of a window
    :param n_levels: number of resolutions, that is ``len(multipliers)``
    :raises ValueError: unless ``horizon`` is a positive multiple of ``2 ** (n_levels - 1)``
    """
    factor = 2 ** (n_levels - 1)
    if horizon < 1 or horizon % factor:
        lower = horizon // factor * factor
        nearest = f"{lower} or {lower + factor}" if lower > 0 else f"{factor}"
        raise ValueError(
            f"`horizon` must be a multiple of {factor} for a temporal U-Net of {n_levels} levels: got {horizon}; "
            f"take {nearest}, or fewer `multipliers`."
        )


# ---------------------------------------------------------------- layers on (horizon, batch_size, width)


class _Taps(NamedTuple):
    """
    Which steps of the input meet which steps of the output, for each tap of a convolution.

    With a stride, steps are dealt out to as many parts, so that what a tap meets lies side by side in one of them.

    :ivar in_stride: number of parts of the input
    :ivar out_stride: number of parts of the output
    :ivar meetings: part and steps of the input, part and steps of the output, equally many
    """

    in_stride: int
    out_stride: int
    meetings: tuple[tuple[int, slice, int, slice], ...]

    def swap(self) -> "_Taps":
        """The taps of the transposed convolution, which is also the way back to the input."""
        return _Taps(self.out_stride, self.in_stride, tuple((o, outs, i, ins) for i, ins, o, outs in self.meetings))


def _taps(n_in: int, n_out: int, kernel_size: int, stride: int, padding: int) -> _Taps:
    """Output ``h`` meets input ``stride * h + tap - padding``; outside the window there is nothing to meet."""
    meetings = []
    for tap in range(kernel_size):
        shift, part = divmod(tap - padding, stride)
        n_part = (n_in - part + stride - 1) // stride
        first = max(0, -shift)
        last = max(first, min(n_out, n_part - shift))
        meetings.append((part, slice(first + shift, last + shift), 0, slice(first, last)))
    return _Taps(stride, 1, tuple(meetings))


_cached_taps = lru_cache(maxsize=1024)(_taps)


def _taps_of(*shape: int, **options: int) -> _Taps:
    """Made once for each shape, also by a compiler, which keeps them itself and cannot look into the cache."""
    return _taps(*shape, **options) if th.compiler.is_compiling() else _cached_taps(*shape, **options)


def _split(x: th.Tensor, stride: int) -> list[th.Tensor]:
    """Steps dealt out to ``stride`` parts, each ``(n_steps, batch_size, width)``; one part is not copied."""
    return [x[part::stride].contiguous() for part in range(stride)]


def _join(parts: Sequence[th.Tensor]) -> th.Tensor:
    """What ``_split`` split: shape ``(horizon, batch_size, width)``; one part is not copied."""
    if len(parts) == 1:
        return parts[0]
    out = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
    for i, part in enumerate(parts):
        out[i :: len(parts)] = part
    return out


def _rows(part: th.Tensor, steps: slice) -> th.Tensor:
    """View of some steps, shape ``(n_steps * batch_size, width)``. The sizes of batches are no constants to a compiler so."""
    return part[steps].view(-1, part.shape[-1])


def _add_products(out: list[th.Tensor], x: list[th.Tensor], weight: th.Tensor, taps: _Taps) -> None:
    """Adds to the parts of the output, in place, the product of each tap with the steps of the input that it meets."""
    for matrix, (i, ins, o, outs) in zip(weight.unbind(0), taps.meetings, strict=True):
        _rows(out[o], outs).addmm_(_rows(x[i], ins), matrix)


def _as_autocast(x: th.Tensor, *weights: th.Tensor) -> tuple[th.Tensor, ...]:
    """Products in place are not autocast by torch: all tensors in the type in which other products are made."""
    device = x.device.type
    if not th.is_autocast_enabled(device):
        return x, *weights
    return tuple(tensor.to(th.get_autocast_dtype(device)) for tensor in (x, *weights))


class _ConvFunction(th.autograd.Function):
    """Bias plus the sum over taps of matrix products, and the products that are its derivatives."""

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, n_out: int, taps: _Taps) -> th.Tensor:
        parts = _split(x, taps.in_stride)
        ctx.save_for_backward(weight, *parts)
        ctx.taps = taps
        out = [bias.repeat(n_out // taps.out_stride, x.shape[1], 1) for _ in range(taps.out_stride)]
        _add_products(out, parts, weight, taps)
        return _join(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor | None, ...]:
        weight, *parts = ctx.saved_tensors
        grads = _split(grad_output.contiguous(), ctx.taps.out_stride)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_parts = [th.zeros_like(part) for part in parts]
            _add_products(grad_parts, grads, weight.transpose(1, 2), ctx.taps.swap())
            grad_x = _join(grad_parts)
        if ctx.needs_input_grad[1]:
            grad_weight = th.empty_like(weight)
            for matrix, (i, ins, o, outs) in zip(grad_weight.unbind(0), ctx.taps.meetings, strict=True):
                th.mm(_rows(parts[i], ins).t(), _rows(grads[o], outs), out=matrix)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.flatten(0, 1).sum(0)
        return grad_x, grad_weight, grad_bias, None, None


class TemporalConv(nn.Module):
    """
    Convolution over steps, zero outside the window; equal to ``nn.Conv1d`` with ``padding = (kernel_size - 1) // 2``.

    :param in_width: channels of the input
    :param out_width: channels of the output
    :param kernel_size: number of taps, odd
    :param stride: step of the output; ``n`` steps become ``(n - 1) // stride + 1``
    """

    def __init__(self, in_width: int, out_width: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"`kernel_size` must be odd, so that a window keeps its length: got {kernel_size}.")
        self.stride = stride
        # The law of nn.Conv1d: uniform on +-1/sqrt(in_width * kernel_size) for weights and biases
        bound = 1.0 / math.sqrt(in_width * kernel_size)
        self.weight = nn.Parameter(th.empty(kernel_size, in_width, out_width).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(out_width).uniform_(-bound, bound))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: contiguous, shape ``(horizon, batch_size, in_width)``
        :return: shape ``((horizon - 1) // stride + 1, batch_size, out_width)``
        """
        kernel_size = len(self.weight)
        n_out = (len(x) - 1) // self.stride + 1
        taps = _taps_of(len(x), n_out, kernel_size, self.stride, kernel_size // 2)
        return _ConvFunction.apply(*_as_autocast(x, self.weight, self.bias), n_out, taps).to(x.dtype)


class TemporalUpsample(nn.Module):
    """
    Twice as many steps; equal to ``nn.ConvTranspose1d`` with ``kernel_size=4, stride=2, padding=1``.

    :param width: channels of input and output
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(4 * width)
        self.weight = nn.Parameter(th.empty(4, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(th.empty(width).uniform_(-bound, bound))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: contiguous, shape ``(horizon, batch_size, width)``
        :return: shape ``(2 * horizon, batch_size, width)``
        """
        n_out = 2 * len(x)
        taps = _taps_of(n_out, len(x), kernel_size=4, stride=2, padding=1).swap()
        return _ConvFunction.apply(*_as_autocast(x, self.weight, self.bias), n_out, taps).to(x.dtype)


class _GroupNormFunction(th.autograd.Function):
    r"""
    $\gamma (x - m) / s + \beta$ with mean $m$ and standard deviation $s$ over the steps and the channels of a group.

    Means run over steps first: each pass over memory is contiguous, and what is left has one entry per window and channel.
    ``groups``, shape ``(8, width)``, is 1 where a channel belongs to a group, 0 elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, x: th.Tensor, weight: th.Tensor, bias: th.Tensor, groups: th.Tensor, eps: float) -> th.Tensor:
        average = groups.t() * (N_GROUPS / x.shape[-1])
        centred = x - x.mean(0) @ average @ groups
        variance = centred.square().mean(0) @ average
        inverse = variance.add_(eps).rsqrt_() @ groups
        scale = inverse * weight
        ctx.save_for_backward(centred, inverse, scale, groups, average)
        return th.addcmul(bias, centred, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: th.Tensor) -> tuple[th.Tensor | None, ...]:
        centred, inverse, scale, groups, average = ctx.saved_tensors
        level = grad_output.sum(0)
        slope = (grad_output * centred).sum(0).mul_(inverse)
        grad_weight, grad_bias = slope.sum(0), level.sum(0)
        level, slope = (th.stack([level, slope]).mul_(scale) @ average @ groups).mul_(-1.0 / len(centred)).unbind(0)
        grad_x = th.addcmul(level, grad_output, scale).addcmul_(centred, slope.mul_(inverse))
        return grad_x, grad_weight, grad_bias, None, None


class TemporalGroupNorm(nn.Module):
    """
    Group normalisation (arXiv 1803.08494) with eight groups; equal to ``nn.GroupNorm(8, width)`` on channels first.

    :param width: channels, a multiple of 8
    :param eps: added to each variance
    """

    groups: th.Tensor

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        if width % N_GROUPS:
            raise ValueError(
                f"Group normalisation needs widths that are multiples of {N_GROUPS}: got {width}; change `base_width` "
                "or `multipliers` (a value net also halves its last width twice)."
            )
        self.eps = eps
        self.weight = nn.Parameter(th.ones(width))
        self.bias = nn.Parameter(th.zeros(width))
        self.register_buffer("groups", th.eye(N_GROUPS).repeat_interleave(width // N_GROUPS, dim=1), persistent=False)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(horizon, batch_size, width)``
        :return: same shape
        """
        device = x.device.type
        with th.autocast(device, enabled=False) if th.is_autocast_enabled(device) else nullcontext():  # means are no products
            return _GroupNormFunction.apply(x, self.weight, self.bias, self.groups, self.eps)


class LinearAttention(nn.Module):
    """
    Attention whose cost grows with the horizon, not its square (arXiv 1812.01243): keys are weighted over the steps first.
    As in the authors' code there is no softmax over the features of a query. Layer normalisation before, residual around.

    :param width: channels of input and output
    :param n_heads: number of heads
    :param head_width: channels of each head
    """

    def __init__(self, width: int, n_heads: int = 4, head_width: int = 32) -> None:
        super().__init__()
        self.heads = (3, n_heads, head_width)
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * n_heads * head_width, bias=False)
        self.out = nn.Linear(n_heads * head_width, width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(horizon, batch_size, width)``
        :return: same shape
        """
        queries, keys, values = self.queries_keys_values(self.norm(x)).unflatten(-1, self.heads).unbind(-3)
        context = th.einsum("hbnk,hbnv->bnkv", keys.softmax(dim=0), values) * self.heads[-1] ** -0.5
        return x + self.out(th.einsum("hbnk,bnkv->hbnv", queries, context).flatten(-2))


class ResidualBlock(nn.Module):
    """
    Two convolutions, each with group normalisation and activation, the noise level between them, and a residual around them.

    :param in_width: channels of the input
    :param out_width: channels of the output
    :param kernel_size: taps of the convolutions
    :param activation_fn: activation after each normalisation
    """

    def __init__(self, in_width: int, out_width: int, kernel_size: int, activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.first = _conv_block(in_width, out_width, kernel_size, activation_fn)
        self.second = _conv_block(out_width, out_width, kernel_size, activation_fn)
        self.residual = nn.Linear(in_width, out_width) if in_width != out_width else nn.Identity()

    def forward(self, x: th.Tensor, shift: th.Tensor) -> th.Tensor:
        """
        :param x: shape ``(horizon, batch_size, in_width)``
        :param shift: what the noise level adds to each channel, shape ``(batch_size, out_width)`` or ``(1, out_width)``
        :return: shape ``(horizon, batch_size, out_width)``
        """
        return self.second(self.first(x) + shift) + self.residual(x)


def _conv_block(in_width: int, out_width: int, kernel_size: int, activation_fn: type[nn.Module]) -> nn.Sequential:
    """Convolution, group normalisation, activation."""
    return nn.Sequential(TemporalConv(in_width, out_width, kernel_size), TemporalGroupNorm(out_width), activation_fn())


class _LevelEmbedding(nn.Module):
    """
    Noise level to features, and features to the shift of each residual block, by one layer for all blocks.

    :param width: number of features
    :param block_widths: output channels of the residual blocks, in the order of their use
    :param activation_fn: activation of the hidden layer and before the last one
    """

    def __init__(self, width: int, block_widths: Sequence[int], activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.block_widths = list(block_widths)
        self.features = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, 4 * width), activation_fn(), nn.Linear(4 * width, width)
        )
        self.shifts = nn.Sequential(activation_fn(), nn.Linear(width, sum(self.block_widths)))

    def forward(self, level: th.Tensor) -> tuple[th.Tensor, Iterator[th.Tensor]]:
        """
        :param level: shape ``(batch_size,)`` or ``(1,)``
        :return: features ``(len(level), width)``, and the shifts, each ``(len(level), block_width)``
        """
        features = self.features(level)
        return features, iter(self.shifts(features).split(self.block_widths, dim=-1))


class _Stage(nn.Module):
    """
    What happens at one resolution: two residual blocks, then attention if asked for.

    :param in_width: channels of the input
    :param out_width: channels of the output
    :param kernel_size: taps of the convolutions
    :param activation_fn: activation function
    :param attention: linear attention after the blocks
    """

    def __init__(
        self, in_width: int, out_width: int, kernel_size: int, activation_fn: type[nn.Module], attention: bool = False
    ) -> None:
        super().__init__()
        self.first = ResidualBlock(in_width, out_width, kernel_size, activation_fn)
        self.second = ResidualBlock(out_width, out_width, kernel_size, activation_fn)
        self.attention = LinearAttention(out_width) if attention else nn.Identity()

    def forward(self, x: th.Tensor, shifts: Iterator[th.Tensor]) -> th.Tensor:
        """
        :param x: shape ``(horizon, batch_size, in_width)``
        :param shifts: the next two are taken, one for each block
        :return: shape ``(horizon, batch_size, out_width)``
        """
        x = self.first(x, next(shifts))
        return self.attention(self.second(x, next(shifts)))


# ---------------------------------------------------------------- U-Nets


class TemporalUnet(nn.Module):
    """
    U-Net over the steps of a window (arXiv 2205.09991), with the structure of the authors' code.

    Each level holds two residual blocks; between levels the steps are halved, on the way up doubled. As in the authors' code
    the features of the first level are not passed across: the way up ends where it reaches their resolution. A trained net
    serves every horizon that [check_horizon][sb3_diffusion.diffuser.networks.check_horizon] lets through.

    :param dim: channels of a window
    :param base_width: channels that ``multipliers`` multiply, also the size of the embedding of the noise level
    :param multipliers: width of each level as a multiple of ``base_width``
    :param kernel_size: taps of the convolutions, odd
    :param attention: [LinearAttention][sb3_diffusion.diffuser.networks.LinearAttention] after each level and in the middle
    :param activation_fn: activation function
    """

    def __init__(
        self,
        dim: int,
        base_width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        kernel_size: int = 5,
        attention: bool = False,
        activation_fn: type[nn.Module] = Mish,
    ) -> None:
        super().__init__()
        widths = [base_width * multiplier for multiplier in multipliers]
        bottom = widths[-1]
        up_widths = widths[-2::-1]
        self.n_levels = len(widths)
        block_widths = [width for width in [*widths, bottom, *up_widths] for _ in range(2)]
        self.level_embedding = _LevelEmbedding(base_width, block_widths, activation_fn)
        self.down = nn.ModuleList(
            _Stage(in_width, width, kernel_size, activation_fn, attention)
            for in_width, width in zip([dim, *widths[:-1]], widths, strict=True)
        )
        self.downsample = nn.ModuleList(TemporalConv(width, width, kernel_size=3, stride=2) for width in widths[:-1])
        self.middle_in = ResidualBlock(bottom, bottom, kernel_size, activation_fn)
        self.middle_attention = LinearAttention(bottom) if attention else nn.Identity()
        self.middle_out = ResidualBlock(bottom, bottom, kernel_size, activation_fn)
        self.up = nn.ModuleList(
            _Stage(2 * skip_width, width, kernel_size, activation_fn, attention)
            for skip_width, width in zip(widths[:0:-1], up_widths, strict=True)
        )
        self.upsample = nn.ModuleList(TemporalUpsample(width) for width in up_widths)
        self.head = nn.Sequential(_conv_block(widths[0], widths[0], kernel_size, activation_fn), nn.Linear(widths[0], dim))

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param level: noise level as the network is told it, shape ``(batch_size,)``, or ``(1,)`` for all windows, which is
            embedded once
        :return: same shape as ``x``
        :raises ValueError: if the horizon cannot be halved ``len(multipliers) - 1`` times
        """
        check_horizon(x.shape[1], self.n_levels)
        _, shifts = self.level_embedding(level)
        hidden = x.transpose(0, 1).contiguous()
        skips = []
        for i, stage in enumerate(self.down):
            hidden = stage(self.downsample[i - 1](hidden) if i > 0 else hidden, shifts)
            skips.append(hidden)
        hidden = self.middle_attention(self.middle_in(hidden, next(shifts)))
        hidden = self.middle_out(hidden, next(shifts))
        for stage, upsample in zip(self.up, self.upsample, strict=True):
            hidden = upsample(stage(th.cat([hidden, skips.pop()], dim=-1), shifts))
        return self.head(hidden).transpose(0, 1).contiguous()


class ValueUnet(nn.Module):
    """
    Value of a noisy window: the way down of a U-Net, two shrinking blocks and a perceptron (arXiv 2205.09991, authors' code).

    Departure from the authors' code: the size of the perceptron follows from the convolutions, each of which turns ``n`` steps
    into ``(n - 1) // 2 + 1``, so that any horizon works; for those that work there the sizes agree.

    :param dim: channels of a window
    :param horizon: steps of a window, at least 1
    :param base_width: channels that ``multipliers`` multiply, also the size of the embedding of the noise level
    :param multipliers: width of each level as a multiple of ``base_width``; the last width must be a multiple of 32,
        better of 64: a group of channels then never holds a single number, which normalisation would wipe out
    :param kernel_size: taps of the convolutions, odd
    :param activation_fn: activation function
    """

    def __init__(
        self,
        dim: int,
        horizon: int,
        base_width: int = 32,
        multipliers: Sequence[int] = (1, 2, 4, 8),
        kernel_size: int = 5,
        activation_fn: type[nn.Module] = Mish,
    ) -> None:
        super().__init__()
        if horizon < 1:
            raise ValueError(f"`horizon` must be at least 1: got {horizon}.")
        self.horizon = horizon
        widths = [base_width * multiplier for multiplier in multipliers]
        shrinking = [widths[-1] // 2, widths[-1] // 4]
        block_widths = [width for width in widths for _ in range(2)] + shrinking
        self.level_embedding = _LevelEmbedding(base_width, block_widths, activation_fn)
        self.down = nn.ModuleList(
            _Stage(in_width, width, kernel_size, activation_fn)
            for in_width, width in zip([dim, *widths[:-1]], widths, strict=True)
        )
        self.shrink = nn.ModuleList(ResidualBlock(2 * width, width, kernel_size, activation_fn) for width in shrinking)
        self.downsample = nn.ModuleList(TemporalConv(width, width, kernel_size=3, stride=2) for width in [*widths, *shrinking])
        n_steps = horizon
        for _ in self.downsample:
            n_steps = (n_steps - 1) // 2 + 1
        size = n_steps * shrinking[-1]
        self.head = nn.Sequential(nn.Linear(size + base_width, size // 2), activation_fn(), nn.Linear(size // 2, 1))

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param level: noise level as the network is told it, shape ``(batch_size,)`` or ``(1,)``
        :return: shape ``(batch_size, 1)``
        :raises ValueError: if the windows have another length than the one the network was made for
        """
        if x.shape[1] != self.horizon:
            raise ValueError(
                f"This value net was made for windows of {self.horizon} steps: got {x.shape[1]}; make one for those."
            )
        features, shifts = self.level_embedding(level)
        hidden = x.transpose(0, 1).contiguous()
        n_levels = len(self.down)
        for stage, downsample in zip(self.down, self.downsample[:n_levels], strict=True):
            hidden = downsample(stage(hidden, shifts))
        for block, downsample in zip(self.shrink, self.downsample[n_levels:], strict=True):
            hidden = downsample(block(hidden, next(shifts)))
        hidden = hidden.transpose(0, 1).flatten(1)
        return self.head(th.cat([hidden, features.expand(len(x), -1)], dim=-1))


# ---------------------------------------------------------------- transformers


def _modulate(x: th.Tensor, shift: th.Tensor, scale: th.Tensor) -> th.Tensor:
    """What adaptive layer normalisation does to a normalised ``x``: $(1 + scale) x + shift$."""
    return th.addcmul(shift, x, 1.0 + scale)


class _TransformerBlock(nn.Module):
    """
    Attention in both directions and a perceptron, each between an adaptive layer normalisation and a gated residual.

    :param width: channels of a step
    :param n_heads: number of heads
    :param activation_fn: activation of the perceptron, whose hidden layer has ``4 * width`` units
    """

    def __init__(self, width: int, n_heads: int, activation_fn: type[nn.Module]) -> None:
        super().__init__()
        self.heads = (3, n_heads, width // n_heads)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), activation_fn(), nn.Linear(4 * width, width))

    def _attend(self, x: th.Tensor) -> th.Tensor:
        """Softmax attention over the steps, shape ``(batch_size, horizon, width)`` in and out."""
        queries, keys, values = self.queries_keys_values(x).unflatten(-1, self.heads).transpose(1, 3).unbind(2)
        return self.out(F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2))

    def forward(self, x: th.Tensor, modulation: Sequence[th.Tensor]) -> th.Tensor:
        """
        :param x: shape ``(batch_size, horizon, width)``
        :param modulation: shift, scale and gate of the attention, then of the perceptron, each of shape
            ``(batch_size, 1, width)`` or ``(1, 1, width)``
        :return: same shape as ``x``
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = th.addcmul(x, gate, self._attend(_modulate(self.norm(x), shift, scale)))
        return th.addcmul(x, mlp_gate, self.mlp(_modulate(self.norm(x), mlp_shift, mlp_scale)))


class _TransformerTrunk(nn.Module):
    """
    What both transformers share: windows and noise levels to normalised features of each step.

    The noise level sets shift, scale and gate of each normalisation, by one layer for all blocks that starts at zero: at first
    each block is the identity (arXiv 2212.09748, section 3.2, "adaLN-Zero").
    """

    def __init__(
        self, dim: int, horizon: int, width: int, n_layers: int, n_heads: int, activation_fn: type[nn.Module]
    ) -> None:
        super().__init__()
        if horizon < 1:
            raise ValueError(f"`horizon` must be at least 1: got {horizon}.")
        if width % n_heads:
            raise ValueError(f"`width` must be a multiple of `n_heads`: got {width} and {n_heads}.")
        self.width = width
        self.inputs = nn.Linear(dim, width)
        self.positions = nn.Parameter(th.empty(horizon, width).normal_(std=0.02))
        self.blocks = nn.ModuleList(_TransformerBlock(width, n_heads, activation_fn) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, (6 * n_layers + 2) * width)
        self.level_embedding = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param level: shape ``(batch_size,)`` or ``(1,)``
        :return: shape ``(batch_size, horizon, width)``
        """
        n_steps, horizon = x.shape[1], len(self.positions)
        if n_steps > horizon:
            raise ValueError(f"This transformer was made for windows of at most {horizon} steps: got {n_steps}.")
        *modulation, shift, scale = self.modulation(self.level_embedding(level)).unsqueeze(1).split(self.width, dim=-1)
        hidden = self.inputs(x) + self.positions[:n_steps]
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, modulation[6 * i : 6 * i + 6])
        return _modulate(self.norm(hidden), shift, scale)


class TrajectoryTransformer(nn.Module):
    """
    Transformer over the steps of a window, told the noise level through adaptive layer normalisation (arXiv 2212.09748), the
    backbone that arXiv 2503.00535 prefers to the U-Net. Each step sees all others. The last layer starts at zero.

    :param dim: channels of a window
    :param horizon: longest window, which sets the number of learned positions; shorter ones are taken too
    :param width: channels of a step inside, a multiple of ``n_heads``, even
    :param n_layers: number of blocks
    :param n_heads: number of attention heads
    :param activation_fn: activation of the perceptrons
    """

    def __init__(
        self,
        dim: int,
        horizon: int,
        width: int = 256,
        n_layers: int = 2,
        n_heads: int = 4,
        activation_fn: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.trunk = _TransformerTrunk(dim, horizon, width, n_layers, n_heads, activation_fn)
        self.head = nn.Linear(width, dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param level: noise level as the network is told it, shape ``(batch_size,)``, or ``(1,)`` for all windows, which is
            embedded once
        :return: same shape as ``x``
        :raises ValueError: if the windows are longer than the network was made for
        """
        return self.head(self.trunk(x, level))


class ValueTransformer(nn.Module):
    """
    Value of a noisy window: the trunk of [TrajectoryTransformer][sb3_diffusion.diffuser.networks.TrajectoryTransformer], the
    mean over steps, and a perceptron.

    :param dim: channels of a window
    :param horizon: longest window; shorter ones are taken too
    :param width: channels of a step inside, a multiple of ``n_heads``, even
    :param n_layers: number of blocks
    :param n_heads: number of attention heads
    :param activation_fn: activation of the perceptrons
    """

    def __init__(
        self,
        dim: int,
        horizon: int,
        width: int = 256,
        n_layers: int = 2,
        n_heads: int = 4,
        activation_fn: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.trunk = _TransformerTrunk(dim, horizon, width, n_layers, n_heads, activation_fn)
        self.head = nn.Sequential(nn.Linear(width, width), activation_fn(), nn.Linear(width, 1))

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        """
        :param x: windows, shape ``(batch_size, horizon, dim)``
        :param level: noise level as the network is told it, shape ``(batch_size,)`` or ``(1,)``
        :return: shape ``(batch_size, 1)``
        :raises ValueError: if the windows are longer than the network was made for
        """
        return self.head(self.trunk(x, level).mean(dim=1))
