"""Diffusion-QL's networks, losses and update (arXiv 2208.06193) against slow loops, known numbers and counts of calls."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from exact_denoisers import exact_chain
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from sb3_diffusion import DiffusionQL, OfflineDataset
from sb3_diffusion.common.schedules import vp_betas
from sb3_diffusion.common.utils import minimize
from sb3_diffusion.diffusion_ql import presets
from sb3_diffusion.diffusion_ql.policies import DiffusionActor, DiffusionQLPolicy

OBS_DIM, ACTION_DIM = 3, 2


def box(dim: int, bound: float = 1.0) -> spaces.Box:
    return spaces.Box(-bound, bound, (dim,), np.float32)


def make_dataset(
    n: int = 60,
    rewards: np.ndarray | None = None,
    terminations: np.ndarray | None = None,
    truncations: np.ndarray | None = None,
) -> OfflineDataset:
    """Random transitions; by default every tenth one terminates."""
    rng = np.random.default_rng(0)
    observations, next_observations = rng.normal(size=(2, n, OBS_DIM)).astype(np.float32)
    return OfflineDataset(
        observations,
        rng.uniform(-0.9, 0.9, (n, ACTION_DIM)).astype(np.float32),
        rng.normal(size=n).astype(np.float32) if rewards is None else rewards,
        next_observations,
        np.arange(n) % 10 == 9 if terminations is None else terminations,
        np.zeros(n, dtype=bool) if truncations is None else truncations,
        observation_space=box(OBS_DIM, 10.0),
        action_space=box(ACTION_DIM),
    )


def make_model(dataset: OfflineDataset | None = None, **kwargs: Any) -> DiffusionQL:
    """A small model of Algorithm 1 as it stands: without imitation, normalisations and what else the defaults add."""
    plain: dict[str, Any] = dict(
        batch_size=16,
        seed=0,
        device="cpu",
        n_imitation_steps=0,
        critic_layer_norm=False,
        normalize_observations=False,
    )
    kwargs = {**plain, **kwargs}
    kwargs["policy_kwargs"] = dict(dict(net_arch=[16]), **kwargs.get("policy_kwargs", {}))
    model = DiffusionQL("MlpPolicy", None, dataset=make_dataset() if dataset is None else dataset, **kwargs)
    model.set_logger(Logger(None, []))
    return model


def make_batch(n: int, **kwargs: th.Tensor) -> ReplayBufferSamples:
    generator = th.Generator().manual_seed(3)
    fields: dict[str, Any] = dict(
        observations=th.randn(n, OBS_DIM, generator=generator),
        actions=2.0 * th.rand(n, ACTION_DIM, generator=generator) - 1.0,
        next_observations=th.randn(n, OBS_DIM, generator=generator),
        dones=(th.rand(n, 1, generator=generator) < 0.4).float(),
        rewards=th.randn(n, 1, generator=generator),
    )
    return ReplayBufferSamples(**{**fields, **kwargs})


def some_observations(n: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(n, OBS_DIM)).astype(np.float32)


def weights(module: nn.Module) -> dict[str, th.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def actor_weights(model: DiffusionQL) -> dict[str, th.Tensor]:
    """Of the trained actor alone, without its average."""
    return {name: value for name, value in weights(model.actor).items() if not name.startswith("averaged.")}


def equal(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(th.equal(first[key], second[key]) for key in first)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def perturb(parameters: Any) -> None:
    with th.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * th.randn_like(parameter))


def tame(actor: DiffusionActor, factor: float = 0.1) -> None:
    """Let the network speak softly, so that not all estimates lie at the bound."""
    with th.no_grad():
        for parameter in actor.denoiser.net.trunk[-1].parameters():
            parameter.mul_(factor)


def flat_gradient(loss: th.Tensor, parameters: list[nn.Parameter]) -> th.Tensor:
    gradients = th.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return th.cat([(th.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def spy(owner: Any, name: str) -> list[Any]:
    """:return: a list that fills with what the method returns"""
    results: list[Any] = []
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        results.append(original(*args, **kwargs))
        return results[-1]

    setattr(owner, name, wrapped)
    return results


class Calls:
    """Notes the number of rows of each forward pass of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: tuple[th.Tensor, ...], output: th.Tensor) -> None:
        self.rows.append(len(output))

    def take(self) -> list[int]:
        rows, self.rows = self.rows, []
        return rows


# ---------------------------------------------------------------- networks


def n_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def make_policy(obs_dim: int, action_dim: int, **kwargs: Any) -> DiffusionQLPolicy:
    return DiffusionQLPolicy(box(obs_dim), box(action_dim), lambda _: 3e-4, **kwargs)


def test_parameter_counts_of_the_published_networks() -> None:
    policy = make_policy(17, 6, critic_layer_norm=False)
    assert sum(parameter.numel() for parameter in trained(policy.actor)) == 144_438
    assert n_parameters(policy.actor.averaged) == 144_438
    assert n_parameters(policy.critic) == n_parameters(policy.critic_target) == 275_970
    assert not trained(policy.actor.averaged)
    assert not trained(policy.critic_target)
    with_norm = make_policy(17, 6)
    assert n_parameters(with_norm.critic) == 275_970 + 2 * 3 * 2 * 256


def test_optimizers_hold_what_is_trained_and_nothing_else() -> None:
    model = make_model(learning_rate=1e-3, critic_learning_rate=2e-3)
    for network, rate in ((model.actor, 1e-3), (model.critic, 2e-3)):
        (group,) = network.optimizer.param_groups
        assert group["lr"] == rate
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained(network)]
    assert {id(parameter) for parameter in trained(model.actor)}.isdisjoint(map(id, model.actor_target.parameters()))


def test_target_networks_start_as_copies() -> None:
    model = make_model()
    assert equal(weights(model.actor_target), actor_weights(model))
    assert equal(weights(model.critic_target), weights(model.critic))


def test_the_two_critics_differ_from_the_start() -> None:
    batch = make_batch(16)
    first, second = make_model().critic(batch.observations, batch.actions)
    assert (first - second).abs().min() > 1e-5


# ---------------------------------------------------------------- the reverse chain


def vp_alphas_bar(n_diffusion_steps: int) -> list[float]:
    r"""$\bar\alpha_1 \dots \bar\alpha_T$ by the product of $\alpha_t$."""
    alphas_bar, product = [], 1.0
    for t in range(1, n_diffusion_steps + 1):
        product *= math.exp(-0.1 / n_diffusion_steps - 9.9 * (2 * t - 1) / (2 * n_diffusion_steps**2))
        alphas_bar.append(product)
    return alphas_bar


def slow_chain(actor: DiffusionActor, observation: th.Tensor, latent: th.Tensor) -> th.Tensor:
    """
    The reverse chain of one row, written from arXiv 2006.11239, eqs. 6 and 7, with clipped estimates of the action.

    :param observation: shape ``(OBS_DIM,)``
    :param latent: start and noises, shape ``(n_diffusion_steps, action_dim)``
    """
    bar = vp_alphas_bar(len(latent))
    action = latent[0]
    for k, i in enumerate(reversed(range(len(latent)))):
        last_bar = bar[i - 1] if i > 0 else 1.0
        alpha = bar[i] / last_bar
        noise = actor.denoiser.net(action[None], observation[None], th.tensor([i]))[0]
        clean = (action / math.sqrt(bar[i]) - math.sqrt(1.0 / bar[i] - 1.0) * noise).clamp(-1.0, 1.0)
        action = (
            math.sqrt(last_bar) * (1.0 - alpha) / (1.0 - bar[i]) * clean
            + math.sqrt(alpha) * (1.0 - last_bar) / (1.0 - bar[i]) * action
        )
        if i > 0:
            action = action + math.sqrt((1.0 - alpha) * (1.0 - last_bar) / (1.0 - bar[i])) * latent[k + 1]
    return action.clamp(-1.0, 1.0)


@pytest.mark.parametrize("n_diffusion_steps", [1, 2, 5])
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_actions_come_from_the_chain_of_the_paper(n_diffusion_steps: int, size: float) -> None:
    model = make_model(n_diffusion_steps=n_diffusion_steps)
    perturb(trained(model.actor))
    tame(model.actor, size)
    observations, latents = make_batch(8).observations, size * th.randn(8, *model.actor.latent_shape)
    assert latents.shape == (8, n_diffusion_steps, ACTION_DIM)
    with th.no_grad():
        slow = th.stack([slow_chain(model.actor, *row) for row in zip(observations, latents, strict=True)])
        th.testing.assert_close(model.actor(observations, latents), slow, rtol=1e-3, atol=1e-4)
    if size < 1.0:
        assert (slow.abs() < 0.99).float().mean() > 0.5  # not all at the bound


@pytest.mark.parametrize(
    ("n_diffusion_steps", "mean", "std", "expected"),
    [(5, 0.5, 0.2, 0.0715), (5, 0.0, 0.5, 0.2954), (5, 0.8, 0.05, 0.00502), (50, 0.5, 0.2, 0.1670)],
)
def test_a_perfect_network_samples_with_the_posterior_variance(
    n_diffusion_steps: int, mean: float, std: float, expected: float
) -> None:
    """Normal data come out narrower than they are, the more so the shorter the chain is."""
    actor = make_policy(OBS_DIM, 2, n_diffusion_steps=n_diffusion_steps, clip_denoised=False).actor
    actor.averaged.denoiser = exact_chain(vp_betas(n_diffusion_steps), [[mean, mean]], std)
    actor.generator = th.Generator().manual_seed(0)
    with th.no_grad():
        actions = actor._predict(th.zeros(20_000, OBS_DIM))
    assert actions.mean().item() == pytest.approx(mean, abs=0.01)
    assert actions.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("clip_denoised", "largest"), [(True, 1.0), (False, 12.5)])
