"""Diff-SR's networks, losses, features and update (arXiv 2406.16121) against slow loops, exact scores and counts of calls."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from conftest import image_env
from envs import POINT_ENV, RandomEnv
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecFrameStack, VecNormalize

from sb3_diffusion import DiffSR, OfflineDataset
from sb3_diffusion.common.denoisers import DiscreteDenoiser
from sb3_diffusion.common.samplers import sample_ddpm
from sb3_diffusion.common.schedules import vp_betas
from sb3_diffusion.diffsr import fit_linear
from sb3_diffusion.diffsr.networks import (
    FEATURE_LOSSES,
    FEATURE_NOISE_SCHEDULES,
    FourierHeads,
    ResidualMLP,
    SpectralScore,
    beta_law_betas,
    decorrelation_penalty,
    elliptical_bonus,
    feature_errors,
    feature_noise_betas,
    unit_features,
)
from sb3_diffusion.diffsr.policies import SpectralCritic
from sb3_diffusion.wrappers import VelocityMask

OBS_DIM, ACTION_DIM = 3, 2


def box(dim: int, bound: float = 1.0) -> spaces.Box:
    return spaces.Box(-bound, bound, (dim,), np.float32)


def make_dataset(n: int = 60, **kwargs: Any) -> OfflineDataset:
    """Random transitions; every tenth one terminates."""
    rng = np.random.default_rng(0)
    observations, next_observations = rng.normal(size=(2, n, OBS_DIM)).astype(np.float32)
    fields: dict[str, Any] = dict(
        observations=observations,
        actions=rng.uniform(-0.9, 0.9, (n, ACTION_DIM)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        next_observations=next_observations,
        terminations=np.arange(n) % 10 == 9,
        truncations=np.zeros(n, dtype=bool),
    )
    return OfflineDataset(**{**fields, **kwargs}, observation_space=box(OBS_DIM, 10.0), action_space=box(ACTION_DIM))


def make_model(env: Any = None, dataset: Any = None, policy: str = "MlpPolicy", **kwargs: Any) -> DiffSR:
    small: dict[str, Any] = dict(
        batch_size=16,
        buffer_size=500,
        learning_starts=10,
        feature_dim=6,
        score_net_width=16,
        n_frequencies=8,
        n_diffusion_steps=10,
        seed=0,
        device="cpu",
    )
    kwargs = {**small, **kwargs}
    kwargs["policy_kwargs"] = {"net_arch": [16], "time_embedding_dim": 8, **kwargs.get("policy_kwargs", {})}
    if env is None and dataset is None:
        dataset = make_dataset()
    model = DiffSR(policy, env, dataset=dataset, **kwargs)
    model.set_logger(Logger(None, []))
    return model


def make_batch(n: int = 12, **kwargs: Any) -> ReplayBufferSamples:
    generator = th.Generator().manual_seed(3)
    fields: dict[str, Any] = dict(
        observations=th.randn(n, OBS_DIM, generator=generator),
        actions=2.0 * th.rand(n, ACTION_DIM, generator=generator) - 1.0,
        next_observations=th.randn(n, OBS_DIM, generator=generator),
        dones=(th.rand(n, 1, generator=generator) < 0.4).float(),
        rewards=th.randn(n, 1, generator=generator),
    )
    return ReplayBufferSamples(**{**fields, **kwargs})


def weights(module: th.nn.Module) -> dict[str, th.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def changed(before: dict[str, th.Tensor], module: th.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if not th.equal(before[name], parameter)}


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "state_dim"), [(5, 3), (1, 3), (5, 1), (1, 1)])
def test_score_is_a_product_of_psi_and_zeta(batch_size: int, state_dim: int) -> None:
    """No axis of size 1 gets lost, and psi enters nowhere but in the product."""
    th.manual_seed(0)
    score = SpectralScore(state_dim, 4, [8, 8], time_embedding_dim=8)
    noisy, psi = th.randn(batch_size, state_dim), th.randn(batch_size, 4)
    level = th.arange(batch_size)
    zeta = score.zeta(th.cat([noisy, score.time_embedding(level)], dim=1)).reshape(batch_size, 4, state_dim)
    f = score(noisy, psi, level)
    assert f.shape == (batch_size, state_dim)
    th.testing.assert_close(f, th.einsum("bd,bdk->bk", psi, zeta))
    th.testing.assert_close(score(noisy, 2.0 * psi, level), 2.0 * f)
    assert not score(noisy, th.zeros_like(psi), level).any(), "nothing of state and action gets past psi"
    th.testing.assert_close(score(noisy, psi, level[:1]), score(noisy, psi, level[:1].expand(batch_size)))


def test_residual_mlp() -> None:
    th.manual_seed(0)
    net = ResidualMLP(3, 2, [5, 5, 4])
    x = th.randn(7, 3)
    h = net.first(x)
    h = h + net.blocks[0](h)
    h = net.blocks[1](h)  # of another width: it cannot add
    th.testing.assert_close(net(x), net.blocks[2](h))
    linear = ResidualMLP(3, 2, [])
    th.testing.assert_close(linear(2.0 * x) - linear(x), linear(x) - linear(0.0 * x))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("arch", [[], [5], [5, 4]])
def test_heads_are_independent_functions_of_sines_and_cosines(trainable: bool, arch: list[int]) -> None:
    th.manual_seed(0)
    heads, psi = FourierHeads(2, 6, 8, arch, trainable), th.randn(7, 6)
    fourier = heads.fourier_features(psi)
    assert fourier.shape == (2, 7, 16)
    sines, cosines = fourier.chunk(2, dim=-1)
    th.testing.assert_close(sines.square() + cosines.square(), th.ones_like(sines))
    assert heads(psi).shape == (2, 7, 1) and not th.allclose(*heads(psi))
    (first,) = th.autograd.grad(heads(psi)[0].sum(), heads.first.weight)
    assert first[0].any() and not first[1].any()
    names = dict(heads.named_parameters())
    assert ("frequencies.weight" in names) is trainable
    if not trainable:
        drawn = heads.get_buffer("fixed_frequencies")
        normalized = th.nn.functional.layer_norm(psi, (6,))
        th.testing.assert_close(sines, th.stack([(normalized @ w).sin() for w in drawn]))
        big = FourierHeads(1, 400, 50, [], trainable=False).get_buffer("fixed_frequencies")
        assert big.std().item() == pytest.approx(1 / math.sqrt(400), rel=0.05)


@pytest.mark.parametrize("schedule", FEATURE_NOISE_SCHEDULES)
def test_noise_grows_with_the_level(schedule: str) -> None:
    denoiser = DiscreteDenoiser(SpectralScore(2, 3, [4], time_embedding_dim=8), feature_noise_betas(schedule, 50))
    assert (denoiser.alphas.diff() < 0.0).all() and (denoiser.sigmas.diff() > 0.0).all()


def test_beta_law() -> None:
    alphas_bar = (1.0 - beta_law_betas(1_000)).cumprod(dim=0)
    law = stats.beta(0.3, 0.1)
    np.testing.assert_allclose(alphas_bar, 1.0 - law.cdf(np.linspace(1e-3, 1.0 - 1e-3, 1_000)), rtol=1e-10)
    model = make_model(noise_schedule="beta_law", n_diffusion_steps=1_000, noise_scale=0.449)
    stds = 0.449 * model.critic.denoiser.sigmas
    np.testing.assert_allclose([stds.min(), stds.max()], [0.081, 0.350], atol=1e-3)  # those of the authors' MuJoCo runs


def test_likelihood_of_the_stochastic_actor() -> None:
    model = make_model(actor_type="sac")
    batch, noise = make_batch(), th.randn(12, ACTION_DIM)
    actions, log_prob = model.actor.sample(batch.observations, noise)
    mean, log_std = model.actor.net(model.actor.features(batch.observations)).chunk(2, dim=1)
    law = th.distributions.TransformedDistribution(
        th.distributions.Normal(mean.double(), log_std.double().clamp(-5.0, 2.0).exp()),
        th.distributions.transforms.TanhTransform(cache_size=0),
    )
    assert log_prob is not None
    expected = law.log_prob(actions.double().clamp(-1 + 1e-12, 1 - 1e-12)).sum(dim=1, keepdim=True)
    th.testing.assert_close(log_prob.double(), expected, rtol=1e-3, atol=1e-3)
    model.actor.net.blocks[-1][-1].bias.data.fill_(40.0)  # deep in the flat part of the hyperbolic tangent
    assert th.isfinite(model.actor.sample(batch.observations, noise)[1]).all()


# The feature loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [1.0, 0.449])
@pytest.mark.parametrize("form", FEATURE_LOSSES)
def test_feature_errors_as_published(form: str, eta: float) -> None:
    """Each form as it is written down, with the noisy state in it, entry by entry."""
    th.manual_seed(0)
    d, clean, noise, f = 4, th.randn(5, 3), th.randn(5, 3), th.randn(5, 3)
    alpha_bar = th.tensor([0.99, 0.7, 0.5, 0.1, 0.01])
    noisy = alpha_bar.sqrt()[:, None] * clean + (1 - alpha_bar).sqrt()[:, None] * eta * noise
    errors = feature_errors(form, f, noise, (1 - alpha_bar).sqrt()[:, None], eta, d)
    for i in range(5):
        a = alpha_bar[i].item()
        for j in range(3):
            shift = (noisy[i, j] - math.sqrt(a) * clean[i, j]).item()
            value, eps = f[i, j].item(), noise[i, j].item()
            expected = {
                "noise": (value - eps) ** 2,
                "score": (value + shift / (1 - a)) ** 2,
                "weighted_score": (math.sqrt(1 - a) * value / d + eps) ** 2,
                "displacement": ((1 - a) * eta * value + shift) ** 2,
            }[form]
            assert errors[i, j].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("eta", [1.0, 0.449])
def test_all_forms_have_one_optimum(eta: float) -> None:
    """The same estimate, rescaled as each form wants it, leaves the same errors up to the weight of the level."""
    th.manual_seed(0)
    noise, estimate = th.randn(2, 6, 3)
    sigma = th.linspace(0.1, 0.99, 6)[:, None]
    score = -estimate / (sigma * eta)
    rescaled = {
        "noise": (-sigma * eta * score, 1.0),
        "score": (eta**2 * score, eta**2 / sigma.square()),
        "weighted_score": (4 * eta * score, 1.0),
        "displacement": (eta * score, eta**2 * sigma.square()),
    }
    plain = (estimate - noise).square()
    for form, (f, weight) in rescaled.items():
        th.testing.assert_close(feature_errors(form, f, noise, sigma, eta, 4), weight * plain, rtol=1e-4, atol=1e-5)


def linear_gaussian(n: int, std: float, state_dim: int = 2) -> tuple[th.Tensor, ...]:
    """States, actions, means and next states of a linear transition with normal noise."""
    generator = th.Generator().manual_seed(0)
    states = th.randn(n, state_dim, generator=generator)
    actions = 2.0 * th.rand(n, 1, generator=generator) - 1.0
    turn = th.tensor([[0.8, 0.4], [-0.4, 0.8]])[:state_dim, :state_dim]
    means = states @ turn.T + actions * th.tensor([0.5, 1.0])[:state_dim]
    return states, actions, means, means + std * th.randn(n, state_dim, generator=generator)


def floor(std: float, n_levels: int = 50) -> float:
    """What no model of the linear-Gaussian transition can undercut, per dimension of the state, on average over levels."""
    alpha_bar = (1.0 - vp_betas(n_levels)).cumprod(dim=0)
    return (alpha_bar * std**2 / (alpha_bar * std**2 + 1.0 - alpha_bar)).mean().item()


@pytest.mark.parametrize(("std", "expected"), [(0.05, 0.0178), (0.1, 0.0470), (0.3, 0.1511)])
def test_exact_factors_reach_the_floor(std: float, expected: float) -> None:
    """psi = (1, m) and zeta = (sqrt(1 - abar) / c) [x; -sqrt(abar) I] are the score of a linear-Gaussian transition."""
    assert floor(std) == pytest.approx(expected, abs=1e-4)
    n = 50_000
    _, _, means, next_states = linear_gaussian(n, std)
    alpha_bar = (1.0 - vp_betas(50)).cumprod(dim=0).float()[th.arange(n) % 50][:, None]
    noise = th.randn(n, 2, generator=th.Generator().manual_seed(1))
    noisy = alpha_bar.sqrt() * next_states + (1 - alpha_bar).sqrt() * noise
    scale = (1 - alpha_bar).sqrt() / (alpha_bar * std**2 + 1 - alpha_bar)
    psi = th.cat([th.ones(n, 1), means], dim=1)
    zeta = th.cat([(scale * noisy)[:, None], -(scale * alpha_bar.sqrt())[:, :, None] * th.eye(2)], dim=1)
    f = th.einsum("bd,bdk->bk", psi, zeta)
    loss = feature_errors("noise", f, noise, (1 - alpha_bar).sqrt()).mean().item()
    assert loss == pytest.approx(expected, rel=0.03)


def trained_on_linear_gaussian(feature_dim: int, std: float, n_updates: int, **kwargs: Any) -> tuple[DiffSR, dict[str, Any]]:
    """A model whose features have learned from a linear-Gaussian transition; its loss on new noise, and the exact score's."""
    states, actions, means, next_states = linear_gaussian(20_000, std)
    rewards = -means.square().sum(dim=1)
    flags = np.zeros(len(states), dtype=bool)
    data = OfflineDataset(
        *(tensor.numpy() for tensor in (states, actions, rewards, next_states)),
        flags,
        flags,
        observation_space=box(2, 10.0),
        action_space=box(1),
    )
    net_arch = dict(pi=[8], qf=[32], psi=[64, 64], zeta=[64, 64])
    model = make_model(
        dataset=data,
        batch_size=256,
        feature_dim=feature_dim,
        n_frequencies=32,
        n_diffusion_steps=50,
        normalize_observations=False,
        policy_kwargs=dict(net_arch=net_arch, time_embedding_dim=32),
        **kwargs,
    )
    model.policy.set_training_mode(True)
    for i in range(n_updates):
        rate = 4e-3 * (1.0 - i / n_updates) + 1e-5
        model.critic.feature_optimizer.param_groups[0]["lr"] = rate
        model._train_features(model.sample_batch(256))
    generator = th.Generator().manual_seed(5)
    level, noise = th.randint(50, (len(states),), generator=generator), th.randn(len(states), 2, generator=generator)
    alpha, sigma = (scale.unsqueeze(1) for scale in model.critic.denoiser.scales(level))
    noisy = model.critic.denoiser.corrupt(next_states, noise, level)
    exact = sigma * (noisy - alpha * means) / (alpha.square() * std**2 + sigma.square())
    with th.no_grad():
        psi = model.critic.spectral_features(states, actions)
        f = model.critic.denoiser.net(noisy, psi, level)
        error = ((f - exact).square().mean() / exact.square().mean()).item()
        loss = (f - noise).square().mean().item()
    return model, dict(error=error, loss=loss, floor=(exact - noise).square().mean().item(), psi=psi, means=means, r=rewards)


