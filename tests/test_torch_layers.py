"""Activations, embeddings, conditional and ensemble perceptrons against torch's own layers."""

import math

import pytest
import torch as th
import torch.nn.functional as F
from torch import nn

from sb3_diffusion.common.torch_layers import (
    ConditionalMLP,
    EnsembleLayerNorm,
    EnsembleLinear,
    Mish,
    SinusoidalEmbedding,
    ensemble_mlp,
    mish,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    th.manual_seed(0)


# ---------------------------------------------------------------- Mish


@pytest.mark.parametrize(("dtype", "tolerance"), [(th.float32, 2e-6), (th.float64, 1e-14)])
def test_mish_value_and_gradient(dtype: th.dtype, tolerance: float) -> None:
    grid = th.cat([th.linspace(-120.0, 120.0, 4001), th.linspace(-5.0, 5.0, 4001), th.zeros(1)]).to(dtype)
    ours, theirs = grid.clone().requires_grad_(), grid.clone().requires_grad_()
    weights = th.randn_like(grid)
    value, expected = mish(ours), F.mish(theirs)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    assert value.dtype == dtype
    th.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)
    th.testing.assert_close(ours.grad, theirs.grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_mish_leaves_its_input_alone_and_takes_any_shape() -> None:
    x = th.randn(2, 3, 4)
    copy = x.clone()
    th.testing.assert_close(Mish()(x), F.mish(copy))
    assert th.equal(x, copy)
    assert Mish()(x.transpose(0, 2)).shape == (4, 3, 2)


def test_mish_gradcheck() -> None:
    x = th.linspace(-6.0, 6.0, 25, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(mish, (x,))


def test_mish_is_right_or_refuses_when_differentiated_twice() -> None:
    x = th.linspace(-3.0, 3.0, 13, dtype=th.float64, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    (expected,) = th.autograd.grad(F.mish(reference).sum(), reference, create_graph=True)
    (expected,) = th.autograd.grad(expected.sum(), reference)
    try:
        (first,) = th.autograd.grad(mish(x).sum(), x, create_graph=True)
        (second,) = th.autograd.grad(first.sum(), x)
    except RuntimeError:
        return
    th.testing.assert_close(second, expected)


# ---------------------------------------------------------------- embedding


def test_sinusoidal_embedding_values() -> None:
    x = th.tensor([-1.5, 0.0, 0.3, 40.0])
    embedding = SinusoidalEmbedding(8)(x)
    for row, value in zip(embedding.tolist(), x.tolist(), strict=True):
        frequencies = [10_000.0 ** (-k / 3) for k in range(4)]
        expected = [math.sin(value * f) for f in frequencies] + [math.cos(value * f) for f in frequencies]
        assert row == pytest.approx(expected, abs=1e-5)
    assert SinusoidalEmbedding(16).frequencies[[0, -1]].tolist() == pytest.approx([1.0, 1e-4])


@pytest.mark.parametrize("dim", [0, 2, 7])
def test_sinusoidal_embedding_refuses_sizes(dim: int) -> None:
    with pytest.raises(ValueError, match=f"even and at least 4: got {dim}"):
        SinusoidalEmbedding(dim)


# ---------------------------------------------------------------- ConditionalMLP


@pytest.mark.parametrize("linear_first_layer", [False, True])
@pytest.mark.parametrize("activation_fn", [Mish, nn.Tanh])
def test_conditional_mlp_written_out(activation_fn: type[nn.Module], linear_first_layer: bool) -> None:
    net = ConditionalMLP(2, 3, [5, 6, 7], activation_fn, 8, linear_first_layer)
    x, condition, level = th.randn(4, 2), th.randn(4, 3), th.randn(4)
    activation = F.mish if activation_fn is Mish else th.tanh
    time_in, time_out = (m for m in net.time_embedding if isinstance(m, nn.Linear))
    assert (time_in.in_features, time_in.out_features, time_out.out_features) == (8, 16, 8)
    embedded = time_out(activation(time_in(SinusoidalEmbedding(8)(level))))
    hidden = th.cat([x, condition, embedded], dim=1)
    *layers, last = (m for m in net.trunk if isinstance(m, nn.Linear))
    assert [layer.out_features for layer in layers] == [5, 6, 7]
    for i, layer in enumerate(layers):
        hidden = layer(hidden)
        if i > 0 or not linear_first_layer:
            hidden = activation(hidden)
    th.testing.assert_close(net(x, condition, level), last(hidden), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- ensembles


def copy_linear(layer: EnsembleLinear, member: int) -> nn.Linear:
    linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[2])
    with th.no_grad():
        linear.weight.copy_(layer.weight[member].T)
        linear.bias.copy_(layer.bias[member, 0])
    return linear


def copy_layer_norm(layer: EnsembleLayerNorm, member: int) -> nn.LayerNorm:
    norm = nn.LayerNorm(layer.weight.shape[-1])
    with th.no_grad():
        norm.weight.copy_(layer.weight[member, 0])
        norm.bias.copy_(layer.bias[member, 0])
    return norm


@pytest.mark.parametrize("shared", [True, False])
def test_ensemble_linear_is_its_members(shared: bool) -> None:
    layer = EnsembleLinear(3, 4, 5)
    x = th.randn(6, 4, requires_grad=True) if shared else th.randn(3, 6, 4, requires_grad=True)
    weights = th.randn(3, 6, 5)
    copies = [copy_linear(layer, i) for i in range(3)]
    copied_x = x.detach().clone().requires_grad_()
    expected = th.stack([copy(copied_x if shared else copied_x[i]) for i, copy in enumerate(copies)])
    value = layer(x)
    th.testing.assert_close(value, expected)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    th.testing.assert_close(x.grad, copied_x.grad)
    for i, copy in enumerate(copies):
        th.testing.assert_close(layer.weight.grad[i], copy.weight.grad.T)
        th.testing.assert_close(layer.bias.grad[i, 0], copy.bias.grad)


def test_ensemble_linear_starts_like_torch() -> None:
    layer = EnsembleLinear(2, 64, 512)
    bound = 1.0 / math.sqrt(64)
    for parameter in (layer.weight, layer.bias):
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    reference = nn.Linear(64, 512)
    assert layer.weight.std().item() == pytest.approx(reference.weight.std().item(), rel=0.02)
    assert not th.equal(layer.weight[0], layer.weight[1])


def test_ensemble_layer_norm_is_its_members() -> None:
    layer = EnsembleLayerNorm(3, 5)
    assert layer.weight.eq(1.0).all()
    assert layer.bias.eq(0.0).all()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = 3.0 * th.randn(3, 6, 5) + 1.0
    expected = th.stack([copy_layer_norm(layer, i)(x[i]) for i in range(3)])
    th.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("net_arch", [[], [7], [7, 8]])
def test_ensemble_mlp_is_its_members(net_arch: list[int], layer_norm: bool) -> None:
    net = ensemble_mlp(2, 4, net_arch, Mish, layer_norm)
    norms = [module for module in net if isinstance(module, EnsembleLayerNorm)]
    assert len(norms) == (len(net_arch) if layer_norm else 0)
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    x = th.randn(6, 4)
    expected = []
    for member in range(2):
        hidden = x
        linears = [copy_linear(module, member) for module in net if isinstance(module, EnsembleLinear)]
        for i, linear in enumerate(linears[:-1]):
            hidden = linear(hidden)
            if layer_norm:
                hidden = copy_layer_norm(norms[i], member)(hidden)
            hidden = F.mish(hidden)
        expected.append(linears[-1](hidden))
    value = net(x)
    assert value.shape == (2, 6, 1)
    th.testing.assert_close(value, th.stack(expected), rtol=1e-4, atol=1e-5)


def test_members_of_an_ensemble_do_not_mix() -> None:
    net = ensemble_mlp(2, 4, [7], Mish, layer_norm=True)
    net(th.randn(6, 4))[0].sum().backward()
    for parameter in net.parameters():
        assert parameter.grad[0].abs().sum() > 0.0
        assert parameter.grad[1].abs().sum() == 0.0