def test_estimates_on_the_way_are_clipped_unless_told_otherwise(clip_denoised: bool, largest: float) -> None:
    actor = make_policy(OBS_DIM, 2, clip_denoised=clip_denoised).actor
    with th.no_grad():
        for parameter in actor.denoiser.net.trunk[-1].parameters():
            parameter.zero_()  # of the noise 0, so that the first estimate is the start divided by sqrt(alpha_bar_T)
        estimates = spy(actor.denoiser, "forward")
        actions = actor(th.zeros(1, OBS_DIM), th.ones(1, *actor.latent_shape))
    assert estimates[0].max().item() == pytest.approx(largest, rel=2e-3)
    assert actions.abs().max() <= 1.0


# ---------------------------------------------------------------- critic


def slow_targets(model: DiffusionQL, batch: ReplayBufferSamples, latents: th.Tensor) -> list[float]:
    """y = r + gamma min_k max_j Q'_k(s', a'_j), one row and one action at a time."""
    n = len(latents) // len(batch.rewards)
    targets = []
    for i in range(len(batch.rewards)):
        observation = batch.next_observations[i]
        best = [-math.inf] * model.critic_target.n_critics
        for j in range(n):
            action = slow_chain(model.actor_target, observation, latents[i * n + j])
            q_values = model.critic_target(observation[None], action[None]).flatten().tolist()
            best = [max(pair) for pair in zip(best, q_values, strict=True)]
        discount = model.gamma if batch.discounts is None else batch.discounts[i].item()
        bootstrap = 0.0 if batch.dones[i].item() == 1.0 else discount * min(best)
        targets.append(batch.rewards[i].item() + bootstrap)
    return targets


def critic_loss(model: DiffusionQL, batch: ReplayBufferSamples) -> th.Tensor:
    """The losses at what an update draws for them."""
    return model._critic_loss(batch, model._draw_next_latents(batch))[0]


def next_values(model: DiffusionQL, batch: ReplayBufferSamples) -> th.Tensor:
    return model._next_values(batch, model._draw_next_latents(batch))


def bc_loss(model: DiffusionQL, features: th.Tensor, actions: th.Tensor) -> th.Tensor:
    noise, step = model._draw_normal(*actions.shape), model._draw_integers(model.n_diffusion_steps, len(actions))
    return model._bc_loss(features, actions, noise, step)


def actor_loss(model: DiffusionQL, batch: ReplayBufferSamples) -> th.Tensor:
    return model._actor_loss(batch, *model._draw_corruption(batch), *model._draw_for_q_loss(batch))[0]


@pytest.mark.parametrize("n_critics", [1, 2, 3])
@pytest.mark.parametrize("kwargs", [dict(), dict(max_q_backup=True, n_backup_actions=3)])
@pytest.mark.parametrize("with_discounts", [False, True])
def test_critic_loss_is_a_loop(n_critics: int, kwargs: dict[str, Any], with_discounts: bool) -> None:
    model = make_model(gamma=0.9, n_diffusion_steps=3, policy_kwargs=dict(n_critics=n_critics), **kwargs)
    for network in (model.actor_target, model.critic, model.critic_target):
        perturb(network.parameters())
    tame(model.actor_target)
    discounts = {"discounts": th.linspace(0.2, 0.9, 8).unsqueeze(1)} if with_discounts else {}
    batch = make_batch(8, **discounts)
    drawn = spy(model, "_draw_latents")
    with th.no_grad():
        loss = critic_loss(model, batch).item()
        (latents,) = drawn
        targets = slow_targets(model, batch, latents)
        q_values = model.critic(batch.observations, batch.actions)
    assert q_values.shape == (n_critics, 8, 1)
    assert len(latents) == 8 * kwargs.get("n_backup_actions", 1)
    expected = sum((q_values[k, i].item() - targets[i]) ** 2 for k in range(n_critics) for i in range(8)) / 8
    assert loss == pytest.approx(expected, rel=1e-3)


def test_backup_takes_the_largest_value_of_each_critic_first() -> None:
    """Q'_1 = (0, 3) and Q'_2 = (2, 1) make 2; the other order would make 1. A second row is not mixed in."""
    model = make_model(max_q_backup=True, n_backup_actions=2)
    values = th.tensor([[0.0, 3.0, -7.0, -9.0], [2.0, 1.0, -8.0, -5.0]]).unsqueeze(2)
    model.critic_target.q_values = lambda features, actions: values
    assert next_values(model, make_batch(2)).tolist() == [[2.0], [-7.0]]
    model.max_q_backup = False
    assert next_values(model, make_batch(4)).tolist() == [[0.0], [1.0], [-8.0], [-9.0]]


def test_terminal_rows_are_worth_their_reward_and_others_bootstrap() -> None:
    model = make_model(gamma=0.9)
    with th.no_grad():
        for parameter in model.critic.parameters():
            parameter.zero_()
    rewards, dones = th.tensor([[0.3], [-2.0]]), th.tensor([[1.0], [0.0]])
    model._next_values = lambda batch, latents: th.full((len(batch.rewards), 1), 1e6)
    batch = make_batch(2, rewards=rewards, dones=dones)
    rows = [ReplayBufferSamples(*(None if x is None else x[i : i + 1] for x in batch)) for i in range(2)]
    assert critic_loss(model, rows[0]).item() == 2.0 * rewards[0].square().item()
    assert critic_loss(model, rows[1]).item() == pytest.approx(2.0 * (9e5 - 2.0) ** 2)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_targets_at_terminations_and_truncations(n_steps: int) -> None:
    """Q' = 10 everywhere: a termination ends the return, a truncation bootstraps."""
    n, gamma = 8, 0.9
    terminations, truncations = np.arange(n) == 3, np.arange(n) == 7
    rewards = 10.0 ** -np.arange(n).astype(np.float32)
    data = make_dataset(n, rewards, terminations, truncations)
    model = make_model(data, gamma=gamma, n_steps=n_steps)
    with th.no_grad():
        for parameter in [*model.critic.parameters(), *model.critic_target.parameters()]:
            parameter.zero_()
        model.critic_target.q_net[-1].bias.fill_(10.0)
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
        assert critic_loss(model, row).item() == pytest.approx(2.0 * target**2, rel=1e-4, abs=1e-6)  # Q = 0
    assert seen == set(range(n))


@pytest.mark.parametrize(
    ("name", "matters"), [("actor_target", True), ("critic_target", True), ("actor", False), ("critic", False)]
)
@pytest.mark.parametrize("features_alone", [False, True])
def test_targets_come_from_the_averaged_actor_and_the_target_critic(name: str, matters: bool, features_alone: bool) -> None:
    model, batch = make_model(policy_kwargs=dict(features_extractor_class=LinearExtractor)), make_batch(16)
    tame(model.actor_target)
    state = model.generator.get_state()
    before = next_values(model, batch)
    network = getattr(model, name)
    part = network.features_extractor if features_alone else network
    perturb(part.parameters() if matters else trained(part))
    model.generator.set_state(state)
    assert th.equal(next_values(model, batch), before) is not matters


def test_targets_carry_no_gradient() -> None:
    model, batch = make_model(), make_batch(16)
    targets = [*model.actor_target.parameters(), *model.critic_target.parameters()]
    for parameter in targets:
        parameter.requires_grad_(True)
    loss = critic_loss(model, batch)
    everything = [*targets, *trained(model.actor)]
    assert all(gradient is None for gradient in th.autograd.grad(loss, everything, allow_unused=True, retain_graph=True))
    assert all(gradient is not None for gradient in th.autograd.grad(loss, trained(model.critic)))


# ---------------------------------------------------------------- denoising loss


def record_draws(model: DiffusionQL) -> list[tuple[th.Tensor, th.Tensor]]:
    """:return: a list that fills with the noise and the steps that the denoising loss draws"""
    draws = []
    loss = model.actor.denoiser.loss
    model.actor.denoiser.loss = lambda clean, noise, level, condition: (
        draws.append((noise, level)) or loss(clean, noise, level, condition)
    )
    return draws


@pytest.mark.parametrize("prediction_type", ["noise", "sample", "v"])
@pytest.mark.parametrize("n_diffusion_steps", [1, 5])
def test_denoising_loss_is_a_loop(prediction_type: str, n_diffusion_steps: int) -> None:
    """The squared error of the noise (eq. 2), a mean over rows and action dimensions, each row with a step of its own."""
    model = make_model(prediction_type=prediction_type, n_diffusion_steps=n_diffusion_steps)
    draws = record_draws(model)
    batch = make_batch(16)
    bar = vp_alphas_bar(n_diffusion_steps)
    with th.no_grad():
        loss = bc_loss(model, model.actor.features(batch.observations), batch.actions).item()
        ((noise, steps),) = draws
        total = 0.0
        for i in range(16):
            alpha, sigma = math.sqrt(bar[int(steps[i])]), math.sqrt(1.0 - bar[int(steps[i])])
            noisy = alpha * batch.actions[i : i + 1] + sigma * noise[i : i + 1]
            told = model.actor.denoiser.net(noisy, batch.observations[i : i + 1], steps[i : i + 1])[0]
            for j in range(ACTION_DIM):
                goal = {
                    "noise": noise[i, j],
                    "sample": batch.actions[i, j],
                    "v": alpha * noise[i, j] - sigma * batch.actions[i, j],
                }[prediction_type]
                total += (told[j] - goal).item() ** 2
    assert loss == pytest.approx(total / (16 * ACTION_DIM), rel=1e-4)


