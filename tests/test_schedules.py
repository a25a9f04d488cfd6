"""Noise-level density and learning-rate schedule against closed forms, quantiles and torch's own schedule."""

import math

import pytest
import torch as th
from exact_denoisers import midpoints
from scipy import stats

from sb3_diffusion.common.schedules import log_logistic_sigmas
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