def test_features_learn_a_linear_gaussian_transition() -> None:
    """Score, floor of the loss, and content of the features; the expensive test below has the bounds of a longer run."""
    _, found = trained_on_linear_gaussian(8, 0.3, 700, reward_coef=1.0)
    assert found["error"] < 0.06
    assert 0.97 * found["floor"] < found["loss"] < 1.3 * found["floor"], "a loss below it would mean that it sees s'"
    for i in range(2):
        assert fit_linear(found["psi"], found["means"][:, i]).r2 > 0.98
    assert fit_linear(found["psi"], found["r"], n_frequencies=200).r2 > 0.95


def test_too_few_features_cannot_tell_the_mean() -> None:
    """Rank test: with d = 1 the loss stays far above the floor. It would not if the score net saw state and action."""
    _, found = trained_on_linear_gaussian(1, 0.3, 300)
    assert found["loss"] > 1.5 * found["floor"]


@pytest.mark.expensive
@pytest.mark.parametrize(("form", "std"), [*[(form, 0.3) for form in FEATURE_LOSSES], ("noise", 0.1)])
def test_features_learn_to_the_floor(form: str, std: float) -> None:
    model, found = trained_on_linear_gaussian(8, std, 6_000, feature_loss=form)
    if form == "noise":
        assert found["error"] < 0.02 and found["floor"] * 0.98 < found["loss"] < 1.1 * found["floor"]
    for i in range(2):
        assert fit_linear(found["psi"], found["means"][:, i]).r2 > (0.99 if form == "noise" else 0.95)
    if form == "noise" and std == 0.3:  # the model that is never sampled would give next states of the right law
        denoiser, generator = model.critic.denoiser, th.Generator().manual_seed(9)
        noises = th.randn(50, 20_000, 2, generator=generator)
        levels = denoiser.sampling_levels(50)

        class ExactNet(th.nn.Module):
            def forward(self, noisy: th.Tensor, means: th.Tensor, level: th.Tensor) -> th.Tensor:
                alpha, sigma = (scale.unsqueeze(-1) for scale in denoiser.scales(level))
                return sigma * (noisy - alpha * means) / (alpha.square() * std**2 + sigma.square())

        with th.no_grad():
            errors = sample_ddpm(denoiser, noises[0], levels, found["psi"], noises[1:]) - found["means"]
            denoiser.net = ExactNet()  # 50 steps of the smaller posterior variance give 0.263 in the place of 0.3
            exact = sample_ddpm(denoiser, noises[0], levels, found["means"], noises[1:]) - found["means"]
        assert errors.mean(dim=0).abs().max() < 0.01
        assert errors.std().item() == pytest.approx(exact.std().item(), rel=0.02)
        assert (errors - exact).square().mean() < 0.05 * exact.square().mean()


