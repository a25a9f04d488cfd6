"""Samplers against other implementations, slow loops, and closed forms for data of known law."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch as th
from exact_denoisers import MixtureDenoiser, NormalDenoiser, exact_chain
from scipy import optimize, stats
from torch import nn

from sb3_diffusion.common.denoisers import Denoiser, DiscreteDenoiser, EDMDenoiser
from sb3_diffusion.common.samplers import (
    SAMPLERS,
    STOCHASTIC_SAMPLERS,
    sample_ddim,
    sample_ddpm,
    sample_dpm_solver,
    sample_heun,
    steps_between,
)
from sb3_diffusion.common.schedules import cosine_betas, linear_betas, vp_betas
from sb3_diffusion.common.torch_layers import ConditionalMLP

DIM, CONDITION_DIM, BATCH_SIZE = 2, 3, 7
MODELS = ("edm", "noise", "sample", "v")
PREDICTION_TYPES = dict(noise="epsilon", sample="sample", v="v_prediction")
"""Our names and those of diffusers."""
Sampler = Callable[..., th.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with NumPy 2

each_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
each_model = pytest.mark.parametrize("model", MODELS)
each_prediction_type = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


@pytest.fixture
def diffusers() -> ModuleType:
    return pytest.importorskip("diffusers")


class Spy(nn.Module):
    """Remembers what a network was told, and calls it; the answer to call number ``cut`` carries no gradient."""

    def __init__(self, net: nn.Module, cut: int | None = None) -> None:
        super().__init__()
        self.net = net
        self.cut = cut
        self.inputs: list[th.Tensor] = []
        self.levels: list[th.Tensor] = []

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        output = self.net(x, condition, level)
        if len(self.inputs) == self.cut:
            output = output.detach()
        self.inputs.append(x)
        self.levels.append(level)
        return output


class Constant(nn.Module):
    def __init__(self, output: float) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        return th.full_like(x, self.output)


class Wave(nn.Module):
    """Works on each entry alone, so that arrays of any shape can be told."""

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        return (1.7 * x + level.double().mean()).sin()


class OneLevelPerRow(nn.Module):
    """A denoiser that spells out the level of each row before it passes a call on."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.scales = denoiser.scales

    def forward(self, noisy: th.Tensor, level: th.Tensor, condition: th.Tensor) -> th.Tensor:
        assert level.shape == (1,)
        return self.denoiser(noisy, level.expand(len(noisy)).clone(), condition)


def make_net() -> ConditionalMLP:
    with th.random.fork_rng(devices=[]):
        th.manual_seed(0)
        return ConditionalMLP(DIM, CONDITION_DIM, [16], time_embedding_dim=4)


def make_denoiser(
    model: str, net: nn.Module | None = None, n_diffusion_steps: int = 6, clip: float | None = None
) -> EDMDenoiser | DiscreteDenoiser:
    net = make_net() if net is None else net
    if model == "edm":
        return EDMDenoiser(net, clip=clip)
    return DiscreteDenoiser(net, vp_betas(n_diffusion_steps), model, clip)


def draw(n_sampling_steps: int, *shape: int, dtype: th.dtype = th.float32) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
    """:return: noise to start from, conditions, and noises on the way; two entries wide if no shape is given"""
    shape = shape or (BATCH_SIZE, DIM)
    generator = th.Generator().manual_seed(0)
    return (
        th.randn(shape, generator=generator, dtype=dtype),
        th.randn(shape[0], CONDITION_DIM, generator=generator, dtype=dtype),
        th.randn(n_sampling_steps - 1, *shape, generator=generator, dtype=dtype),
    )


def run(sampler: Sampler, denoiser: Denoiser, n_sampling_steps: int, **kwargs: float) -> th.Tensor:
    """Samples from what ``draw`` gives, in single precision."""
    noise, condition, noises = draw(n_sampling_steps)
    levels = denoiser.sampling_levels(n_sampling_steps)
    return sampler(denoiser, denoiser.prior(noise, levels[:1]), levels, condition, noises, **kwargs)


# ---------------------------------------------------------------- what all have in common


@each_model
@each_sampler
def test_every_sampler_serves_every_model(sampler: Sampler, model: str) -> None:
    n_evaluations = (lambda n: 2 * n - 1) if sampler is sample_heun else (lambda n: n)
    for n in range(1, 7):
        spy = Spy(make_net())
        samples = run(sampler, make_denoiser(model, spy), n)
        assert samples.shape == (BATCH_SIZE, DIM)
        assert samples.dtype == th.float32
        assert samples.isfinite().all()
        assert len(spy.inputs) == n_evaluations(n)


@each_model
@each_sampler
def test_one_step_is_one_estimate(sampler: Sampler, model: str) -> None:
    denoiser = make_denoiser(model)
    levels = denoiser.sampling_levels(1)
    noise, condition, _ = draw(1)
    x = denoiser.prior(noise, levels)
    before = x.clone()
    samples = sampler(denoiser, x, levels, condition, noise.new_zeros(0, *noise.shape))
    th.testing.assert_close(samples, denoiser(before, levels, condition), rtol=1e-5, atol=1e-4)
    assert th.equal(x, before)


