"""Noise-level density, noise schedules and learning-rate schedule against closed forms, slow loops and other libraries."""

import math

import pytest
import torch as th
from exact_denoisers import midpoints
from scipy import integrate, stats

from sb3_diffusion.common.schedules import (
    NOISE_SCHEDULES,
    cosine_betas,
    karras_sigmas,
    linear_betas,
    log_logistic_sigmas,
    noise_schedule_betas,
    vp_betas,
)
from sb3_diffusion.common.utils import CosineSchedule

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.002, 80.0


def log_logistic_cdf(sigma: float, sigma_data: float = SIGMA_DATA, scale: float = 0.5) -> float:
    """Distribution function before truncation, written from the definition."""
    return 1.0 / (1.0 + math.exp(-(math.log(sigma) - math.log(sigma_data)) / scale))


def draw(n: int, **kwargs: float) -> th.Tensor:
    return log_logistic_sigmas(th.rand(n, generator=th.Generator().manual_seed(0)), **kwargs)


def test_share_of_noise_is_uniform() -> None:
    sigmas = draw(20_000).double()
    share = sigmas.square() / (sigmas.square() + SIGMA_DATA**2)
    low, high = log_logistic_cdf(SIGMA_MIN), log_logistic_cdf(SIGMA_MAX)
    assert low == pytest.approx(1.6e-5, rel=0.01)
    assert high == pytest.approx(0.99996, abs=1e-6)
    assert stats.kstest(share.numpy(), "uniform", args=(low, high - low)).pvalue > 0.01


def test_share_of_noise_is_not_uniform_with_another_density() -> None:
    """The test above tells EDM's log-normal law apart."""
    sigmas = (th.randn(20_000, generator=th.Generator().manual_seed(0), dtype=th.float64) * 1.2 - 1.2).exp()
    share = sigmas.square() / (sigmas.square() + SIGMA_DATA**2)
    assert stats.kstest(share.numpy(), "uniform").pvalue < 1e-9


@pytest.mark.parametrize(
    ("probability", "sigma"),
    [(0.01, 0.0503), (0.05, 0.1147), (0.25, 0.2887), (0.5, 0.5), (0.75, 0.8660), (0.95, 2.179), (0.99, 4.965)],
)
def test_quantiles(probability: float, sigma: float) -> None:
    assert log_logistic_sigmas(th.tensor(probability, dtype=th.float64)).item() == pytest.approx(sigma, rel=1e-3)


def test_levels_stay_inside_the_bounds() -> None:
    edges = th.tensor([0.0, 1e-12, 1e-7, 0.5, 1.0 - 2.0**-24, 1.0])
    for sigmas in (draw(100_000), log_logistic_sigmas(edges), log_logistic_sigmas(edges.double())):
        assert sigmas.isfinite().all()
        assert sigmas.min() >= SIGMA_MIN
        assert sigmas.max() <= SIGMA_MAX
    ends = log_logistic_sigmas(th.tensor([0.0, 1.0], dtype=th.float64))
    assert ends.tolist() == pytest.approx([SIGMA_MIN, SIGMA_MAX], rel=1e-6)
    assert log_logistic_sigmas(th.rand(3, 4)).shape == (3, 4)


@pytest.mark.parametrize("kwargs", [dict(sigma_data=2.0), dict(scale=1.0), dict(sigma_min=0.1, sigma_max=1.0)])
def test_other_constants_are_the_inverse_distribution_function(kwargs: dict[str, float]) -> None:
    sigma_data, scale = kwargs.get("sigma_data", SIGMA_DATA), kwargs.get("scale", 0.5)
    low = log_logistic_cdf(kwargs.get("sigma_min", SIGMA_MIN), sigma_data, scale)
    high = log_logistic_cdf(kwargs.get("sigma_max", SIGMA_MAX), sigma_data, scale)
    uniform = midpoints(200)
    sigmas = log_logistic_sigmas(uniform, **kwargs)
    probabilities = [(log_logistic_cdf(sigma, sigma_data, scale) - low) / (high - low) for sigma in sigmas.tolist()]
    assert probabilities == pytest.approx(uniform.tolist(), abs=1e-9)


# ---------------------------------------------------------------- variances of discrete steps

LENGTHS = (1, 2, 5, 20, 50, 1000)


@pytest.mark.parametrize("name", NOISE_SCHEDULES)
@pytest.mark.parametrize("n_diffusion_steps", LENGTHS)
def test_variances_are_variances(name: str, n_diffusion_steps: int) -> None:
    betas = noise_schedule_betas(name, n_diffusion_steps)
    assert betas.shape == (n_diffusion_steps,)
    assert betas.dtype == th.float64
    assert (betas > 0.0).all()
    assert (betas < 1.0).all()
    assert (betas.diff() > 0.0).all()
    assert th.equal(betas, {"linear": linear_betas, "cosine": cosine_betas, "vp": vp_betas}[name](n_diffusion_steps))