# What the features are good for -----------------------------------------------------------------------------------------


def lq_values(gain: float, gamma: float = 0.9) -> Callable[[th.Tensor, th.Tensor], th.Tensor]:
    """Exact action value of u = -gain * s where s' = 0.9 s + 0.5 u and the reward is -(s^2 + 0.1 u^2)."""
    p = (1.0 + 0.1 * gain**2) / (1.0 - gamma * (0.9 - 0.5 * gain) ** 2)
    return lambda s, u: -(s.square() + 0.1 * u.square()) - gamma * p * (0.9 * s + 0.5 * u).square()


def test_action_values_are_linear_in_fourier_features() -> None:
    """The same features serve two policies; in the features themselves a quadratic value is not linear."""
    generator = th.Generator().manual_seed(0)
    s, u = 2.0 * th.rand(2, 1_000, generator=generator, dtype=th.float64) - 1.0
    mix = th.randn(2, 4, generator=generator, dtype=th.float64)
    psi = th.stack([s, u], dim=1) @ mix
    for gain in (0.2, 1.2):
        value = lq_values(gain)(s, u)
        assert value[:1].item() == pytest.approx(
            (-(s**2 + 0.1 * u**2) + 0.9 * lq_values(gain)(0.9 * s + 0.5 * u, -gain * (0.9 * s + 0.5 * u)))[0].item()
        ), "it solves Bellman's equation"
        r2 = [fit_linear(psi, value, n_frequencies=n, length_scale=1.0).r2 for n in (2, 8, 64)]
        assert r2[0] < r2[1] < r2[2] and r2[2] > 0.98
        assert fit_linear(psi, value).r2 < 0.2