@each_sampler
def test_network_is_told_each_level(sampler: Sampler) -> None:
    spy = Spy(make_net())
    run(sampler, make_denoiser("noise", spy, n_diffusion_steps=9), 4)
    indices = [8, 5, 5, 3, 3, 0, 0] if sampler is sample_heun else [8, 5, 3, 0]
    assert [level.tolist() for level in spy.levels] == [[index] for index in indices]
    assert all(not level.is_floating_point() for level in spy.levels)


@each_model
@each_sampler
def test_level_of_one_element_is_that_of_each_row(sampler: Sampler, model: str) -> None:
    denoiser = make_denoiser(model)
    noise, condition, noises = draw(5)
    levels = denoiser.sampling_levels(5)
    x = denoiser.prior(noise, levels[:1])
    spelled_out = sampler(OneLevelPerRow(denoiser), x, levels, condition, noises)
    th.testing.assert_close(sampler(denoiser, x, levels, condition, noises), spelled_out, rtol=1e-5, atol=1e-5)


@each_model
@each_sampler
def test_trailing_axes(sampler: Sampler, model: str) -> None:
    denoiser = make_denoiser(model, Wave())
    noise, condition, noises = draw(4, 5, 4, 3, dtype=th.float64)
    levels = denoiser.sampling_levels(4)
    x = denoiser.prior(noise, levels[:1])
    samples = sampler(denoiser, x, levels, condition, noises)
    flat = sampler(denoiser, x.flatten(1), levels, condition, noises.flatten(2))
    th.testing.assert_close(samples, flat.reshape(5, 4, 3))


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_on_the_way_moves_stochastic_samplers_alone(name: str) -> None:
    denoiser = make_denoiser("noise")
    noise, condition, noises = draw(4)
    levels = denoiser.sampling_levels(4)
    samples = SAMPLERS[name](denoiser, noise, levels, condition, noises)
    assert th.equal(SAMPLERS[name](denoiser, noise, levels, condition, noises), samples)
    for k in range(3):
        moved = noises.clone()
        moved[k] += 1.0
        same = th.equal(SAMPLERS[name](denoiser, noise, levels, condition, moved), samples)
        assert same == (name not in STOCHASTIC_SAMPLERS)
    without = SAMPLERS[name](denoiser, noise, levels, condition)
    assert th.equal(without, SAMPLERS[name](denoiser, noise, levels, condition, th.zeros_like(noises)))


# ---------------------------------------------------------------- other implementations


def linspace_indices(n_diffusion_steps: int, n_sampling_steps: int) -> th.Tensor:
    return th.from_numpy(np.linspace(n_diffusion_steps - 1, 0, n_sampling_steps).round().astype(np.int64))