def test_denoising_loss_draws_uniform_steps_and_normal_noise() -> None:
    model = make_model(n_diffusion_steps=5)
    draws = record_draws(model)
    n = 10_000
    with th.no_grad():
        bc_loss(model, th.zeros(n, OBS_DIM), th.zeros(n, ACTION_DIM))
        bc_loss(model, th.zeros(n, OBS_DIM), th.zeros(n, ACTION_DIM))
    (noise, steps), (other_noise, other_steps) = draws
    counts = steps.bincount()
    assert len(counts) == 5
    assert ((counts - n / 5) ** 2 / (n / 5)).sum() < 18.5  # 99.9 % of chi-square with 4 degrees of freedom
    assert noise.mean().item() == pytest.approx(0.0, abs=0.03)
    assert noise.std().item() == pytest.approx(1.0, abs=0.03)
    assert np.corrcoef(noise.T.numpy())[0, 1] == pytest.approx(0.0, abs=0.04)
    assert not th.equal(noise, other_noise)
    assert not th.equal(steps, other_steps)


def test_denoising_loss_of_a_trained_actor_comes_down_to_its_floor() -> None:
    """Actions from N(0.5, 0.2^2): no network can do better than 0.03606 with 5 steps, and knowing nothing costs 1."""
    floor = 0.03606
    model = make_model(learning_rate=1e-2, policy_kwargs=dict(net_arch=[32, 32]))
    generator = th.Generator().manual_seed(0)

    def loss(n: int) -> th.Tensor:
        return bc_loss(model, th.zeros(n, OBS_DIM), 0.5 + 0.2 * th.randn(n, ACTION_DIM, generator=generator))

    losses = []
    for n_updates in (0, 50, 450):
        for _ in range(n_updates):
            minimize(model.actor.optimizer, loss(256))
        with th.no_grad():
            losses.append(loss(200_000).item())
    assert 0.8 < losses[0] < 1.3
    assert losses[0] > losses[1] > losses[2] > 0.98 * floor
    assert losses[2] < 1.25 * floor


# ---------------------------------------------------------------- action values in the actor's loss


def q_loss_of(model: DiffusionQL, batch: ReplayBufferSamples, features: th.Tensor) -> th.Tensor:
    return model._q_loss(batch, features, *model._draw_for_q_loss(batch))


def fix_latents(model: DiffusionQL, latents: th.Tensor) -> None:
    model._draw_latents = lambda n: latents


def next_critic(model: DiffusionQL, n_critics: int) -> int:
    """Which critic the next loss will maximise, if it draws nothing else first."""
    generator = th.Generator().manual_seed(0)
    generator.set_state(model.generator.get_state())
    return int(th.randint(n_critics, (1,), generator=generator))


@pytest.mark.parametrize("n_critics", [1, 2, 3])
@pytest.mark.parametrize("q_normalization", ["cross_critic", "data", None])
def test_q_loss_is_a_loop_for_each_draw_of_the_critic(n_critics: int, q_normalization: str | None) -> None:
    model = make_model(q_normalization=q_normalization, n_diffusion_steps=3, policy_kwargs=dict(n_critics=n_critics))
    perturb(trained(model.actor))
    tame(model.actor)
    perturb(model.critic.parameters())
    n = 8
    batch, latents = make_batch(n), th.randn(n, *model.actor.latent_shape)
    fix_latents(model, latents)
    with th.no_grad():
        values, data_values = [], []
        for i in range(n):
            observation = batch.observations[i]
            action = slow_chain(model.actor, observation, latents[i])
            values.append(model.critic(observation[None], action[None]).flatten().tolist())
            data_values.append(model.critic(observation[None], batch.actions[i : i + 1]).flatten().tolist())
        features = model.actor.features(batch.observations)
        seen = set()
        for seed in range(20):
            model.generator.manual_seed(seed)
            first = next_critic(model, n_critics)
            other = (first + 1) % n_critics
            scale = {
                "cross_critic": sum(abs(row[other]) for row in values) / n,
                "data": sum(abs(q) for row in data_values for q in row) / (n * n_critics),
                None: 1.0,
            }[q_normalization]
            expected = -sum(row[first] for row in values) / n / scale
            assert q_loss_of(model, batch, features).item() == pytest.approx(expected, rel=1e-3)
            seen.add(first)
    assert seen == set(range(n_critics))


def test_each_critic_is_drawn_as_often_as_the_other() -> None:
    model, batch = make_model(q_normalization=None), make_batch(2)
    model.actor.sample = lambda features, latents: th.zeros(2, ACTION_DIM)
    with th.no_grad():  # the values are 0 and 1
        model.critic.q_net[-1].weight.zero_()
        model.critic.q_net[-1].bias.copy_(th.tensor([0.0, 1.0]).reshape(2, 1, 1))
    features = th.zeros(2, OBS_DIM)
    share = -sum(q_loss_of(model, batch, features).item() for _ in range(1000)) / 1000
    assert share == pytest.approx(0.5, abs=0.06)


def q_loss_and_gradient(model: DiffusionQL, batch: ReplayBufferSamples) -> tuple[float, th.Tensor]:
    model.generator.manual_seed(0)
    loss = q_loss_of(model, batch, model.actor.features(batch.observations))
    return loss.item(), flat_gradient(loss, trained(model.actor))


def scale_critics(model: DiffusionQL, factor: float) -> None:
    with th.no_grad():
        for parameter in model.critic.q_net[-1].parameters():
            parameter.mul_(factor)