def test_fit_linear() -> None:
    generator = th.Generator().manual_seed(0)
    x = th.randn(200, 3, generator=generator)
    x = th.cat([5.0 + 0.1 * x, th.ones(200, 1)], dim=1)  # a constant feature does no harm
    y = 2.0 * x[:, 0] - 3.0 * x[:, 2] + 7.0
    fit = fit_linear(x, y, ridge=1e-10)
    assert fit.r2 == pytest.approx(1.0, abs=1e-6)
    th.testing.assert_close(fit.predict(x), y.double(), rtol=1e-5, atol=1e-5)
    assert fit_linear(x, y, ridge=1e6).r2 < 0.01, "a large penalty leaves the mean"
    assert fit_linear(x, th.ones(200)).r2 == 1.0
    with pytest.raises(ValueError, match="one target"):
        fit_linear(x, y[:-1])


def test_public_features() -> None:
    model = make_model(RandomEnv(box(OBS_DIM), spaces.Box(-2.0, 6.0, (1, 2), np.float32)))
    rng = np.random.default_rng(0)
    observations, scaled = rng.uniform(-1, 1, (5, OBS_DIM)).astype(np.float32), rng.uniform(-1, 1, (5, 2)).astype(np.float32)
    actions = 2.0 + 4.0 * scaled.reshape(5, 1, 2)
    found = model.features(observations, actions)
    assert isinstance(found, np.ndarray) and found.shape == (5, 6)
    expected = model.critic_target.spectral_features(th.as_tensor(observations), th.as_tensor(scaled))
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-5)
    tensors = model.features(th.as_tensor(observations), th.as_tensor(actions))
    assert isinstance(tensors, th.Tensor) and not tensors.requires_grad
    np.testing.assert_array_equal(tensors, found)
    fit = model.fit_linear(observations, actions, found @ np.arange(6.0))
    assert fit.r2 == pytest.approx(1.0, abs=1e-3)


def test_features_are_those_of_the_average() -> None:
    model = make_model()
    data = make_dataset(5)
    before = model.features(data.observations, data.actions)
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.add_(1.0)
    np.testing.assert_array_equal(model.features(data.observations, data.actions), before)
    model.policy.update_targets(1.0)
    assert not np.allclose(model.features(data.observations, data.actions), before)


# Losses against loops ---------------------------------------------------------------------------------------------------


def critic_loss(model: DiffSR, batch: Any) -> th.Tensor:
    """The loss at what an update draws for it."""
    return model._critic_loss(batch, model._draw_normal(*batch.actions.shape))[0]


def test_feature_loss() -> None:
    model, batch = make_model(reward_coef=0.3, noise_scale=0.5), make_batch()
    noise, level = th.randn(12, OBS_DIM), th.arange(12) % 10
    total, reward_error = 0.0, 0.0
    alpha_bar = (1.0 - vp_betas(10)).cumprod(dim=0).float()
    next_states = model.critic_target.features(batch.next_observations)
    for i in range(12):
        psi = model.critic.spectral_features(batch.observations[i : i + 1], batch.actions[i : i + 1])
        a = alpha_bar[level[i]]
        noisy = a.sqrt() * next_states[i] + (1 - a).sqrt() * 0.5 * noise[i]
        f = model.critic.denoiser.net(noisy[None], psi, level[i : i + 1])[0]
        total += (f - noise[i]).square().sum().item() / 12
        reward_error += (model.critic.reward_net(psi) - batch.rewards[i]).square().item() / 12
    assert model._feature_loss(batch, noise, level)[0].item() == pytest.approx(total + 0.3 * reward_error, rel=1e-4)


@pytest.mark.parametrize("actor_type", ["td3", "sac"])
@pytest.mark.parametrize("discounted", [False, True])
def test_critic_loss(actor_type: str, discounted: bool) -> None:
    discounts = th.linspace(0.5, 0.99, 12)[:, None] if discounted else None
    model, batch = make_model(actor_type=actor_type, ent_coef=0.3, gamma=0.9), make_batch(discounts=discounts)
    with th.no_grad():  # targets that differ from what they follow
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
    state = model.generator.get_state()
    noise = model._draw_normal(12, ACTION_DIM)
    model.generator.set_state(state)
    loss = 0.0
    for i in range(12):
        s, a, following = (getattr(batch, name)[i : i + 1] for name in ("observations", "actions", "next_observations"))
        if actor_type == "td3":
            action = model.actor_target.mean(following) + (0.2 * noise[i]).clamp(-0.3, 0.3)
            action, entropy = action.clamp(-1.0, 1.0), 0.0
        else:
            action, log_prob = model.actor.sample(following, noise[i : i + 1])
            entropy = -0.3 * log_prob.item()
        values = model.critic_target.q_net(model.critic_target.spectral_features(following, action))
        discount = 0.9 if discounts is None else discounts[i].item()
        target = batch.rewards[i].item() + (1 - batch.dones[i].item()) * discount * (values.min().item() + entropy)
        estimates = model.critic.q_net(model.critic_target.spectral_features(s, a)).flatten()
        loss += sum((estimate.item() - target) ** 2 for estimate in estimates) / 12
    assert critic_loss(model, batch).item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("actor_type", "reduction"), [("td3", None), ("sac", None), ("td3", "min"), ("sac", "mean")])
def test_actor_loss(actor_type: str, reduction: str | None) -> None:
    model, batch = make_model(POINT_ENV, actor_type=actor_type, q_reduction=reduction, ent_coef=0.3), make_batch()
    batch = batch._replace(observations=th.randn(12, 4))
    actions, log_prob = model.actor.sample(batch.observations, th.randn(12, ACTION_DIM))
    values = model.critic.q_net(model.critic_target.spectral_features(batch.observations, actions)).squeeze(-1)
    use_min = reduction == "min" or (reduction is None and actor_type == "sac")
    chosen = values.min(dim=0).values if use_min else values.mean(dim=0)
    expected = -chosen.mean() + (0.0 if log_prob is None else 0.3 * log_prob.mean())
    th.testing.assert_close(model._actor_loss(batch, actions, log_prob)[0], expected)


