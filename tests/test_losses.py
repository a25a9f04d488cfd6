"""DTQL's networks, losses and update against closed forms, slow loops and counts of denoiser calls."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch as th
from exact_denoisers import MixtureDenoiser, NormalDenoiser, midpoints, normal_quantiles
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_diffusion import DTQL, CosineSchedule, OfflineDataset
from sb3_diffusion.common.schedules import log_logistic_sigmas
from sb3_diffusion.common.utils import expectile_loss, minimize
from sb3_diffusion.dtql.policies import DTQLPolicy, GaussianActor, ImplicitActor

OBS_DIM = 3
SIGMA_DATA = 0.5


def box(dim: int, bound: float = 1.0) -> spaces.Box:
    return spaces.Box(-bound, bound, (dim,), np.float32)


def make_dataset(
    actions: np.ndarray | None = None,
    rewards: np.ndarray | None = None,
    action_dim: int = 2,
    n: int = 60,
    terminations: np.ndarray | None = None,
    truncations: np.ndarray | None = None,
) -> OfflineDataset:
    """Random transitions; by default every tenth one terminates."""
    rng = np.random.default_rng(0)
    n = n if actions is None else len(actions)
    drawn = rng.uniform(-0.9, 0.9, (n, action_dim)).astype(np.float32)
    observations, next_observations = rng.normal(size=(2, n, OBS_DIM)).astype(np.float32)
    return OfflineDataset(
        observations,
        drawn if actions is None else actions,
        rng.normal(size=n).astype(np.float32) if rewards is None else rewards,
        next_observations,
        np.arange(n) % 10 == 9 if terminations is None else terminations,
        np.zeros(n, dtype=bool) if truncations is None else truncations,
        observation_space=box(OBS_DIM, 10.0),
        action_space=box(action_dim),
    )


def make_model(dataset: OfflineDataset | None = None, action_dim: int = 2, **kwargs: Any) -> DTQL:
    """A small model of Algorithm 1 as it stands: without the warm-up, averages and normalisation that the defaults add."""
    plain: dict[str, Any] = dict(
        batch_size=16, seed=0, device="cpu", q_coef=1.0, n_imitation_steps=0, ema_decay=0.0, normalize_observations=False
    )
    kwargs = {**plain, **kwargs}
    kwargs["policy_kwargs"] = dict(dict(net_arch=[16]), **kwargs.get("policy_kwargs", {}))
    data = make_dataset(action_dim=action_dim) if dataset is None else dataset
    model = DTQL("MlpPolicy", None, dataset=data, **kwargs)
    model.set_logger(Logger(None, []))
    return model


def weights(module: nn.Module) -> dict[str, th.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def equal(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(th.equal(first[key], second[key]) for key in first)


def perturb(module: nn.Module) -> None:
    with th.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * th.randn_like(parameter))


def critic_loss(model: DTQL, batch: ReplayBufferSamples) -> th.Tensor:
    return model._critic_loss(batch)[0]


def actor_loss(model: DTQL, batch: ReplayBufferSamples) -> th.Tensor:
    """The loss at what an update draws for it."""
    return model._actor_loss(batch, model._draw_action_noise(batch.observations), *model._draw_corruption(batch))


def behavior_loss(model: DTQL, batch: ReplayBufferSamples) -> th.Tensor:
    return model._behavior_loss(batch.observations, batch.actions, *model._draw_corruption(batch))


def kl_loss(model: DTQL, observations: th.Tensor, actions: th.Tensor) -> th.Tensor:
    return model._kl_loss(observations, actions, model._draw_action_noise(observations), model._draw_sigma(len(actions)))


def make_batch(n: int, actions: th.Tensor | None = None, action_dim: int = 2, **kwargs: th.Tensor) -> ReplayBufferSamples:
    generator = th.Generator().manual_seed(3)
    fields: dict[str, Any] = dict(
        observations=th.randn(n, OBS_DIM, generator=generator),
        actions=2.0 * th.rand(n, action_dim, generator=generator) - 1.0 if actions is None else actions,
        next_observations=th.randn(n, OBS_DIM, generator=generator),
        dones=(th.rand(n, 1, generator=generator) < 0.4).float(),
        rewards=th.randn(n, 1, generator=generator),
    )
    return ReplayBufferSamples(**{**fields, **kwargs})


# ---------------------------------------------------------------- networks


def n_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def make_policy(obs_dim: int, action_dim: int, **kwargs: Any) -> DTQLPolicy:
    return DTQLPolicy(box(obs_dim), box(action_dim), lambda _: 3e-4, **kwargs)


def test_parameter_counts_of_the_published_networks() -> None:
    policy = make_policy(17, 6, average_actor=False)
    assert n_parameters(policy.behavior) == 210_230
    assert n_parameters(policy.actor) == 139_276
    assert n_parameters(policy.critic) == 415_491
    assert n_parameters(policy.critic.q_net) == n_parameters(policy.critic_target) == 2 * 139_521
    assert n_parameters(policy.critic.value_net) == 136_449
    assert not any(parameter.requires_grad for parameter in policy.critic_target.parameters())


def test_first_layer_of_the_behavior_network_is_linear() -> None:
    """4 hidden layers, 3 activations: with 0 observations the first two layers together are affine in the action."""
    kinds = [type(module).__name__ for module in make_policy(17, 6).behavior.denoiser.net.trunk]
    assert kinds == ["Linear", "Linear", "Mish", "Linear", "Mish", "Linear", "Mish", "Linear"]


def test_gaussian_actor_starts_orthogonal_and_is_bounded() -> None:
    actor = make_policy(4, 2, net_arch=[16, 16]).actor
    linears = [module for module in actor.net if isinstance(module, nn.Linear)]
    assert all(linear.bias.eq(0.0).all() for linear in linears)
    th.testing.assert_close(linears[0].weight.T @ linears[0].weight, th.eye(4), rtol=1e-4, atol=1e-5)
    th.testing.assert_close(linears[1].weight @ linears[1].weight.T, th.eye(16), rtol=1e-4, atol=1e-5)
    observations = th.randn(50, 4, generator=th.Generator().manual_seed(0))
    with th.no_grad():
        linears[-1].weight.mul_(100.0)
    scale = actor.distribution(observations).scale
    assert scale.min().item() == pytest.approx(math.exp(-5.0))
    assert scale.max().item() == pytest.approx(math.exp(2.0))
    latents = th.randn(50, 2, generator=th.Generator().manual_seed(1))
    law = actor.distribution(observations)
    th.testing.assert_close(actor(observations, latents), th.tanh(law.loc + law.scale * latents))
    th.testing.assert_close(actor._predict(observations, deterministic=True), th.tanh(law.loc))


def test_implicit_actor_is_one_bounded_denoising_step() -> None:
    actor = make_policy(4, 2, net_arch=[16, 16], actor_type="implicit").actor
    assert isinstance(actor, ImplicitActor)
    generator = th.Generator().manual_seed(0)
    observations, latents = th.randn(5, 4, generator=generator), th.randn(5, 2, generator=generator)
    sigma, total = 2.5, math.sqrt(2.5**2 + SIGMA_DATA**2)
    raw = actor.denoiser.net(sigma * latents / total, observations, th.full((5,), math.log(sigma) / 4.0))
    denoised = SIGMA_DATA**2 / total**2 * sigma * latents + sigma * SIGMA_DATA / total * raw
    th.testing.assert_close(actor(observations, latents), th.tanh(denoised), rtol=1e-4, atol=1e-6)
    assert not th.equal(actor(observations, latents), actor(observations, -latents))


def test_log_prob_with_and_without_the_jacobian() -> None:
    actor = make_policy(4, 2, net_arch=[16]).actor
    perturb(actor)
    generator = th.Generator().manual_seed(0)
    observations, actions = th.randn(40, 4, generator=generator), 1.8 * th.rand(40, 2, generator=generator) - 0.9
    law = actor.distribution(observations)
    base = th.distributions.Normal(law.loc.double(), law.scale.double())
    squashed = actions.double() / 1.001
    true = th.distributions.TransformedDistribution(base, [th.distributions.TanhTransform()]).log_prob(squashed).sum(dim=1)
    with_jacobian = actor.log_prob(observations, actions, jacobian=True).double()
    without = actor.log_prob(observations, actions).double()
    assert with_jacobian.shape == (40,)
    th.testing.assert_close(with_jacobian, true, rtol=1e-4, atol=1e-4)
    jacobian = (1.0 - squashed.atanh().tanh().square()).log().sum(dim=1)
    assert jacobian.min() < -0.5
    th.testing.assert_close(without - with_jacobian, jacobian, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("jacobian", [False, True])
def test_log_prob_is_finite_at_the_edge_of_the_box(jacobian: bool) -> None:
    actor = make_policy(4, 2, net_arch=[16]).actor
    log_prob = actor.log_prob(th.zeros(2, 4), th.tensor([[1.0, -1.0], [0.0, 1.0]]), jacobian)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in actor.parameters())


# ---------------------------------------------------------------- one optimiser step


def test_minimize_changes_and_charges_its_own_parameters_alone() -> None:
    th.manual_seed(0)
    mine, other = nn.Linear(3, 3), nn.Linear(3, 1)
    before_mine, before_other = weights(mine), weights(other)
    optimizer = th.optim.SGD(mine.parameters(), lr=0.1)
    x = th.randn(5, 3)
    loss = other(mine(x)).square().mean()
    expected = th.autograd.grad(loss, tuple(mine.parameters()), retain_graph=True)
    value = minimize(optimizer, loss)
    assert not value.requires_grad
    assert value.item() == loss.item()
    assert equal(weights(other), before_other)
    assert all(parameter.grad is None for parameter in other.parameters())
    for parameter, gradient, old in zip(mine.parameters(), expected, before_mine.values(), strict=True):
        th.testing.assert_close(parameter.detach(), old - 0.1 * gradient)
    second = other(mine(x)).square().mean()
    expected = th.autograd.grad(second, tuple(mine.parameters()), retain_graph=True)
    minimize(optimizer, second)  # gradients do not add up
    for parameter, gradient in zip(mine.parameters(), expected, strict=True):
        th.testing.assert_close(parameter.grad, gradient)


def test_minimize_bounds_the_norm_of_the_gradient() -> None:
    parameter = th.tensor([3.0, 4.0], requires_grad=True)
    minimize(th.optim.SGD([parameter], lr=1.0), 10.0 * parameter.square().sum(), max_grad_norm=0.5)
    th.testing.assert_close(parameter.detach(), th.tensor([3.0 - 0.3, 4.0 - 0.4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kwargs", [dict(), dict(regularizer="kl"), dict(nll_coef=1.0), dict(actor_type="implicit")])
def test_actor_step_leaves_the_other_networks_alone(kwargs: dict[str, Any]) -> None:
    model = make_model(**kwargs)
    others = [model.behavior, model.critic, model.critic_target]
    before, before_actor = [weights(network) for network in others], weights(model.actor)
    minimize(model.actor.optimizer, actor_loss(model, make_batch(16)))
    for network, values in zip(others, before, strict=True):
        assert equal(weights(network), values)
        assert all(parameter.grad is None for parameter in network.parameters())
    assert not equal(weights(model.actor), before_actor)
    assert all(parameter.grad is not None for parameter in model.actor.parameters())


def test_critic_and_behavior_steps_leave_the_other_networks_alone() -> None:
    model = make_model()
    batch = make_batch(16)
    before = weights(model.policy)
    minimize(model.critic.optimizer, critic_loss(model, batch))
    minimize(model.behavior.optimizer, behavior_loss(model, batch))
    changed = {key.split(".")[0] for key, value in weights(model.policy).items() if not th.equal(value, before[key])}
    assert changed == {"critic", "behavior"}
    assert all(parameter.grad is None for parameter in model.actor.parameters())


# ---------------------------------------------------------------- critic


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("p", [0.25, 0.6])
def test_expectile_of_a_coin(expectile: float, p: float) -> None:
    """V = tau p / (tau p + (1 - tau)(1 - p)) for q in {0, 1} with P(1) = p."""
    q = (midpoints(100) < p).double()
    expected = expectile * p / (expectile * p + (1.0 - expectile) * (1.0 - p))
    if p == 0.25 and expectile != 0.5:
        assert expected == pytest.approx({0.7: 0.4375, 0.9: 0.75}[expectile])
    grid = th.linspace(0.0, 1.0, 1001, dtype=th.float64)
    losses = expectile_loss(q - grid.unsqueeze(1), expectile).mean(dim=1)
    assert grid[losses.argmin()].item() == pytest.approx(expected, abs=1e-3)
    v = th.tensor(expected, dtype=th.float64, requires_grad=True)
    (slope,) = th.autograd.grad(expectile_loss(q - v, expectile).mean(), v)
    assert slope.item() == pytest.approx(0.0, abs=1e-7)


def slow_critic_loss(model: DTQL, batch: ReplayBufferSamples, n_critics: int) -> float:
    """L_V + L_Q, one transition at a time."""
    n = len(batch.actions)
    value_losses, q_losses = [], []
    for i in range(n):
        row = slice(i, i + 1)
        q = model.critic(batch.observations[row], batch.actions[row]).flatten().tolist()
        target_q = model.critic_target(batch.observations[row], batch.actions[row]).flatten().tolist()
        assert len(q) == n_critics
        value = model.critic.value_net(batch.observations[row]).item()
        next_value = model.critic.value_net(batch.next_observations[row]).item()
        gap = min(target_q if model.value_from_target else q) - value
        value_losses.append(abs(model.expectile - (1.0 if gap < 0.0 else 0.0)) * gap**2)
        discount = model.gamma if batch.discounts is None else batch.discounts[i].item()
        bootstrap = 0.0 if batch.dones[i].item() == 1.0 else discount * next_value
        q_losses.append(sum((q_k - batch.rewards[i].item() - bootstrap) ** 2 for q_k in q))
    return sum(value_losses) / n + sum(q_losses) / n


@pytest.mark.parametrize("value_from_target", [False, True])
@pytest.mark.parametrize("n_critics", [1, 2, 3])
@pytest.mark.parametrize("with_discounts", [False, True])
def test_critic_loss_is_a_loop(value_from_target: bool, n_critics: int, with_discounts: bool) -> None:
    model = make_model(value_from_target=value_from_target, gamma=0.9, expectile=0.8, policy_kwargs=dict(n_critics=n_critics))
    perturb(model.critic)
    perturb(model.critic_target)
    discounts = {"discounts": th.linspace(0.2, 0.9, 16).unsqueeze(1)} if with_discounts else {}
    batch = make_batch(16, **discounts)
    with th.no_grad():
        expected = slow_critic_loss(model, batch, n_critics)
        assert critic_loss(model, batch).item() == pytest.approx(expected, rel=1e-4)


def test_critic_targets_get_no_gradient() -> None:
    """V learns from its regression alone, each Q from its own: doubling V moves no target that is held fixed."""
    model = make_model()
    batch = make_batch(16)
    critic_loss(model, batch).backward()
    with th.no_grad():
        q_values = model.critic(batch.observations, batch.actions)
        targets = batch.rewards + (1.0 - batch.dones) * 0.99 * model.critic.value_net(batch.next_observations)
    frozen = copy.deepcopy(model.critic)
    frozen.zero_grad()
    expectile_loss(q_values.amin(dim=0) - frozen.value_net(batch.observations), 0.7).mean().backward()
    for member in range(2):
        nn.functional.mse_loss(frozen(batch.observations, batch.actions)[member], targets).backward()
    for parameter, expected in zip(model.critic.parameters(), frozen.parameters(), strict=True):
        th.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_target_critic_teaches_the_value_only_if_asked_to() -> None:
    losses = {}
    for value_from_target in (False, True):
        model = make_model(value_from_target=value_from_target)
        batch = make_batch(16)
        before = critic_loss(model, batch).item()
        th.manual_seed(0)
        perturb(model.critic_target)
        losses[value_from_target] = (before, critic_loss(model, batch).item())
    assert losses[False][0] == losses[False][1]
    assert abs(losses[True][1] - losses[True][0]) > 1e-3


@pytest.mark.parametrize("n_steps", [1, 3])
def test_targets_at_terminations_and_truncations(n_steps: int) -> None:
    """V = 10 everywhere: a termination ends the return, a truncation bootstraps."""
    n, gamma = 8, 0.9
    terminations, truncations = np.arange(n) == 3, np.arange(n) == 7
    rewards = 10.0 ** -np.arange(n).astype(np.float32)
    data = make_dataset(n=n, rewards=rewards, terminations=terminations, truncations=truncations)
    model = make_model(data, gamma=gamma, n_steps=n_steps)
    with th.no_grad():
        for parameter in [*model.critic.value_net.parameters(), *model.critic.q_net.parameters()]:
            parameter.zero_()
        model.critic.value_net[-1].bias.fill_(10.0)
    batch = model.sample_batch(64)
    seen = set()
    for i in range(64):
        row = ReplayBufferSamples(*(None if field is None else field[i : i + 1] for field in batch))
        step = int(np.abs(data.observations - row.observations.numpy()).sum(axis=1).argmin())
        seen.add(step)
        end = 3 if step <= 3 else 7
        last = min(step + n_steps - 1, end)
        target = sum(gamma ** (j - step) * float(rewards[j]) for j in range(step, last + 1))
        if last != 3:
            target += gamma ** (last - step + 1) * 10.0
        # Q = 0, so that L_Q is twice the squared target; L_V is (1 - 0.7) 10^2
        q_loss = critic_loss(model, row).item() - 0.3 * 100.0
        assert q_loss == pytest.approx(2.0 * target**2, rel=1e-4, abs=1e-4)
    assert seen == set(range(n))


# ---------------------------------------------------------------- losses of actor and behaviour


def stub_draws(model: DTQL, normals: list[th.Tensor], sigmas: th.Tensor) -> None:
    """Replace what the losses draw: ``normals`` in turn, and ``sigmas`` every time."""
    draws: Iterator[th.Tensor] = cycle(normals)
    model._draw_action_noise = lambda observations: next(draws)
    model._draw_sigma = lambda n: sigmas


def test_behavior_loss_is_the_mean_of_the_denoising_loss() -> None:
    model = make_model()
    batch = make_batch(16)
    noise, sigmas = th.randn(16, 2), log_logistic_sigmas(th.rand(16))
    stub_draws(model, [noise], sigmas)
    total = 0.0
    for i in range(16):
        noisy = batch.actions[i : i + 1] + sigmas[i] * noise[i]
        with th.no_grad():
            error = model.behavior(batch.observations[i : i + 1], noisy, sigmas[i : i + 1]) - batch.actions[i : i + 1]
        total += error.square().mean().item() * (sigmas[i].item() ** 2 + 0.25) / (0.5 * sigmas[i].item()) ** 2
    for loss in (model._behavior_loss, model._trust_region_loss):
        assert loss(batch.observations, batch.actions, noise, sigmas).item() == pytest.approx(total / 16, rel=1e-3)


def test_denoised_actions_are_clipped_to_the_box_unless_told_otherwise() -> None:
    observations, sigma = th.zeros(4, OBS_DIM), th.full((4,), 0.01)
    noisy = th.tensor([[3.0, -3.0]]).repeat(4, 1)
    assert make_model().behavior(observations, noisy, sigma).abs().max() == 1.0
    unclipped = make_model(policy_kwargs=dict(clip_denoised=False)).behavior(observations, noisy, sigma)
    assert unclipped.abs().max() > 2.5


def test_sigmas_follow_the_bounds_of_the_model() -> None:
    sigmas = make_model(sigma_min=0.1, sigma_max=1.0, sigma_data=0.3)._draw_sigma(10_000)
    assert sigmas.shape == (10_000,)
    assert 0.1 <= sigmas.min() < 0.11
    assert 0.9 < sigmas.max() <= 1.0
    assert make_model(sigma_data=0.3)._draw_sigma(10_000).median().item() == pytest.approx(0.3, rel=0.05)
    assert (make_model(sigma_min=0.5, sigma_max=0.5)._draw_sigma(10) == 0.5).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(sigma_min=0.0), "`sigma_min` must be positive and at most `sigma_max`.*: got 0.0 and 80.0"),
        (dict(sigma_min=-1.0), "`sigma_min` must be positive"),
        (dict(sigma_min=math.nan), "`sigma_min` must be positive"),
        (dict(sigma_min=2.0, sigma_max=1.0), "at most `sigma_max`.*: got 2.0 and 1.0"),
        (dict(sigma_max=math.inf), "must be finite"),
        (dict(sigma_data=0.0), "`sigma_data` must be positive"),
    ],
)
def test_noise_levels_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(**settings)


@pytest.mark.parametrize(("q_normalization", "scale"), [(None, 1.0), ("magnitude", 7.0 / 3.0), ("advantage", 4.0)])
@pytest.mark.parametrize("q_coef", [0.0, 1.0, 2.0])
def test_actor_loss_is_the_weighted_sum(q_normalization: str | None, scale: float, q_coef: float) -> None:
    model = make_model(trust_region_coef=5.0, nll_coef=0.5, q_normalization=q_normalization, q_coef=q_coef)
    model.policy.advantage_scale.fill_(4.0)
    q_values = th.tensor([[[1.0], [-4.0], [2.0]], [[3.0], [-1.0], [-2.0]]])  # smallest: 1, -4, -2
    model.critic.forward = lambda observations, actions: q_values
    model._trust_region_loss = lambda observations, actions, noise, sigma: th.tensor(0.3)
    model._nll_loss = lambda batch: th.tensor(7.0)
    expected = 5.0 * 0.3 - q_coef * (-5.0 / 3.0) / scale + 0.5 * 7.0
    assert actor_loss(model, make_batch(3)).item() == pytest.approx(expected)


def test_normalized_q_does_not_carry_the_scale_of_the_rewards() -> None:
    gradients = {}
    for kind in (None, "magnitude", "advantage"):
        for scale in (1.0, 1000.0):
            model, batch = make_model(q_normalization=kind, trust_region_coef=0.0), make_batch(16)
            with th.no_grad():
                for layer in (model.critic.q_net[-1], model.critic.value_net[-1]):
                    layer.weight.mul_(scale)
                    layer.bias.mul_(scale)
            model._track_advantages(model._critic_loss(batch)[1])
            actor_loss(model, batch).backward()
            gradients[kind, scale] = th.cat([parameter.grad.flatten() for parameter in model.actor.parameters()])
    for kind in ("magnitude", "advantage"):
        th.testing.assert_close(gradients[kind, 1.0], gradients[kind, 1000.0], rtol=1e-3, atol=1e-7)
        assert gradients[kind, 1.0].abs().max() > 1e-4
    th.testing.assert_close(1000.0 * gradients[None, 1.0], gradients[None, 1000.0], rtol=1e-3, atol=1e-5)
    assert not th.allclose(gradients["magnitude", 1.0], gradients["advantage", 1.0], rtol=0.1)


@pytest.mark.parametrize("value_from_target", [False, True])
def test_scale_of_the_advantages(value_from_target: bool) -> None:
    """An average of the batches' standard deviations: of all of them at first, then with weight 0.01 of the newest."""
    model = make_model(value_from_target=value_from_target)
    perturb(model.critic_target)
    batch = make_batch(16)
    with th.no_grad():
        critic = model.critic_target if value_from_target else model.critic
        advantages = critic(batch.observations, batch.actions).amin(dim=0) - model.critic.value_net(batch.observations)
        th.testing.assert_close(model._critic_loss(batch)[1], advantages)
    assert not model._critic_loss(batch)[1].requires_grad
    stds = [3.0, 1.0, 8.0]
    for i, std in enumerate(stds):
        model._track_advantages(std * th.tensor([[-1.0], [1.0]]) + 100.0)
        model._n_updates += 1
        assert model.policy.advantage_scale.item() == pytest.approx(sum(stds[: i + 1]) / (i + 1))
    model._n_updates = 10_000
    model._track_advantages(th.tensor([[-14.0], [14.0]]))
    assert model.policy.advantage_scale.item() == pytest.approx(0.99 * 4.0 + 0.01 * 14.0)