@pytest.mark.parametrize("factor", [0.1, 1000.0])
@pytest.mark.parametrize("q_normalization", ["cross_critic", "data", None])
def test_normalized_q_does_not_carry_the_scale_of_the_rewards(q_normalization: str | None, factor: float) -> None:
    model, batch = make_model(q_normalization=q_normalization), make_batch(16)
    loss, gradient = q_loss_and_gradient(model, batch)
    assert gradient.abs().max() > 1e-4
    scale_critics(model, factor)
    scaled_loss, scaled_gradient = q_loss_and_gradient(model, batch)
    if q_normalization is None:
        loss, gradient = factor * loss, factor * gradient
    assert scaled_loss == pytest.approx(loss, rel=1e-3)
    th.testing.assert_close(scaled_gradient, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("q_normalization", ["cross_critic", "data"])
def test_denominator_is_not_differentiated(q_normalization: str) -> None:
    batch = make_batch(16)
    raw_loss, raw_gradient = q_loss_and_gradient(make_model(q_normalization=None), batch)
    loss, gradient = q_loss_and_gradient(make_model(q_normalization=q_normalization), batch)
    scale = raw_loss / loss
    assert abs(scale - 1.0) > 0.1
    th.testing.assert_close(gradient, raw_gradient / scale, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("offset", "expected"), [(100.0, -1.0), (-100.0, 1.0)])
@pytest.mark.parametrize("q_normalization", ["cross_critic", "data"])
def test_q_loss_tells_the_sign_of_the_values_alone(q_normalization: str, offset: float, expected: float) -> None:
    model = make_model(q_normalization=q_normalization)
    with th.no_grad():
        model.critic.q_net[-1].bias.add_(offset)
    assert q_loss_and_gradient(model, make_batch(16))[0] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("q_normalization", ["cross_critic", "data"])
def test_values_of_zero_do_no_harm(q_normalization: str) -> None:
    model = make_model(q_normalization=q_normalization)
    scale_critics(model, 0.0)
    loss, gradient = q_loss_and_gradient(model, make_batch(16))
    assert loss == 0.0
    assert gradient.isfinite().all()


def test_q_loss_goes_down_as_the_actor_follows_it() -> None:
    """Q = the first entry of the action, for every critic: that entry rises."""
    model, batch = make_model(q_normalization=None, learning_rate=1e-2), make_batch(64)
    model.critic.q_values_of = lambda member, features, actions: actions[None, :, :1]
    features = model.actor.features(batch.observations)
    before = -q_loss_of(model, batch, features).item()
    for _ in range(60):
        minimize(model.actor.optimizer, q_loss_of(model, batch, features))
    after = -q_loss_of(model, batch, features).item()
    assert after > before + 0.3


# ---------------------------------------------------------------- gradient through the chain


def exact_model() -> tuple[DiffusionQL, ReplayBufferSamples, list[th.Tensor]]:
    """In double precision, with fixed latents so small that no estimate is clipped; and the estimates as they come."""
    model, batch = make_model(q_normalization=None, policy_kwargs=dict(net_arch=[16, 16])), make_batch(4)
    model.policy.double()
    shape = (4, *model.actor.latent_shape)
    fix_latents(model, 0.01 * th.randn(shape, generator=th.Generator().manual_seed(1), dtype=th.float64))
    tame(model.actor)
    return model, batch, spy(model.actor.denoiser, "forward")


def q_loss(model: DiffusionQL, batch: ReplayBufferSamples) -> th.Tensor:
    model.generator.manual_seed(0)
    return q_loss_of(model, batch, model.actor.features(batch.observations))


def test_gradient_reaches_every_call_of_the_network() -> None:
    """It changes if what any one of the five calls says is detached."""
    model, batch, estimates = exact_model()
    net, parameters = model.actor.denoiser.net, trained(model.actor)
    whole = flat_gradient(q_loss(model, batch), parameters)
    assert len(estimates) == 5
    assert max(estimate.abs().max().item() for estimate in estimates) < 1.0
    forward = net.forward
    for detached in range(5):
        calls = iter(range(5))
        net.forward = lambda *args, calls=calls, detached=detached: (
            forward(*args).detach() if next(calls) == detached else forward(*args)
        )
        gradient = flat_gradient(q_loss(model, batch), parameters)
        assert next(calls, None) is None
        assert (gradient - whole).norm() > 1e-3 * whole.norm()


@pytest.mark.parametrize("name", ["trunk.0.weight", "trunk.2.bias", "trunk.4.weight", "time_embedding.1.weight"])
def test_gradient_is_the_finite_difference(name: str) -> None:
    model, batch, estimates = exact_model()
    parameter = dict(model.actor.denoiser.net.named_parameters())[name]
    (gradient,) = th.autograd.grad(q_loss(model, batch), [parameter])
    index = int(gradient.abs().argmax())
    entry, step = parameter.data.flatten()[index].item(), 1e-5
    losses = []
    for shift in (step, -step):
        parameter.data.view(-1)[index] = entry + shift
        losses.append(q_loss(model, batch).item())
    assert max(estimate.abs().max().item() for estimate in estimates) < 1.0
    assert abs(gradient.flatten()[index]) > 1e-6
    assert gradient.flatten()[index].item() == pytest.approx((losses[0] - losses[1]) / (2.0 * step), rel=1e-5)


# ---------------------------------------------------------------- the actor's loss


@pytest.mark.parametrize("q_coef", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("bc_coef", [0.0, 3.0])
def test_actor_loss_is_the_weighted_sum(q_coef: float, bc_coef: float) -> None:
    model = make_model(q_coef=q_coef, bc_coef=bc_coef, online_bc_coef=100.0)
    model._bc_loss = lambda *args: th.tensor(0.3)
    model._q_loss = lambda *args: th.tensor(-7.0)
    assert actor_loss(model, make_batch(4)).item() == pytest.approx(0.3 * bc_coef - 7.0 * q_coef)


def test_cloning_is_weaker_without_data() -> None:
    for dataset_kept, coef in ((True, 5.0), (False, 0.3)):
        model = make_model(bc_coef=5.0, online_bc_coef=0.3, q_coef=0.0)
        if not dataset_kept:
            model.set_dataset(None)
        model._bc_loss = lambda *args: th.tensor(2.0)
        assert actor_loss(model, make_batch(4)).item() == pytest.approx(2.0 * coef)


def test_actor_step_leaves_the_other_networks_alone() -> None:
    model, batch = make_model(), make_batch(16)
    others = [model.critic, model.critic_target, model.actor_target]
    before, before_actor = [weights(network) for network in others], actor_weights(model)
    minimize(model.actor.optimizer, actor_loss(model, batch))
    for network, values in zip(others, before, strict=True):
        assert equal(weights(network), values)
        assert all(parameter.grad is None for parameter in network.parameters())
    after = actor_weights(model)
    assert all(not th.equal(after[name], before_actor[name]) for name in after)


def test_critic_step_leaves_the_actors_and_the_target_alone() -> None:
    model, batch = make_model(), make_batch(16)
    others = [model.actor, model.critic_target]  # the first holds its average
    before, before_critic = [weights(network) for network in others], weights(model.critic)
    minimize(model.critic.optimizer, critic_loss(model, batch))
    for network, values in zip(others, before, strict=True):
        assert equal(weights(network), values)
        assert all(parameter.grad is None for parameter in network.parameters())
    after = weights(model.critic)
    assert all(not th.equal(after[name], before_critic[name]) for name in after)


# ---------------------------------------------------------------- the update


def test_order_of_an_update() -> None:
    """Critic, actor with that critic, then both targets follow what has just been trained."""
    model = make_model(tau=0.25, ema_start=1, ema_decay=0.75, learning_rate=1e-2)
    model._n_updates = 1
    order: list[str] = []

    def note(name: str, label: str | None = None) -> None:
        original = getattr(model, name)

        def wrapped(*args: Any) -> Any:
            order.append(label or args[0])
            return original(*args)

        setattr(model, name, wrapped)

    note("sample_batch", "sample")
    note("_critic_loss", "critic")
    note("_actor_loss", "actor")
    note("_minimize")
    note("_update_actor_target", "averaged actor")
    note("_update_critic_target", "target critic")
    before, before_average = weights(model.critic_target), weights(model.actor_target)
    model.train(gradient_steps=1, batch_size=16)
    assert order == ["sample", "critic", "critic_loss", "actor", "actor_loss", "averaged actor", "target critic"]
    for online, target, start in (
        (weights(model.critic), weights(model.critic_target), before),
        (actor_weights(model), weights(model.actor_target), before_average),
    ):
        for key, value in target.items():
            th.testing.assert_close(value, start[key] + 0.25 * (online[key] - start[key]), rtol=1e-5, atol=1e-7)
    assert model._n_updates == 2


@pytest.mark.parametrize(
    ("kwargs", "n_trained", "n_target", "rows_of_target"),
    [
        (dict(), 1 + 5, 5, 16),
        (dict(n_diffusion_steps=8), 1 + 8, 8, 16),
        (dict(n_sampling_steps=2), 1 + 2, 2, 16),
        (dict(sampler="ddim", n_sampling_steps=3), 1 + 3, 3, 16),
        (dict(sampler="dpm_solver", n_sampling_steps=1), 1 + 1, 1, 16),
        (dict(sampler="heun", n_sampling_steps=3), 1 + 5, 5, 16),
        (dict(q_coef=0.0), 1, 5, 16),
        (dict(n_imitation_steps=10), 1, 5, 16),
        (dict(n_pretrain_steps=10), 1, 5, 16),
        (dict(max_q_backup=True), 1 + 5, 5, 160),
        (dict(max_q_backup=True, n_backup_actions=4), 1 + 5, 5, 64),
        (dict(q_normalization="data"), 1 + 5, 5, 16),
        (dict(n_action_samples=50), 1 + 5, 5, 16),
    ],
)
def test_calls_of_the_actors_network_in_an_update(
    kwargs: dict[str, Any], n_trained: int, n_target: int, rows_of_target: int
) -> None:
    model = make_model(**kwargs)
    of_trained, of_target = Calls(model.actor.denoiser.net), Calls(model.actor_target.denoiser.net)
    model.train(gradient_steps=2, batch_size=16)
    assert of_trained.take() == [16] * (2 * n_trained)
    assert of_target.take() == [rows_of_target] * (2 * n_target)


@pytest.mark.parametrize(
    ("kwargs", "n_calls"),
    [(dict(), 5), (dict(n_sampling_steps=2), 2), (dict(sampler="heun", n_sampling_steps=2), 3)],
)
@pytest.mark.parametrize("acts_with_average", [True, False])
@pytest.mark.parametrize("n_action_samples", [1, 8])
def test_calls_of_the_networks_for_an_action(
    kwargs: dict[str, Any], n_calls: int, acts_with_average: bool, n_action_samples: int
) -> None:
    model = make_model(acts_with_average=acts_with_average, n_action_samples=n_action_samples, **kwargs)
    nets = [model.actor_target.denoiser.net, model.actor.denoiser.net]
    acting, idle = map(Calls, nets if acts_with_average else nets[::-1])
    target_critic, critic = Calls(model.critic_target.features_extractor), Calls(model.critic.features_extractor)
    for deterministic in (True, False):
        model.predict(some_observations(5), deterministic=deterministic)
        assert acting.take() == [5 * n_action_samples] * n_calls
        assert idle.take() == critic.take() == []
        assert target_critic.take() == ([5 * n_action_samples] if n_action_samples > 1 else [])


def test_losses_are_logged_under_their_names() -> None:
    model = make_model(n_imitation_steps=2)
    model.learn(2)
    names = {"train/critic_loss", "train/actor_loss", "train/bc_loss", "train/n_updates"}
    assert names <= model.logger.name_to_value.keys()
    assert "train/q_loss" not in model.logger.name_to_value
    q_losses, bc_losses = spy(model, "_q_loss"), spy(model, "_bc_loss")
    model.learn(2)
    values = model.logger.name_to_value
    assert values["train/q_loss"] == pytest.approx(sum(loss.item() for loss in q_losses) / 2)
    assert values["train/bc_loss"] == pytest.approx(sum(loss.item() for loss in bc_losses) / 2)


def gradient_norms(model: DiffusionQL) -> dict[str, list[float]]:
    """:return: a dict that fills with the norm of the gradient that each step used"""
    norms: dict[str, list[float]] = {"critic_loss": [], "actor_loss": []}
    minimize_ = model._minimize

    def wrapped(name: str, optimizer: th.optim.Optimizer, loss: th.Tensor, parts: Any = None) -> None:
        minimize_(name, optimizer, loss, parts)
        gradients = [parameter.grad.flatten() for group in optimizer.param_groups for parameter in group["params"]]
        norms[name].append(th.cat(gradients).norm().item())

    model._minimize = wrapped
    return norms


def test_gradients_of_both_networks_are_bounded() -> None:
    free, bounded = make_model(), make_model(max_grad_norm=0.05)
    free_norms, bounded_norms = gradient_norms(free), gradient_norms(bounded)
    for model in (free, bounded):
        model.train(gradient_steps=4, batch_size=16)
    for name in ("critic_loss", "actor_loss"):
        assert len(free_norms[name]) == 4
        assert min(free_norms[name]) > 0.2
        assert bounded_norms[name] == pytest.approx([0.05] * 4, rel=1e-3)
    small = make_model(max_grad_norm=1e6)
    norms = gradient_norms(small)
    small.train(gradient_steps=4, batch_size=16)
    assert norms == free_norms  # a bound that is far away does nothing


# ---------------------------------------------------------------- moving averages


def test_average_of_the_actor_starts_with_the_first_update() -> None:
    """Decay n / (n + 10) after n updates, up to the given one."""
    model = make_model(ema_decay=0.4, learning_rate=1e-2)
    expected = actor_weights(model)
    for n in range(1, 11):
        model.train(gradient_steps=1, batch_size=16)
        decay, online = min(0.4, n / (n + 10)), actor_weights(model)
        expected = {name: decay * expected[name] + (1.0 - decay) * online[name] for name in online}
        for name, value in weights(model.actor_target).items():
            th.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def assert_moved(model: DiffusionQL, before: dict[str, th.Tensor], share: float) -> None:
    """The averaged actor went that share of the way to the trained one."""
    online, after = actor_weights(model), weights(model.actor_target)
    for name, value in after.items():
        th.testing.assert_close(value - before[name], share * (online[name] - before[name]), rtol=1e-2, atol=1e-6)
    assert not equal(after, before)


def test_decay_of_the_average_in_the_long_run() -> None:
    model = make_model(learning_rate=1e-2)
    perturb(trained(model.actor))
    model._n_updates = 10_000
    before = weights(model.actor_target)
    model.train(gradient_steps=1, batch_size=16)
    assert_moved(model, before, 0.005)


def test_average_follows_the_tensors_of_a_moved_model() -> None:
    """Tensors are looked up once, and again after a move, which makes new buffers."""
    model = make_model(normalize_observations=True)
    model.train(gradient_steps=1, batch_size=16)
    actor, averaged = model.actor.double(), model.actor_target
    perturb(trained(actor))
    normalizer = actor.normalizer
    assert normalizer is not None and averaged.normalizer is not None
    normalizer.mean_0.add_(1.0)
    actor.update_average(0.0)
    assert equal(weights(averaged), actor_weights(model))
    assert th.equal(averaged.normalizer.mean_0, normalizer.mean_0)


class CountingExtractor(FlattenExtractor):
    """Counts the batches that it is trained on, and remembers the last one."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.register_buffer("n_batches", th.zeros((), dtype=th.int64))
        self.register_buffer("last", th.zeros(()), persistent=False)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.training:
            self.n_batches += 1
            self.last.copy_(observations.sum())
        return super().forward(observations)


def test_targets_and_averages_copy_the_buffers_of_a_state() -> None:
    """Of any type; what is no part of a state is left alone."""
    model = make_model(policy_kwargs=dict(features_extractor_class=CountingExtractor), tau=0.0, ema_decay=1.0)
    model.train(gradient_steps=3, batch_size=16)
    for follower, leader in ((model.actor_target, model.actor), (model.critic_target, model.critic)):
        assert follower.features_extractor.n_batches == leader.features_extractor.n_batches > 0
        assert follower.features_extractor.last == 0.0 != leader.features_extractor.last


@pytest.mark.parametrize(
    ("ema_start", "ema_interval", "moves"), [(4, 3, (6, 9, 12)), (6, 3, (6, 9, 12)), (5, 1, range(5, 14))]
)
def test_average_that_waits_and_then_moves_in_intervals(ema_start: int, ema_interval: int, moves: Any) -> None:
    """At update n, counted from 0, if n is at least the start and a multiple of the interval."""
    model = make_model(ema_start=ema_start, ema_interval=ema_interval, ema_decay=0.9, learning_rate=1e-2)
    initial = weights(model.actor_target)
    for n in range(14):
        before = weights(model.actor_target)
        model.train(gradient_steps=1, batch_size=16)
        if n in moves:
            assert_moved(model, before, 0.1)
        else:
            assert equal(weights(model.actor_target), before)
        if n < moves[0]:
            assert equal(weights(model.actor_target), initial)


def test_average_of_the_published_runs_moves_first_at_update_1000() -> None:
    model = make_preset("hopper-medium")
    perturb(trained(model.actor))
    model._n_updates = 994
    moved = []
    for n in range(994, 1012):
        before = weights(model.actor_target)
        model.train(gradient_steps=1, batch_size=16)
        if not equal(weights(model.actor_target), before):
            assert_moved(model, before, 0.005)
            moved.append(n)
    assert moved == [1000, 1005, 1010]


@pytest.mark.parametrize("kwargs", [dict(), dict(n_imitation_steps=10), dict(n_pretrain_steps=10), dict(ema_start=10)])
def test_target_critic_moves_in_every_update(kwargs: dict[str, Any]) -> None:
    model = make_model(tau=0.1, critic_learning_rate=1e-2, **kwargs)
    for _ in range(4):
        before = weights(model.critic_target)
        model.train(gradient_steps=1, batch_size=16)
        online, after = weights(model.critic), weights(model.critic_target)
        assert not equal(after, before)
        for key, value in after.items():
            th.testing.assert_close(value, before[key] + 0.1 * (online[key] - before[key]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("acts_with_average", [True, False])
@pytest.mark.parametrize("n_action_samples", [1, 4])
def test_which_weights_act(acts_with_average: bool, n_action_samples: int) -> None:
    model = make_model(acts_with_average=acts_with_average, n_action_samples=n_action_samples, ema_start=100)
    perturb(trained(model.actor))
    observations = some_observations(6)
    actions, _ = model.predict(observations, deterministic=True)
    perturb((model.actor_target if not acts_with_average else model.actor.denoiser).parameters())  # those that should not
    np.testing.assert_array_equal(actions, model.predict(observations, deterministic=True)[0])
    perturb((model.actor_target if acts_with_average else model.actor.denoiser).parameters())
    assert np.abs(actions - model.predict(observations, deterministic=True)[0]).max() > 1e-3


@pytest.mark.parametrize("acts_with_average", [True, False])
def test_files_of_the_actor_remember_which_weights_act(acts_with_average: bool, tmp_path: Path) -> None:
    model = make_model(acts_with_average=acts_with_average, learning_rate=1e-2)
    model.train(gradient_steps=20, batch_size=16)
    model.actor.save(tmp_path / "actor")
    loaded = DiffusionActor.load(tmp_path / "actor", device="cpu")
    expected, _ = model.actor.predict(some_observations(5), deterministic=True)
    np.testing.assert_array_equal(loaded.predict(some_observations(5), deterministic=True)[0], expected)
    model.actor.acts_with_average = not acts_with_average
    assert not np.array_equal(model.actor.predict(some_observations(5), deterministic=True)[0], expected)
    model.policy.save(tmp_path / "policy")
    policy = DiffusionQLPolicy.load(tmp_path / "policy", device="cpu")
    assert policy.actor.acts_with_average is not acts_with_average


def test_learning_does_not_notice_which_weights_act() -> None:
    assert equal(train_states(acts_with_average=True), train_states(acts_with_average=False))


# ---------------------------------------------------------------- imitation and pretraining


@pytest.mark.parametrize("argument", ["n_imitation_steps", "n_pretrain_steps"])
def test_cloning_alone_comes_before_the_action_values(argument: str) -> None:
    runs = [make_model(q_coef=coef, bc_coef=2.0, **{argument: 3}) for coef in (0.0, 1.0)]
    bc_losses, q_losses, actor_losses = (spy(runs[1], name) for name in ("_bc_loss", "_q_loss", "_actor_loss"))
    critic, start = weights(runs[1].critic), actor_weights(runs[1])
    for step in range(3):
        for model in runs:
            assert model.imitating is (argument == "n_imitation_steps")
            assert model.pretraining is (argument == "n_pretrain_steps")
            model.train(gradient_steps=1, batch_size=16)
        assert equal(actor_weights(runs[0]), actor_weights(runs[1]))
        assert actor_losses[step][0].item() == 2.0 * bc_losses[step].item()
    assert not q_losses
    assert not equal(weights(runs[1].critic), critic)  # it learns meanwhile
    assert not equal(actor_weights(runs[1]), start)
    for model in runs:
        assert not model.imitating
        assert not model.pretraining
        model.train(gradient_steps=1, batch_size=16)
    assert len(q_losses) == 1
    assert not equal(actor_weights(runs[0]), actor_weights(runs[1]))


def test_nothing_is_imitated_online() -> None:
    model = make_model(n_imitation_steps=3, n_pretrain_steps=3)
    model.set_dataset(None)
    assert not model.imitating
    assert not model.pretraining
    q_losses = spy(model, "_q_loss")
    actor_loss(model, make_batch(4))
    assert len(q_losses) == 1


def test_updates_may_be_asked_for_in_any_portions() -> None:
    runs = []
    for portions in ((8,), (3, 5), (1,) * 8):
        model = make_model(n_pretrain_steps=2, n_imitation_steps=4, ema_start=3, ema_interval=2)
        for portion in portions:
            model.train(gradient_steps=portion, batch_size=16)
        runs.append(weights(model.policy))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


class LearningRates(BaseCallback):
    """What each update used, of actor and critic."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[tuple[float, float]] = []

    def _on_step(self) -> bool:
        actor, critic = (network.optimizer.param_groups[0]["lr"] for network in (self.model.actor, self.model.critic))
        self.rates.append((actor, critic))
        return True


@pytest.mark.parametrize("n_pretrain_steps", [0, 4])
@pytest.mark.parametrize(("name", "rate"), [("antmaze-medium-play", 1e-3), ("pen-human", 3e-5)])
def test_learning_rates_of_presets_fall_by_a_cosine_in_every_update(name: str, rate: float, n_pretrain_steps: int) -> None:
    """They stand still in pretraining."""
    n_main = 8
    model, callback = make_preset(name, n_pretrain_steps=n_pretrain_steps), LearningRates()
    model.learn(n_pretrain_steps + n_main, callback=callback)
    assert len(callback.rates) == n_pretrain_steps + n_main
    for i, rates in enumerate(callback.rates):
        factor = 0.5 * (1.0 + math.cos(math.pi * max(0, i - n_pretrain_steps) / n_main))
        assert rates == pytest.approx((rate * factor, 3e-4 * factor))


def test_learning_rates_are_constant_by_default() -> None:
    model, callback = make_model(), LearningRates()
    model.learn(6, callback=callback)
    assert callback.rates == [(3e-4, 3e-4)] * 6
    model, callback = make_model(learning_rate=1e-3), LearningRates()
    model.learn(3, callback=callback)
    assert callback.rates == [(1e-3, 1e-3)] * 3


# ---------------------------------------------------------------- presets

LOCOMOTION, ANTMAZE = dict(eta=1.0, epochs=2000), dict(reward=(4.0, -2.0), epochs=1000)
PUBLISHED: dict[str, dict[str, Any]] = {
    "halfcheetah-medium": dict(LOCOMOTION, norm=9.0),
    "hopper-medium": dict(LOCOMOTION, norm=9.0),
    "walker2d-medium": dict(LOCOMOTION, norm=1.0),
    "halfcheetah-medium-replay": dict(LOCOMOTION, norm=2.0),
    "hopper-medium-replay": dict(LOCOMOTION, norm=4.0),
    "walker2d-medium-replay": dict(LOCOMOTION, norm=4.0),
    "halfcheetah-medium-expert": dict(LOCOMOTION, norm=7.0),
    "hopper-medium-expert": dict(LOCOMOTION, norm=5.0),
    "walker2d-medium-expert": dict(LOCOMOTION, norm=5.0),
    "antmaze-umaze": dict(ANTMAZE, eta=0.5, norm=2.0),
    "antmaze-umaze-diverse": dict(ANTMAZE, eta=2.0, norm=3.0, max_q=True),
    "antmaze-medium-play": dict(ANTMAZE, eta=2.0, norm=2.0, max_q=True, lr=1e-3),
    "antmaze-medium-diverse": dict(ANTMAZE, eta=3.0, norm=1.0, max_q=True),
    "antmaze-large-play": dict(ANTMAZE, eta=4.5, norm=10.0, max_q=True),
    "antmaze-large-diverse": dict(ANTMAZE, eta=3.5, norm=7.0, max_q=True),
    "pen-human": dict(eta=0.15, norm=7.0, epochs=1000, lr=3e-5, reward="normalize"),
    "pen-cloned": dict(eta=0.1, norm=8.0, epochs=1000, lr=3e-5, reward="normalize"),
    "kitchen-complete": dict(eta=0.005, norm=9.0, epochs=250),
    "kitchen-partial": dict(eta=0.005, norm=10.0, epochs=1000),
    "kitchen-mixed": dict(eta=0.005, norm=10.0, epochs=1000),
}
"""Weight of the action value, bound of the gradients and length of each published run, and where it differs the rest."""


def make_preset(name: str, **kwargs: Any) -> DiffusionQL:
    settings: dict[str, Any] = dict(batch_size=16, seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))
    model = DiffusionQL.from_preset(name, dataset=make_dataset(), **{**settings, **kwargs})
    model.set_logger(Logger(None, []))
    return model


def settings_of(model: DiffusionQL) -> dict[str, Any]:
    names = """q_coef bc_coef max_grad_norm default_total_timesteps max_q_backup n_backup_actions gamma tau batch_size n_steps
    q_normalization n_imitation_steps n_pretrain_steps critic_layer_norm normalize_observations n_action_samples
    candidate_choice acts_with_average ema_decay ema_start ema_interval n_diffusion_steps noise_schedule prediction_type
    sampler n_sampling_steps"""
    settings = {name: getattr(model, name) for name in names.split()}
    rates = {"learning_rate": model.lr_schedule(1.0), "critic_learning_rate": model.critic_lr_schedule(1.0)}
    return {**settings, **rates, "reward": (model.reward_scale, model.reward_shift)}


def test_every_published_task_has_a_preset() -> None:
    assert set(DiffusionQL.presets) == {*PUBLISHED, "locomotion"}


def test_what_the_presets_share_is_not_our_default() -> None:
    defaults = inspect.signature(DiffusionQL.__init__).parameters
    assert [name for name, value in presets.PUBLISHED.items() if defaults[name].default == value] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_settings(name: str) -> None:
    """As in the authors' `main.py`."""
    published = PUBLISHED[name]
    model = DiffusionQL.from_preset(name, dataset=make_dataset(), seed=0, device="cpu", policy_kwargs=dict(net_arch=[8]))
    rewards = model.dataset.rewards
    reward = published.get("reward", (1.0, 0.0))
    if reward == "normalize":
        reward = (1.0 / rewards.std(), -rewards.mean() / rewards.std())
    settings = settings_of(model)
    assert settings.pop("reward") == pytest.approx(reward, rel=1e-5)
    assert settings == dict(
        q_coef=published["eta"],
        bc_coef=1.0,
        max_grad_norm=published["norm"],
        default_total_timesteps=1000 * published["epochs"],
        max_q_backup=published.get("max_q", False),
        n_backup_actions=10,
        gamma=0.99,
        tau=0.005,
        batch_size=256,
        n_steps=1,
        learning_rate=published.get("lr", 3e-4),
        critic_learning_rate=3e-4,
        q_normalization="cross_critic",
        n_imitation_steps=0,
        n_pretrain_steps=0,
        critic_layer_norm=False,
        normalize_observations=False,
        n_action_samples=50,
        candidate_choice="softmax",
        acts_with_average=False,
        ema_decay=0.995,
        ema_start=1000,
        ema_interval=5,
        n_diffusion_steps=5,
        noise_schedule="vp",
        prediction_type="noise",
        sampler="ddpm",
        n_sampling_steps=None,
    )
    rewards_seen = th.cat([model.sample_batch(64).rewards for _ in range(4)])
    assert rewards_seen.min().item() == pytest.approx(rewards.min() * reward[0] + reward[1], rel=1e-4)
    assert rewards_seen.max().item() == pytest.approx(rewards.max() * reward[0] + reward[1], rel=1e-4)
    assert model.lr_schedule(0.0) == model.critic_lr_schedule(0.0) == 0.0
    assert model.actor.normalizer is None
    assert (model.policy.n_action_samples, model.actor.acts_with_average) == (50, False)


def test_preset_of_a_task_with_and_without_its_version() -> None:
    with_version, without = make_preset("hopper-medium-v2"), make_preset("hopper-medium")
    assert settings_of(with_version) == settings_of(without)
    assert without.q_coef == 1.0
    assert without.max_grad_norm == 9.0
    for model in (with_version, without):
        model.train(gradient_steps=2, batch_size=16)
    assert equal(weights(with_version.policy), weights(without.policy))


def test_preset_has_the_published_networks() -> None:
    space = box(17, 10.0)
    observations = np.zeros((4, 17), np.float32)
    flags = np.zeros(4, bool)
    data = OfflineDataset(
        observations,
        np.zeros((4, 6), np.float32),
        np.zeros(4, np.float32),
        observations,
        flags,
        ~flags,
        observation_space=space,
        action_space=box(6),
    )
    model = DiffusionQL.from_preset("halfcheetah-medium", dataset=data, device="cpu")
    assert sum(parameter.numel() for parameter in trained(model.actor)) == 144_438
    assert n_parameters(model.critic) == 275_970


def test_arguments_win_over_the_preset() -> None:
    model = make_preset("hopper-medium", q_coef=3.0, learning_rate=1e-2)
    assert model.q_coef == 3.0
    assert model.lr_schedule(0.5) == 1e-2
    assert model.max_grad_norm == 9.0


def test_unknown_preset_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="DiffusionQL has no preset 'hopper-middling'.*hopper-medium"):
        make_preset("hopper-middling")