def test_actor_imitates_offline() -> None:
    model, batch = make_model(bc_coef=0.7), make_batch()
    actions, log_prob = model.actor.sample(batch.observations, th.zeros(12, ACTION_DIM))
    values = model.critic.q_net(model.critic_target.spectral_features(batch.observations, actions)).mean(dim=0)
    imitation = (actions - batch.actions).square().mean()
    expected = -values.mean() / values.abs().mean() + 0.7 * imitation
    th.testing.assert_close(model._actor_loss(batch, actions, log_prob)[0], expected)
    model._offline = False
    th.testing.assert_close(model._actor_loss(batch, actions, log_prob)[0], -values.mean())
    model._offline, model.n_pretrain_steps = True, 1
    th.testing.assert_close(model._actor_loss(batch, actions, log_prob)[0], imitation)


def test_decorrelation_penalty() -> None:
    g = th.randn(2, 5, 3, generator=th.Generator().manual_seed(0))
    for head, found in zip(g, decorrelation_penalty(g), strict=True):
        products = [(head[i] @ head[j]).item() ** 2 for i in range(5) for j in range(5) if i != j]
        norms = [(row @ row).item() for row in head]
        assert found.item() == pytest.approx(np.mean(products) - 2 * np.mean(norms) / 3 + 1 / 3, rel=1e-4)
    white = th.randn(1, 4_000, 4, generator=th.Generator().manual_seed(0)) / 2.0  # second moment I / 4
    assert abs(decorrelation_penalty(white).item()) < 0.01
    plain, batch = make_model(), make_batch()
    penalised = make_model(decorrelation_coef=2.0)
    hidden = plain.critic.q_net.hidden(plain.critic_target.spectral_features(batch.observations, batch.actions))
    difference = critic_loss(penalised, batch) - critic_loss(plain, batch)
    th.testing.assert_close(difference, 2.0 * decorrelation_penalty(hidden).sum(), rtol=1e-3, atol=1e-4)


def test_elliptical_bonus() -> None:
    generator = th.Generator().manual_seed(0)
    features, seen = th.randn(4, 3, generator=generator), th.randn(50, 3, generator=generator)
    covariance = seen.T @ seen / 50
    inverse = th.linalg.inv(50 * covariance + 2.0 * th.eye(3))
    expected = th.stack([(row @ inverse @ row).sqrt() for row in features])[:, None]
    th.testing.assert_close(elliptical_bonus(features, covariance, 50, ridge=2.0), expected)
    assert (elliptical_bonus(features, covariance, 500) < elliptical_bonus(features, covariance, 50)).all()
    th.testing.assert_close(elliptical_bonus(features, 0 * covariance, 9), features.norm(dim=1, keepdim=True))
    assert (unit_features(features).norm(dim=1) <= 1.0 + 1e-6).all()


def test_bonus_is_added_to_rewards_online_only() -> None:
    model = make_model(POINT_ENV, exploration_coef=0.5, gamma=0.0).learn(11)
    batch = model.sample_batch(16)
    with th.no_grad():
        psi = model.critic_target.spectral_features(batch.observations, batch.actions)
        bonus = 0.5 * elliptical_bonus(unit_features(psi), model.policy.feature_covariance, 11)
        values = model.critic.q_net(psi)
        expected = (values - batch.rewards - bonus).square().mean(dim=(1, 2)).sum()
        th.testing.assert_close(critic_loss(model, batch), expected)
        assert (bonus > 0.0).all()
        model._offline = True
        plain = (values - batch.rewards).square().mean(dim=(1, 2)).sum()
        th.testing.assert_close(critic_loss(model, batch), plain)


@pytest.mark.parametrize("kwargs", [dict(), dict(n_feature_steps=3, critic_trains_features=True)])
def test_covariance_moves_once_per_update(kwargs: dict[str, Any]) -> None:
    """From 0 its trace comes to $1 - (1 - \tau)^n$, as all features have length 1; losses leave it alone."""
    model = make_model(POINT_ENV, exploration_coef=0.5, tau=0.1, **kwargs).learn(13)
    covariance = model.policy.feature_covariance.clone()
    assert model._n_updates == 3
    assert covariance.trace().item() == pytest.approx(1.0 - 0.9**3, rel=1e-3)
    batch = model.sample_batch(16)
    critic_loss(model, batch)
    assert th.equal(model.policy.feature_covariance, covariance)
    with th.no_grad():
        phi = unit_features(model.critic_target.spectral_features(batch.observations, batch.actions))
    model._move_feature_covariance(batch)
    th.testing.assert_close(model.policy.feature_covariance, 0.9 * covariance + 0.1 * phi.T @ phi / 16)


def test_bonus_in_bfloat16() -> None:
    model = make_model(POINT_ENV, exploration_coef=0.5, precision="bfloat16").learn(12)
    assert model.policy.feature_covariance.dtype == th.float32 and model.policy.feature_covariance.trace() > 0.0


# The update -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actor_type", ["td3", "sac"])
def test_one_update_trains_every_part(actor_type: str) -> None:
    model = make_model(actor_type=actor_type, bc_coef=0.0, tau=0.25)
    policy = model.policy
    before = {name: weights(module) for name, module in policy.named_children()}
    temperature = None if policy.log_ent_coef is None else policy.log_ent_coef.detach().clone()
    model.learn(1)
    assert changed(before["actor"], policy.actor) and changed(before["critic"], policy.critic)
    critic = changed(before["critic"], policy.critic)
    for part in ("psi.", "denoiser.net.zeta.", "denoiser.net.time_embedding.", "reward_net.", "q_net."):
        parameters = {name for name in before["critic"] if name.startswith(part)}
        assert parameters and parameters <= critic, part
    for head in range(2):
        name = "q_net.first.weight"
        assert not th.equal(before["critic"][name][head], policy.critic.q_net.first.weight[head]), "both heads"
    for name in policy.target_names:
        online = dict(getattr(policy, name.removesuffix("_target")).named_parameters())
        for key, parameter in getattr(policy, name).named_parameters():
            th.testing.assert_close(parameter, before[name][key] + 0.25 * (online[key] - before[name][key]))
    if actor_type == "sac":
        assert temperature is not None and not th.equal(policy.log_ent_coef, temperature)
        fixed = make_model(actor_type="sac", ent_coef=0.1).learn(2)
        assert fixed.log_ent_coef is None and fixed._temperature() == 0.1
        assert policy.target_names == ("critic_target",)