def test_nll_loss_is_of_the_actions_in_the_data() -> None:
    model = make_model(nll_coef=1.0)
    batch = make_batch(16)
    for jacobian in (False, True):
        model.nll_jacobian = jacobian
        expected = -model.actor.log_prob(batch.observations, batch.actions, jacobian=jacobian).mean()
        assert model._nll_loss(batch).item() == pytest.approx(expected.item())


# ---------------------------------------------------------------- trust region with an exact denoiser


def use_exact_behavior(model: DTQL, mean: list[float], std: float = SIGMA_DATA) -> None:
    model.behavior.denoiser = NormalDenoiser(mean, std)


def test_gradient_of_the_trust_region_is_that_of_the_log_density() -> None:
    """(a - m) / s^2 at s = sigma_data; a detached estimate would double it."""
    model = make_model(action_dim=1)
    use_exact_behavior(model, [0.3])
    n = 1000
    signs = th.tensor([-1.0, 1.0], dtype=th.float64).repeat(n).unsqueeze(1)
    sigmas = log_logistic_sigmas(midpoints(n)).repeat_interleave(2)
    for action in (-0.9, 0.1, 0.8):
        a = th.tensor(action, dtype=th.float64, requires_grad=True)
        (gradient,) = th.autograd.grad(
            model._trust_region_loss(th.zeros(2 * n, OBS_DIM), a.expand(2 * n, 1), signs, sigmas), a
        )
        assert gradient.item() == pytest.approx((action - 0.3) / SIGMA_DATA**2, rel=2e-3)


