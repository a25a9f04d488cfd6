"""Networks on windows of steps against torch's own layers and against loops written from the equations."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_diffusion.diffuser.networks import (
    LinearAttention,
    TemporalConv,
    TemporalGroupNorm,
    TemporalUnet,
    TemporalUpsample,
    TrajectoryTransformer,
    ValueTransformer,
    ValueUnet,
    check_horizon,
)

DIM, HORIZON, BATCH_SIZE = 3, 8, 4
SMALL = {
    "unet": lambda: TemporalUnet(DIM, base_width=8, multipliers=(1, 2, 4)),
    "unet-attention": lambda: TemporalUnet(DIM, base_width=8, multipliers=(1, 2, 4), attention=True),
    "transformer": lambda: TrajectoryTransformer(DIM, HORIZON, width=16),
    "value-unet": lambda: ValueUnet(DIM, HORIZON, base_width=8, multipliers=(1, 2, 8)),
    "value-transformer": lambda: ValueTransformer(DIM, HORIZON, width=16),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    th.manual_seed(0)


@pytest.fixture(params=SMALL)
def net(request: pytest.FixtureRequest) -> nn.Module:
    """A small network in float64 none of whose parameters is zero or one."""
    return stirred(SMALL[request.param]().double())


def stirred(net: nn.Module) -> nn.Module:
    with th.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    return net


def windows(batch_size: int = BATCH_SIZE) -> tuple[th.Tensor, th.Tensor]:
    return th.randn(batch_size, HORIZON, DIM, dtype=th.float64), th.arange(batch_size) * 5.0


def n_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


# ---------------------------------------------------------------- the equations in loops, on arrays (horizon, width)


def array(x: th.Tensor) -> np.ndarray:
    return x.detach().numpy()


def naive_conv(x: np.ndarray, layer: TemporalConv) -> np.ndarray:
    weight, n = array(layer.weight), len(x)
    out = [array(layer.bias).copy() for _ in range((n - 1) // layer.stride + 1)]
    for h in range(len(out)):
        for tap in range(len(weight)):
            source = layer.stride * h + tap - len(weight) // 2
            if 0 <= source < n:
                out[h] += x[source] @ weight[tap]
    return np.stack(out)


def naive_upsample(x: np.ndarray, layer: TemporalUpsample) -> np.ndarray:
    out = [array(layer.bias).copy() for _ in range(2 * len(x))]
    for h in range(len(x)):
        for tap in range(4):
            target = 2 * h + tap - 1
            if 0 <= target < len(out):
                out[target] += x[h] @ array(layer.weight)[tap]
    return np.stack(out)


def naive_group_norm(x: np.ndarray, layer: TemporalGroupNorm) -> np.ndarray:
    groups = []
    for group in np.split(x, 8, axis=1):
        groups.append((group - group.mean()) / math.sqrt(group.var() + 1e-5))
    return np.concatenate(groups, axis=1) * array(layer.weight) + array(layer.bias)


def naive_mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.log1p(np.exp(x)))


def naive_linear(x: np.ndarray, layer: nn.Linear) -> np.ndarray:
    return x @ array(layer.weight).T + (0.0 if layer.bias is None else array(layer.bias))


def naive_layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def naive_conv_block(x: np.ndarray, block: nn.Sequential) -> np.ndarray:
    return naive_mish(naive_group_norm(naive_conv(x, block[0]), block[1]))


def naive_residual_block(x: np.ndarray, block: nn.Module, shift: np.ndarray) -> np.ndarray:
    residual = naive_linear(x, block.residual) if isinstance(block.residual, nn.Linear) else x
    return naive_conv_block(naive_conv_block(x, block.first) + shift, block.second) + residual


def naive_linear_attention(x: np.ndarray, layer: nn.Module) -> np.ndarray:
    if isinstance(layer, nn.Identity):
        return x
    normed = naive_layer_norm(x) * array(layer.norm.weight) + array(layer.norm.bias)
    queries, keys, values = np.split(naive_linear(normed, layer.queries_keys_values), 3, axis=1)
    out = np.zeros_like(queries)
    for head in range(4):
        columns = slice(32 * head, 32 * head + 32)
        weights = np.exp(keys[:, columns]) / np.exp(keys[:, columns]).sum(axis=0)
        context = sum(np.outer(weights[h], values[h, columns]) for h in range(len(x)))
        for h in range(len(x)):
            out[h, columns] = queries[h, columns] / math.sqrt(32) @ context
    return x + naive_linear(out, layer.out)


def naive_embedding(net: nn.Module, level: float) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    sinusoidal, first, _, second = net.level_embedding.features
    angles = level * array(sinusoidal.frequencies)
    features = naive_linear(naive_mish(naive_linear(np.concatenate([np.sin(angles), np.cos(angles)]), first)), second)
    shifts = naive_linear(naive_mish(features), net.level_embedding.shifts[1])
    return features, iter(np.split(shifts, np.cumsum(net.level_embedding.block_widths)[:-1]))


def naive_stage(x: np.ndarray, stage: nn.Module, shifts: Iterator[np.ndarray]) -> np.ndarray:
    x = naive_residual_block(x, stage.first, next(shifts))
    return naive_linear_attention(naive_residual_block(x, stage.second, next(shifts)), stage.attention)


def naive_unet(net: TemporalUnet, x: np.ndarray, level: float) -> np.ndarray:
    _, shifts = naive_embedding(net, level)
    first = naive_stage(x, net.down[0], shifts)
    second = naive_stage(naive_conv(first, net.downsample[0]), net.down[1], shifts)
    third = naive_stage(naive_conv(second, net.downsample[1]), net.down[2], shifts)
    x = naive_linear_attention(naive_residual_block(third, net.middle_in, next(shifts)), net.middle_attention)
    x = naive_residual_block(x, net.middle_out, next(shifts))
    x = naive_upsample(naive_stage(np.concatenate([x, third], axis=1), net.up[0], shifts), net.upsample[0])
    x = naive_upsample(naive_stage(np.concatenate([x, second], axis=1), net.up[1], shifts), net.upsample[1])
    return naive_linear(naive_conv_block(x, net.head[0]), net.head[1])


def naive_value_unet(net: ValueUnet, x: np.ndarray, level: float) -> np.ndarray:
    features, shifts = naive_embedding(net, level)
    for i in range(3):
        x = naive_conv(naive_stage(x, net.down[i], shifts), net.downsample[i])
    for i in range(2):
        x = naive_conv(naive_residual_block(x, net.shrink[i], next(shifts)), net.downsample[3 + i])
    return naive_linear(naive_mish(naive_linear(np.concatenate([x.ravel(), features]), net.head[0])), net.head[2])


def naive_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


def naive_silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def naive_trunk(trunk: nn.Module, x: np.ndarray, level: float) -> np.ndarray:
    sinusoidal, first, _, second, _ = trunk.level_embedding
    angles = level * array(sinusoidal.frequencies)
    features = naive_linear(naive_silu(naive_linear(np.concatenate([np.sin(angles), np.cos(angles)]), first)), second)
    modulation = iter(naive_linear(naive_silu(features), trunk.modulation).reshape(-1, trunk.width))
    x = naive_linear(x, trunk.inputs) + array(trunk.positions)[: len(x)]
    for block in trunk.blocks:
        shift, scale, gate = next(modulation), next(modulation), next(modulation)
        normed = (1.0 + scale) * naive_layer_norm(x) + shift
        queries, keys, values = np.split(naive_linear(normed, block.queries_keys_values), 3, axis=1)
        attended, head_width = np.zeros_like(x), trunk.width // 4
        for head in range(4):
            columns = slice(head_width * head, head_width * (head + 1))
            for h in range(len(x)):
                scores = np.exp(keys[:, columns] @ queries[h, columns] / math.sqrt(head_width))
                attended[h, columns] = scores @ values[:, columns] / scores.sum()
        x = x + gate * naive_linear(attended, block.out)
        shift, scale, gate = next(modulation), next(modulation), next(modulation)
        normed = (1.0 + scale) * naive_layer_norm(x) + shift
        x = x + gate * naive_linear(naive_gelu(naive_linear(normed, block.mlp[0])), block.mlp[2])
    shift, scale = next(modulation), next(modulation)
    return (1.0 + scale) * naive_layer_norm(x) + shift


def naive_transformer(net: TrajectoryTransformer, x: np.ndarray, level: float) -> np.ndarray:
    return naive_linear(naive_trunk(net.trunk, x, level), net.head)


def naive_value_transformer(net: ValueTransformer, x: np.ndarray, level: float) -> np.ndarray:
    pooled = naive_trunk(net.trunk, x, level).mean(axis=0)
    return naive_linear(naive_gelu(naive_linear(pooled, net.head[0])), net.head[2])


REFERENCES: dict[type, Callable[..., np.ndarray]] = {
    TemporalUnet: naive_unet,
    ValueUnet: naive_value_unet,
    TrajectoryTransformer: naive_transformer,
    ValueTransformer: naive_value_transformer,
}


def test_networks_equal_the_equations_in_loops(net: nn.Module) -> None:
    x, level = windows()
    expected = [REFERENCES[type(net)](net, array(x[i]), float(level[i])) for i in range(len(x))]
    np.testing.assert_allclose(array(net(x, level)), np.stack(expected), rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_conv_equals_torch(kernel_size: int, stride: int) -> None:
    layer = TemporalConv(3, 5, kernel_size, stride).double()
    for horizon in range(1, 10):
        x = th.randn(horizon, 2, 3, dtype=th.float64, requires_grad=True)
        weight = layer.weight.permute(2, 1, 0)
        expected = F.conv1d(x.permute(1, 2, 0), weight, layer.bias, stride, kernel_size // 2).permute(2, 0, 1)
        check_same(layer, layer(x), expected, x)


@pytest.mark.parametrize("horizon", range(1, 6))
def test_upsample_equals_torch(horizon: int) -> None:
    layer = TemporalUpsample(3).double()
    x = th.randn(horizon, 2, 3, dtype=th.float64, requires_grad=True)
    expected = F.conv_transpose1d(x.permute(1, 2, 0), layer.weight.permute(1, 2, 0), layer.bias, stride=2, padding=1)
    check_same(layer, layer(x), expected.permute(2, 0, 1), x)


@pytest.mark.parametrize("horizon", [1, 2, 7])
@pytest.mark.parametrize("width", [8, 24])
def test_group_norm_equals_torch(horizon: int, width: int) -> None:
    layer = stirred(TemporalGroupNorm(width).double())
    x = (3.0 + th.randn(horizon, 2, width, dtype=th.float64)).requires_grad_()
    expected = F.group_norm(x.permute(1, 2, 0), 8, layer.weight, layer.bias).permute(2, 0, 1)
    check_same(layer, layer(x), expected, x)


def check_same(layer: nn.Module, out: th.Tensor, expected: th.Tensor, x: th.Tensor) -> None:
    """Values and all derivatives, along one random direction."""
    direction = th.randn_like(out)
    inputs = [x, *layer.parameters()]
    th.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    ours, theirs = th.autograd.grad(out, inputs, direction), th.autograd.grad(expected, inputs, direction)
    for gradient, expected_gradient in zip(ours, theirs, strict=True):
        th.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-10)


def test_group_norm_keeps_its_digits_far_from_zero() -> None:
    x = 1000.0 + th.randn(8, 2, 16)
    expected = F.group_norm(x.double().permute(1, 2, 0), 8).permute(2, 0, 1)
    th.testing.assert_close(TemporalGroupNorm(16)(x).double(), expected, rtol=1e-3, atol=1e-3)
    assert th.equal(TemporalGroupNorm(16)(th.zeros(8, 2, 16)), th.zeros(8, 2, 16))


def test_layers_refuse_a_second_derivative_instead_of_getting_it_wrong() -> None:
    x = th.randn(4, 2, 8, requires_grad=True)
    for layer in (TemporalConv(8, 8, 3), TemporalGroupNorm(8)):
        (gradient,) = th.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_frozen_layers_still_pass_the_gradient_on() -> None:
    layer = TemporalConv(3, 8, 5)
    x = th.randn(4, 2, 3, requires_grad=True)
    (expected,) = th.autograd.grad(layer(x).sum(), x)
    (gradient,) = th.autograd.grad(layer.requires_grad_(False)(x).sum(), x)
    assert th.equal(gradient, expected)


@pytest.mark.parametrize("layer", [TemporalConv(16, 64, 5), TemporalUpsample(32)], ids=["conv", "upsample"])
def test_initial_weights_follow_the_law_of_torch(layer: nn.Module) -> None:
    bound = 1.0 / math.sqrt(layer.weight.shape[0] * layer.weight.shape[1])
    assert 0.99 * bound < layer.weight.abs().max() <= bound and layer.bias.abs().max() <= bound
    assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3.0), rel=0.05)


def test_linear_attention_weighs_steps_whatever_their_order() -> None:
    layer = LinearAttention(8)
    x, order = th.randn(6, 2, 8), th.tensor([3, 1, 5, 0, 2, 4])
    th.testing.assert_close(layer(x[order]), layer(x)[order])


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (lambda: TemporalUnet(23), 3_958_327),
        (lambda: TemporalUnet(14), 3_956_302),
        (lambda: TemporalUnet(23, multipliers=(1, 4, 8), attention=True), 4_114_423),
        (lambda: TemporalUnet(6, multipliers=(1, 4, 8)), 3_682_118),
        (lambda: ValueUnet(23, 32), 2_296_545),
    ],
    ids=["walker2d", "hopper", "halfcheetah", "maze2d", "value"],
)
def test_parameter_counts_are_the_published_ones(net: Callable[[], nn.Module], expected: int) -> None:
    assert n_parameters(net()) == expected


def test_parameter_count_of_the_transformer() -> None:
    dim, horizon, width, n_layers = 5, 7, 16, 3
    ends = dim * width + width + horizon * width + width * dim + dim
    level = 2 * (width * width + width) + (width + 1) * (6 * n_layers + 2) * width
    block = (width + 1) * 3 * width + (width + 1) * width + (width + 1) * 4 * width + (4 * width + 1) * width
    net = TrajectoryTransformer(dim, horizon, width, n_layers)
    assert n_parameters(net) == ends + level + n_layers * block


@pytest.mark.parametrize(
    ("multipliers", "horizons"), [((1, 2, 4, 8), (8, 16, 32)), ((1, 4, 8), (4, 8, 128, 256, 384)), ((1,), (1, 5))]
)
def test_one_unet_serves_many_horizons(multipliers: tuple[int, ...], horizons: tuple[int, ...]) -> None:
    net = TemporalUnet(6, base_width=8, multipliers=multipliers, attention=True)
    for horizon in horizons:
        check_horizon(horizon, len(multipliers))
        with th.no_grad():
            out = net(th.randn(2, horizon, 6), th.tensor([3]))
        assert out.shape == (2, horizon, 6) and out.is_contiguous() and out.isfinite().all()


def test_a_published_net_runs_at_its_horizons() -> None:
    net = TemporalUnet(23)
    for horizon in (8, 32):
        assert net(th.randn(2, horizon, 23), th.tensor([3, 4])).shape == (2, horizon, 23)


def test_horizons_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 8 for a temporal U-Net of 4 levels: got 12; take 8 or 16"):
        check_horizon(12, 4)
    with pytest.raises(ValueError, match="got 3; take 4, or"):
        check_horizon(3, 3)
    with pytest.raises(ValueError, match="got 0; take 8, or"):
        check_horizon(0, 4)
    with pytest.raises(ValueError, match="multiple of 4 for a temporal U-Net of 3 levels: got 6"):
        SMALL["unet"]()(th.randn(2, 6, DIM), th.tensor([0]))


@pytest.mark.parametrize("horizon", [*range(1, 41), 64, 128])
def test_value_net_takes_any_horizon(horizon: int) -> None:
    net = ValueUnet(2, horizon, base_width=8, multipliers=(1, 2, 4))
    value = net(th.randn(3, horizon, 2), th.tensor([1, 2, 3]))
    assert value.shape == (3, 1) and value.isfinite().all()


@pytest.mark.parametrize(("horizon", "n_steps"), [(4, 1), (8, 1), (64, 1), (65, 2), (128, 2)])
def test_size_of_the_published_value_net(horizon: int, n_steps: int) -> None:
    net = ValueUnet(23, horizon)
    assert net.head[0].in_features == 64 * n_steps + 32
    assert net(th.randn(2, horizon, 23), th.tensor([0])).shape == (2, 1)


def test_transformers_take_shorter_windows() -> None:
    x, level = windows()
    for name in ("transformer", "value-transformer"):
        net = stirred(SMALL[name]().double())
        expected = REFERENCES[type(net)](net, array(x[0, :5]), 0.0)
        np.testing.assert_allclose(array(net(x[:, :5], level)[0]), expected, rtol=1e-9, atol=1e-10)
        with pytest.raises(ValueError, match="at most 8 steps: got 9"):
            net(th.randn(1, 9, DIM).double(), level[:1])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`kernel_size` must be odd.*got 4"):
        TemporalUnet(3, kernel_size=4)
    with pytest.raises(ValueError, match="multiples of 8: got 12"):
        TemporalUnet(3, base_width=12)
    with pytest.raises(ValueError, match="multiples of 8: got 4; .*a value net"):
        ValueUnet(3, 8, base_width=8, multipliers=(1, 2))
    with pytest.raises(ValueError, match="`width` must be a multiple of `n_heads`: got 16 and 3"):
        TrajectoryTransformer(3, 8, width=16, n_heads=3)
    with pytest.raises(ValueError, match="made for windows of 8 steps: got 9"):
        SMALL["value-unet"]()(th.randn(2, 9, DIM), th.tensor([0]))
    for made in (ValueUnet, TrajectoryTransformer, ValueTransformer):
        with pytest.raises(ValueError, match="`horizon` must be at least 1: got 0"):
            made(3, 0)


# ---------------------------------------------------------------- properties of all networks


def test_one_level_for_all_rows_equals_repeated_levels(net: nn.Module) -> None:
    x, _ = windows()
    th.testing.assert_close(net(x, th.tensor([7])), net(x, th.full((BATCH_SIZE,), 7)), rtol=1e-12, atol=1e-12)
    assert not th.allclose(net(x, th.tensor([7])), net(x, th.tensor([8])))


def test_rows_are_independent(net: nn.Module) -> None:
    x, level = windows()
    out = net(x, level)
    order = th.tensor([2, 0, 3, 1])
    th.testing.assert_close(net(x[order], level[order]), out[order], rtol=1e-12, atol=1e-12)
    th.testing.assert_close(net(x[1:2], level[1:2]), out[1:2], rtol=1e-12, atol=1e-12)


def test_every_output_sees_every_step(net: nn.Module) -> None:
    x, level = windows(1)
    jacobian = th.autograd.functional.jacobian(lambda x: net(x, level), x)
    assert (jacobian != 0.0).all()


def test_the_order_of_steps_matters(net: nn.Module) -> None:
    x, level = windows()
    out = net(x, level)
    turned = net(x.flip(1), level)
    assert not th.allclose(turned, out.flip(1) if out.dim() == 3 else out)


def test_gradient_reaches_every_parameter(net: nn.Module) -> None:
    x, level = windows()
    net(x, level).square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0.0, name


def test_gradient_with_respect_to_the_windows(net: nn.Module) -> None:
    x, level = windows(2)
    assert th.autograd.gradcheck(lambda x: net(x, level), (x.requires_grad_(),), fast_mode=True)


def test_no_grad_and_strided_windows_change_nothing(net: nn.Module) -> None:
    x, level = windows()
    copy = x.clone()
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    expected = net(x, level)
    with th.no_grad():
        th.testing.assert_close(net(strided, level), expected.detach(), rtol=1e-12, atol=1e-12)
    assert th.equal(x, copy) and expected.dtype == th.float64


def test_float32_agrees_with_float64(net: nn.Module) -> None:
    x, level = windows()
    expected = net(x, level)
    th.testing.assert_close(net.float()(x.float(), level).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SMALL)
def test_same_seed_same_numbers(name: str) -> None:
    results = []
    for _ in range(2):
        th.manual_seed(1)
        net = stirred(SMALL[name]())
        x, level = windows()
        out = net(x.float(), level)
        out.sum().backward()
        results.append([out, *(parameter.grad for parameter in net.parameters())])
    assert all(th.equal(first, second) for first, second in zip(*results, strict=True))


def test_transformer_starts_at_zero_and_leaves_it() -> None:
    net = TrajectoryTransformer(DIM, HORIZON, width=16)
    x, level = th.randn(BATCH_SIZE, HORIZON, DIM), th.arange(BATCH_SIZE)
    assert th.equal(net(x, level), th.zeros_like(x))
    start = {name: parameter.clone() for name, parameter in net.named_parameters()}
    optimizer = th.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):  # head, then modulation, then what the gates let through
        optimizer.zero_grad()
        (net(x, level) - x).square().mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert not th.equal(parameter, start[name]), name


@pytest.mark.parametrize(("name", "n_updates"), [("unet", 60), ("transformer", 200)])
def test_networks_learn_to_look_ahead(name: str, n_updates: int) -> None:
    """Each step is to tell what stands in the next one, which a network that saw each step alone could not."""
    net = SMALL[name]()
    optimizer = th.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(n_updates):
        x = th.randn(32, HORIZON, DIM)
        loss = (net(x, th.tensor([0]))[:, :-1] - x[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8  # the best guess without the next step has 1