# ---------------------------------------------------------------- acting


def code_candidates(
    model: DiffusionQL,
    n: int,
    q_values: Callable[[th.Tensor], th.Tensor],
    second: Callable[[th.Tensor], th.Tensor] | None = None,
) -> None:
    """Candidates become 0, 1/n, 2/n, ... in each row; ``q_values`` gives their target values from these codes."""
    policy = model.policy
    policy.n_action_samples = n
    policy.actor.latents = lambda batch_size, deterministic=False: (th.arange(batch_size) % n / n).unsqueeze(1)
    policy.actor.act = lambda observations, latents: latents
    other = q_values if second is None else second
    policy.critic_target.forward = lambda observations, actions: th.stack([q_values(actions), other(actions)])


def chosen(model: DiffusionQL, n: int, n_rows: int) -> np.ndarray:
    model.policy.set_generator(th.Generator().manual_seed(0))
    with th.no_grad():
        return (model.policy._predict(th.zeros(n_rows, OBS_DIM)) * n).round().long().squeeze(1).numpy()


def test_equal_values_draw_uniformly() -> None:
    model = make_model()
    code_candidates(model, 4, lambda actions: th.full_like(actions, 123.0))
    counts = np.bincount(chosen(model, 4, 4000), minlength=4)
    assert ((counts - 1000) ** 2 / 1000).sum() < 16.3  # 99.9 % of chi-square with 3 degrees of freedom