def test_learned_temperature_starts_where_told_and_moves_the_right_way() -> None:
    for start, expected in (("auto", 1.0), ("auto_0.1", 0.1)):
        model = make_model(actor_type="sac", ent_coef=start)
        assert model._temperature().item() == pytest.approx(expected)
        for log_prob, sign in ((5.0, -1.0), (-5.0, 1.0)):  # above minus the target entropy, 2, the temperature must rise
            (gradient,) = th.autograd.grad(model._ent_coef_loss(th.full((4, 1), log_prob)), model.log_ent_coef)
            assert math.copysign(1.0, gradient.item()) == sign
    assert make_model(actor_type="td3").log_ent_coef is None
    with pytest.raises(ValueError, match="ent_coef"):
        make_model(actor_type="sac", ent_coef="auto_0")
    with pytest.raises(ValueError, match="ent_coef"):
        make_model(actor_type="sac", ent_coef="learned")


def test_intervals_and_frozen_parts() -> None:
    model = make_model(policy_delay=2, target_update_interval=3, feature_learning_rate=0.0, trainable_frequencies=False)
    history = []
    for _ in range(6):
        before = {name: weights(module) for name, module in model.policy.named_children()}
        fixed = model.critic.q_net.get_buffer("fixed_frequencies").clone()
        model.learn(1, reset_num_timesteps=False)
        history.append({name: changed(before[name], module) for name, module in model.policy.named_children()})
        assert th.equal(model.critic.q_net.get_buffer("fixed_frequencies"), fixed)
    assert [bool(step["actor"]) for step in history] == [True, False] * 3
    assert [bool(step["critic_target"]) for step in history] == [True, False, False] * 2
    for step in history:
        assert step["critic"] and all(name.startswith("q_net.") for name in step["critic"]), "psi stays bit-identical"