class PointActor(nn.Module):
    """The same action whatever the observation and the latent."""

    def __init__(self, action_dim: int) -> None:
        super().__init__()
        self.action = nn.Parameter(th.zeros(action_dim, dtype=th.float64))

    def forward(self, observations: th.Tensor, latents: th.Tensor) -> th.Tensor:
        return self.action.expand(len(observations), -1)


def test_optimum_with_linear_q() -> None:
    """a_j = m_j + A b_j s^2 / alpha, at the exact denoiser of s = sigma_data."""
    alpha, mean, slopes = 2.0, [0.2, -0.1, 0.0], th.tensor([0.4, -0.6, 0.2], dtype=th.float64)
    model = make_model(action_dim=3, trust_region_coef=alpha, q_normalization=None)
    use_exact_behavior(model, mean)
    n = 1000
    signs = th.tensor([-1.0, 1.0], dtype=th.float64).repeat(n).unsqueeze(1).expand(-1, 3)
    stub_draws(model, [signs], log_logistic_sigmas(midpoints(n)).repeat_interleave(2))
    model.actor = PointActor(3)
    model.critic.forward = lambda observations, actions: (actions @ slopes).unsqueeze(1) + th.tensor([[[0.0]], [[1.0]]])
    batch = make_batch(2 * n, action_dim=3)
    optimizer = th.optim.SGD(model.actor.parameters(), lr=0.5 * 3 * SIGMA_DATA**2 / alpha)
    for _ in range(30):
        minimize(optimizer, actor_loss(model, batch))
    shifts = 3 * slopes * SIGMA_DATA**2 / alpha
    th.testing.assert_close(model.actor.action.detach() - th.tensor(mean), shifts, rtol=0.01, atol=1e-9)