def test_candidates_are_drawn_by_the_softmax_of_the_smallest_target_value() -> None:
    probabilities = th.tensor([0.1, 0.2, 0.3, 0.4])
    model = make_model()

    def log_probabilities(actions: th.Tensor) -> th.Tensor:
        return probabilities.log()[(actions * 4).round().long()]

    code_candidates(model, 4, lambda actions: log_probabilities(actions) + 3.0, log_probabilities)
    counts = np.bincount(chosen(model, 4, 4000), minlength=4)
    expected = 4000 * probabilities.numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 16.3
    # the two values disagree: the smaller one decides
    code_candidates(model, 4, lambda actions: 1000.0 - 2000.0 * actions, lambda actions: 100.0 * actions)
    assert (chosen(model, 4, 20) == 1).all()


@pytest.mark.parametrize("best", [0, 2])
def test_a_gap_of_100_gives_the_argmax(best: int) -> None:
    model = make_model()
    code_candidates(model, 4, lambda actions: 100.0 * ((actions * 4).round() == best))
    assert (chosen(model, 4, 2000) == best).all()


def test_argmax_takes_the_best_by_the_smallest_margin() -> None:
    for choice, kinds in (("argmax", {2}), ("softmax", {0, 1, 2, 3})):
        model = make_model(candidate_choice=choice)
        code_candidates(model, 4, lambda actions: 0.01 * ((actions * 4).round() == 2))
        assert set(chosen(model, 4, 200).tolist()) == kinds