@pytest.mark.parametrize("n_feature_steps", [1, 3])
def test_calls_of_the_score_network(n_feature_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call and one batch for each feature step; none to learn values or to act. No reverse chain is ever run."""
    model = make_model(n_feature_steps=n_feature_steps)
    calls, draws = [], []
    model.critic.denoiser.net.register_forward_hook(lambda *_: calls.append(1))
    sample = model.sample_batch
    monkeypatch.setattr(model, "sample_batch", lambda n: (draws.append(n), sample(n))[1])
    model.learn(4)
    assert len(calls) == len(draws) == 4 * n_feature_steps
    model.predict(make_dataset().observations[:3])
    assert len(calls) == 4 * n_feature_steps


def test_gradients_stay_where_they_belong() -> None:
    """Only what each loss is to change, or passes through on the way to the action, gets a gradient."""
    model, batch = make_model(), make_batch()
    critic_loss(model, batch).backward()
    with_gradient = {name for name, parameter in model.policy.named_parameters() if parameter.grad is not None}
    assert with_gradient and all(name.startswith("critic.q_net.") for name in with_gradient)
    model.policy.zero_grad(set_to_none=True)
    model._feature_loss(batch, th.randn(12, OBS_DIM), th.arange(12) % 10)[0].backward()
    with_gradient = {name for name, parameter in model.policy.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"critic.{name}" for name, _ in model.critic.named_parameters() if "q_net" not in name}
    model.policy.zero_grad(set_to_none=True)
    model._train_actor(batch)
    with_gradient = {name for name, parameter in model.policy.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"actor.{name}" for name, _ in model.actor.named_parameters()}
    assert any(parameter.grad.abs().sum() > 0.0 for parameter in model.actor.parameters()), "through psi to the action"


@pytest.mark.parametrize("actor_type", ["td3", "sac"])
def test_values_on_the_features_as_they_are(actor_type: str) -> None:
    """Without ``target_features`` values and public features use psi itself, which the critic still does not train."""
    model, batch = make_model(target_features=False, actor_type=actor_type, ent_coef=0.0, bc_coef=0.0), make_batch()
    with th.no_grad():
        for parameter in model.critic_target.psi.parameters():
            parameter.fill_(math.nan)  # whatever touches the average shows
    loss = critic_loss(model, batch)
    loss.backward()
    with_gradient = {name for name, parameter in model.policy.named_parameters() if parameter.grad is not None}
    assert loss.isfinite() and all(name.startswith("critic.q_net.") for name in with_gradient)
    model._train_actor(batch)
    assert all(parameter.isfinite().all() for parameter in model.actor.parameters())
    observations, actions = batch.observations, batch.actions
    with th.no_grad():
        th.testing.assert_close(model.features(observations, actions), model.critic.spectral_features(observations, actions))


def test_critic_may_train_the_features() -> None:
    model, batch = make_model(critic_trains_features=True), make_batch()
    critic_loss(model, batch).backward()
    assert all(parameter.grad is not None for parameter in model.critic.psi.parameters())
    assert all(parameter.grad is None for parameter in model.critic_target.parameters())


def test_the_critic_sees_the_averaged_features() -> None:
    """What carries the values is psi: frozen at other values, the same updates lead to other values."""
    batch = make_batch()
    losses = []
    for rate in (1e-2, 0.0):
        model = make_model(feature_learning_rate=rate, tau=0.5)
        model.learn(8)
        losses.append(model.critic.q_net(model.critic_target.spectral_features(batch.observations, batch.actions)))
    assert not th.allclose(*losses, atol=1e-3)


def optimizers_of(model: DiffSR) -> tuple[th.optim.Optimizer, ...]:
    return model.actor.optimizer, model.critic.optimizer, model.critic.feature_optimizer


@pytest.mark.parametrize("name", ["critic", "critic_target"])
@pytest.mark.parametrize("trainable_frequencies", [True, False])
def test_files_of_the_critic(name: str, trainable_frequencies: bool, tmp_path: Path) -> None:
    """With or without what teaches the features, which a target does not have."""
    critic = getattr(make_model(trainable_frequencies=trainable_frequencies, policy_kwargs=dict(n_critics=3)).policy, name)
    critic.save(tmp_path / "critic")
    loaded = SpectralCritic.load(tmp_path / "critic", device="cpu")
    state, batch = critic.state_dict(), make_batch()
    assert state.keys() == loaded.state_dict().keys()
    assert all(th.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert th.equal(loaded(batch.observations, batch.actions), critic(batch.observations, batch.actions))


def test_learning_rates() -> None:
    model = make_model(learning_rate=1e-3, critic_learning_rate=lambda p: 2e-3 * p, feature_learning_rate=3e-3).learn(2)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers_of(model)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 3e-3])  # half of the run was left at the last update
    model = make_model(learning_rate=1e-3, feature_learning_rate=None).learn(1)
    assert model.critic.feature_optimizer.param_groups[0]["lr"] == model.critic.optimizer.param_groups[0]["lr"] == 1e-3
    model.lr_schedule = lambda _: 2e-3  # where no other rate is given, all follow it
    model.train(1)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers_of(model)]
    assert rates == [2e-3] * 3


def test_exploration_noise() -> None:
    observation = np.repeat(make_dataset().observations[:1], 2_000, axis=0)
    model = make_model(exploration_noise=0.1)
    model.actor.net.blocks[-1][-1].weight.data.zero_()
    model.actor.net.blocks[-1][-1].bias.data.zero_()
    drawn = model.predict(observation)[0]
    assert drawn.std() == pytest.approx(0.1, rel=0.05) and abs(drawn.mean()) < 0.01
    assert not model.predict(observation, deterministic=True)[0].any()
    noise = NormalActionNoise(np.zeros(2), np.full(2, 0.5))
    replaced = make_model(POINT_ENV, action_noise=noise)
    assert replaced.actor.noise_std == 0.0, "action noise takes its place"


# Data -------------------------------------------------------------------------------------------------------------------


def test_statistics_follow_the_replay_buffer() -> None:
    """Taken before the first update, again when the stored steps have doubled, and not in between."""
    model = make_model(POINT_ENV)
    fitted = []

    def callback(local: dict[str, Any], _globals: dict[str, Any]) -> bool:
        fitted.append(local["self"]._n_steps_fitted)
        return True

    model.learn(50, callback=callback)
    assert sorted(set(fitted)) == [0, 11, 22, 44]
    rows = model.replay_buffer.observations[:44, 0]
    for network in (model.actor, model.critic, model.critic_target, model.actor_target):
        np.testing.assert_allclose(network.normalizer.mean_0, rows.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(network.normalizer.std_0, rows.std(axis=0), rtol=1e-4)
    assert make_model(VecNormalize(make_vec_env(POINT_ENV))).learn(15)._n_steps_fitted == 0


def test_statistics_of_a_dataset_stay() -> None:
    model = make_model()
    np.testing.assert_allclose(model.actor.normalizer.mean_0, make_dataset().observations.mean(axis=0), rtol=1e-4, atol=1e-5)
    before = model.actor.normalizer.mean_0.clone()
    model.learn(1)
    model.set_env(RandomEnv(box(OBS_DIM, 10.0), box(ACTION_DIM)))
    model.learn(30, offline=False)
    assert th.equal(model.actor.normalizer.mean_0, before) and model._n_steps_fitted is None


def test_features_learn_from_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With n-step returns psi still describes one step: next state and reward are those of the step itself."""
    n = 60
    observations = np.zeros((n, OBS_DIM), np.float32)
    observations[:, 0] = np.arange(n)
    data = make_dataset(
        n,
        observations=observations,
        next_observations=observations + np.array([1.0, 0.0, 0.0], np.float32),
        rewards=np.ones(n, np.float32),
        terminations=np.zeros(n, bool),
    )
    model = make_model(dataset=data, n_steps=3, gamma=1.0)
    seen: dict[str, list[Any]] = {"_feature_loss": [], "_critic_loss": []}
    for name, batches in seen.items():
        original = getattr(model, name)

        def spy(batch: Any, *args: Any, _original: Callable = original, _batches: list[Any] = batches) -> th.Tensor:
            _batches.append(batch)
            return _original(batch, *args)

        monkeypatch.setattr(model, name, spy)
    model.learn(2)
    for batch in seen["_feature_loss"]:
        assert ((batch.next_observations - batch.observations)[:, 0] == 1.0).all() and (batch.rewards == 1.0).all()
    for batch in seen["_critic_loss"]:
        assert ((batch.next_observations - batch.observations)[:, 0] == 3.0).any() and (batch.rewards == 3.0).any()
    assert model.dataset_buffer.n_steps == model.replay_buffer.n_steps == 3
    assert model._last_batch is seen["_critic_loss"][-1], "what errors of critic and actor are described by"


@pytest.mark.parametrize("share", [False, True])
def test_images(share: bool) -> None:
    """The encoder learns from both losses; what is diffused is the average's output, normalised and without gradient."""
    model = make_model(
        image_env(),
        policy="CnnPolicy",
        buffer_size=40,
        policy_kwargs=dict(share_features_extractor=share, features_extractor_kwargs=dict(features_dim=8)),
    ).learn(14)
    assert model.critic.learns_states and model._critic_reaches_features
    assert (model.actor.features_extractor is model.critic.features_extractor) is share
    batch = model.sample_batch(4)
    diffused = model.critic_target.diffused(batch.next_observations)
    assert diffused.shape == (4, 8) and not diffused.requires_grad
    np.testing.assert_allclose(diffused.mean(dim=1), 0.0, atol=1e-5)
    noise, level = th.randn(4, 8), th.arange(4)
    for loss in (model._feature_loss(batch, noise, level)[0], critic_loss(model, batch)):
        model.policy.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [parameter.grad for parameter in model.critic.features_extractor.parameters()]
        assert all(gradient is not None for gradient in gradients)
    actor_before = weights(model.actor.features_extractor)
    model._train_actor(batch)
    assert bool(changed(actor_before, model.actor.features_extractor)) is not share
    assert make_model(image_env(), policy="CnnPolicy", buffer_size=20).critic.features_extractor.features_dim == 50
    several = spaces.Dict(image=image_env().observation_space, vector=box(3))
    of_several = make_model(RandomEnv(several, box(1)), policy="MultiInputPolicy", buffer_size=20)
    assert of_several.critic.features_extractor.features_dim == 53


def test_large_last_layer_warns() -> None:
    with pytest.warns(UserWarning, match="score_net_width.*512 x.*feature_dim.*512 x 100 entries"):
        make_model(
            RandomEnv(box(100), box(1)),
            feature_dim=512,
            score_net_width=512,
            policy_kwargs=dict(net_arch=dict(pi=[4], qf=[4], psi=[4])),
        )


@pytest.mark.parametrize("buffer_class", [None, NStepReplayBuffer])
def test_features_learn_from_single_steps_of_any_buffer(buffer_class: Any) -> None:
    """With n-step returns, next observations are still those that one step leads to: a turn by the new speed."""
    settings: dict[str, Any] = dict(n_steps=3)
    if buffer_class is not None:
        settings = dict(replay_buffer_class=buffer_class, replay_buffer_kwargs=dict(n_steps=3, gamma=0.99))
    model = DiffSR.from_preset("small", "Pendulum-v1", learning_starts=40, batch_size=16, device="cpu", seed=0, **settings)
    model.learn(50)
    seen: list[Any] = []
    loss = model._feature_loss
    model._feature_loss = lambda batch, *args: (seen.append(batch), loss(batch, *args))[1]  # type: ignore[method-assign]
    model.train(1)
    angles = [th.atan2(states[:, 1], states[:, 0]) for states in (seen[0].observations, seen[0].next_observations)]
    turned = th.remainder(angles[1] - angles[0] + th.pi, 2 * th.pi) - th.pi
    th.testing.assert_close(turned, 0.05 * seen[0].next_observations[:, 2], atol=1e-4, rtol=0.0)
    assert seen[0].rewards.max() <= 0.0 and model.replay_buffer.n_steps == 3


@pytest.mark.parametrize("name", DiffSR.presets)
def test_presets(name: str) -> None:
    model = DiffSR.from_preset(name, POINT_ENV, learning_starts=3, batch_size=4, buffer_size=10, device="cpu", seed=0)
    model.learn(5)
    assert model._n_updates == 2


def test_all_rates_of_the_preset_for_logs_end(box_dataset: OfflineDataset) -> None:
    """They start at those of the preset for learning online, and only the length of the run differs beside them."""
    model = DiffSR.from_preset("locomotion", dataset=box_dataset, device="cpu", seed=0)
    schedules = model.lr_schedule, model.critic_lr_schedule, model.feature_lr_schedule
    small, locomotion = dict(DiffSR.presets["small"]), dict(DiffSR.presets["locomotion"])
    rates = 3e-4, small.pop("critic_learning_rate"), small.pop("feature_learning_rate")
    assert [schedule(1.0) for schedule in schedules] == pytest.approx(rates)
    assert [schedule(0.5) for schedule in schedules] == pytest.approx([rate / 2 for rate in rates])
    assert [schedule(0.0) for schedule in schedules] == [0.0] * 3
    assert {name: locomotion[name] for name in small} == small
    assert model.default_total_timesteps == 20_000


@pytest.mark.parametrize(
    "bad",
    [
        dict(actor_type="ppo"),
        dict(feature_loss="mse"),
        dict(q_reduction="max"),
        dict(feature_dim=0),
        dict(n_feature_steps=0),
        dict(policy_delay=0),
        dict(n_stack=0),
        dict(reward_coef=-1.0),
        dict(noise_scale=0.0),
        dict(max_grad_norm=0.0),
        dict(noise_schedule="none"),
    ],
)
def test_bad_arguments(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_model(**bad)
    with pytest.raises(ValueError, match="batch_size"):
        make_model(decorrelation_coef=0.1, batch_size=1)


# Partial observation ------------------------------------------------------------------------------------------------------


def test_velocity_mask() -> None:
    env = VelocityMask(gym.make("Pendulum-v1"))
    assert env.observation_space == spaces.Box(-1.0, 1.0, (2,), np.float32)
    observation, _ = env.reset(seed=0)
    np.testing.assert_array_equal(observation, env.unwrapped._get_obs()[:2])
    assert env.step(env.action_space.sample())[0].shape == (2,)
    chosen = VelocityMask(gym.make("Pendulum-v1"), keep=[2, 0])
    np.testing.assert_array_equal(chosen.reset(seed=0)[0], env.unwrapped.reset(seed=0)[0][[2, 0]])
    assert chosen.spec is not None and gym.make(chosen.spec).observation_space == chosen.observation_space


def test_newest_of_a_history_is_diffused() -> None:
    env = VecFrameStack(make_vec_env(lambda: VelocityMask(gym.make("Pendulum-v1"))), n_stack=3)
    whole = make_model(env).learn(15)
    assert whole.observation_space.shape == (6,) and whole.critic.diffused_dim == 6
    model = make_model(env, n_stack=3).learn(15)
    batch = model.sample_batch(4)
    th.testing.assert_close(batch.next_observations[:, :4], batch.observations[:, 2:])  # the older part is known
    diffused = model.critic_target.diffused(batch.next_observations)
    th.testing.assert_close(diffused, model.critic_target.features(batch.next_observations)[:, 4:])
    psi = model.critic.spectral_features(batch.observations, batch.actions)
    assert model.critic.denoiser.net(diffused, psi, th.arange(4)).shape == (4, 2)
    assert model.actor.net.first.in_features == 6, "the actor sees the whole history"
    for n_stack, bad in ((4, env), (2, image_env())):
        with pytest.raises(ValueError, match="n_stack"):
            make_model(bad, n_stack=n_stack, policy="CnnPolicy" if n_stack == 2 else "MlpPolicy", buffer_size=20)


@pytest.mark.parametrize(
    ("env_id", "n_positions"), [("Hopper-v5", 5), ("HalfCheetah-v5", 8), ("Ant-v5", 13), ("InvertedDoublePendulum-v5", 5)]
)
def test_velocity_mask_of_mujoco(env_id: str, n_positions: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mujoco")
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes its log
    env = VelocityMask(gym.make(env_id))
    observation, _ = env.reset(seed=0)
    base: Any = env.unwrapped
    assert observation.shape == env.observation_space.shape == (n_positions,)
    base.data.qvel[:] += 1.0
    np.testing.assert_array_equal(env.observation(base._get_obs()), observation)


def test_velocity_mask_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="vector"):
        VelocityMask(image_env())
    with pytest.raises(ValueError, match="as `keep`"):
        VelocityMask(RandomEnv(box(3), box(1)))
    for keep in ([], [3], [-1]):
        with pytest.raises(ValueError, match="from 0 to 2"):
            VelocityMask(gym.make("Pendulum-v1"), keep=keep)