class Constants(nn.Module):
    """Mean and log of the standard deviation, whatever the features."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(th.tensor([0.0, -1.0], dtype=th.float64))

    def forward(self, features: th.Tensor) -> th.Tensor:
        return self.values.expand(len(features), 2)


class UnsquashedActor(GaussianActor):
    """A normal law without the hyperbolic tangent, the same for all observations."""

    def __init__(self) -> None:
        super().__init__(box(OBS_DIM), box(1), net_arch=[])
        self.net = Constants()

    def forward(self, observations: th.Tensor, latents: th.Tensor) -> th.Tensor:
        law = self.distribution(observations)
        return law.loc + law.scale * latents

    def log_prob(self, observations: th.Tensor, actions: th.Tensor, jacobian: bool = False) -> th.Tensor:
        return self.distribution(observations).log_prob(actions).sum(dim=1)


def unsquashed_model(nll_coef: float) -> tuple[DTQL, ReplayBufferSamples]:
    """Exact behaviour N(0.3, sigma_data^2), no Q, and draws whose first two moments are exact."""
    model = make_model(action_dim=1, nll_coef=nll_coef, q_coef=0.0)
    use_exact_behavior(model, [0.3])
    model.actor = UnsquashedActor()
    model.critic.forward = lambda observations, actions: actions.expand(2, -1, -1)
    n = 500
    signs = th.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=th.float64).repeat(n, 1)
    stub_draws(model, [signs[:, :1], signs[:, 1:]], log_logistic_sigmas(midpoints(n)).repeat_interleave(4))
    data = 0.3 + SIGMA_DATA * normal_quantiles(4 * n).unsqueeze(1)
    return model, make_batch(4 * n, actions=data)


def test_likelihood_term_holds_the_variance_up() -> None:
    """The optimal variance is (sqrt(5) - 1) / 2 of the data's, at equal weights of the two terms."""
    model, batch = unsquashed_model(nll_coef=1.0)
    optimizer = th.optim.LBFGS(model.actor.net.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> th.Tensor:
        optimizer.zero_grad()
        loss = actor_loss(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)
    mean, log_std = model.actor.net.values.tolist()
    assert mean == pytest.approx(0.3, abs=1e-3)
    assert math.exp(2.0 * log_std) == pytest.approx((math.sqrt(5.0) - 1.0) / 2.0 * SIGMA_DATA**2, rel=2e-3)


def test_without_it_the_standard_deviation_goes_to_its_floor() -> None:
    model, batch = unsquashed_model(nll_coef=0.0)
    optimizer = th.optim.Rprop(model.actor.net.parameters(), lr=0.1)
    for _ in range(40):
        minimize(optimizer, actor_loss(model, batch))
    assert model.actor.distribution(batch.observations).scale.max().item() == pytest.approx(math.exp(-5.0))


# ---------------------------------------------------------------- KL distillation


def kl_model(real: tuple[float, float], fake: tuple[float, float], sigma: float) -> tuple[DTQL, th.Tensor, th.Tensor]:
    """A model with two exact denoisers and stubbed draws; the actor's actions and their latents."""
    model = make_model(action_dim=1, regularizer="kl")
    model.behavior.denoiser = NormalDenoiser([real[0]], real[1])
    model.fake_behavior.denoiser = NormalDenoiser([fake[0]], fake[1])
    quantiles = normal_quantiles(61)
    latents, noise = (grid.reshape(-1, 1) for grid in th.meshgrid(quantiles, quantiles, indexing="ij"))
    stub_draws(model, [noise], th.full((len(noise),), sigma, dtype=th.float64))
    return model, fake[0] + fake[1] * latents, latents


@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("fake", [(-0.1, 0.2), (0.3, 0.5), (0.6, 0.1)])
def test_kl_loss_has_the_gradient_of_the_divergence(fake: tuple[float, float], sigma: float) -> None:
    """
    Freed of its positive weight in each row, the gradient is that of KL(N(m_f, s_f^2 + sigma^2) || N(m, s^2 + sigma^2)) in
    the actor's mean and standard deviation, found by finite differences.
    """
    real = (0.3, 0.2)
    model, actions, latents = kl_model(real, fake, sigma)
    actions = actions.requires_grad_()
    observations = th.zeros(len(actions), OBS_DIM)
    (gradient,) = th.autograd.grad(kl_loss(model, observations, actions), actions)
    with th.no_grad():
        noisy = actions + sigma * model._draw_action_noise(observations)
        weight = 1.0 / (actions - model.behavior(observations, noisy, th.full((len(actions),), sigma))).abs().clamp(min=1e-6)
    slopes = gradient * len(actions) / weight / sigma**2  # difference of the two scores at the noisy actions

    def divergence(mean: float, std: float) -> float:
        law = th.distributions.Normal(th.tensor(mean, dtype=th.float64), math.sqrt(std**2 + sigma**2))
        goal = th.distributions.Normal(th.tensor(real[0], dtype=th.float64), math.sqrt(real[1] ** 2 + sigma**2))
        return th.distributions.kl_divergence(law, goal).item()

    step, (mean, std) = 1e-4, fake
    in_mean = (divergence(mean + step, std) - divergence(mean - step, std)) / (2.0 * step)
    in_std = (divergence(mean, std + step) - divergence(mean, std - step)) / (2.0 * step)
    assert slopes.mean().item() == pytest.approx(in_mean, rel=0.01, abs=1e-6)
    assert (slopes * latents).mean().item() == pytest.approx(in_std, rel=0.01, abs=1e-6)


def test_kl_loss_vanishes_between_equal_models() -> None:
    model, actions, _ = kl_model((0.3, 0.2), (0.3, 0.2), 0.5)
    actions = actions.requires_grad_()
    loss = kl_loss(model, th.zeros(len(actions), OBS_DIM), actions)
    (gradient,) = th.autograd.grad(loss, actions)
    assert loss.item() == pytest.approx(0.0, abs=1e-20)
    assert gradient.abs().max().item() == pytest.approx(0.0, abs=1e-12)


def test_kl_loss_reaches_the_actor_alone() -> None:
    model = make_model(regularizer="kl")
    batch = make_batch(16)
    denoisers = [*model.behavior.parameters(), *model.fake_behavior.parameters()]
    actions = model.actor(batch.observations, th.randn(16, 2))
    gradients = th.autograd.grad(
        kl_loss(model, batch.observations, actions), [actions, *denoisers], allow_unused=True, retain_graph=True
    )
    assert gradients[0].abs().sum() > 0.0
    assert all(gradient is None for gradient in gradients[1:])
    model._fake_behavior_loss(batch.observations, th.randn(16, 2), *model._draw_corruption(batch)).backward()
    assert all(parameter.grad is None for parameter in [*model.actor.parameters(), *model.behavior.parameters()])
    assert all(parameter.grad is not None for parameter in model.fake_behavior.parameters())


# ---------------------------------------------------------------- the update


class Calls:
    """Counts the forward passes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.n = 0
        module.register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.n += 1


@pytest.mark.parametrize(
    ("kwargs", "n_pretraining", "n_main", "n_fake"),
    [
        (dict(), 1, 2, 0),
        (dict(pretrain_actor=False), 1, 2, 0),
        (dict(actor_type="implicit"), 1, 2, 0),
        (dict(actor_type="implicit", pretrain_actor=False), 1, 2, 0),
        (dict(n_action_samples=8, nll_coef=1.0), 1, 2, 0),
        (dict(regularizer="kl"), 1, 2, 2),
        (dict(regularizer="kl", actor_type="implicit"), 1, 2, 2),
    ],
)
def test_denoiser_calls_per_update_and_per_action(
    kwargs: dict[str, Any], n_pretraining: int, n_main: int, n_fake: int
) -> None:
    model = make_model(n_pretrain_steps=3, **kwargs)
    calls = Calls(model.behavior.denoiser.net)
    fake_calls = Calls(model.fake_behavior.denoiser.net) if n_fake else None
    for phase_length, expected in ((3, n_pretraining), (4, n_main)):
        calls.n = 0
        assert fake_calls is None or fake_calls.n == 0
        model.train(gradient_steps=phase_length, batch_size=16)
        assert calls.n == phase_length * expected
    assert fake_calls is None or fake_calls.n == 4 * n_fake
    calls.n = 0
    for deterministic in (True, False):
        model.predict(np.zeros((5, OBS_DIM), np.float32), deterministic=deterministic)
    assert calls.n == 0
    assert fake_calls is None or fake_calls.n == 4 * n_fake


def test_one_actor_pass_per_action() -> None:
    model = make_model(n_action_samples=8)
    calls, target_calls, online_calls = Calls(model.actor.net), Calls(model.critic_target), Calls(model.critic)
    model.predict(np.zeros((5, OBS_DIM), np.float32))
    assert (calls.n, target_calls.n, online_calls.n) == (1, 1, 0)


def test_trust_region_draws_noise_of_its_own() -> None:
    model = make_model()
    draw, drawn = model._draw_sigma, []
    model._draw_sigma = lambda n: drawn.append(draw(n)) or drawn[-1]
    model.train(gradient_steps=2, batch_size=16)
    assert len({tuple(sigmas.tolist()) for sigmas in drawn}) == len(drawn) == 4


def test_order_of_an_update() -> None:
    """The actor learns from the critic and the diffusion model of the same step."""
    model = make_model(tau=0.25)
    order = []
    minimize_, sample = model._minimize, model.sample_batch
    model.sample_batch = lambda n: order.append("sample") or sample(n)
    model._minimize = lambda name, network, loss: order.append(name) or minimize_(name, network, loss)
    before = weights(model.critic_target)
    model.train(gradient_steps=1, batch_size=16)
    assert order == ["sample", "critic_loss", "behavior_loss", "actor_loss"]
    online = weights(model.critic)
    for key, value in weights(model.critic_target).items():
        th.testing.assert_close(value, before[key] + 0.25 * (online[key] - before[key]))


def train_states(**kwargs: Any) -> dict[str, dict[str, th.Tensor]]:
    model = make_model(**kwargs)
    model.train(gradient_steps=4, batch_size=16)
    return {name: weights(getattr(model, name)) for name in ("actor", "behavior", "critic", "critic_target")}


def freeze(model: DTQL, name: str) -> None:
    for group in getattr(model, name).optimizer.param_groups:
        group["lr"] = 0.0
    model._update_learning_rates = lambda: None


def test_same_settings_same_weights() -> None:
    first, second = train_states(), train_states()
    assert all(equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(trust_region_coef=0.0),
        dict(trust_region_coef=2.0),
        dict(q_coef=0.0),
        dict(nll_coef=1.0),
        dict(nll_coef=1.0, nll_jacobian=True),
        dict(q_normalization=None),
        dict(q_normalization="magnitude"),
    ],
)
def test_each_part_of_the_actor_loss_matters_to_the_actor_alone(kwargs: dict[str, Any]) -> None:
    base, other = train_states(), train_states(**kwargs)
    assert not equal(base["actor"], other["actor"])
    assert all(equal(base[name], other[name]) for name in ("behavior", "critic", "critic_target"))


def test_the_diffusion_model_matters_to_the_actor_through_the_trust_region_alone() -> None:
    """Frozen, it changes what the actor learns; without the trust region it does not."""
    for coef, matters in ((1.0, True), (0.0, False)):
        results = []
        for frozen in (False, True):
            model = make_model(trust_region_coef=coef)
            if frozen:
                freeze(model, "behavior")
            model.train(gradient_steps=4, batch_size=16)
            results.append((weights(model.actor), weights(model.critic)))
        assert equal(results[0][0], results[1][0]) is not matters
        assert equal(results[0][1], results[1][1])


def test_the_critic_matters_to_the_actor_through_q_alone() -> None:
    for coef, matters in ((1.0, True), (0.0, False)):
        results = []
        for frozen in (False, True):
            model = make_model(q_coef=coef)
            if frozen:
                freeze(model, "critic")
            model.train(gradient_steps=4, batch_size=16)
            results.append((weights(model.actor), weights(model.behavior)))
        assert equal(results[0][0], results[1][0]) is not matters
        assert equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    "kwargs",
    [dict(expectile=0.9), dict(gamma=0.5), dict(value_from_target=True), dict(critic_learning_rate=1e-3)],
)
def test_each_part_of_the_critic_loss_matters_to_the_critic(kwargs: dict[str, Any]) -> None:
    base, other = train_states(), train_states(**kwargs)
    assert not equal(base["critic"], other["critic"])
    assert equal(base["behavior"], other["behavior"])


def bandit_actions(seed: int, slope: float, trust_region_coef: float = 1.0) -> np.ndarray:
    """Actions of an actor trained on Q = ``slope`` a and the exact denoiser of two modes of behaviour at -0.5 and 0.5."""
    model = make_model(action_dim=1, seed=seed, q_normalization=None, learning_rate=1e-2, trust_region_coef=trust_region_coef)
    model.behavior.denoiser = MixtureDenoiser([[-0.5], [0.5]], 0.05)
    model.critic.forward = lambda observations, actions: slope * actions.expand(2, -1, -1)
    batch = make_batch(64, action_dim=1, observations=th.ones(64, OBS_DIM))
    for _ in range(200):
        minimize(model.actor.optimizer, actor_loss(model, batch))
    actions, _ = model.predict(batch.observations.numpy())
    return actions[:, 0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_trust_region_keeps_the_actor_in_a_mode_of_the_data(seed: int) -> None:
    for slope in (0.0, 2.0):
        assert (np.abs(np.abs(bandit_actions(seed, slope)) - 0.5) < 0.2).mean() > 0.95
    assert (bandit_actions(seed, 2.0, trust_region_coef=0.0) > 0.9).mean() > 0.95  # the edge of the box


def test_imitation_comes_before_the_action_values() -> None:
    """The first updates are of the likelihood; neither the trust region nor Q reaches the actor until they are over."""
    runs = [make_model(n_imitation_steps=3, trust_region_coef=coef, q_coef=coef) for coef in (0.0, 1.0)]
    losses: list[float] = []
    record = runs[0]._minimize
    runs[0]._minimize = lambda name, network, loss: (
        losses.append(loss.item()) if name == "actor_loss" else None,
        record(name, network, loss),
    )
    imitation_loss = runs[0]._imitation_loss
    expected: list[float] = []
    runs[0]._imitation_loss = lambda *args: expected.append(imitation_loss(*args).item()) or imitation_loss(*args)
    target = weights(runs[0].critic_target)
    for step in range(3):
        for model in runs:
            assert model.imitating
            model.train(gradient_steps=1, batch_size=16)
        assert equal(weights(runs[0].actor), weights(runs[1].actor))
        assert losses[step] == expected[step]
    assert not equal(weights(runs[0].critic_target), target)  # part of the main loop, unlike pretraining
    for model in runs:
        assert not model.imitating
        model.train(gradient_steps=1, batch_size=16)
    assert len(expected) == 3
    assert not equal(weights(runs[0].actor), weights(runs[1].actor))
    assert not equal(train_states()["actor"], train_states(n_imitation_steps=2)["actor"])


def test_trust_region_is_weaker_without_data() -> None:
    for dataset_kept, coef in ((True, 5.0), (False, 0.3)):
        model = make_model(trust_region_coef=5.0, online_trust_region_coef=0.3, q_coef=0.0)
        if not dataset_kept:
            model.set_dataset(None)
        model._trust_region_loss = lambda observations, actions, noise, sigma: th.tensor(2.0)
        assert actor_loss(model, make_batch(4)).item() == pytest.approx(2.0 * coef)


# ---------------------------------------------------------------- pretraining and target critic


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("pretrain_actor", [True, False])
def test_pretraining_and_the_target_critic(sync: bool, pretrain_actor: bool) -> None:
    tau = 0.005
    model = make_model(
        n_pretrain_steps=5, sync_target_after_pretraining=sync, pretrain_actor=pretrain_actor, critic_learning_rate=1e-2
    )
    target, actor, behavior = weights(model.critic_target), weights(model.actor), weights(model.behavior)
    for _ in range(4):
        assert model.pretraining
        model.train(gradient_steps=1, batch_size=16)
        assert equal(weights(model.critic_target), target)
    assert model.pretraining
    model.train(gradient_steps=1, batch_size=16)
    assert not model.pretraining
    assert not equal(weights(model.behavior), behavior)
    assert equal(weights(model.actor), actor) is not pretrain_actor
    online = weights(model.critic)
    assert not th.equal(online["q_net.0.weight"], target["q_net.0.weight"])
    after = weights(model.critic_target)
    assert equal(after, {key: online[key] for key in after} if sync else target)
    for _ in range(3):
        before = weights(model.critic_target)
        model.train(gradient_steps=1, batch_size=16)
        online = weights(model.critic)
        for key, value in weights(model.critic_target).items():
            th.testing.assert_close(value - before[key], tau * (online[key] - before[key]), rtol=1e-2, atol=1e-7)
            assert not th.equal(value, before[key])


def test_all_steps_at_once_end_pretraining_at_the_same_place() -> None:
    runs = []
    for chunks in ((8,), (3, 5), (1,) * 8):
        model = make_model(n_pretrain_steps=5)
        for chunk in chunks:
            model.train(gradient_steps=chunk, batch_size=16)
        runs.append(weights(model.policy))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


@pytest.mark.parametrize("pretrain_actor", [True, False])
def test_an_actor_that_was_not_pretrained_imitates_afterwards(pretrain_actor: bool) -> None:
    model = make_model(n_pretrain_steps=3, n_imitation_steps=2, pretrain_actor=pretrain_actor)
    imitates = []
    for _ in range(6):
        imitates.append(model.imitating and not model.pretraining)
        model.train(gradient_steps=1, batch_size=16)
    assert imitates == ([False] * 6 if pretrain_actor else [False, False, False, True, True, False])


@pytest.mark.parametrize("kwargs", [dict(n_pretrain_steps=2), dict(n_pretrain_steps=2, pretrain_actor=False)])
def test_pretraining_matters(kwargs: dict[str, Any]) -> None:
    assert not equal(train_states()["actor"], train_states(**kwargs)["actor"])


def test_pretrained_gaussian_actor_imitates_the_data() -> None:
    losses = {}
    for pretrain_actor in (True, False):
        model = make_model(n_pretrain_steps=150, pretrain_actor=pretrain_actor, learning_rate=3e-3)
        model.train(gradient_steps=150, batch_size=32)
        losses[pretrain_actor] = model._nll_loss(model.sample_batch(256)).item()
    assert losses[True] < losses[False] - 0.1


def test_kl_arm_starts_its_second_model_from_the_behavior() -> None:
    model = make_model(n_pretrain_steps=3, regularizer="kl")
    before = weights(model.fake_behavior)
    model.train(gradient_steps=2, batch_size=16)
    assert equal(weights(model.fake_behavior), before)
    model.train(gradient_steps=1, batch_size=16)
    assert equal(weights(model.fake_behavior), weights(model.behavior))
    model.train(gradient_steps=1, batch_size=16)
    assert not equal(weights(model.fake_behavior), weights(model.behavior))


class LearningRates(BaseCallback):
    """What each update used, of actor, diffusion model and critic."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[tuple[float, ...]] = []

    def _on_step(self) -> bool:
        networks = (self.model.actor, self.model.behavior, self.model.critic)
        self.rates.append(tuple(network.optimizer.param_groups[0]["lr"] for network in networks))
        return True


@pytest.mark.parametrize("n_pretrain_steps", [0, 4])
def test_learning_rates_stand_still_in_pretraining(n_pretrain_steps: int) -> None:
    n_main = 8
    model = make_model(
        learning_rate=CosineSchedule(1e-3), critic_learning_rate=CosineSchedule(3e-4), n_pretrain_steps=n_pretrain_steps
    )
    callback = LearningRates()
    model.learn(n_pretrain_steps + n_main, callback=callback)
    assert len(callback.rates) == n_pretrain_steps + n_main
    for i, (actor, behavior, critic) in enumerate(callback.rates):
        factor = 0.5 * (1.0 + math.cos(math.pi * max(0, i - n_pretrain_steps) / n_main))
        assert (actor, behavior, critic) == pytest.approx((1e-3 * factor, 1e-3 * factor, 3e-4 * factor))
    assert model._current_progress_remaining == pytest.approx(0.0)


# ---------------------------------------------------------------- averaged actor


@pytest.mark.parametrize(("actor_type", "n_pretrain_steps"), [("gaussian", 3), ("implicit", 0)])
def test_the_policy_acts_with_the_average_of_the_actor(actor_type: str, n_pretrain_steps: int) -> None:
    """Decay n / (n + 10) after n updates, up to the given one; the actor that is trained does not notice."""
    settings: dict[str, Any] = dict(actor_type=actor_type, learning_rate=1e-2, n_pretrain_steps=n_pretrain_steps)
    model, plain = make_model(ema_decay=0.4, **settings), make_model(**settings)
    expected = {name: parameter.detach().clone() for name, parameter in plain.actor.named_parameters()}
    assert equal(weights(model.actor.averaged), weights(plain.actor))
    for n in range(1, 11):
        model.train(gradient_steps=1, batch_size=16)
        plain.train(gradient_steps=1, batch_size=16)
        decay = min(0.4, n / (n + 10))
        for name, parameter in plain.actor.named_parameters():
            expected[name] = decay * expected[name] + (1.0 - decay) * parameter.detach()
        averaged = dict(model.actor.averaged.named_parameters())
        for name, value in expected.items():
            th.testing.assert_close(averaged[name].detach(), value, rtol=1e-4, atol=1e-6)
    trained = weights(model.actor)
    assert equal({name: trained[name] for name in weights(plain.actor)}, weights(plain.actor))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in averaged.values())

    observations = np.random.default_rng(0).normal(size=(6, OBS_DIM)).astype(np.float32)
    with th.no_grad():
        by_average = model.actor.averaged(th.as_tensor(observations), th.zeros(6, 2)).numpy()
        by_trained = model.actor(th.as_tensor(observations), th.zeros(6, 2)).numpy()
    assert np.abs(by_average - by_trained).max() > 1e-3
    for n_action_samples in (1, 4):
        model.policy.n_action_samples = n_action_samples
        calls = Calls(model.actor.averaged)
        model.predict(observations)
        assert calls.n == 1
    model.policy.n_action_samples = 1
    np.testing.assert_allclose(model.predict(observations, deterministic=True)[0], by_average, atol=1e-6)
    np.testing.assert_allclose(plain.predict(observations, deterministic=True)[0], by_trained, atol=1e-6)