def test_one_candidate_is_a_plain_sample_of_the_actor() -> None:
    observations = some_observations(6)
    model = make_model(n_action_samples=1)
    state = model.acting_generator.get_state()
    actions, _ = model.predict(observations)
    model.acting_generator.set_state(state)
    latents = th.randn(6, 5, ACTION_DIM, generator=model.acting_generator)
    with th.no_grad():
        expected = model.actor_target(th.as_tensor(observations), latents)
    np.testing.assert_allclose(actions, expected.numpy(), rtol=1e-5, atol=1e-6)
    model.acting_generator.set_state(state)
    with th.no_grad():
        same = model.policy._best_of_candidates(th.as_tensor(observations), deterministic=False)
    np.testing.assert_allclose(actions, same.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("candidate_choice", ["softmax", "argmax"])
def test_each_row_chooses_among_its_own_candidates(candidate_choice: str) -> None:
    model = make_model(n_action_samples=16, candidate_choice=candidate_choice)
    observations = th.linspace(-5.0, 5.0, 6).unsqueeze(1).repeat(1, OBS_DIM)
    model.actor.act = lambda repeated, latents: 0.1 * repeated[:, :2] + 1e-4 * latents[:, 0].clamp(-1.0, 1.0)
    for deterministic in (False, True):
        with th.no_grad():
            actions = model.policy._predict(observations, deterministic)
        th.testing.assert_close(actions, 0.1 * observations[:, :2], rtol=0.0, atol=2e-4)


def test_rows_draw_latents_of_their_own() -> None:
    for n_action_samples in (1, 4):
        model = make_model(n_action_samples=n_action_samples, prediction_type="sample")
        actions, _ = model.predict(np.zeros((50, OBS_DIM), np.float32))
        assert len(np.unique(actions, axis=0)) == 50


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
@pytest.mark.parametrize("n_action_samples", [1, 8])
def test_deterministic_actions_depend_on_their_row_alone(n_action_samples: int, sampler: str) -> None:
    model = make_model(n_action_samples=n_action_samples, sampler=sampler, prediction_type="sample")
    observations = some_observations(6)
    state = model.acting_generator.get_state()
    actions, _ = model.predict(observations, deterministic=True)
    assert th.equal(model.acting_generator.get_state(), state)  # nothing is drawn
    np.testing.assert_array_equal(actions, model.predict(observations, deterministic=True)[0])
    np.testing.assert_allclose(actions[::-1], model.predict(observations[::-1].copy(), deterministic=True)[0], atol=1e-5)
    for observation, action in zip(observations, actions, strict=True):
        np.testing.assert_allclose(model.predict(observation, deterministic=True)[0], action, atol=1e-5)
    assert len(np.unique(actions, axis=0)) == 6
    drawn, _ = model.predict(observations)
    assert not np.allclose(drawn, model.predict(observations)[0])


def test_deterministic_action_follows_the_means_from_zero() -> None:
    model = make_model()
    perturb(model.actor_target.parameters())
    tame(model.actor_target)
    observations = some_observations(6)
    actions, _ = model.predict(observations, deterministic=True)
    assert (np.abs(actions) < 0.99).mean() > 0.2  # not all at the bound
    with th.no_grad():
        rows = [slow_chain(model.actor_target, row, th.zeros(5, ACTION_DIM)) for row in th.as_tensor(observations)]
    np.testing.assert_allclose(actions, th.stack(rows).numpy(), rtol=1e-3, atol=1e-4)


def test_deterministic_choice_is_the_best_of_shared_candidates() -> None:
    model = make_model(n_action_samples=8)
    perturb(model.actor_target.parameters())
    tame(model.actor_target)
    perturb(model.critic_target.parameters())
    seen: list[th.Tensor] = []
    act = model.actor.act
    model.actor.act = lambda observations, latents: seen.append(latents) or act(observations, latents)
    observations = th.as_tensor(some_observations(5))
    with th.no_grad():
        actions = model.policy._predict(observations, deterministic=True)
        latents = seen[0].reshape(5, 8, 5, ACTION_DIM)
        assert th.equal(latents, latents[:1].expand_as(latents))
        assert latents[0, 0].eq(0.0).all()
        assert len(latents[0].unique(dim=0)) == 8
        for i in range(5):
            row = observations[i].expand(8, -1)
            candidates = act(row, latents[i])
            best = model.critic_target(row, candidates).amin(dim=0).argmax()
            th.testing.assert_close(actions[i], candidates[best])


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    ("sampler", "n_sampling_steps", "n_calls", "n_draws"),
    [
        ("ddpm", None, 5, 5),
        ("ddpm", 2, 2, 2),
        ("ddim", None, 5, 1),
        ("ddim", 1, 1, 1),
        ("dpm_solver", 3, 3, 1),
        ("heun", 3, 5, 1),
        ("heun", None, 9, 1),
    ],
)
def test_sampler_may_be_changed_after_training(sampler: str, n_sampling_steps: int | None, n_calls: int, n_draws: int) -> None:
    model = make_model()
    model.train(gradient_steps=3, batch_size=16)
    averaged, online = Calls(model.actor_target.denoiser.net), Calls(model.actor.denoiser.net)
    state = model.acting_generator.get_state()
    before, _ = model.predict(some_observations(5))
    assert averaged.take() == [5] * 5
    model.set_sampler(sampler, n_sampling_steps)
    assert (model.sampler, model.n_sampling_steps) == (sampler, n_sampling_steps)
    model.acting_generator.set_state(state)
    after, _ = model.predict(some_observations(5))
    assert np.array_equal(after, before) is (sampler == "ddpm" and n_sampling_steps is None)
    assert averaged.take() == [5] * n_calls
    assert online.take() == []
    assert model.actor.latent_shape == model.actor_target.latent_shape == (n_draws, ACTION_DIM)
    model.actor.acts_with_average = False
    model.predict(some_observations(5))
    assert (averaged.take(), online.take()) == ([], [5] * n_calls)
    model.train(gradient_steps=1, batch_size=16)  # it may go on, with the new sampler
    assert (averaged.take(), online.take()) == ([16] * n_calls, [16] * (1 + n_calls))