@pytest.mark.parametrize("n_diffusion_steps", LENGTHS)
def test_vp_variances_are_integrals_of_the_rate(n_diffusion_steps: int) -> None:
    """The rate grows linearly in time: each step keeps exp(-its integral) of the variance."""
    for beta_min, beta_max in ((0.1, 10.0), (0.1, 20.0)):
        betas = vp_betas(n_diffusion_steps, beta_min, beta_max).tolist()
        for i in range(0, n_diffusion_steps, max(n_diffusion_steps // 5, 1)):
            ends = i / n_diffusion_steps, (i + 1) / n_diffusion_steps
            integral, _ = integrate.quad(lambda t, low, high: low + (high - low) * t, *ends, (beta_min, beta_max))
            assert betas[i] == pytest.approx(1.0 - math.exp(-integral), rel=1e-9)


def test_vp_variances_of_five_steps() -> None:
    betas = vp_betas(5)
    alphas_bar = (1.0 - betas).cumprod(dim=0).tolist()
    assert betas.tolist() == pytest.approx([0.195875, 0.458818, 0.635781, 0.754878, 0.835031], abs=1e-6)
    assert alphas_bar == pytest.approx([0.804125, 0.435178, 0.158500, 0.038852, 0.006409], abs=1e-6)


@pytest.mark.parametrize("n_diffusion_steps", [1, 2, 5, 10, 50, 1000])
def test_vp_ends_at_the_same_noise_whatever_its_length(n_diffusion_steps: int) -> None:
    alpha_bar = (1.0 - vp_betas(n_diffusion_steps)).prod().item()
    assert alpha_bar == pytest.approx(math.exp(-5.05), rel=1e-10)
    assert alpha_bar == pytest.approx(0.00640933, abs=1e-8)


@pytest.mark.parametrize("n_diffusion_steps", LENGTHS)
def test_cosine_variances_are_a_loop(n_diffusion_steps: int) -> None:
    def f(t: int) -> float:
        return math.cos((t / n_diffusion_steps + 0.008) / 1.008 * math.pi / 2.0) ** 2

    expected = [min(1.0 - f(t) / f(t - 1), 0.999) for t in range(1, n_diffusion_steps + 1)]
    assert cosine_betas(n_diffusion_steps).tolist() == pytest.approx(expected, rel=1e-9)


def test_cosine_variances_of_twenty_steps() -> None:
    betas = cosine_betas(20)
    alphas_bar = (1.0 - betas).cumprod(dim=0)[[0, 1, 10, 18, 19]].tolist()
    assert alphas_bar == pytest.approx([0.992007, 0.972093, 0.416312, 0.00605964, 6.0596e-6], rel=1e-4)
    assert betas[19].item() == 0.999
    assert cosine_betas(20, max_beta=0.5).max().item() == 0.5
    assert cosine_betas(20, offset=0.1)[0] > 2.0 * betas[0]


@pytest.mark.parametrize("n_diffusion_steps", LENGTHS)
def test_linear_variances_are_a_loop(n_diffusion_steps: int) -> None:
    for low, high in ((1e-4, 0.02), (0.1, 0.3)):
        steps = range(n_diffusion_steps)
        expected = [low + (high - low) * i / max(n_diffusion_steps - 1, 1) for i in steps]
        assert linear_betas(n_diffusion_steps, low, high).tolist() == pytest.approx(expected, rel=1e-12)
    assert linear_betas(n_diffusion_steps)[0] == 1e-4


@pytest.mark.parametrize("n_diffusion_steps", LENGTHS)
@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_variances_are_those_of_diffusers(name: str, theirs: str, n_diffusion_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(n_diffusion_steps, beta_schedule=theirs)
    betas = noise_schedule_betas(name, n_diffusion_steps)
    th.testing.assert_close(betas.float(), scheduler.betas, rtol=1e-6, atol=1e-9)


def test_noise_schedule_must_exist() -> None:
    with pytest.raises(ValueError, match=r"one of \['linear', 'cosine', 'vp'\]: got 'karras'"):
        noise_schedule_betas("karras", 5)
    for n_diffusion_steps in (0, -3):
        with pytest.raises(ValueError, match=f"at least 1: got {n_diffusion_steps}"):
            noise_schedule_betas("vp", n_diffusion_steps)


# ---------------------------------------------------------------- levels of an EDM model


@pytest.mark.parametrize("n_sampling_steps", [1, 2, 5, 18])
@pytest.mark.parametrize("constants", [(0.002, 80.0, 7.0), (0.05, 3.0, 7.0), (0.002, 80.0, 1.0)])
def test_karras_levels_are_a_loop(n_sampling_steps: int, constants: tuple[float, float, float]) -> None:
    low, high, rho = constants
    sigmas = karras_sigmas(n_sampling_steps, low, high, rho)
    expected = []
    for i in range(n_sampling_steps):
        share = i / (n_sampling_steps - 1) if i > 0 else 0.0
        expected.append((high ** (1.0 / rho) + share * (low ** (1.0 / rho) - high ** (1.0 / rho))) ** rho)
    assert sigmas.dtype == th.float64
    assert sigmas.tolist() == pytest.approx(expected, rel=1e-9)
    assert sigmas[0].item() == pytest.approx(high)
    assert sigmas[-1].item() == pytest.approx(low if n_sampling_steps > 1 else high)
    assert (sigmas.diff() < 0.0).all()


@pytest.mark.parametrize("n_sampling_steps", [1, 2, 18, 100])
def test_karras_levels_are_those_of_diffusers(n_sampling_steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(n_sampling_steps)
    th.testing.assert_close(karras_sigmas(n_sampling_steps).float(), scheduler.sigmas[:-1])
    assert scheduler.sigmas[-1] == 0.0


# ---------------------------------------------------------------- learning rates


def test_cosine_schedule_values() -> None:
    schedule = CosineSchedule(3e-4)
    assert schedule(1.0) == pytest.approx(3e-4)
    assert schedule(0.5) == pytest.approx(1.5e-4)
    assert schedule(0.0) == pytest.approx(0.0, abs=1e-15)
    assert "0.0003" in repr(schedule)


def test_cosine_schedule_is_that_of_torch() -> None:
    n = 50
    optimizer = th.optim.SGD([th.zeros(1, requires_grad=True)], lr=0.1)
    annealing = th.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=n)
    schedule = CosineSchedule(0.1)
    for step in range(n):
        assert schedule(1.0 - step / n) == pytest.approx(annealing.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        annealing.step()