# ---------------------------------------------------------------- networks with a learned features extractor


class LinearExtractor(BaseFeaturesExtractor):
    """A features extractor with parameters."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 5) -> None:
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(OBS_DIM, features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations)


def test_target_critic_follows_with_all_its_parameters() -> None:
    model = make_model(policy_kwargs=dict(features_extractor_class=LinearExtractor), critic_learning_rate=1e-2, tau=0.1)
    model.train(gradient_steps=2, batch_size=16)
    before = weights(model.critic_target)
    model.train(gradient_steps=1, batch_size=16)
    online = weights(model.critic)
    assert any("features_extractor" in key for key in before)
    for key, value in weights(model.critic_target).items():
        th.testing.assert_close(value, before[key] + 0.1 * (online[key] - before[key]), rtol=1e-4, atol=1e-6)


def test_shared_features_extractor_learns_with_the_actor_alone() -> None:
    model = make_model(policy_kwargs=dict(features_extractor_class=LinearExtractor, share_features_extractor=True))
    extractor = model.actor.features_extractor
    assert model.critic.features_extractor is model.behavior.features_extractor is extractor
    batch, before = make_batch(16), weights(extractor)
    minimize(model.critic.optimizer, critic_loss(model, batch))
    minimize(model.behavior.optimizer, behavior_loss(model, batch))
    assert equal(weights(extractor), before)
    minimize(model.actor.optimizer, actor_loss(model, batch))
    assert not equal(weights(extractor), before)


# ---------------------------------------------------------------- acting


def code_candidates(
    model: DTQL, n: int, q_values: Callable[[th.Tensor], th.Tensor], second: Callable[[th.Tensor], th.Tensor] | None = None
) -> None:
    """Candidates become 0, 1/n, 2/n, ... in each row; ``q_values`` gives their target values from these codes."""
    policy = model.policy
    policy.n_action_samples = n
    policy.actor.latents = lambda batch_size, deterministic=False: (th.arange(batch_size) % n / n).unsqueeze(1)
    policy.actor.forward = lambda observations, latents: latents
    other = q_values if second is None else second
    policy.critic_target.forward = lambda observations, actions: th.stack([q_values(actions), other(actions)])


def chosen(model: DTQL, n: int, n_rows: int) -> np.ndarray:
    model.policy.set_generator(th.Generator().manual_seed(0))
    with th.no_grad():
        return (model.policy._predict(th.zeros(n_rows, OBS_DIM)) * n).round().long().squeeze(1).numpy()


def test_one_candidate_is_a_plain_sample_of_the_actor() -> None:
    observations = np.random.default_rng(0).normal(size=(6, OBS_DIM)).astype(np.float32)
    model = make_model(n_action_samples=1)
    state = model.acting_generator.get_state()
    actions, _ = model.predict(observations)
    model.acting_generator.set_state(state)
    latents = th.randn(6, 2, generator=model.acting_generator)
    with th.no_grad():
        expected = model.actor(th.as_tensor(observations), latents)
    np.testing.assert_allclose(actions, expected.numpy(), rtol=1e-5, atol=1e-6)
    model.acting_generator.set_state(state)
    with th.no_grad():
        same = model.policy._best_of_candidates(th.as_tensor(observations), deterministic=False)
    np.testing.assert_allclose(actions, same.numpy(), rtol=1e-5, atol=1e-6)


def test_constant_q_draws_uniformly() -> None:
    model = make_model(action_dim=1)
    code_candidates(model, 4, lambda actions: th.full_like(actions, 123.0))
    counts = np.bincount(chosen(model, 4, 4000), minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 99.9 % of chi-square with 3 degrees of freedom


def test_candidates_are_drawn_by_the_softmax_of_the_smallest_target_value() -> None:
    probabilities = th.tensor([0.1, 0.2, 0.3, 0.4])
    model = make_model(action_dim=1)

    def log_probabilities(actions: th.Tensor) -> th.Tensor:
        return probabilities.log()[(actions * 4).round().long()]

    code_candidates(model, 4, lambda actions: log_probabilities(actions) + 3.0, log_probabilities)
    counts = np.bincount(chosen(model, 4, 4000), minlength=4)
    expected = 4000 * probabilities.numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 16.3
    # the two values disagree: the smaller one decides
    reverse = lambda actions: 100.0 * actions  # noqa: E731
    code_candidates(model, 4, lambda actions: 1000.0 - 2000.0 * actions, reverse)
    assert (chosen(model, 4, 20) == 1).all()


@pytest.mark.parametrize("best", [0, 2])
def test_a_gap_of_100_gives_the_argmax(best: int) -> None:
    model = make_model(action_dim=1)
    code_candidates(model, 4, lambda actions: 100.0 * ((actions * 4).round() == best))
    assert (chosen(model, 4, 2000) == best).all()


def test_each_row_chooses_among_its_own_candidates() -> None:
    model = make_model(n_action_samples=16)
    observations = th.linspace(-5.0, 5.0, 6).unsqueeze(1).repeat(1, OBS_DIM)
    model.actor.forward = lambda repeated, latents: 0.1 * repeated[:, :2] + 1e-4 * latents.clamp(-1.0, 1.0)
    for deterministic in (False, True):
        with th.no_grad():
            actions = model.policy._predict(observations, deterministic)
        th.testing.assert_close(actions, 0.1 * observations[:, :2], rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("n_action_samples", [1, 8])
@pytest.mark.parametrize("actor_type", ["gaussian", "implicit"])
def test_deterministic_actions_depend_on_their_row_alone(n_action_samples: int, actor_type: str) -> None:
    model = make_model(n_action_samples=n_action_samples, actor_type=actor_type)
    perturb(model.actor)
    observations = np.random.default_rng(1).normal(size=(6, OBS_DIM)).astype(np.float32)
    actions, _ = model.predict(observations, deterministic=True)
    np.testing.assert_array_equal(actions, model.predict(observations, deterministic=True)[0])
    np.testing.assert_allclose(actions[::-1], model.predict(observations[::-1].copy(), deterministic=True)[0], atol=1e-6)
    for observation, action in zip(observations, actions, strict=True):
        np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], action, atol=1e-6)
    drawn, _ = model.predict(observations)
    assert not np.allclose(drawn, model.predict(observations)[0])


def test_deterministic_choice_is_the_best_of_shared_candidates() -> None:
    model = make_model(n_action_samples=8)
    perturb(model.actor)
    perturb(model.critic_target)
    seen: list[th.Tensor] = []
    forward = model.actor.forward
    model.actor.forward = lambda observations, latents: seen.append(latents) or forward(observations, latents)
    observations = th.randn(5, OBS_DIM, generator=th.Generator().manual_seed(0))
    with th.no_grad():
        actions = model.policy._predict(observations, deterministic=True)
        latents = seen[0].reshape(5, 8, 2)
        assert th.equal(latents, latents[:1].expand(5, 8, 2))
        assert latents[0, 0].eq(0.0).all()
        assert len(latents[0].unique(dim=0)) == 8
        for i in range(5):
            row = observations[i].expand(8, -1)
            candidates = forward(row, latents[i])
            best = model.critic_target(row, candidates).amin(dim=0).argmax()
            th.testing.assert_close(actions[i], candidates[best])


def test_an_implicit_actor_starts_from_the_pretrained_diffusion_model() -> None:
    model = make_model(actor_type="implicit", n_pretrain_steps=2, ema_decay=0.9)
    model.learn(2)
    behavior = weights(model.behavior.denoiser)
    assert equal(weights(model.actor.denoiser), behavior)
    assert equal(weights(model.actor.averaged.denoiser), behavior)
    model = make_model(actor_type="implicit", n_pretrain_steps=2, pretrain_actor=False)
    before = weights(model.actor)
    model.learn(2)
    assert equal(weights(model.actor), before)


# Presets --------------------------------------------------------------------------------------------------------------

ANTMAZE: dict[str, Any] = dict(nll=1.0, expectile=0.9, batch_size=2048, shift=-1.0)
PUBLISHED: dict[str, dict[str, Any]] = {
    "halfcheetah-medium": dict(alpha=1.0, epochs=1000),
    "halfcheetah-medium-replay": dict(alpha=5.0, epochs=1000),
    "halfcheetah-medium-expert": dict(alpha=50.0, epochs=1000),
    "hopper-medium": dict(alpha=5.0, epochs=1000, lr=1e-4, decay=True),
    "hopper-medium-replay": dict(alpha=5.0, epochs=1000),
    "hopper-medium-expert": dict(alpha=20.0, epochs=1000),
    "walker2d-medium": dict(alpha=5.0, epochs=1000, decay=True),
    "walker2d-medium-replay": dict(alpha=5.0, epochs=1000, decay=True),
    "walker2d-medium-expert": dict(alpha=5.0, epochs=1000, decay=True),
    "antmaze-umaze": dict(ANTMAZE, alpha=1.0, epochs=500),
    "antmaze-umaze-diverse": dict(ANTMAZE, alpha=1.0, epochs=500, lr=3e-5, decay=True),
    "antmaze-medium-play": dict(ANTMAZE, alpha=1.0, epochs=400),
    "antmaze-medium-diverse": dict(ANTMAZE, alpha=1.0, epochs=400),
    "antmaze-large-play": dict(ANTMAZE, alpha=1.0, epochs=350),
    "antmaze-large-diverse": dict(ANTMAZE, alpha=0.5, epochs=300),
    "pen-human": dict(alpha=1500.0, epochs=300, lr=3e-5, decay=True, expectile=0.9),
    "pen-cloned": dict(alpha=1500.0, epochs=200, lr=1e-5),
    "kitchen-complete": dict(alpha=200.0, epochs=500, lr=1e-4, decay=True),
    "kitchen-partial": dict(alpha=100.0, epochs=1000, lr=1e-4, decay=True),
    "kitchen-mixed": dict(alpha=200.0, epochs=500, decay=True),
}
"""Trust region and length of each published run, and where it differs the rest."""


def test_every_published_task_has_a_preset() -> None:
    assert set(DTQL.presets) == {*PUBLISHED, "locomotion"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_settings(name: str) -> None:
    """As in the authors' `main.py`."""
    published = PUBLISHED[name]
    model = DTQL.from_preset(name, dataset=make_dataset(), device="cpu", policy_kwargs=dict(net_arch=[8]))
    names = """trust_region_coef nll_coef expectile batch_size default_total_timesteps n_pretrain_steps q_coef q_normalization
    gamma tau n_steps n_action_samples n_imitation_steps pretrain_actor sync_target_after_pretraining normalize_observations
    reward_scale reward_shift ema_decay"""
    assert {setting: getattr(model, setting) for setting in names.split()} == dict(
        trust_region_coef=published["alpha"],
        nll_coef=published.get("nll", 0.0),
        expectile=published.get("expectile", 0.7),
        batch_size=published.get("batch_size", 256),
        default_total_timesteps=50_000 + 1_000 * published["epochs"],
        n_pretrain_steps=50_000,
        q_coef=1.0,
        q_normalization=None,
        gamma=0.99,
        tau=0.005,
        n_steps=1,
        n_action_samples=1024,
        n_imitation_steps=0,
        pretrain_actor=False,
        sync_target_after_pretraining=False,
        normalize_observations=False,
        reward_scale=1.0,
        reward_shift=published.get("shift", 0.0),
        ema_decay=0.0,
    )
    rate, end = published.get("lr", 3e-4), 0.0 if published.get("decay") else 1.0
    schedules = (model.lr_schedule, rate), (model.critic_lr_schedule, 3e-4)
    for schedule, start in schedules:
        assert (schedule(1.0), schedule(0.0)) == pytest.approx((start, end * start))