@pytest.mark.parametrize("n_sampling_steps", [2, 4, 10])
@pytest.mark.parametrize("posterior_variance", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
@each_prediction_type
def test_ddpm_is_that_of_diffusers(
    diffusers: ModuleType, prediction_type: str, clip: float | None, posterior_variance: bool, n_sampling_steps: int
) -> None:
    betas = vp_betas(10)
    scheduler = diffusers.DDPMScheduler(
        10,
        trained_betas=betas.tolist(),
        variance_type="fixed_small" if posterior_variance else "fixed_large",
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        prediction_type=PREDICTION_TYPES[prediction_type],
    )
    levels = linspace_indices(10, n_sampling_steps)
    scheduler.set_timesteps(timesteps=levels.tolist())
    net = make_net()
    start, condition, _ = draw(n_sampling_steps)
    generator = th.Generator().manual_seed(1)
    expected = start
    for index in levels:
        expected = scheduler.step(net(expected, condition, index.reshape(1)), index, expected, generator).prev_sample
    generator.manual_seed(1)
    noises = start.new_zeros(n_sampling_steps - 1, *start.shape)
    for noise in noises:
        noise.copy_(th.randn(start.shape, generator=generator))
    denoiser = DiscreteDenoiser(net, betas, prediction_type, clip)
    samples = sample_ddpm(denoiser, start, levels, condition, noises, posterior_variance=posterior_variance)
    th.testing.assert_close(samples, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clip", [None, 0.5])
@each_prediction_type
def test_ddim_is_that_of_diffusers(
    diffusers: ModuleType, prediction_type: str, clip: float | None, eta: float, spacing: str
) -> None:
    """Diffusers takes the distance of two levels for ``n_diffusion_steps // n_sampling_steps``: true of these spacings."""
    betas = linear_betas(1000)
    scheduler = diffusers.DDIMScheduler(
        1000,
        trained_betas=betas.tolist(),
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        prediction_type=PREDICTION_TYPES[prediction_type],
        timestep_spacing=spacing,
        set_alpha_to_one=True,
    )
    net = make_net()
    for n in (1, 5, 20):
        scheduler.set_timesteps(n)
        start, condition, noises = draw(n)
        expected = start
        for index, noise in zip(scheduler.timesteps, [*noises, th.zeros_like(start)], strict=True):
            prediction = net(expected, condition, index.reshape(1))
            expected = scheduler.step(
                prediction, index, expected, eta, use_clipped_model_output=True, variance_noise=noise
            ).prev_sample
        denoiser = DiscreteDenoiser(net, betas, prediction_type, clip)
        samples = sample_ddim(denoiser, start, scheduler.timesteps, condition, noises, eta=eta)
        th.testing.assert_close(samples, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@each_prediction_type
def test_ddim_of_all_steps_is_that_of_diffusers(diffusers: ModuleType, prediction_type: str, eta: float) -> None:
    betas = vp_betas(8)
    scheduler = diffusers.DDIMScheduler(
        8,
        trained_betas=betas.tolist(),
        clip_sample=False,
        prediction_type=PREDICTION_TYPES[prediction_type],
        timestep_spacing="linspace",
        set_alpha_to_one=True,
    )
    scheduler.set_timesteps(8)
    denoiser = make_denoiser(prediction_type, n_diffusion_steps=8)
    assert th.equal(denoiser.sampling_levels(8), scheduler.timesteps)
    expected, condition, noises = draw(8)
    for index, noise in zip(scheduler.timesteps, [*noises, th.zeros_like(expected)], strict=True):
        prediction = denoiser.net(expected, condition, index.reshape(1))
        expected = scheduler.step(prediction, index, expected, eta, variance_noise=noise).prev_sample
    th.testing.assert_close(run(sample_ddim, denoiser, 8, eta=eta), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_sampling_steps", [1, 2, 3, 10, 20, 40])
@each_prediction_type
def test_dpm_solver_is_that_of_diffusers(diffusers: ModuleType, prediction_type: str, n_sampling_steps: int) -> None:
    betas = vp_betas(40)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        40,
        trained_betas=betas.tolist(),
        solver_order=2,
        prediction_type=PREDICTION_TYPES[prediction_type],
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    levels = linspace_indices(40, n_sampling_steps)
    scheduler.set_timesteps(timesteps=levels.tolist())
    denoiser = make_denoiser(prediction_type, n_diffusion_steps=40)
    expected, condition, _ = draw(n_sampling_steps)
    for index in scheduler.timesteps:
        expected = scheduler.step(denoiser.net(expected, condition, index.reshape(1)), index, expected).prev_sample
    th.testing.assert_close(run(sample_dpm_solver, denoiser, n_sampling_steps), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_sampling_steps", [1, 2, 3, 10, 40])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("prediction_type", ["noise", "v"])  # the other is not read off the scaled sample
def test_heun_is_that_of_diffusers(
    diffusers: ModuleType, prediction_type: str, clip: float | None, n_sampling_steps: int
) -> None:
    betas = vp_betas(40)
    scheduler = diffusers.HeunDiscreteScheduler(
        40,
        trained_betas=betas.tolist(),
        prediction_type=PREDICTION_TYPES[prediction_type],
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    levels = linspace_indices(40, n_sampling_steps)
    scheduler.set_timesteps(timesteps=levels.tolist())
    denoiser = make_denoiser(prediction_type, n_diffusion_steps=40, clip=clip)
    noise, condition, _ = draw(n_sampling_steps)
    expected = noise * (scheduler.sigmas[0].square() + 1.0).sqrt()
    for index in scheduler.timesteps:
        prediction = denoiser.net(scheduler.scale_model_input(expected, index), condition, index.long().reshape(1))
        expected = scheduler.step(prediction, index, expected).prev_sample
    th.testing.assert_close(run(sample_heun, denoiser, n_sampling_steps), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_sampling_steps", [1, 2, 3, 10, 30])
@pytest.mark.parametrize(
    ("sampler", "name"), [(sample_ddim, "EDMEulerScheduler"), (sample_dpm_solver, "EDMDPMSolverMultistepScheduler")]
)
def test_samplers_of_edm_are_those_of_diffusers(
    diffusers: ModuleType, sampler: Sampler, name: str, n_sampling_steps: int
) -> None:
    """DDIM without noise is Euler's method."""
    scheduler = getattr(diffusers, name)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(n_sampling_steps)
    denoiser = make_denoiser("edm")
    noise, condition, _ = draw(n_sampling_steps)
    expected = 80.0 * noise
    for timestep in scheduler.timesteps:
        prediction = denoiser.net(scheduler.scale_model_input(expected, timestep), condition, timestep.reshape(1))
        expected = scheduler.step(prediction, timestep, expected).prev_sample
    th.testing.assert_close(run(sampler, denoiser, n_sampling_steps), expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- slow loops


def slow_heun(denoise: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """Algorithm 1 of arXiv 2206.00364, with the schedule sigma(t) = t."""
    t = [*sigmas, 0.0]
    for i in range(len(sigmas)):
        d = (x - denoise(x, t[i])) / t[i]
        ahead = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0.0:
            d_ahead = (ahead - denoise(ahead, t[i + 1])) / t[i + 1]
            ahead = x + (t[i + 1] - t[i]) * (0.5 * d + 0.5 * d_ahead)
        x = ahead
    return x


def slow_dpm_solver(denoise: Callable[[np.ndarray, float], np.ndarray], x: np.ndarray, sigmas: list[float]) -> np.ndarray:
    """Algorithm 2 of arXiv 2211.01095 for data that is not scaled, then one step to the clean data."""
    t = [-math.log(sigma) for sigma in sigmas]
    q = [denoise(x, sigmas[0])]
    for i in range(1, len(sigmas)):
        h = t[i] - t[i - 1]
        d = q[i - 1]
        if i > 1:
            r = (t[i - 1] - t[i - 2]) / h
            d = (1.0 + 1.0 / (2.0 * r)) * q[i - 1] - 1.0 / (2.0 * r) * q[i - 2]
        x = sigmas[i] / sigmas[i - 1] * x - (math.exp(-h) - 1.0) * d
        q.append(denoise(x, sigmas[i]))
    return q[-1]


@pytest.mark.parametrize("n_sampling_steps", [1, 2, 3, 8])
@pytest.mark.parametrize(("sampler", "slow"), [(sample_heun, slow_heun), (sample_dpm_solver, slow_dpm_solver)])
def test_solvers_are_loops_on_edm(sampler: Sampler, slow: Callable[..., np.ndarray], n_sampling_steps: int) -> None:
    denoiser = make_denoiser("edm").double()
    noise, condition, _ = draw(n_sampling_steps, dtype=th.float64)
    levels = denoiser.sampling_levels(n_sampling_steps).double()

    @th.no_grad()
    def denoise(x: np.ndarray, sigma: float) -> np.ndarray:
        return denoiser(th.from_numpy(x), th.tensor([sigma], dtype=th.float64), condition).numpy()

    x = denoiser.prior(noise, levels[:1])
    expected = slow(denoise, x.numpy(), levels.tolist())
    np.testing.assert_allclose(sampler(denoiser, x, levels, condition).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@each_model
def test_ddpm_draws_from_the_posterior(model: str) -> None:
    """The next level and this one are jointly normal given the clean data: condition the one on the other."""
    denoiser = make_denoiser(model, n_diffusion_steps=20).double()
    levels = th.tensor([60.0, 3.0, 0.4, 0.1]).double() if model == "edm" else th.tensor([19, 11, 10, 3])
    noise, condition, noises = draw(4, dtype=th.float64)
    x = denoiser.prior(noise, levels[:1])
    samples = {variance: sample_ddpm(denoiser, x, levels, condition, noises, variance) for variance in (True, False)}
    alphas, sigmas = (scale.tolist() for scale in denoiser.scales(levels))
    for posterior_variance in (True, False):
        expected = x
        for k in range(3):
            clean = denoiser(expected, levels[k : k + 1], condition)
            ratio = alphas[k] / alphas[k + 1]
            added = sigmas[k] ** 2 - ratio**2 * sigmas[k + 1] ** 2  # x_k = ratio x_{k+1} + N(0, added)
            covariance = np.array([[sigmas[k + 1] ** 2, ratio * sigmas[k + 1] ** 2], [0.0, sigmas[k] ** 2]])
            gain = covariance[0, 1] / covariance[1, 1]
            mean = alphas[k + 1] * clean + gain * (expected - alphas[k] * clean)
            variance = covariance[0, 0] - gain * covariance[0, 1] if posterior_variance else added
            expected = mean + math.sqrt(variance) * noises[k]
        expected = denoiser(expected, levels[3:], condition)
        th.testing.assert_close(samples[posterior_variance], expected, rtol=1e-6, atol=1e-7)
    assert not th.allclose(samples[True], samples[False], rtol=0.01)


@each_model
def test_ddim_with_all_noise_is_ddpm(model: str) -> None:
    denoiser = make_denoiser(model, n_diffusion_steps=12)
    for n in (2, 5, 12):
        samples = run(sample_ddim, denoiser, n, eta=1.0)
        th.testing.assert_close(samples, run(sample_ddpm, denoiser, n), rtol=1e-4, atol=1e-5)
        assert not th.allclose(run(sample_ddim, denoiser, n, eta=0.5), samples, rtol=0.01)


def test_ddim_without_the_noise_that_eta_asks_for() -> None:
    denoiser = make_denoiser("v")
    noise, condition, noises = draw(4)
    levels = denoiser.sampling_levels(4)
    samples = sample_ddim(denoiser, noise, levels, condition, eta=0.7)
    assert th.equal(samples, sample_ddim(denoiser, noise, levels, condition, th.zeros_like(noises), eta=0.7))
    assert not th.allclose(samples, sample_ddim(denoiser, noise, levels, condition), rtol=0.01)


# ---------------------------------------------------------------- published numbers


def coefficients(betas: th.Tensor) -> tuple[list[float], list[float], list[float]]:
    """Those of x, of the estimate and of the noise in each step of ``sample_ddpm``, from the last step of the chain on."""
    n = len(betas)

    def path(estimate: float, noise: float) -> th.Tensor:
        spy = Spy(Constant(estimate))
        x, noises = th.ones(1, 1, dtype=th.float64), th.full((n - 1, 1, 1), noise, dtype=th.float64)
        denoiser = DiscreteDenoiser(spy, betas, "sample").double()
        result = sample_ddpm(denoiser, x, denoiser.sampling_levels(n), th.zeros(1, 0), noises)
        return th.cat([*spy.inputs, result]).squeeze(1)

    plain, pulled, noisy = path(0.0, 0.0), path(1.0, 0.0), path(0.0, 1.0)
    keep = plain[1:] / plain[:-1]
    pull = pulled[1:] - keep * pulled[:-1]
    std = noisy[1:] - keep * noisy[:-1]
    return keep.flip(0).tolist(), pull.flip(0).tolist(), std.flip(0).tolist()


def test_coefficients_of_five_steps() -> None:
    """Those of Diffusion-QL (arXiv 2208.06193)."""
    keep, pull, std = coefficients(vp_betas(5))
    assert pull == pytest.approx([1.0, 0.728435, 0.498410, 0.312681, 0.165654], abs=1e-5)
    assert keep == pytest.approx([0.0, 0.255116, 0.405078, 0.433466, 0.392901], abs=1e-5)
    assert std == pytest.approx([0.0, 0.398890, 0.653255, 0.812962, 0.898758], abs=1e-5)


def test_coefficients_of_twenty_steps() -> None:
    """Those of Diffuser (arXiv 2205.09991)."""
    keep, pull, std = coefficients(cosine_betas(20))
    assert (pull[0], keep[0]) == (1.0, 0.0)
    assert (pull[19], keep[19]) == pytest.approx((0.077766, 0.031431), abs=1e-5)
    assert [std[i] ** 2 for i in (0, 1, 2, 3)] == pytest.approx([0.0, 0.005750, 0.015189, 0.026140], abs=1e-6)
    assert [std[i] ** 2 for i in (18, 19)] == pytest.approx([0.7349, 0.99295], abs=5e-5)


@pytest.mark.parametrize("betas", [vp_betas(5), cosine_betas(20), linear_betas(1000)], ids=["vp", "cosine", "linear"])
def test_steps_of_a_whole_chain(betas: th.Tensor) -> None:
    denoiser = DiscreteDenoiser(nn.Identity(), betas)
    steps = steps_between(denoiser, denoiser.sampling_levels(len(betas)))
    th.testing.assert_close(steps.variance.double(), betas.flip(0), rtol=2e-3, atol=1e-6)
    assert steps.posterior_std[-1] == 0.0
    assert (steps.posterior_std.square() <= steps.variance * (1.0 + 1e-6)).all()
    assert (steps.next_alpha[-1], steps.next_sigma[-1]) == (1.0, 0.0)


@each_prediction_type
@each_sampler
def test_data_at_one_point(sampler: Sampler, prediction_type: str) -> None:
    point = [0.3, -0.7]
    for n in (1, 3, 5):
        denoiser = exact_chain(vp_betas(5), [point], 0.0, prediction_type=prediction_type)
        noise, condition, noises = draw(n, dtype=th.float64)
        samples = sampler(denoiser, 10.0 * noise, denoiser.sampling_levels(n), condition, 10.0 * noises)
        th.testing.assert_close(samples, th.tensor(point).double().expand_as(samples), rtol=0.0, atol=2e-5)


def test_data_at_one_point_comes_out_bit_by_bit() -> None:
    point = th.tensor([[0.3, -0.7]], dtype=th.float64)
    for sampler in (sample_ddpm, sample_ddim, sample_dpm_solver):
        denoiser = exact_chain(vp_betas(5), point.tolist(), 0.0, prediction_type="sample")
        noise, condition, noises = draw(5, dtype=th.float64)
        assert th.equal(sampler(denoiser, noise, denoiser.sampling_levels(5), condition, noises), point.expand_as(noise))


@pytest.mark.parametrize("sampler", [sample_ddpm, sample_ddim, sample_dpm_solver])
@each_model
def test_samples_keep_to_the_bound_of_the_estimate(sampler: Sampler, model: str) -> None:
    samples = run(sampler, make_denoiser(model, clip=0.05), 4)
    assert samples.abs().max() == th.tensor(0.05)


# ---------------------------------------------------------------- normal data: the sampler is an affine map of its noise


def law_of_samples(sampler: Sampler, denoiser: Denoiser, n_sampling_steps: int, **kwargs: float) -> tuple[float, float]:
    """Mean and standard deviation, by the slopes of one sample in each noise."""
    levels = denoiser.sampling_levels(n_sampling_steps)
    noise = th.zeros(1, 1, dtype=th.float64, requires_grad=True)
    noises = th.zeros(n_sampling_steps - 1, 1, 1, dtype=th.float64, requires_grad=True)
    sample = sampler(denoiser, denoiser.prior(noise, levels[:1]), levels, th.zeros(1, 0), noises, **kwargs)
    slopes = th.autograd.grad(sample.sum(), (noise, noises), materialize_grads=True)
    return sample.item(), math.sqrt(sum(slope.square().sum().item() for slope in slopes))


@pytest.mark.parametrize(
    ("n_diffusion_steps", "mean", "std", "expected_mean", "expected_std"),
    [
        (5, 0.5, 0.2, 0.49987, 0.0715),
        (5, 0.0, 0.5, 0.0, 0.2954),
        (5, 0.8, 0.05, 0.79999, 0.00502),
        (50, 0.5, 0.2, 0.49987, 0.1670),
        (50, 0.0, 0.5, 0.0, 0.4574),
        (50, 0.8, 0.05, 0.79999, 0.0284),
        (1000, 0.5, 0.2, 0.49987, 0.1971),
        (1000, 0.0, 0.5, 0.0, 0.4971),
        (1000, 0.8, 0.05, 0.79999, 0.0467),
    ],
)
def test_ddpm_on_normal_data(
    n_diffusion_steps: int, mean: float, std: float, expected_mean: float, expected_std: float
) -> None:
    """Too narrow with few steps, for each draws from the posterior of one point."""
    law = law_of_samples(sample_ddpm, exact_chain(vp_betas(n_diffusion_steps), [[mean]], std), n_diffusion_steps)
    assert law[0] == pytest.approx(expected_mean, abs=1e-5)
    assert law[1] == pytest.approx(expected_std, abs=5.1e-5)


@pytest.mark.parametrize(("mean", "std", "expected"), [(0.5, 0.2, 0.114), (0.0, 0.5, 0.444), (0.8, 0.05, 0.0081)])
def test_larger_variance_on_normal_data(mean: float, std: float, expected: float) -> None:
    denoiser = exact_chain(vp_betas(5), [[mean]], std)
    assert law_of_samples(sample_ddpm, denoiser, 5, posterior_variance=False)[1] == pytest.approx(expected, rel=6e-3)


@pytest.mark.parametrize(
    ("n_diffusion_steps", "mean", "variance", "expected"),
    [(20, 0.0, 1.0, 0.8118), (64, 0.0, 1.0, 0.9314), (256, 0.0, 1.0, 0.9815), (20, 1.0, 0.1, 0.0676)],
)
def test_ddpm_on_the_cosine_schedule(n_diffusion_steps: int, mean: float, variance: float, expected: float) -> None:
    denoiser = exact_chain(cosine_betas(n_diffusion_steps), [[mean]], math.sqrt(variance), prediction_type="sample")
    law = law_of_samples(sample_ddpm, denoiser, n_diffusion_steps)
    assert law[0] == pytest.approx(mean, abs=1e-5)
    assert law[1] ** 2 == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize(
    ("betas", "n_sampling_steps", "ratios"),
    [
        (cosine_betas(10), 10, (0.88, 0.85, 0.49)),
        (cosine_betas(50), 20, (0.94, 0.92, 0.77)),
        (cosine_betas(50), 50, (0.98, 0.97, 0.86)),
        (vp_betas(50), 50, (0.97, 0.96, 0.80)),
        (vp_betas(1000, beta_max=20.0), 20, (0.91, 0.86, 0.54)),
        (vp_betas(1000, beta_max=20.0), 50, (0.96, 0.94, 0.78)),
    ],
)
def test_ddim_on_normal_data(betas: th.Tensor, n_sampling_steps: int, ratios: tuple[float, ...]) -> None:
    stds = (1.0, 0.5, 0.1)
    laws = [law_of_samples(sample_ddim, exact_chain(betas, [[0.0]], std), n_sampling_steps) for std in stds]
    assert [law[1] / std for law, std in zip(laws, stds, strict=True)] == pytest.approx(ratios, abs=0.0052)


def solver_error(sampler: Sampler, denoiser: Denoiser, std: float, n_sampling_steps: int) -> float:
    """
    How wrong the standard deviation of samples of N(0, ``std``^2) is.

    Along the probability-flow equation x / alpha grows as the root of ``std``^2 + (sigma / alpha)^2, in closed form.
    """
    levels = denoiser.sampling_levels(n_sampling_steps)
    alpha, sigma = (scale.item() for scale in denoiser.scales(levels[:1]))
    start = denoiser.prior(th.ones(1, 1, dtype=th.float64), levels[:1])
    exact = start.item() / alpha * std / math.sqrt(std**2 + (sigma / alpha) ** 2)
    return abs(sampler(denoiser, start, levels, th.zeros(1, 0)).item() - exact)


@pytest.mark.parametrize("std", [0.2, 0.5])
@pytest.mark.parametrize("model", ["edm", "chain"])
def test_solvers_of_second_order_win_at_equal_cost(model: str, std: float) -> None:
    denoiser = NormalDenoiser([0.0], std) if model == "edm" else exact_chain(vp_betas(1000), [[0.0]], std)
    euler, double = (solver_error(sample_ddim, denoiser, std, n) for n in (79, 158))
    solver, finer = (solver_error(sample_dpm_solver, denoiser, std, n) for n in (79, 158))
    heun, finest = (solver_error(sample_heun, denoiser, std, n) for n in (40, 80))
    assert solver < 0.9 * euler
    assert heun < 0.4 * euler
    assert math.log2(euler / double) == pytest.approx(1.0, abs=0.1)
    assert math.log2(solver / finer) > 1.8
    assert math.log2(heun / finest) > 1.8


# ---------------------------------------------------------------- two modes


@pytest.mark.parametrize(
    ("n_diffusion_steps", "expected", "tolerance"),
    [(1, 1.0, 0.0), (2, 0.95, 0.01), (5, 0.30, 0.015), (10, 0.03, 0.01), (50, 0.0, 1e-3)],
)
def test_mass_between_two_modes(n_diffusion_steps: int, expected: float, tolerance: float) -> None:
    """Few steps of an exact model do not tell the modes apart."""
    denoiser = exact_chain(vp_betas(n_diffusion_steps), [[-0.8], [0.8]], 0.05)
    noise, condition, noises = draw(n_diffusion_steps, 20_000, 1)
    samples = sample_ddpm(denoiser, noise, denoiser.sampling_levels(n_diffusion_steps), condition, noises)
    assert samples.abs().lt(0.6).double().mean().item() == pytest.approx(expected, abs=tolerance)
    assert samples.gt(0.0).double().mean().item() == pytest.approx(0.5, abs=0.015)


def test_two_modes_of_twenty_steps() -> None:
    denoiser = exact_chain(cosine_betas(20), [[-1.0], [1.0]], 0.1, prediction_type="sample")
    noise, condition, noises = draw(20, 20_000, 1)
    samples = sample_ddpm(denoiser, noise, denoiser.sampling_levels(20), condition, noises)
    distances = samples.abs()
    assert samples.gt(0.0).double().mean().item() == pytest.approx(0.5, abs=0.015)
    assert distances.mean().item() == pytest.approx(0.995, abs=2e-3)
    assert distances.std().item() == pytest.approx(0.067, abs=2e-3)
    assert (distances - 1.0).abs().gt(0.3).double().mean() < 1e-3


@pytest.mark.parametrize(("sampler", "tolerance"), [(sample_ddim, 0.02), (sample_dpm_solver, 4e-3), (sample_heun, 2e-3)])
@pytest.mark.parametrize("model", ["edm", "chain"])
def test_solvers_carry_quantiles_to_quantiles(model: str, sampler: Sampler, tolerance: float) -> None:
    """In one dimension paths of the probability-flow equation do not cross."""
    means, stds, weights = [-0.8, 0.7], [0.1, 0.25], [0.3, 0.7]
    probabilities = [0.02, 0.1, 0.2, 0.28, 0.33, 0.5, 0.8, 0.97]

    def quantiles(alpha: float, sigma: float) -> th.Tensor:
        scales = [math.sqrt(alpha**2 * std**2 + sigma**2) for std in stds]

        def excess(x: float, p: float) -> float:
            parts = zip(means, scales, weights, strict=True)
            return sum(w * stats.norm.cdf(x, alpha * mean, scale) for mean, scale, w in parts) - p

        return th.tensor([[optimize.brentq(excess, -999.0, 999.0, (p,), xtol=1e-12)] for p in probabilities]).double()

    denoiser: Denoiser = MixtureDenoiser([[mean] for mean in means], stds, weights)
    if model == "chain":
        denoiser = exact_chain(vp_betas(1000), [[mean] for mean in means], stds, weights)
    levels = denoiser.sampling_levels(250)
    alpha, sigma = (scale.item() for scale in denoiser.scales(levels[:1]))
    samples = sampler(denoiser, quantiles(alpha, sigma), levels, th.zeros(len(probabilities), 0))
    th.testing.assert_close(samples, quantiles(1.0, 0.0), rtol=0.0, atol=tolerance)


def test_edm_model_around_a_perfect_network() -> None:
    """Preconditioning, levels and Heun's method together give samples of the right mean and standard deviation."""

    class Preconditioned(nn.Module):
        """Tells what EDM's network should, from the posterior mean (arXiv 2206.00364, eq. 8)."""

        def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
            sigma = (4.0 * level.double()).exp().reshape(-1, 1)
            total = (sigma.square() + 0.25).sqrt()
            noisy = x.double() * total
            denoised = NormalDenoiser([0.3], 0.2)(noisy, sigma.squeeze(1), condition)
            return (denoised - 0.25 / total.square() * noisy) * total / (0.5 * sigma)

    mean, std = law_of_samples(sample_heun, EDMDenoiser(Preconditioned()), 80)
    assert mean == pytest.approx(0.3, abs=1e-3)
    assert std == pytest.approx(0.2, abs=1e-3)


# ---------------------------------------------------------------- guides


@each_model
@each_sampler
def test_guide_comes_before_each_step(sampler: Sampler, model: str) -> None:
    """It is told the number of the step, and the network sees what it makes of the noisy data."""
    spy, told, made = Spy(make_net()), [], []

    def guide(k: int, x: th.Tensor) -> th.Tensor:
        told.append(k)
        made.append(1.1 * x + 0.3)
        return made[-1]

    denoiser = make_denoiser(model, spy)
    samples = run(sampler, denoiser, 4, guide=guide)
    assert told == [0, 1, 2, 3]
    of_steps = spy.inputs[::2] if sampler is sample_heun else spy.inputs
    for k, (level, seen) in enumerate(zip(denoiser.sampling_levels(4), of_steps, strict=True)):
        scale = (level.square() + 0.25).rsqrt() if model == "edm" else 1.0  # EDM's network sees its input scaled
        th.testing.assert_close(seen, scale * made[k], rtol=1e-5, atol=1e-5)
    assert not th.allclose(samples, run(sampler, denoiser, 4), rtol=0.01)


@each_model
@each_sampler
def test_guide_that_does_nothing(sampler: Sampler, model: str) -> None:
    denoiser = make_denoiser(model)
    free = run(sampler, denoiser, 5)
    th.testing.assert_close(run(sampler, denoiser, 5, guide=lambda k, x: x), free, rtol=1e-5, atol=1e-5)


@each_model
@each_sampler
def test_guide_is_told_the_noisy_data(sampler: Sampler, model: str) -> None:
    """Not scaled in any way: what sampling starts from, then what each step makes of it."""
    seen: list[th.Tensor] = []

    def guide(k: int, x: th.Tensor) -> th.Tensor:
        seen.append(x)
        return x

    spy = Spy(make_net())
    denoiser = make_denoiser(model, spy)
    run(sampler, denoiser, 4)
    inputs = spy.inputs[::2] if sampler is sample_heun else list(spy.inputs)
    run(sampler, denoiser, 4, guide=guide)
    levels = denoiser.sampling_levels(4)
    th.testing.assert_close(seen[0], denoiser.prior(draw(4)[0], levels[:1]))
    for x, level, told in zip(seen, levels, inputs, strict=True):
        scale = (level.square() + 0.25).rsqrt() if model == "edm" else 1.0  # EDM's network sees its input scaled
        th.testing.assert_close(scale * x, told, rtol=1e-5, atol=1e-5)


@each_sampler
def test_nothing_from_before_a_guide_that_replaces_all_is_left(sampler: Sampler) -> None:
    """A constant in the place of the noisy data makes samples that do not depend on the start."""
    denoiser = make_denoiser("sample", Wave())
    levels, condition = denoiser.sampling_levels(4), th.zeros(2, 0)

    def samples(guide: Callable[[int, th.Tensor], th.Tensor] | None) -> th.Tensor:
        return sampler(denoiser, th.tensor([[1.0], [-3.0]]), levels, condition, guide=guide)

    free, replaced = samples(None), samples(lambda k, x: th.full_like(x, 0.1 * k))
    assert th.equal(replaced[0], replaced[1])
    assert not th.allclose(free[0], free[1], rtol=1e-3)


@pytest.mark.parametrize("tilt", [0.5, -1.5])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_guide_by_the_posterior_variance_tilts_the_law(tilt: float, prediction_type: str) -> None:
    r"""
    Of data from N(0, 1) with the density multiplied by $e^{c x}$ the mean is c and the variance stays. The gradient of
    $\ln E[e^{c x_0} | x]$ is $\alpha c$; along a long chain a step of the posterior variance times it does that.
    """
    betas = cosine_betas(1000)
    denoiser = exact_chain(betas, [[0.0]], 1.0, prediction_type=prediction_type)
    levels = denoiser.sampling_levels(1000)
    steps = steps_between(denoiser, levels)
    sizes = steps.posterior_std.square() * steps.alpha * tilt
    law = law_of_samples(sample_ddpm, denoiser, 1000, guide=lambda k, x: x + sizes[k])
    assert law[0] == pytest.approx(tilt, rel=0.01)
    assert law[1] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("power", "n_steps", "first_level", "expected"),
    [(2, 2, 2, 0.2431), (1, 2, 2, 0.6371), (0, 2, 2, 2.0379), (2, 1, 0, 0.1221)],
)
def test_guide_on_the_cosine_schedule(power: int, n_steps: int, first_level: int, expected: float) -> None:
    """
    Diffuser's guidance by a value of slope 1 on N(0, 1): steps of 0.1 times a power of the posterior's standard deviation.
    """
    denoiser = exact_chain(cosine_betas(20), [[0.0]], 1.0, prediction_type="sample")
    levels = denoiser.sampling_levels(20)
    sizes = 0.1 * n_steps * steps_between(denoiser, levels).posterior_std ** power * (levels >= first_level)
    law = law_of_samples(sample_ddpm, denoiser, 20, guide=lambda k, x: x + sizes[k])
    assert law[0] == pytest.approx(expected, abs=1e-4)
    assert law[1] ** 2 == pytest.approx(0.8118, abs=1e-4)


@each_sampler
def test_gradient_flows_through_a_guide(sampler: Sampler) -> None:
    denoiser = make_denoiser("v")
    size = th.tensor(0.2, requires_grad=True)
    run(sampler, denoiser, 4, guide=lambda k, x: x + size).sum().backward()
    assert size.grad is not None and size.grad.abs() > 1e-3


# ---------------------------------------------------------------- gradients


def gradient(sampler: Sampler, model: str, net: nn.Module, cut: int | None = None) -> th.Tensor:
    """Of a loss of samples, in each weight of the network."""
    denoiser = make_denoiser(model, Spy(net, cut), n_diffusion_steps=5)
    noise, condition, noises = draw(5, dtype=th.float64)
    levels = denoiser.sampling_levels(5)
    samples = sampler(denoiser, denoiser.prior(noise, levels[:1]), levels, condition, noises)
    gradients = th.autograd.grad((samples - 0.3).square().sum(), list(net.parameters()))
    return th.cat([part.flatten() for part in gradients])


@each_model
@each_sampler
def test_gradient_flows_through_every_call(sampler: Sampler, model: str) -> None:
    net = make_net().double()
    whole = gradient(sampler, model, net)
    for cut in range(9 if sampler is sample_heun else 5):
        change = gradient(sampler, model, net, cut) - whole
        assert change.norm() > 1e-6 * whole.norm(), cut


@each_model
@each_sampler
def test_gradient_is_the_finite_difference(sampler: Sampler, model: str) -> None:
    net = make_net().double()
    denoiser = make_denoiser(model, net, n_diffusion_steps=5)
    weight = net.trunk[0].weight
    noise, condition, noises = draw(5, dtype=th.float64)
    levels = denoiser.sampling_levels(5)
    noise.requires_grad_()

    def loss() -> th.Tensor:
        samples = sampler(denoiser, denoiser.prior(noise, levels[:1]), levels, condition, noises)
        return (samples - 0.3).square().sum()

    of_weight, of_noise = th.autograd.grad(loss(), (weight, noise))
    for tensor, slopes in ((weight, of_weight), (noise, of_noise)):
        values = []
        for step in (1e-5, -2e-5):
            tensor.data[0, 1] += step
            values.append(loss().item())
        tensor.data[0, 1] += 1e-5
        assert slopes[0, 1].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)
