"""Preconditioning, predictions, losses and trust region against closed forms for data of known law."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch as th
from exact_denoisers import (
    ChainDenoiser,
    MixtureDenoiser,
    NormalDenoiser,
    exact_chain,
    expected_loss,
    grid_mixture,
    midpoints,
    normal_quantiles,
)
from torch import nn

from sb3_diffusion.common.denoisers import PREDICTION_TYPES, Denoiser, DiscreteDenoiser, EDMDenoiser, append_dims
from sb3_diffusion.common.schedules import (
    NOISE_SCHEDULES,
    cosine_betas,
    karras_sigmas,
    log_logistic_sigmas,
    noise_schedule_betas,
    vp_betas,
)
from sb3_diffusion.common.torch_layers import ConditionalMLP

SIGMA_DATA = 0.5
LEVELS = th.tensor([0.002, 0.05, 0.3, 0.5, 2.0, 80.0], dtype=th.float64)
NO_CONDITION = th.zeros(len(LEVELS), 0)


class Spy(nn.Module):
    """A network with a constant output that remembers what it was told."""

    def __init__(self, output: float) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        self.x, self.condition, self.level = x, condition, level
        return th.full_like(x, self.output)


def closed_form(std: float) -> tuple[float, float]:
    """$(C, K)$ of the trust region $C + K (a - m)^2$ around normal data of standard deviation ``std``."""
    rho = SIGMA_DATA**2 / std**2
    if rho == 1.0:
        return 0.5, 0.5 / std**2
    c = 1.0 / (rho - 1.0) - math.log(rho) / (rho - 1.0) ** 2
    return c, rho / std**2 * (math.log(rho) + 1.0 / rho - 1.0) / (rho - 1.0) ** 2


def points(*values: tuple[float, ...]) -> th.Tensor:
    return th.tensor(values, dtype=th.float64)


# ---------------------------------------------------------------- preconditioning


def test_preconditioning_identities() -> None:
    x = th.linspace(-2.0, 2.0, len(LEVELS), dtype=th.float64).unsqueeze(1)
    condition = th.randn(len(LEVELS), 2, generator=th.Generator().manual_seed(0))
    spy = Spy(0.0)
    c_skip = (EDMDenoiser(spy, SIGMA_DATA)(x, LEVELS, condition) / x).squeeze(1)
    c_in = (spy.x / x).squeeze(1)
    c_out = EDMDenoiser(Spy(1.0), SIGMA_DATA)(th.zeros_like(x), LEVELS, condition).squeeze(1)
    share = LEVELS.square() / (LEVELS.square() + SIGMA_DATA**2)
    th.testing.assert_close(c_in.square() * (LEVELS.square() + SIGMA_DATA**2), th.ones_like(LEVELS))
    th.testing.assert_close(c_out.square(), LEVELS.square() * c_skip)
    th.testing.assert_close(c_skip + share, th.ones_like(LEVELS))
    th.testing.assert_close(spy.level, LEVELS.log() / 4.0)
    assert spy.condition is condition
    assert (c_out > 0.0).all()
    th.testing.assert_close(EDMDenoiser(spy, SIGMA_DATA).loss_weight(LEVELS), 1.0 / c_out.square())


def test_denoiser_written_out() -> None:
    generator = th.Generator().manual_seed(0)
    net = ConditionalMLP(2, 3, [8], time_embedding_dim=4).double()
    net.time_embedding[0].double()
    x = th.randn(5, 2, generator=generator, dtype=th.float64)
    condition = th.randn(5, 3, generator=generator, dtype=th.float64)
    sigmas = th.rand(5, generator=generator, dtype=th.float64) + 0.1
    denoised = EDMDenoiser(net, sigma_data=0.7)(x, sigmas, condition)
    for i in range(5):
        sigma = sigmas[i].item()
        total = math.sqrt(sigma**2 + 0.7**2)
        raw = net(x[i : i + 1] / total, condition[i : i + 1], th.tensor([math.log(sigma) / 4.0], dtype=th.float64))[0]
        th.testing.assert_close(denoised[i], 0.49 / total**2 * x[i] + sigma * 0.7 / total * raw)


@pytest.mark.parametrize("output", [-0.3, 0.0, 0.3])
def test_untrained_loss_is_one_at_every_level(output: float) -> None:
    """For data N(0, sigma_data^2) the network output 0 is optimal and costs 1, any other constant f costs 1 + f^2."""
    quantiles = normal_quantiles(201)
    clean, noise = (grid.reshape(-1, 1) for grid in th.meshgrid(SIGMA_DATA * quantiles, quantiles, indexing="ij"))
    denoiser = EDMDenoiser(Spy(output), SIGMA_DATA)
    for sigma in LEVELS.tolist():
        level = th.full((len(clean),), sigma, dtype=th.float64)
        loss = denoiser.loss(clean, noise, level, th.zeros(len(clean), 0)).mean().item()
        assert loss == pytest.approx(1.0 + output**2, rel=1e-6)


def test_loss_is_a_loop_over_entries() -> None:
    generator = th.Generator().manual_seed(1)
    denoiser = EDMDenoiser(ConditionalMLP(2, 3, [8], time_embedding_dim=4), SIGMA_DATA)
    clean, noise = th.rand(6, 2, generator=generator) - 0.5, th.randn(6, 2, generator=generator)
    condition, level = th.randn(6, 3, generator=generator), th.rand(6, generator=generator) + 0.05
    loss = denoiser.loss(clean, noise, level, condition)
    assert loss.shape == clean.shape
    for i, j in product(range(6), range(2)):
        sigma = level[i].item()
        denoised = denoiser((clean[i] + sigma * noise[i]).unsqueeze(0), level[i : i + 1], condition[i : i + 1])[0, j]
        c_out = sigma * SIGMA_DATA / math.sqrt(sigma**2 + SIGMA_DATA**2)
        assert loss[i, j].item() == pytest.approx(((denoised - clean[i, j]) / c_out).item() ** 2, rel=1e-3)


def test_trailing_axes_share_a_level() -> None:
    denoiser = EDMDenoiser(Spy(0.5), SIGMA_DATA)
    clean = th.randn(6, 4, 3, generator=th.Generator().manual_seed(0), dtype=th.float64)
    noise = th.randn(6, 4, 3, generator=th.Generator().manual_seed(1), dtype=th.float64)
    loss = denoiser.loss(clean, noise, LEVELS, NO_CONDITION)
    flat = denoiser.loss(clean.reshape(6, 12), noise.reshape(6, 12), LEVELS, NO_CONDITION)
    th.testing.assert_close(loss, flat.reshape(6, 4, 3))
    assert append_dims(LEVELS, 3).shape == (6, 1, 1)


def test_corrupt_agrees_with_the_scales() -> None:
    clean, noise = th.full((6, 2), 0.3, dtype=th.float64), th.full((6, 2), -1.2, dtype=th.float64)
    denoiser = EDMDenoiser(Spy(0.0), SIGMA_DATA)
    alpha, sigma = denoiser.scales(LEVELS)
    assert alpha.eq(1.0).all()
    assert th.equal(sigma, LEVELS)
    th.testing.assert_close(denoiser.corrupt(clean, noise, LEVELS), Denoiser.corrupt(denoiser, clean, noise, LEVELS))


@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_clip_bounds_the_estimate_and_stops_the_gradient(clip: float) -> None:
    x = th.tensor([-9.0, 0.1, -0.3, -0.2, 9.0, 90.0], dtype=th.float64).unsqueeze(1).requires_grad_()
    bounded = EDMDenoiser(Spy(0.7), SIGMA_DATA, clip)(x, LEVELS, NO_CONDITION)
    free = EDMDenoiser(Spy(0.7), SIGMA_DATA)(x, LEVELS, NO_CONDITION)
    (slope,) = th.autograd.grad(bounded.sum(), x)
    bites = free.detach().abs() > clip
    assert 0 < bites.sum() < len(LEVELS)
    th.testing.assert_close(bounded, free.clamp(-clip, clip))
    assert slope[bites].eq(0.0).all()
    assert slope[~bites].ne(0.0).all()


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_sigma_data_must_be_positive(sigma_data: float) -> None:
    with pytest.raises(ValueError, match="`sigma_data` must be positive"):
        EDMDenoiser(Spy(0.0), sigma_data)


def test_sampling_levels_and_prior_of_edm() -> None:
    denoiser = EDMDenoiser(Spy(0.0))
    th.testing.assert_close(denoiser.sampling_levels(18), karras_sigmas(18, 0.002, 80.0).float())
    th.testing.assert_close(EDMDenoiser(Spy(0.0), sigma_min=0.1, sigma_max=2.0).sampling_levels(2), th.tensor([2.0, 0.1]))
    assert denoiser.sampling_levels(1).tolist() == [80.0]
    noise = th.randn(3, 4, 2, generator=th.Generator().manual_seed(0))
    assert th.equal(denoiser.prior(noise, denoiser.sampling_levels(5)[:1]), 80.0 * noise)


# ---------------------------------------------------------------- discrete steps

N_STEPS = 6
each_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


class Told(nn.Module):
    """A network whose answer is given, whatever it is asked."""

    def __init__(self, answer: th.Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        return self.answer


def discrete(prediction_type: str, clip: float | None = None) -> DiscreteDenoiser:
    """Around a random network, in double precision."""
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        net = ConditionalMLP(2, 3, [8], time_embedding_dim=4)
    return DiscreteDenoiser(net, vp_betas(N_STEPS), prediction_type, clip).double()


def discrete_batch() -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """Clean data, noise, each level, condition."""
    generator = th.Generator().manual_seed(0)
    clean, noise = (th.randn(N_STEPS, 2, generator=generator, dtype=th.float64) for _ in range(2))
    return clean, noise, th.arange(N_STEPS), th.randn(N_STEPS, 3, generator=generator, dtype=th.float64)


@pytest.mark.parametrize("n_diffusion_steps", [1, 5, 1000])
@pytest.mark.parametrize("name", NOISE_SCHEDULES)
def test_scales_of_a_chain(name: str, n_diffusion_steps: int) -> None:
    betas = noise_schedule_betas(name, n_diffusion_steps)
    denoiser = DiscreteDenoiser(Spy(0.0), betas)
    alpha, sigma = denoiser.scales(th.arange(n_diffusion_steps))
    exact_alpha, exact_sigma = ChainDenoiser(betas, [[0.0]], 1.0).scales(th.arange(n_diffusion_steps))
    th.testing.assert_close(alpha.double(), exact_alpha, rtol=3e-7, atol=0.0)
    th.testing.assert_close(sigma.double(), exact_sigma, rtol=3e-7, atol=0.0)
    assert denoiser.n_diffusion_steps == n_diffusion_steps
    assert alpha.dtype == th.float32


def test_a_chain_keeps_the_variance() -> None:
    clean, noise, level, _ = discrete_batch()
    denoiser = discrete("noise")
    alpha, sigma = denoiser.scales(level)
    th.testing.assert_close(alpha.square() + sigma.square(), th.ones_like(alpha), rtol=1e-6, atol=0.0)
    noisy = denoiser.corrupt(clean, noise, level)
    for i, j in product(range(N_STEPS), range(2)):
        expected = alpha[i].item() * clean[i, j].item() + sigma[i].item() * noise[i, j].item()
        assert noisy[i, j].item() == pytest.approx(expected, rel=1e-9)


def test_constants_of_a_chain_are_not_saved() -> None:
    denoiser = discrete("v")
    assert set(denoiser.state_dict()) == {f"net.{name}" for name in denoiser.net.state_dict()}
    assert set(dict(denoiser.named_buffers())) >= {"alphas", "sigmas"}  # yet they move with the model


@pytest.mark.parametrize("betas", [vp_betas(N_STEPS), cosine_betas(N_STEPS)], ids=["vp", "cosine"])
@each_prediction_type
def test_true_answer_gives_the_clean_data(prediction_type: str, betas: th.Tensor) -> None:
    clean, noise, level, condition = discrete_batch()
    answer = DiscreteDenoiser(Spy(0.0), betas, prediction_type).double().target(clean, noise, level)
    denoiser = DiscreteDenoiser(Told(answer), betas, prediction_type).double()
    noisy = denoiser.corrupt(clean, noise, level)
    th.testing.assert_close(denoiser(noisy, level, condition), clean, rtol=1e-4, atol=1e-6)
    assert denoiser.loss(clean, noise, level, condition).max() == 0.0


@each_prediction_type
def test_prediction_types_agree_on_the_posterior_mean(prediction_type: str) -> None:
    law = ([[-0.8, 0.1], [0.8, 0.4]], [0.1, 0.3], [0.4, 0.6])
    clean, noise, level, condition = discrete_batch()
    denoiser = exact_chain(vp_betas(N_STEPS), *law, prediction_type=prediction_type)
    noisy = denoiser.corrupt(clean, noise, level)
    expected = ChainDenoiser(vp_betas(N_STEPS), *law)(noisy, level, condition)
    th.testing.assert_close(denoiser(noisy, level, condition), expected, rtol=1e-5, atol=1e-6)


def test_targets() -> None:
    clean, noise, level, _ = discrete_batch()
    assert discrete("noise").target(clean, noise, level) is noise
    assert discrete("sample").target(clean, noise, level) is clean
    denoiser = discrete("v")
    v = denoiser.target(clean, noise, level)
    alpha, sigma = (append_dims(scale, 2) for scale in denoiser.scales(level))
    noisy = denoiser.corrupt(clean, noise, level)
    # v turns data and noise by a right angle (arXiv 2202.00512, appendix D)
    th.testing.assert_close(alpha * noisy - sigma * v, clean, rtol=1e-5, atol=1e-6)
    th.testing.assert_close(sigma * noisy + alpha * v, noise, rtol=1e-5, atol=1e-6)
    assert denoiser.target(clean.unsqueeze(1), noise.unsqueeze(1), level).shape == (N_STEPS, 1, 2)


def test_corrupted_data_and_v_are_those_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(N_STEPS, trained_betas=vp_betas(N_STEPS).tolist())
    clean, noise, level, _ = discrete_batch()
    denoiser = discrete("v")
    theirs = scheduler.add_noise(clean, noise, level), scheduler.get_velocity(clean, noise, level)
    ours = denoiser.corrupt(clean, noise, level), denoiser.target(clean, noise, level)
    th.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@each_prediction_type
def test_network_is_told_the_index(prediction_type: str) -> None:
    clean, noise, level, condition = discrete_batch()
    spy = Spy(0.1)
    denoiser = DiscreteDenoiser(spy, vp_betas(N_STEPS), prediction_type).double()
    for call in (lambda: denoiser(clean, level, condition), lambda: denoiser.loss(clean, noise, level, condition)):
        spy.level = spy.condition = None
        call()
        assert th.equal(spy.level, level)
        assert spy.level.dtype == th.int64
        assert spy.condition is condition
    th.testing.assert_close(spy.x, denoiser.corrupt(clean, noise, level))


@each_prediction_type
def test_loss_of_a_chain_is_a_loop(prediction_type: str) -> None:
    clean, noise, level, condition = discrete_batch()
    denoiser = discrete(prediction_type)
    loss = denoiser.loss(clean, noise, level, condition)
    product_of_alphas = 1.0
    for i, beta in enumerate(vp_betas(N_STEPS).tolist()):
        product_of_alphas *= 1.0 - beta
        alpha, sigma = math.sqrt(product_of_alphas), math.sqrt(1.0 - product_of_alphas)
        answer = denoiser.net(alpha * clean[i : i + 1] + sigma * noise[i : i + 1], condition[i : i + 1], th.tensor([i]))[0]
        for j in range(2):
            wanted = dict(noise=noise[i, j], sample=clean[i, j], v=alpha * noise[i, j] - sigma * clean[i, j])
            expected = (answer[j] - wanted[prediction_type]).item() ** 2
            assert loss[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


@each_prediction_type
def test_loss_of_a_chain_is_the_weighted_error_of_the_estimate(prediction_type: str) -> None:
    """The same function of the clean data and of the network: value and both gradients."""
    clean, noise, level, condition = discrete_batch()
    clean.requires_grad_()
    denoiser = discrete(prediction_type)
    inputs = [clean, *denoiser.parameters()]
    ours, plain = denoiser.loss(clean, noise, level, condition), Denoiser.loss(denoiser, clean, noise, level, condition)
    th.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    th.testing.assert_close(
        th.autograd.grad(ours.mean(), inputs), th.autograd.grad(plain.mean(), inputs), rtol=1e-4, atol=1e-6
    )


@each_prediction_type
def test_clip_of_a_chain(prediction_type: str) -> None:
    """It bounds the estimate and leaves the loss alone."""
    clean, noise, level, condition = discrete_batch()
    free, bounded = discrete(prediction_type), discrete(prediction_type, clip=0.3)
    noisy = (0.2 * free.corrupt(clean, noise, level)).requires_grad_()
    estimate, bounded_estimate = free(noisy, level, condition), bounded(noisy, level, condition)
    bites = estimate.abs() > 0.3
    assert 0 < bites.sum() < bites.numel()
    th.testing.assert_close(bounded_estimate, estimate.clamp(-0.3, 0.3))
    (slope,) = th.autograd.grad(bounded_estimate[bites].sum(), noisy, retain_graph=True)
    assert slope.eq(0.0).all()
    (slope,) = th.autograd.grad(bounded_estimate[~bites].sum(), noisy)
    assert slope.ne(0.0).any()
    assert th.equal(bounded.loss(clean, noise, level, condition), free.loss(clean, noise, level, condition))


def test_prediction_type_must_exist() -> None:
    with pytest.raises(ValueError, match=r"one of \['noise', 'sample', 'v'\]: got 'epsilon'"):
        DiscreteDenoiser(Spy(0.0), vp_betas(5), "epsilon")


def test_sampling_levels_of_a_chain() -> None:
    for n_diffusion_steps in (*range(1, 30), 100, 1000):
        denoiser = DiscreteDenoiser(Spy(0.0), vp_betas(n_diffusion_steps))
        for n in range(1, min(n_diffusion_steps, 30) + 1):
            levels = denoiser.sampling_levels(n)
            assert levels.shape == (n,)
            assert levels.dtype == th.int64
            assert (levels.diff() < 0).all()
            assert levels[0] == n_diffusion_steps - 1
            assert levels[-1] == (0 if n > 1 else n_diffusion_steps - 1)
            for k, level in enumerate(levels.tolist()):
                exact = (n_diffusion_steps - 1) * (1.0 - k / max(n - 1, 1))
                assert abs(level - exact) <= 0.5 + 1e-9
        everything = denoiser.sampling_levels(n_diffusion_steps)
        assert th.equal(everything, th.arange(n_diffusion_steps).flip(0))


@pytest.mark.parametrize(("n_diffusion_steps", "n_sampling_steps"), [(5, 5), (10, 4), (50, 20), (1000, 10), (1000, 50)])
def test_sampling_levels_are_those_of_diffusers(n_diffusion_steps: int, n_sampling_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(n_diffusion_steps, timestep_spacing="linspace")
    scheduler.set_timesteps(n_sampling_steps)
    denoiser = DiscreteDenoiser(Spy(0.0), vp_betas(n_diffusion_steps))
    assert th.equal(denoiser.sampling_levels(n_sampling_steps), scheduler.timesteps)


@pytest.mark.parametrize("n_sampling_steps", [0, -1, N_STEPS + 1])
def test_number_of_sampling_levels_has_bounds(n_sampling_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"\[1, {N_STEPS}\], the length of the chain: got {n_sampling_steps}\."):
        discrete("noise").sampling_levels(n_sampling_steps)


def test_prior_of_a_chain_is_the_noise() -> None:
    noise = th.randn(4, 3, generator=th.Generator().manual_seed(0))
    denoiser = discrete("noise")
    assert th.equal(denoiser.prior(noise, denoiser.sampling_levels(3)[:1]), noise)


def test_sampling_levels_lie_beside_the_model() -> None:
    for denoiser in (EDMDenoiser(discrete("noise").net), discrete("noise")):
        assert denoiser.sampling_levels(3).device.type == "cpu"
        assert denoiser.to("meta").sampling_levels(3).device.type == "meta"


@pytest.mark.parametrize("prediction_type", ["edm", *PREDICTION_TYPES])
def test_one_level_for_all_rows(prediction_type: str) -> None:
    """Of the network, which embeds it once, and of the denoiser around it."""
    denoiser = EDMDenoiser(discrete("noise").net) if prediction_type == "edm" else discrete(prediction_type)
    clean, _, _, condition = discrete_batch()
    for level in denoiser.sampling_levels(3).split(1):
        rows = level.repeat(N_STEPS)
        th.testing.assert_close(denoiser.net(clean, condition, level), denoiser.net(clean, condition, rows))
        estimate = denoiser(clean, level, condition)
        assert estimate.shape == clean.shape
        th.testing.assert_close(estimate, denoiser(clean, rows, condition))


def moments(mean: float, std: float) -> tuple[th.Tensor, th.Tensor]:
    """Clean data and noise, four rows: as good as normal laws wherever only means and covariances count."""
    clean = th.tensor([[-1.0], [-1.0], [1.0], [1.0]], dtype=th.float64)
    return mean + std * clean, th.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=th.float64)


@pytest.mark.parametrize(
    ("n_diffusion_steps", "std", "floor"),
    [
        (5, 0.2, 0.03606),
        (5, 0.5, 0.14492),
        (5, 0.05, 0.00253),
        (50, 0.2, 0.10229),
        (50, 0.5, 0.23281),
        (50, 0.05, 0.01784),
        (50, 0.1, 0.0470),
        (50, 0.3, 0.1511),
    ],
)
def test_floor_of_the_loss_of_the_noise(n_diffusion_steps: int, std: float, floor: float) -> None:
    """What is left for normal data, a mean over levels; a silent network costs 1 and no other is better than the exact."""
    betas, mean = vp_betas(n_diffusion_steps), 0.3
    clean, noise = (grid.repeat(n_diffusion_steps, 1) for grid in moments(mean, std))
    level = th.arange(n_diffusion_steps).repeat_interleave(4)

    def loss(denoiser: DiscreteDenoiser) -> float:
        return denoiser.loss(clean, noise, level, th.zeros(len(clean), 0)).mean().item()

    exact = loss(exact_chain(betas, [[mean]], std))
    assert exact == pytest.approx(floor, rel=2e-3)
    assert loss(DiscreteDenoiser(Spy(0.0), betas)) == pytest.approx(1.0, rel=1e-6)
    assert loss(exact_chain(betas, [[mean + 0.2 * std]], std)) > 1.001 * exact
    assert loss(exact_chain(betas, [[mean]], 1.2 * std)) > 1.001 * exact


@pytest.mark.parametrize("std", [0.05, 0.5])
@each_prediction_type
def test_floor_of_the_loss_of_a_chain(prediction_type: str, std: float) -> None:
    """The variance of clean data given the noisy, in the weight of each prediction type."""
    betas = vp_betas(N_STEPS)
    clean, noise = moments(0.0, std)
    alphas, sigmas = ChainDenoiser(betas, [[0.0]], std).scales(th.arange(N_STEPS))
    for i, (alpha, sigma) in enumerate(zip(alphas.tolist(), sigmas.tolist(), strict=True)):
        variance = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
        expected = variance * dict(noise=alpha**2 / sigma**2, sample=1.0, v=1.0 / sigma**2)[prediction_type]
        denoiser = exact_chain(betas, [[0.0]], std, prediction_type=prediction_type)
        loss = denoiser.loss(clean, noise, th.full((4,), i), th.zeros(4, 0)).mean().item()
        assert loss == pytest.approx(expected, rel=1e-4)


# ---------------------------------------------------------------- exact denoisers


@pytest.mark.parametrize("cls", [MixtureDenoiser, partial(ChainDenoiser, vp_betas(50))], ids=["edm", "chain"])
def test_exact_denoisers_obey_tweedie(cls: Callable[..., MixtureDenoiser]) -> None:
    """The posterior mean is (x + sigma^2 times the score) / alpha."""
    denoiser = cls([[-0.8, 0.1], [0.8, 0.4], [0.0, -1.0]], [0.05, 0.3, 0.2], [0.2, 0.5, 0.3])
    x = th.randn(40, 2, generator=th.Generator().manual_seed(0), dtype=th.float64).requires_grad_()
    level = th.arange(1, 41) if isinstance(denoiser, ChainDenoiser) else 0.05 + 0.9 * midpoints(40)
    (score,) = th.autograd.grad(denoiser.log_density(x, level).sum(), x)
    alpha, sigma = (append_dims(scale, 2) for scale in denoiser.scales(level))
    th.testing.assert_close(denoiser(x, level, th.zeros(40, 0)), (x + sigma.square() * score) / alpha)


def test_normal_denoiser_is_the_formula() -> None:
    x = th.linspace(-2.0, 2.0, len(LEVELS), dtype=th.float64).unsqueeze(1)
    sigma = LEVELS.unsqueeze(1)
    expected = (0.04 * x + sigma.square() * 0.3) / (0.04 + sigma.square())
    th.testing.assert_close(NormalDenoiser([0.3], 0.2)(x, LEVELS, NO_CONDITION), expected)


# ---------------------------------------------------------------- floor of the behaviour loss


@pytest.mark.parametrize(("std", "floor"), [(0.2, 0.349), (0.05, 0.0465), (0.5, 1.0), (1.0, 1.848)])
def test_floor_of_the_behavior_loss(std: float, floor: float) -> None:
    rho = SIGMA_DATA**2 / std**2
    exact = math.log(rho) / (rho - 1.0) if rho != 1.0 else 1.0
    data = 0.3 + std * normal_quantiles(41).unsqueeze(1)
    value = expected_loss(NormalDenoiser([0.3], std), data, n_levels=500).mean().item()
    assert exact == pytest.approx(floor, rel=2e-3)
    assert value == pytest.approx(exact, rel=2e-3)
    for wrong in (NormalDenoiser([0.3 + 0.2 * std], std), NormalDenoiser([0.3], 1.3 * std)):  # no other denoiser is better
        assert expected_loss(wrong, data, n_levels=500).mean().item() > 1.004 * exact


def test_trained_network_approaches_the_floor_from_above() -> None:
    std, mean = 0.2, 0.3
    generator = th.Generator().manual_seed(0)
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        denoiser = EDMDenoiser(ConditionalMLP(1, 0, [32, 32], time_embedding_dim=8), SIGMA_DATA)
    optimizer = th.optim.Adam(denoiser.parameters(), lr=3e-3)
    schedule = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)

    def evaluate() -> float:
        with th.no_grad():
            data = (mean + std * normal_quantiles(21).unsqueeze(1)).float()
            return expected_loss(Single(denoiser.net, SIGMA_DATA), data, n_levels=200).mean().item()

    before = evaluate()
    for _ in range(800):
        clean = mean + std * th.randn(256, 1, generator=generator)
        noise = th.randn(256, 1, generator=generator)
        level = log_logistic_sigmas(th.rand(256, generator=generator), SIGMA_DATA)
        loss = denoiser.loss(clean, noise, level, th.zeros(256, 0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    floor = math.log(6.25) / 5.25
    assert before > 1.5 * floor
    assert floor * 0.998 < evaluate() < floor * 1.03


class Single(EDMDenoiser):
    """Feeds a network of single-precision numbers."""

    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        return super().forward(noisy.float(), level.float(), condition.float())


# ---------------------------------------------------------------- trust region in closed form


@pytest.mark.parametrize(
    ("std", "constant", "curvature"), [(0.5, 0.4995, 2.0), (0.2, 0.1237, 5.627), (0.05, 0.0096, 14.75), (1.0, 1.132, 0.717)]
)
def test_trust_region_around_normal_data(std: float, constant: float, curvature: float) -> None:
    c, k = closed_form(std)
    assert (c, k) == pytest.approx((constant, curvature), rel=5e-3)
    mean, offsets = 0.3, th.tensor([-1.0, -0.2, 0.0, 0.1, 0.7], dtype=th.float64)
    losses = expected_loss(NormalDenoiser([mean], std), (mean + offsets).unsqueeze(1))
    expected = [c + k * offset**2 for offset in offsets.tolist()]
    assert losses.tolist() == pytest.approx(expected, rel=3e-3)


def test_trust_region_at_sigma_data_is_the_log_density() -> None:
    law = th.distributions.Normal(0.3, SIGMA_DATA)
    actions = points((-0.9,), (0.3,), (0.8,))
    losses = expected_loss(NormalDenoiser([0.3], SIGMA_DATA), actions)
    penalties = -law.log_prob(actions).squeeze(1)
    th.testing.assert_close(losses - losses[1], penalties - penalties[1], rtol=1e-3, atol=1e-6)


def test_gradient_of_the_trust_region_flows_through_both_occurrences() -> None:
    """(a - m) / s^2, as finite differences say: twice that if the estimate is detached, the opposite if the target is."""
    mean, std, action = 0.3, SIGMA_DATA, 0.7
    denoiser = NormalDenoiser([mean], std)
    level = log_logistic_sigmas(midpoints(2000)).repeat_interleave(2)
    noise = th.tensor([-1.0, 1.0], dtype=th.float64).repeat(2000).unsqueeze(1)
    condition = th.zeros(4000, 0)

    def value(a: float) -> float:
        return denoiser.loss(th.full_like(noise, a), noise, level, condition).mean().item()

    a = th.tensor(action, dtype=th.float64, requires_grad=True)
    clean = a.expand_as(noise)
    (gradient,) = th.autograd.grad(denoiser.loss(clean, noise, level, condition).mean(), a)
    expected = (action - mean) / std**2
    assert gradient.item() == pytest.approx(expected, rel=1e-3)
    assert gradient.item() == pytest.approx((value(action + 1e-4) - value(action - 1e-4)) / 2e-4, rel=1e-6)

    weight = denoiser.loss_weight(level).unsqueeze(1)
    denoised = denoiser(denoiser.corrupt(clean, noise, level), level, condition)
    (no_estimate,) = th.autograd.grad((weight * (denoised.detach() - clean).square()).mean(), a, retain_graph=True)
    (no_target,) = th.autograd.grad((weight * (denoised - clean.detach()).square()).mean(), a)
    assert no_estimate.item() == pytest.approx(2.0 * expected, rel=1e-3)
    assert no_target.item() == pytest.approx(-expected, rel=1e-2)


@pytest.mark.parametrize(("weights", "expected"), [(None, (0.96, 7.1, 0.96)), ((0.25, 0.75), (1.95, 7.25, 0.39))])
def test_trust_region_of_two_modes(weights: tuple[float, float] | None, expected: tuple[float, ...]) -> None:
    denoiser = MixtureDenoiser([[-0.8], [0.8]], 0.05, weights)
    losses = expected_loss(denoiser, points((-0.8,), (0.0,), (0.8,)), n_levels=2000, n_noises=101)
    assert losses.tolist() == pytest.approx(expected, rel=0.02)
    slopes = expected_loss(denoiser, points((-0.7,), (-0.9,), (0.7,), (0.9,)))
    assert (slopes > th.stack([losses[0], losses[0], losses[2], losses[2]])).all()  # valleys at the modes


# ---------------------------------------------------------------- the 25 modes

AXIS = (-10.0, -5.0, 0.0, 5.0, 10.0)
CENTERS = tuple(product(AXIS, AXIS))


def grid_loss(*values: tuple[float, ...]) -> th.Tensor:
    return expected_loss(grid_mixture(), points(*values), n_levels=200, n_noises=31)


@pytest.fixture(scope="module")
def losses_at_centers() -> th.Tensor:
    return grid_loss(*CENTERS)


def test_trust_region_of_the_grid(losses_at_centers: th.Tensor) -> None:
    assert losses_at_centers.min().item() == pytest.approx(3.25, rel=0.02)
    assert losses_at_centers.max().item() == pytest.approx(3.35, rel=0.02)
    assert grid_loss((2.5, 0.0), (5.0, -7.5), (-10.0, 2.5)).tolist() == pytest.approx([12.3] * 3, rel=0.03)
    assert grid_loss((2.5, 2.5), (-7.5, 7.5)).tolist() == pytest.approx([21.6] * 2, rel=0.02)
    assert grid_loss((11.0, 11.0), (12.0, 12.0)).tolist() == pytest.approx([7.1, 18.3], rel=0.02)


def test_all_valleys_of_the_grid_are_modes() -> None:
    """Along a row of modes and along a diagonal of cells the loss only falls towards the nearest mode."""
    steps = th.linspace(0.0, 2.5, 6, dtype=th.float64).tolist()
    for direction in ((1.0, 0.0), (0.0, -1.0), (1.0, 1.0)):
        losses = grid_loss(*[(step * direction[0], step * direction[1]) for step in steps])
        assert (losses.diff() > 0.0).all()


@pytest.mark.parametrize(
    ("reward", "best"),
    [
        ("far", {(x, y) for x in (-10.0, 10.0) for y in (-10.0, 10.0)}),
        ("near", {(0.0, 0.0)}),
        ("hard", {(-10.0, 10.0)}),
    ],
)
def test_best_mode_of_the_grid(reward: str, best: set[tuple[float, float]], losses_at_centers: th.Tensor) -> None:
    """With weight 1 of the reward the objective is smallest at the mode that the reward prefers."""
    centers = points(*CENTERS)
    radius = centers.norm(dim=1)
    upper_left = (centers[:, 0] < -7.5) & (centers[:, 1] > 7.5)
    rewards = dict(far=radius, near=radius.max() - radius, hard=th.where(upper_left, 2.0 * radius, radius))
    objective = losses_at_centers - rewards[reward]
    chosen = {CENTERS[i] for i in (objective < objective.min() + 1e-6).nonzero().squeeze(1).tolist()}
    assert chosen == best
    between = points((-7.5, 7.5), (-7.5, 10.0), (7.5, 10.0), (2.5, 0.0), (2.5, 2.5))
    gains = dict(far=between.norm(dim=1), near=radius.max() - between.norm(dim=1), hard=between.norm(dim=1))
    assert (grid_loss(*between.tolist()) - gains[reward] > objective.min()).all()


def test_far_reward_moves_the_optimum_a_little_out_of_the_corner() -> None:
    distances = th.linspace(0.0, 0.5, 5, dtype=th.float64)
    corner = 10.0 + distances.unsqueeze(1) / math.sqrt(2.0) * th.ones(2, dtype=th.float64)
    objective = grid_loss(*corner.tolist()) - corner.norm(dim=1)
    curvature, slope, _ = np.polyfit(distances.numpy(), objective.numpy(), 2)
    assert -slope / (2.0 * curvature) == pytest.approx(0.24, abs=0.03)