def test_files_remember_the_sampler(tmp_path: Path) -> None:
    model = make_model()
    model.set_sampler("ddim", 2)
    model.save(tmp_path / "model")
    model.policy.save(tmp_path / "policy")
    loaded = DiffusionQL.load(tmp_path / "model", device="cpu")
    policies = [loaded.policy, DiffusionQLPolicy.load(tmp_path / "policy", device="cpu")]
    for holder in (loaded, *[actor for policy in policies for actor in (policy.actor, policy.actor.averaged)]):
        assert (holder.sampler, holder.n_sampling_steps) == ("ddim", 2)
    actions, _ = model.predict(some_observations(4), deterministic=True)
    np.testing.assert_array_equal(loaded.predict(some_observations(4), deterministic=True)[0], actions)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("ancestral", None), "`sampler` must be one of .*'ddpm'.*'heun'.*: got 'ancestral'"),
        (("ddim", 6), r"`n_sampling_steps` must lie in \[1, 5\]: got 6"),
        (("ddim", 0), r"`n_sampling_steps` must lie in \[1, 5\]: got 0"),
        (("ddpm", -1), r"`n_sampling_steps` must lie in \[1, 5\]: got -1"),
    ],
)
def test_samplers_that_do_not_exist(arguments: tuple[str, int | None], match: str) -> None:
    model = make_model(sampler="ddim", n_sampling_steps=2)
    with pytest.raises(ValueError, match=match):
        model.set_sampler(*arguments)
    for holder in (model, model.actor, model.actor_target):  # as they were
        assert (holder.sampler, holder.n_sampling_steps) == ("ddim", 2)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("q_coef", -0.1),
        ("q_coef", math.nan),
        ("bc_coef", -0.1),
        ("online_bc_coef", -0.1),
        ("q_normalization", "magnitude"),
        ("n_backup_actions", 0),
        ("n_diffusion_steps", 0),
        ("noise_schedule", "quadratic"),
        ("prediction_type", "score"),
        ("sampler", "ancestral"),
        ("n_sampling_steps", 6),
        ("n_sampling_steps", -1),
        ("n_sampling_steps", 0),
        ("n_imitation_steps", -1),
        ("n_pretrain_steps", -1),
        ("n_action_samples", 0),
        ("candidate_choice", "greedy"),
        ("ema_decay", -0.1),
        ("ema_decay", 1.1),
        ("ema_start", -1),
        ("ema_interval", 0),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
        ("exploration_noise", -0.1),
        ("batch_size", 0),
        ("buffer_size", 0),
        ("n_steps", 0),
        ("gamma", 1.1),
        ("tau", -0.1),
        ("offline_fraction", 1.1),
        ("reward_transform", "log"),
    ],
)
def test_bad_arguments_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"`{argument}` must .*: got {value!r}"):
        make_model(**{argument: value})


@pytest.mark.parametrize("n_critics", [0, -1])
def test_there_is_at_least_one_critic(n_critics: int) -> None:
    with pytest.raises(ValueError, match="`n_critics` must be at least 1"):
        make_model(policy_kwargs=dict(n_critics=n_critics))


# ---------------------------------------------------------------- every setting does something


def train_states(n_updates: int = 4, **kwargs: Any) -> dict[str, th.Tensor]:
    """Weights of all networks after a few updates."""
    model = make_model(**{"learning_rate": 1e-2, **kwargs})
    model.train(gradient_steps=n_updates, batch_size=16)
    return weights(model.policy)


def changed(kwargs: dict[str, Any], **base: Any) -> set[str]:
    """Which networks the settings change, the averaged actor being part of the actor."""
    first, second = train_states(**base), train_states(**base, **kwargs)
    return {name.split(".")[0] for name in first.keys() & second.keys() if not th.equal(first[name], second[name])}


def test_same_settings_same_weights() -> None:
    assert changed({}) == set()


def test_another_seed_other_weights() -> None:
    assert changed(dict(seed=1)) == {"actor", "critic", "critic_target"}


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(q_coef=0.0),
        dict(q_coef=2.0),
        dict(bc_coef=0.0),
        dict(bc_coef=2.0),
        dict(q_normalization="data"),
        dict(q_normalization=None),
        dict(max_q_backup=True),
        dict(n_diffusion_steps=4),
        dict(noise_schedule="linear"),
        dict(noise_schedule="cosine"),
        dict(prediction_type="sample"),
        dict(prediction_type="v"),
        dict(sampler="ddim"),
        dict(n_sampling_steps=3),
        dict(critic_layer_norm=True),
        dict(critic_learning_rate=1e-3),
        dict(ema_decay=0.05),
        dict(ema_interval=2),
        dict(ema_start=2),
        dict(n_imitation_steps=2),
        dict(n_pretrain_steps=2),
        dict(normalize_observations=True),
        dict(max_grad_norm=0.01),
        dict(gamma=0.5),
        dict(tau=0.1),
        dict(reward_transform="antmaze"),
    ],
)
def test_each_setting_matters_to_all_networks(kwargs: dict[str, Any]) -> None:
    """The critic sees the actor through its targets, the actor the critic through Q."""
    assert changed(kwargs) == {"actor", "critic", "critic_target"}


def test_number_of_backup_actions_matters_only_to_their_backup() -> None:
    assert changed(dict(n_backup_actions=3), max_q_backup=True) == {"actor", "critic", "critic_target"}
    assert changed(dict(n_backup_actions=3)) == set()


@pytest.mark.parametrize(
    "kwargs", [dict(q_coef=2.0), dict(bc_coef=2.0), dict(q_normalization="data"), dict(q_normalization=None)]
)
def test_each_part_of_the_actors_loss_reaches_the_actor_first(kwargs: dict[str, Any]) -> None:
    assert changed(kwargs, n_updates=1) == {"actor"}


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(n_action_samples=5),
        dict(n_action_samples=5, candidate_choice="argmax"),
        dict(online_bc_coef=7.0),
        dict(exploration_noise=0.5),
        dict(acts_with_average=False),
    ],
)
def test_how_it_acts_does_not_matter_to_learning_from_data(kwargs: dict[str, Any]) -> None:
    assert changed(kwargs) == set()


def test_the_critic_matters_to_the_actor_through_q_alone() -> None:
    for coef, matters in ((1.0, True), (0.0, False)):
        runs = [make_model(q_coef=coef) for _ in range(2)]
        perturb(runs[1].critic.parameters())
        for model in runs:
            model.train(gradient_steps=3, batch_size=16)
        assert equal(actor_weights(runs[0]), actor_weights(runs[1])) is not matters


# ---------------------------------------------------------------- networks with a learned features extractor


class LinearExtractor(BaseFeaturesExtractor):
    """A features extractor with parameters."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 5) -> None:
        super().__init__(observation_space, features_dim)
        self.linear = nn.Linear(OBS_DIM, features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.linear(observations)


def test_targets_follow_with_their_features_extractors() -> None:
    settings: dict[str, Any] = dict(learning_rate=1e-2, tau=0.1, ema_start=1, ema_decay=0.9)
    model = make_model(policy_kwargs=dict(features_extractor_class=LinearExtractor), **settings)
    model.train(gradient_steps=2, batch_size=16)
    before = [weights(model.critic_target), weights(model.actor_target)]
    model.train(gradient_steps=1, batch_size=16)
    after = [weights(model.critic_target), weights(model.actor_target)]
    for old, new, online in zip(before, after, [weights(model.critic), actor_weights(model)], strict=True):
        assert "features_extractor.linear.weight" in new
        for key, value in new.items():
            th.testing.assert_close(value, old[key] + 0.1 * (online[key] - old[key]), rtol=1e-4, atol=1e-6)
            assert not th.equal(value, old[key])


def test_shared_features_extractor_learns_with_the_actor_alone() -> None:
    model = make_model(policy_kwargs=dict(features_extractor_class=LinearExtractor, share_features_extractor=True))
    extractor = model.actor.features_extractor
    assert model.critic.features_extractor is extractor
    assert model.critic_target.features_extractor is not extractor
    batch, before = make_batch(16), weights(extractor)
    minimize(model.critic.optimizer, critic_loss(model, batch))
    assert equal(weights(extractor), before)
    minimize(model.actor.optimizer, actor_loss(model, batch))
    assert not equal(weights(extractor), before)


# ---------------------------------------------------------------- a bandit of four corners

CORNERS = np.array([[-0.8, 0.8], [-0.8, -0.8], [0.8, 0.8], [0.8, -0.8]], np.float32)
CORNER_REWARDS = np.array([3.0, 0.0, 1.5, 5.0], np.float32)


def corner_dataset(n: int = 2000) -> OfflineDataset:
    """The bandit of the paper's toy experiments: one step, actions around four corners, the last of which pays best."""
    rng = np.random.default_rng(0)
    corner = np.arange(n) % 4
    observations = np.zeros((n, 2), np.float32)
    return OfflineDataset(
        observations,
        (CORNERS[corner] + 0.05 * rng.normal(size=(n, 2))).clip(-1.0, 1.0).astype(np.float32),
        (CORNER_REWARDS[corner] + 0.5 * rng.normal(size=n)).astype(np.float32),
        observations,
        np.ones(n, dtype=bool),
        np.zeros(n, dtype=bool),
        observation_space=box(2),
        action_space=box(2),
    )


def shares_of_corners(model: DiffusionQL) -> np.ndarray:
    """Of 1,000 actions, the share near each corner; the rest is near none."""
    actions, _ = model.predict(np.zeros((1000, 2), np.float32))
    distances = np.linalg.norm(actions[:, None] - CORNERS, axis=2)
    return (distances < 0.25).mean(axis=0)


def test_bandit_of_four_corners() -> None:
    """Cloning visits all four corners; with action values the actor goes to the best one."""
    n_cloning = 1000
    model = make_model(
        corner_dataset(),
        n_imitation_steps=n_cloning,
        n_diffusion_steps=10,
        q_coef=2.5,
        critic_layer_norm=True,
        ema_decay=0.98,
        learning_rate=5e-3,
        batch_size=128,
        policy_kwargs=dict(net_arch=[64] * 3),
    )
    model._next_values = lambda batch, latents: th.zeros_like(batch.rewards)  # there is nothing after the one step
    model.learn(n_cloning)
    shares = shares_of_corners(model)
    assert shares.min() > 0.1
    assert shares.sum() > 0.65
    model.learn(200, reset_num_timesteps=False)
    shares = shares_of_corners(model)
    assert shares[3] > 0.8
    assert shares[:3].sum() < 0.05
