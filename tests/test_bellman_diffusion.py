"""Bellman diffusion against measures that are known: losses at their fixed point, learned chains, rewards, values, acting."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from conftest import image_env
from envs import POINT_ENV, RandomEnv
from exact_denoisers import exact_chain
from gymnasium import spaces
from scipy.stats import spearmanr
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

from sb3_diffusion import BellmanDiffusion, FutureStateReplayBuffer, OfflineDataset
from sb3_diffusion.bellman_diffusion.measure import Chain
from sb3_diffusion.bellman_diffusion.networks import StateCoder
from sb3_diffusion.bellman_diffusion.policies import BellmanDiffusionPolicy
from sb3_diffusion.buffers import FutureStateSamples
from sb3_diffusion.common.samplers import sample_ddim
from sb3_diffusion.common.schedules import noise_schedule_betas
from sb3_diffusion.common.serialization import MissingObjectError

N_STATES = 5
STATES = np.stack([np.cos(2 * np.pi * np.arange(N_STATES) / N_STATES), np.sin(2 * np.pi * np.arange(N_STATES) / N_STATES)], 1)
STATES = STATES.astype(np.float32)
RIGHT, LEFT = 1, 0


def shift(n: int) -> np.ndarray:
    """Transition matrix of ``n`` steps to the right on the circle."""
    return np.roll(np.eye(N_STATES), n, axis=1)


P = np.stack([0.1 * shift(1) + 0.1 * shift(0) + 0.8 * shift(-1), 0.7 * shift(1) + 0.1 * shift(0) + 0.2 * shift(-1)])
"""Transition matrices of the actions LEFT and RIGHT."""


def exact_measure(gamma: float, policy: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """:return: measure of both actions in all states, shape ``(2, N_STATES, N_STATES)``"""
    mean = policy[0] * P[0] + policy[1] * P[1]
    return (1.0 - gamma) * P @ np.linalg.inv(np.eye(N_STATES) - gamma * mean)


def exact_finite_measure(n: int) -> np.ndarray:
    """:return: uniform measure over the next ``n`` states under uniform actions, shape ``(2, N_STATES, N_STATES)``"""
    mean = P.mean(axis=0)
    return sum(P @ np.linalg.matrix_power(mean, k) for k in range(n)) / n


def as_action(chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen == RIGHT, 1.0, -1.0).astype(np.float32)[:, None]


def dataset(
    states: np.ndarray,
    actions: np.ndarray,
    next_states: np.ndarray,
    length: int,
    terminations: np.ndarray | None = None,
    rewards: np.ndarray | None = None,
) -> OfflineDataset:
    """Logged steps; episodes are truncated after ``length`` steps unless they terminate."""
    n = len(states)
    terminations = np.zeros(n, bool) if terminations is None else terminations
    truncations = (np.arange(1, n + 1) % length == 0) & ~terminations
    return OfflineDataset(
        states,
        actions,
        np.zeros(n) if rewards is None else rewards,
        next_states,
        terminations,
        truncations,
        observation_space=spaces.Box(-3.0, 3.0, states.shape[1:], np.float32),
        action_space=spaces.Box(-1.0, 1.0, (1,), np.float32),
    )


def chain_data(n: int = 20_000, right: float = 0.5, seed: int = 0) -> OfflineDataset:
    """Steps on the circle, RIGHT with probability ``right``."""
    rng = np.random.default_rng(seed)
    actions = (rng.uniform(size=n) < right).astype(int)
    moves, state, visited = rng.uniform(size=n), 0, [0]
    for action, u in zip(actions, moves, strict=True):
        state = int(np.searchsorted(np.cumsum(P[action, state]), u).clip(max=N_STATES - 1))
        visited.append(state)
    index = np.array(visited)
    return dataset(STATES[index[:-1]], as_action(actions), STATES[index[1:]], n)


def make(data: Any, **kwargs: Any) -> BellmanDiffusion:
    settings: dict[str, Any] = dict(
        n_diffusion_steps=20, learning_rate=1e-3, gamma=0.8, train_agent=False, policy_kwargs=dict(net_arch=[64, 64])
    )
    return BellmanDiffusion("MlpPolicy", None, dataset=data, seed=0, device="cpu", **{**settings, **kwargs})


def shares(model: BellmanDiffusion, atoms: np.ndarray, states: np.ndarray, action: float, n: int = 1024) -> tuple[Any, float]:
    """Shares of samples next to each atom, shape ``(len(states), len(atoms))``, and their mean distance from it."""
    samples = model.sample_future(states, np.array([action]), n, seed=1)
    distances = np.linalg.norm(samples[:, :, None] - atoms, axis=-1)
    nearest = distances.argmin(axis=-1)
    return np.stack([(nearest == j).mean(axis=1) for j in range(len(atoms))], axis=1), float(distances.min(axis=-1).mean())


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    return float(0.5 * np.abs(a - b).sum(axis=-1).mean())


# Losses ---------------------------------------------------------------------------------------------------------------


class ExactNet(nn.Module):
    """
    What a perfect network tells of a chain's measure, plus an offset to take gradients of.

    :param model: whose coder and denoiser it is for
    :param measures: of remaining steps (0: discounted), shape ``(2, N_STATES, N_STATES)`` each
    """

    def __init__(self, model: BellmanDiffusion, measures: dict[int, np.ndarray]) -> None:
        super().__init__()
        self.measures = {n: th.as_tensor(measure, dtype=th.float32) for n, measure in measures.items()}
        self.states = th.as_tensor(STATES)
        self.atoms = model.measure.coder(self.states)
        self.scales = model.measure.denoiser.scales
        self.offset = nn.Parameter(th.zeros(self.atoms.shape[1]))

    def forward(self, x: th.Tensor, condition: th.Tensor, level: th.Tensor) -> th.Tensor:
        state = th.cdist(condition[:, :2], self.states).argmin(dim=1)
        action = (condition[:, 2] > 0.0).long()
        if condition.shape[1] == 3:
            weights = self.measures[0][action, state]
        else:
            n = (1.0 / condition[:, 4]).round().long()
            table = th.stack([self.measures[k] for k in range(1, 7)])
            weights = table[n - 1, action, state]
        alpha, sigma = (scale[:, None] for scale in self.scales(level))
        logits = weights.clamp(min=1e-30).log() - (x[:, None] - alpha[:, None] * self.atoms).square().sum(2) / (2 * sigma**2)
        clean = logits.softmax(dim=1) @ self.atoms
        noise = (x - alpha * clean) / sigma
        return alpha * noise - sigma * clean + self.offset


def exact_model(**kwargs: Any) -> tuple[BellmanDiffusion, ExactNet]:
    """A model whose networks tell the exact measure of the chain."""
    model = make(chain_data(500), normalize_observations=False, n_chain_levels=1, n_diffusion_steps=8, **kwargs)
    measures = {0: exact_measure(0.8), **{n: exact_finite_measure(n) for n in range(1, 7)}}
    net = ExactNet(model, measures)
    model.measure.denoiser.net = net
    model.measure.target.denoiser.net = ExactNet(model, measures)
    return model, net


def draw(rng: np.random.Generator, probabilities: np.ndarray) -> np.ndarray:
    """One draw from each row."""
    return (probabilities.cumsum(axis=1) < rng.uniform(size=(len(probabilities), 1))).sum(axis=1).clip(max=N_STATES - 1)


def batch_of(state: Any, action: Any, following: Any, next_action: Any, offsets: Any, steps: Any) -> FutureStateSamples:
    n, column = len(state), lambda values: th.as_tensor(values).reshape(-1, 1)
    return FutureStateSamples(
        observations=th.as_tensor(STATES[state]),
        actions=th.as_tensor(as_action(action)),
        next_observations=th.as_tensor(STATES[following]),
        dones=th.zeros(n, 1),
        rewards=th.zeros(n, 1),
        discounts=None,
        future_observations=th.as_tensor(STATES[following]),
        offsets=column(offsets),
        steps_remaining=column(steps),
        next_actions=th.as_tensor(as_action(next_action)),
        has_next_actions=th.ones(n, 1),
        absorbed=th.zeros(n, 1),
        unknown=th.zeros(n, 1),
        step_rewards=th.zeros(n, 1),
        n_future=column(steps),
    )


def largest_t_value(gradients: list[th.Tensor]) -> float:
    """Of the mean over batches, the largest over entries."""
    stacked = th.stack(gradients)
    return float((stacked.mean(0).abs() * len(stacked) ** 0.5 / stacked.std(0).clamp(min=1e-8)).max())


@pytest.mark.parametrize(("literal", "n_steps"), [(False, 1), (False, 2), (True, 1)])
def test_the_exact_measure_is_a_fixed_point(literal: bool, n_steps: int) -> None:
    """At it the gradient of both losses in their shares is zero, and of each alone it is not; nor at the next pair."""
    model, net = exact_model(n_steps=n_steps)
    measure, rng, n = exact_measure(0.8), np.random.default_rng(0), 512
    gradients: dict[str, list[th.Tensor]] = {"both": [], "next": [], "bootstrap": []}
    for _ in range(60):
        state, action = np.zeros(n, int), np.full(n, RIGHT)
        following, next_action = draw(rng, P[action, state]), rng.integers(2, size=n)
        seen, discount = following, 0.8
        if n_steps == 2:
            first, discount = following, 0.64
            following, next_action = draw(rng, P[next_action, first]), rng.integers(2, size=n)
            seen = np.where(rng.uniform(size=n) < 0.2 / 0.36, first, following)
        future = draw(rng, measure[next_action, following])
        batch = batch_of(state, action, following, next_action, np.ones(n, int), np.ones(n, int))
        batch = batch._replace(future_observations=th.as_tensor(STATES[seen]), discounts=th.full((n, 1), discount))
        if literal:  # as printed: the network is trained at the next observation and action
            batch = batch._replace(observations=batch.next_observations, actions=batch.next_actions)
        levels, coder, dim = model._draw_levels(n), model.measure.coder, model.measure.coder.dim
        noisy = model.measure.denoiser.corrupt(coder(th.as_tensor(STATES[future])), model._draw_normal(n, dim), levels)
        condition = model.measure.condition(batch.next_observations, batch.next_actions)
        chain = Chain(th.arange(n), condition, noisy, levels, noisy)
        next_loss = model._next_state_loss(batch, model._draw_normal(n, dim), levels).mean()
        bootstrap_loss = model._bootstrap_loss(batch, chain, model._draw_normal(n, dim)).mean()
        both = (1.0 - discount) * next_loss + discount * bootstrap_loss
        losses = {"next": next_loss, "bootstrap": bootstrap_loss, "both": both}
        for name, loss in losses.items():
            gradients[name] += th.autograd.grad(loss, net.offset, retain_graph=True)
    t_values = {name: largest_t_value([g[:2] for g in values]) for name, values in gradients.items()}
    if literal:
        assert t_values["both"] > 8.0
    else:
        assert t_values["both"] < 3.5 and t_values["next"] > 8.0 and t_values["bootstrap"] > 8.0


@pytest.mark.parametrize("horizon", [None, 6])
@pytest.mark.parametrize("branch", ["offset", "value", "steps"])
def test_the_fixed_point_of_logged_futures(horizon: int | None, branch: str) -> None:
    """Branches are told apart by the offset: by comparing states, or with the remaining steps off by one, it is none."""
    if horizon is None and branch == "steps":
        pytest.skip("the discounted form knows no remaining steps")
    model, net = exact_model(scheme="logged", horizon=horizon)
    rng, n, gradients = np.random.default_rng(0), 1024, []
    for _ in range(80):
        state, action = np.zeros(n, int), np.full(n, RIGHT)
        steps = rng.integers(2, 4, size=n)
        offsets = rng.geometric(0.2, size=n) if horizon is None else rng.integers(1, steps + 1)
        following, next_action = draw(rng, P[action, state]), rng.integers(2, size=n)
        if horizon is None:
            later = draw(rng, exact_measure(0.8)[next_action, following])
        else:
            tables = np.stack([exact_finite_measure(k) for k in (1, 2)])
            later = draw(rng, tables[np.maximum(steps - 2, 0), next_action, following])
        future = np.where(offsets == 1, following, later)
        if branch == "value":
            offsets = np.where(future == following, 1, offsets + 1)
        batch = batch_of(state, action, following, next_action, offsets, steps + int(branch == "steps"))
        futures = model.measure.coder(th.as_tensor(STATES[future]))
        loss = model._offset_loss(
            batch, futures, model._draw_normal(*futures.shape), model._draw_levels(n), model._next_actions(batch, slice(None))
        )
        gradients.append(th.autograd.grad(loss, net.offset)[0][:2])
    assert (largest_t_value(gradients) < 3.5) is (branch == "offset")


def test_a_future_drawn_at_a_cut_end_and_its_target_share_the_next_action() -> None:
    """The state there is both the next one and the last one known; two actions of it would be of two measures."""
    model = make(dataset(*(np.random.default_rng(0).uniform(-1, 1, (400, n)) for n in (2, 1, 2)), 4), scheme="logged")
    seen: list[tuple[th.Tensor, th.Tensor]] = []
    model.actor.register_forward_hook(lambda _, inputs, actions: seen.append((inputs[0], actions)))
    model.learn(1)
    (last_states, drawn_with), (next_states, compared_with) = seen
    same = (last_states == next_states).all(dim=1)
    assert same.sum() > 20 and len(drawn_with[same].unique()) > 20
    assert drawn_with[same].equal(compared_with[same])


def test_losses_row_by_row() -> None:
    """Against the equations, written as a loop; rows whose episode ended are drawn to their last state, no longer alive."""
    model = make(chain_data(200), n_chain_levels=2, n_diffusion_steps=5, level_weighting="ddpm")
    measure, target = model.measure, model.measure.target
    for parameter in target.parameters():  # the two networks differ
        parameter.mul_(3.0)
    rng, n = np.random.default_rng(0), 6
    index = rng.integers(N_STATES, size=(2, n))
    batch = batch_of(index[0], rng.integers(2, size=n), index[1], rng.integers(2, size=n), np.ones(n, int), np.ones(n, int))
    batch = batch._replace(dones=th.tensor([[0.0], [1.0]]).repeat(3, 1))
    chain, noise = model._draw_chain(batch), th.randn(6, 3)
    assert len(set(chain.rows.tolist())) == len(chain.rows) == 3 and 0 < batch.dones[chain.rows].sum() < 3
    levels = th.tensor([0, 1, 2, 3, 4, 2])
    alphas, sigmas = measure.denoiser.alphas, measure.denoiser.sigmas

    expected = []
    for row in range(n):
        level, one = levels[row], slice(row, row + 1)
        clean = th.cat([(batch.next_observations[row] - measure.coder.mean) / measure.coder.std, th.ones(1)])[None]
        noisy = alphas[level] * clean + sigmas[level] * noise[one]
        told = measure.denoiser.net(noisy, measure.condition(batch.observations[one], batch.actions[one]), level[None])
        goal = alphas[level] * noise[one] - sigmas[level] * clean
        expected.append(measure.level_weights[level] * (told - goal).square().mean())
    th.testing.assert_close(model._next_state_loss(batch, noise, levels), th.stack(expected))

    expected = []
    for j in range(6):
        row, level = chain.rows[j % 3], chain.levels[j]
        condition = measure.condition(batch.observations[row][None], batch.actions[row][None])
        if batch.dones[row] == 1.0:
            clean = th.cat([(batch.next_observations[row] - measure.coder.mean) / measure.coder.std, -th.ones(1)])[None]
            noisy = alphas[level] * clean + sigmas[level] * noise[j][None]
            goal = alphas[level] * noise[j][None] - sigmas[level] * clean
        else:
            noisy = chain.noisy[j][None]
            condition_after = target.condition(batch.next_observations[row][None], batch.next_actions[row][None])
            goal = target.denoiser.net(noisy, condition_after, level[None])
        told = measure.denoiser.net(noisy, condition, level[None])
        expected.append(measure.level_weights[level] * (told - goal).square().mean())
    th.testing.assert_close(model._bootstrap_loss(batch, chain, noise), th.stack(expected))
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_ddpm_weights_of_all_prediction_types() -> None:
    r"""$\beta / (2 \alpha (1 - \bar\alpha))$ of the error of the noise, whatever the network tells."""
    betas = noise_schedule_betas("vp", 50)
    alphas_bar = (1.0 - betas).cumprod(0)
    expected = betas / (2.0 * (1.0 - betas) * (1.0 - alphas_bar))
    kinds = {
        "noise": th.ones(50),
        "sample": alphas_bar / (1.0 - alphas_bar),
        "v": alphas_bar,
    }  # error of noise / of what is told
    for kind, factor in kinds.items():
        model = make(chain_data(50), n_diffusion_steps=50, noise_schedule="vp", prediction_type=kind, level_weighting="ddpm")
        weights = (expected * factor).float()
        th.testing.assert_close(model.measure.level_weights, weights / weights.mean(), rtol=1e-4, atol=1e-5)
    first, last = expected[0] / expected.mean(), expected[-1] / expected.mean()
    assert first > 4.0 and 0.5 < last < 1.5, "small noise counts most"


def test_the_chain_is_the_targets_and_stops_at_its_level() -> None:
    model = make(chain_data(200), n_diffusion_steps=6)
    target = model.measure.target
    for parameter in target.parameters():
        parameter.mul_(1.1)
    condition, noise = th.randn(4, 3), th.randn(4, 3)
    path, clean = target.run(condition, noise)
    alphas, sigmas = [*target.denoiser.alphas.tolist()], [*target.denoiser.sigmas.tolist()]
    x = noise
    for k, level in enumerate(range(5, -1, -1)):
        th.testing.assert_close(path[k], x, rtol=1e-4, atol=1e-5)
        told = target.denoiser.net(x, condition, th.tensor([level]))
        denoised, noise_told = alphas[level] * x - sigmas[level] * told, sigmas[level] * x + alphas[level] * told
        x = denoised if level == 0 else alphas[level - 1] * denoised + sigmas[level - 1] * noise_told
    th.testing.assert_close(clean, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "of_target", "of_measure"),
    [
        (dict(scheme="stopped"), 7, 2),  # six steps, and what it tells at the levels
        (dict(scheme="renoised", n_sampling_steps=3), 4, 2),
        (dict(scheme="logged"), 7, 1),
        (dict(horizon=4), 1, 1),
    ],
)
def test_network_calls_per_update(kwargs: dict[str, Any], of_target: int, of_measure: int) -> None:
    model = make(chain_data(200), n_diffusion_steps=6, batch_size=16, train_agent=True, **kwargs)
    calls: dict[str, list[int]] = {"target": [], "measure": [], "behavior": []}
    for name, net in (
        ("target", model.measure.target.denoiser.net),
        ("measure", model.measure.denoiser.net),
        ("behavior", model.policy.behavior.denoiser.net),
    ):
        net.register_forward_hook(lambda _net, inputs, _out, _name=name: calls[_name].append(len(inputs[0])))
    model.learn(1)
    assert (len(calls["target"]), len(calls["measure"]), len(calls["behavior"])) == (of_target, of_measure, 1)
    if model.scheme in ("stopped", "renoised"):
        assert calls["target"] == [4] * (of_target - 1) + [16] and calls["measure"] == [16, 16]


@pytest.mark.parametrize("frozen", ["measure", "behavior", "reward_model", "value", "actor"])
def test_each_network_learns_by_its_own_loss(frozen: str) -> None:
    model = make(chain_data(200), batch_size=16, n_diffusion_steps=4, train_agent=True)
    before = {name: [p.clone() for p in net.parameters()] for name, net in model.policy.trained_networks.items()}
    for group in model.policy.trained_networks[frozen].optimizer.param_groups:
        group["lr"] = 0.0
    model._update_learning_rate = lambda optimizers: None
    model.learn(2)
    for name, network in model.policy.trained_networks.items():
        same = [th.equal(a, b) for a, b in zip(before[name], network.parameters(), strict=True)]
        assert all(same) if name == frozen else not all(same), name


@pytest.mark.parametrize(
    ("schedule", "n_steps", "n_sampling_steps", "ratios"),
    [("cosine", 50, 20, (0.94, 0.92, 0.77)), ("cosine", 50, 50, (0.98, 0.97, 0.86)), ("vp", 50, 50, (0.97, 0.96, 0.80))],
)
def test_spread_that_the_sampler_loses(schedule: str, n_steps: int, n_sampling_steps: int, ratios: tuple[float, ...]) -> None:
    """With a perfect network; measured by the authors of the checks, to within 0.015."""
    for std, ratio in zip((1.0, 0.5, 0.1), ratios, strict=True):
        denoiser = exact_chain(noise_schedule_betas(schedule, n_steps), [[0.0]], std)
        noise = th.special.ndtri((th.arange(2_000, dtype=th.float64) + 0.5) / 2_000)[:, None]
        levels = denoiser.sampling_levels(n_sampling_steps)
        samples = sample_ddim(denoiser, noise, levels, th.zeros(2_000, 0))
        assert float(samples.std() / noise.std()) / std == pytest.approx(ratio, abs=0.015)


# Learned measures -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain_model() -> BellmanDiffusion:
    """The measure of uniform actions on the circle, gamma 0.8."""
    return make(chain_data()).learn(1_500)


def noise_error(model: BellmanDiffusion, exact: np.ndarray, n: int = 200) -> float:
    r"""Mean over levels with $\bar\alpha \le 0.95$ of the error of the told noise, in shares of the exact noise."""
    target, rng, errors = model.measure.target, np.random.default_rng(0), []
    exact_net = ExactNet(model, {0: exact})
    state, action = np.tile(np.repeat(np.arange(N_STATES), n), 2), np.repeat([LEFT, RIGHT], n * N_STATES)
    pair = th.as_tensor(STATES[state]), th.as_tensor(as_action(action))
    condition = target.condition(*pair)
    for level in target.sampling_levels[target.denoiser.alphas[target.sampling_levels] ** 2 <= 0.95].tolist():
        levels = th.full((len(state),), level)
        clean = model.measure.coder(th.as_tensor(STATES[draw(rng, exact[action, state])]))
        noisy = target.denoiser.corrupt(clean, th.as_tensor(rng.normal(size=clean.shape), dtype=th.float32), levels)
        alpha, sigma = (float(scale[0]) for scale in target.denoiser.scales(levels))
        noise = sigma * noisy + alpha * exact_net(noisy, th.cat(pair, dim=1), levels)
        told = (noisy - alpha * target.denoiser(noisy, levels, condition)) / sigma
        errors.append(float((told - noise).square().sum() / noise.square().sum()))
    return float(np.mean(errors))


def assert_close_to(model: BellmanDiffusion, exact: np.ndarray, largest_distance: float = 0.1) -> None:
    """Shares near the states, distance of samples from them (0.52 where the model draws one cloud), and error of the noise."""
    for action in (RIGHT, LEFT):
        found, distance = shares(model, STATES, STATES, 2.0 * action - 1.0)
        assert total_variation(found, exact[action]) <= 0.06 and distance <= largest_distance
    with th.no_grad():
        assert noise_error(model, exact) <= 0.05


def test_finite_chain(chain_model: BellmanDiffusion) -> None:
    exact = exact_measure(0.8)
    np.testing.assert_allclose(exact[RIGHT, 0], [0.2158, 0.2983, 0.1635, 0.1373, 0.1851], atol=1e-4)
    assert_close_to(chain_model, exact, 0.25)  # small networks and few updates: the bound of 0.1 is held below
    swapped, _ = shares(chain_model, STATES, STATES, 1.0)
    assert total_variation(swapped, exact[LEFT]) > 0.09, "the comparison tells the actions apart"


@pytest.mark.expensive
@pytest.mark.parametrize("gamma", [0.0, 0.8, 0.9])
def test_finite_chain_by_the_defaults(gamma: float) -> None:
    model = BellmanDiffusion("MlpPolicy", None, dataset=chain_data(), gamma=gamma, train_agent=False, seed=0, device="cpu")
    assert_close_to(model.learn(3_000), exact_measure(gamma))


def test_zero_shot_values_of_three_rewards(chain_model: BellmanDiffusion) -> None:
    """One measure, no training in between: values and the ranking of state-action pairs against the exact ones."""
    exact, all_values, all_expected = exact_measure(0.8), [], []
    for goal in (0, 2, 3):

        def reward(states: np.ndarray, goal: int = goal) -> np.ndarray:
            assert states.ndim == 2 and states.shape[1] == 2
            return np.linalg.norm(states[:, None] - STATES, axis=2).argmin(axis=1) == goal

        values = np.stack([chain_model.value(STATES, np.array([a]), reward, n_samples=4096) for a in (-1.0, 1.0)])
        expected = exact[:, :, goal] / 0.2
        assert np.abs(values - expected).mean() < 0.1 * expected.mean()
        assert spearmanr(values.ravel(), expected.ravel()).statistic >= 0.9
        all_values.append(values)
        all_expected.append(expected)
    values, expected = np.stack(all_values), np.stack(all_expected)
    assert spearmanr(values.ravel(), expected.ravel()).statistic >= 0.95
    clear = np.abs(np.diff(expected, axis=1)) > 3.0 * 2.5 / np.sqrt(4096)  # three standard errors of a mean of 0 and 5
    assert np.mean((np.diff(values, axis=1) > 0.0)[clear] == (np.diff(expected, axis=1) > 0.0)[clear]) >= 0.95


def ending_data(n: int = 4_000) -> OfflineDataset:
    """States 0, 1, 2 on a line: 0 goes to 1; 1 goes back to 0, or with probability 0.3 ends in 2. Reward 1 for each step."""
    rng = np.random.default_rng(0)
    state, rows = 0, []
    for _ in range(n):
        following = 1 if state == 0 else (2 if rng.uniform() < 0.3 else 0)
        rows.append((state, following))
        state = 0 if following == 2 else following
    index = np.array(rows)
    states = index.astype(np.float32)[:, :, None]
    actions = rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32)
    return dataset(states[:, 0], actions, states[:, 1], n, terminations=index[:, 1] == 2, rewards=np.ones(n))


def test_terminations() -> None:
    """An ended episode earns nothing more: rewards of steps and of states against the exact sums."""
    model = make(ending_data(), gamma=0.8, n_diffusion_steps=10).learn(800)
    # V(0) = 1 + 0.8 V(1), V(1) = 1 + 0.8 * 0.7 V(0)
    v_0 = (1.0 + 0.8) / (1.0 - 0.8 * 0.8 * 0.7)
    v_1 = 1.0 + 0.8 * 0.7 * v_0
    states, action = np.array([[0.0], [1.0]], np.float32), np.zeros(1, np.float32)
    np.testing.assert_allclose(model.value(states, action, n_samples=1024), [v_0, v_1], rtol=0.1)
    # Reaching the last state counts once: W(1) = 0.3 + 0.8 * 0.7 W(0), W(0) = 0.8 W(1)
    w_1 = 0.3 / (1.0 - 0.8 * 0.7 * 0.8)
    reached = model.value(states, action, lambda x: (x[:, 0] > 1.5).astype(float), n_samples=4096)
    np.testing.assert_allclose(reached, [0.8 * w_1, w_1], atol=0.12)


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("alive_flag", [True, False])
def test_what_is_distilled_where_episodes_end(alive_flag: bool, n_steps: int) -> None:
    """Without the flag a reward function goes on paying for a terminal state, as in the measure; learned rewards never do."""
    model = make(ending_data(200), gamma=0.8, n_diffusion_steps=3, alive_flag=alive_flag, n_steps=n_steps, n_chain_levels=1)

    def reward_fn(states: np.ndarray) -> np.ndarray:
        return 2.0 + states[:, 0]

    batch = model.sample_batch(64)
    chain = model._draw_chain(batch)
    ended = batch.dones[chain.rows, 0] > 0.0
    model.set_reward_fn(reward_fn)
    means = model._flow_means(batch, chain)[ended, 0]
    shares = th.full((64,), 0.8) if batch.discounts is None else batch.discounts[:, 0]
    seen = batch.next_observations if n_steps == 1 else batch.future_observations
    at_last_state = shares * (0.0 if alive_flag else 4.0)
    expected = (1.0 - shares) * th.as_tensor(reward_fn(seen.numpy())) + at_last_state
    assert 0 < ended.sum() < 64
    th.testing.assert_close(means, expected[chain.rows][ended])
    model.set_reward_fn(None)
    nets = model.policy.reward_model
    for net in (nets.action_net, nets.state_net):
        for parameter in net.parameters():
            parameter.data.zero_()
    nets.mean.fill_(5.0)
    before_the_end = (batch.offsets < batch.steps_remaining)[:, 0] if n_steps > 1 else th.zeros(64, dtype=th.bool)
    expected = (1.0 - shares) * 5.0 * before_the_end
    th.testing.assert_close(model._flow_means(batch, chain)[ended, 0], expected[chain.rows][ended])


@pytest.mark.expensive
def test_an_absorbing_state_takes_all_mass() -> None:
    """Without the flag a terminal state goes on for ever; with gamma near 1 nothing else is left."""
    model = make(ending_data(), gamma=0.97, n_diffusion_steps=10, alive_flag=False, tau=0.1).learn(800)
    atoms = np.array([[0.0], [1.0], [2.0]], np.float32)
    found, _ = shares(model, atoms, atoms[:2], 0.0)
    # Probability of the last state: A(0) = 0.97 A(1), A(1) = 0.3 + 0.7 * 0.97 A(0)
    a_1 = 0.3 / (1.0 - 0.7 * 0.97**2)
    np.testing.assert_allclose(found[:, 2], [0.97 * a_1, a_1], atol=0.08)


@pytest.mark.expensive
@pytest.mark.parametrize("kwargs", [dict(), dict(scheme="renoised"), dict(scheme="logged"), dict(horizon=8)])
def test_deterministic_ring(kwargs: dict[str, Any]) -> None:
    """
    Masses fall by gamma from step to step, from the next state on; over a horizon they are equal, and the last one, which only
    the whole horizon reaches, is learned last. The rate falls to 0.
    """
    n, gamma = 8, 0.9
    angles = 2 * np.pi * np.arange(n) / n
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    index = np.arange(2_000) % n
    actions = np.random.default_rng(0).uniform(-1.0, 1.0, (2_000, 1)).astype(np.float32)
    data = dataset(ring[index], actions, ring[(index + 1) % n], 2_000)
    arguments: dict[str, Any] = dict(gamma=gamma, learning_rate=LinearSchedule(1e-3, 0.0, 1.0), train_agent=False, seed=0)
    model = BellmanDiffusion("MlpPolicy", None, dataset=data, device="cpu", **arguments, **kwargs).learn(6_000)
    found, distance = shares(model, ring, ring, 0.0)
    aligned = np.stack([np.roll(row, -1 - i) for i, row in enumerate(found)]).mean(axis=0)
    exact = (1.0 - gamma) * gamma ** np.arange(n) / (1.0 - gamma**n) if "horizon" not in kwargs else np.full(n, 1.0 / n)
    assert 0.5 * np.abs(aligned - exact).sum() < (0.08 if "horizon" in kwargs else 0.06) and distance < 0.15


@pytest.mark.expensive
@pytest.mark.parametrize("measured", ["data", "actor", "other"])
def test_whose_measure(measured: str) -> None:
    """From data that go right in 9 of 10 steps: the measure of the data, or that of an actor that goes left."""
    model = make(chain_data(right=0.9), measured_policy="actor" if measured == "actor" else "data", gamma=0.8)
    with th.no_grad():
        for parameter in model.actor.net.parameters():
            parameter.zero_()
        model.actor.net[-1].bias.copy_(th.tensor([-3.0, -4.0]))  # mean near -1, little spread
    if measured == "other":
        model.set_measured_policy(AlwaysLeft())
    model.learn(3_000)
    exact = exact_measure(0.8, (0.1, 0.9) if measured == "data" else (1.0, 0.0))
    for action in (RIGHT, LEFT):
        found, _ = shares(model, STATES, STATES, 2.0 * action - 1.0)
        assert total_variation(found, exact[action]) < 0.08


class AlwaysLeft:
    """A policy with SB3's ``predict``."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def predict(self, observation: Any, *_args: Any, **_kwargs: Any) -> tuple[np.ndarray, None]:
        self.seen.append(len(observation))
        return -np.ones((len(observation), 1), np.float32), None


def test_another_policy_is_measured() -> None:
    """It is asked for its actions in the next observations, in future states, and where episodes start."""
    policy, model = AlwaysLeft(), make(line_data(200), n_diffusion_steps=4, batch_size=16, train_agent=True)
    on_data = model.start_values(8)
    assert on_data.shape == (10,)
    model.set_measured_policy(policy)
    model.learn(1)
    assert policy.seen == [4, 4, 4], "a' of the chains, and rewards of the next states and of the futures"
    values = model.start_values(8)
    assert policy.seen[3:] == [10, 80] and values.shape == (10,)
    np.testing.assert_allclose(values, model.value(model.dataset.observations[::20], np.array([-1.0]), n_samples=8), rtol=1e-4)
    estimate = model.estimate_value(8)
    np.testing.assert_array_equal(estimate.values, values)
    assert estimate.mean == pytest.approx(values.mean(), rel=1e-6) and estimate.low < estimate.mean < estimate.high
    seen = len(policy.seen)
    model.set_measured_policy("data")
    model.learn(1)
    assert len(policy.seen) == seen
    with pytest.raises(ValueError, match="policy"):
        model.set_measured_policy("other")
    with pytest.raises(ValueError, match="Logged futures"):
        make(line_data(200), scheme="logged").set_measured_policy(policy)
    with pytest.raises(ValueError, match="Logged futures"):
        make(line_data(200), n_steps=2).set_measured_policy(policy)
    model.set_dataset(None)
    with pytest.raises(RuntimeError, match="set_dataset"):
        model.start_values()


@pytest.mark.parametrize(("scheme", "counted"), [("stopped", [0, 1, 2, 4, 6]), ("logged", [0, 2, 4, 6])])
def test_an_actor_that_does_not_learn_does_not_stand_in_where_the_log_ends(scheme: str, counted: list[int]) -> None:
    """Steps that need an action which nobody knows count for nothing; a terminal state needs none."""
    model, n = make(line_data(200), scheme=scheme, n_chain_levels=1), 8
    known = th.tensor([1.0, 0.0]).repeat(4).unsqueeze(1)
    dones = th.zeros(n, 1).index_fill(0, th.tensor([1]), 1.0)
    batch = model.sample_batch(n)._replace(has_next_actions=known, unknown=1.0 - known, dones=dones)
    noise, levels = th.randn(n, model.measure.coder.dim), th.arange(n)

    def loss(rows: list[int]) -> th.Tensor:
        part = FutureStateSamples(*(None if field is None else field[rows] for field in batch))
        drawn = noise[rows], levels[rows]
        if scheme == "logged":
            return model._offset_loss(part, model.measure.coder(part.future_observations), *drawn, part.next_actions)
        condition = model.measure.condition(part.next_observations, part.next_actions)
        return model._measure_loss(part, Chain(th.arange(len(rows)), condition, *drawn, noise[rows]), *drawn, noise[rows])

    mean_of_counted = len(counted) / n * loss(counted)
    th.testing.assert_close(loss(list(range(n))), mean_of_counted)
    model.train_agent = True
    assert not th.isclose(loss(list(range(n))), mean_of_counted)


def test_rewards_have_to_be_a_function() -> None:
    with pytest.raises(ValueError, match="`reward_fn` must be a function"):
        make(line_data(200), reward_fn=5)
    with pytest.raises(ValueError, match="`reward_fn` must be a function"):
        make(line_data(200)).set_reward_fn(5)


def test_a_policy_file_knows_whose_rewards_it_tells(tmp_path: Path) -> None:
    model = make(line_data(200), train_agent=True)
    model.set_measured_policy("actor")
    model.policy.save(tmp_path / "policy")
    assert BellmanDiffusionPolicy.load(tmp_path / "policy").rewards_of == "actor"


@pytest.mark.parametrize("horizon", [1, 4])
def test_values_over_a_horizon_have_so_many_rewards(horizon: int) -> None:
    """Where each reward is 1, whichever rewards; the first of the learned ones is the action's, the others are of futures."""
    model = make(line_data(200), horizon=horizon, n_diffusion_steps=3, alive_flag=False)
    nets = model.policy.reward_model
    for net in (nets.action_net, nets.state_net):
        for parameter in net.parameters():
            parameter.data.zero_()
    nets.mean.fill_(1.0)
    asked: list[float] = []  # the number of futures that the measure is told
    condition = model.measure.target.condition
    model.measure.target.condition = lambda *args: (
        asked.append(round(1.0 / condition(*args)[0, -1].item())) or condition(*args)
    )
    states, action = np.zeros((2, 1), np.float32), np.zeros(1, np.float32)
    for n in {None, 1, horizon}:
        total, asked[:] = horizon if n is None else n, []
        np.testing.assert_allclose(model.value(states, action, n_samples=4, horizon=n), total, rtol=1e-5)
        ones = model.value(states, action, lambda states: np.ones(len(states)), n_samples=4, horizon=n)
        np.testing.assert_allclose(ones, total, rtol=1e-5)
        assert asked == [max(1, total - 1), total]
    np.testing.assert_allclose(model.estimate_value(4).values, horizon, rtol=1e-5)


@pytest.mark.parametrize("learned", [True, False])
def test_what_is_distilled_over_a_horizon(learned: bool) -> None:
    """The mean of the targets over the offsets is that of n rewards: the action's own and n - 1, or n of states reached."""
    model = make(line_data(200), horizon=3, n_diffusion_steps=3, alive_flag=False, train_agent=True)
    model.policy.state_rewards = lambda x, _reward_fn: x[:, :1]  # the coded state is its reward
    model.reward_fn = None if learned else lambda states: np.zeros(len(states))
    rewards, own = th.tensor([[7.0], [11.0], [13.0]]), 5.0  # of the states 1, 2 and 3 steps on, and of the action
    for n in (1, 2, 3):
        batch = model.sample_batch(n)._replace(
            offsets=th.arange(1, n + 1)[:, None], n_future=th.full((n, 1), n), step_rewards=th.full((n, 1), own)
        )
        mixture = model.policy.mixture(learned, batch.n_future)
        targets = mixture.first * batch.step_rewards + mixture.rest * model._logged_means(batch, rewards[:n])
        summed = own + rewards[: n - 1].sum() if learned else rewards[:n].sum()
        assert float((mixture.n_steps * targets).mean()) == pytest.approx(float(summed))


# Use ------------------------------------------------------------------------------------------------------------------


def test_shapes_and_units(chain_model: BellmanDiffusion) -> None:
    samples = chain_model.sample_future(STATES, np.array([1.0]), 7)
    assert samples.shape == (N_STATES, 7, 2) and samples.dtype == np.float32
    assert chain_model.sample_future(STATES[0], np.array([1.0]), 7).shape == (7, 2)
    again = [chain_model.sample_future(STATES, np.array([1.0]), 7, seed=3) for _ in range(2)]
    np.testing.assert_array_equal(*again)
    assert not np.array_equal(samples, chain_model.sample_future(STATES, np.array([1.0]), 7))
    values = chain_model.value(STATES, np.array([1.0]), lambda states: states[:, 0])
    assert values.shape == (N_STATES,) and np.shape(chain_model.value(STATES[0], np.array([1.0]))) == ()
    np.testing.assert_array_equal(values, chain_model.value(STATES, np.array([1.0]), lambda states: states[:, 0]))
    twice = chain_model.value(np.repeat(STATES[:1], 2, axis=0), np.array([1.0]), lambda states: states[:, 0])
    assert twice[0] == pytest.approx(twice[1], abs=1e-5), "rows share their noises"
    with pytest.raises(ValueError, match="one action of shape"):
        chain_model.sample_future(STATES, np.zeros((2, 1)), 3)
    with pytest.raises(ValueError, match="n_samples"):
        chain_model.value(STATES, np.array([1.0]), n_samples=0)
    with pytest.raises(ValueError, match="one reward per state"):
        chain_model.value(STATES, np.array([1.0]), lambda states: states)


def test_dict_observations(goal_dataset: OfflineDataset) -> None:
    model = BellmanDiffusion("MultiInputPolicy", None, dataset=goal_dataset, seed=0, device="cpu", n_diffusion_steps=3)
    model.learn(2)
    observations = {key: value[:4] for key, value in goal_dataset.observations.items()}
    samples = model.sample_future(observations, goal_dataset.actions[:4], 5)
    assert samples.keys() == observations.keys()
    assert all(samples[key].shape == (4, 5, 2) for key in samples)
    values = model.value(observations, goal_dataset.actions[:4], lambda x: -np.linalg.norm(x["achieved_goal"], axis=1))
    assert values.shape == (4,) and np.isfinite(values).all()


def test_states_are_coded_and_decoded() -> None:
    space = spaces.Dict(b=spaces.Box(-9.0, 9.0, (2, 2)), a=spaces.Box(-9.0, 9.0, ()), c=spaces.Box(-9.0, 9.0, (1,)))
    rng = np.random.default_rng(0)
    data = {key: th.as_tensor(rng.normal(3.0, 2.0, (50, *part.shape)).astype(np.float32)) for key, part in space.items()}
    data["c"] = th.full((50, 1), 4.0)
    coder = StateCoder(space, alive_flag=True)
    coder.fit(data)
    alive = th.arange(50).remainder(2).float()[:, None]
    x = coder(data, alive)
    assert x.shape == (50, coder.dim) == (50, 7)
    th.testing.assert_close(x[:, :5].std(0, correction=0), th.ones(5))
    assert th.equal(coder.alive(x), alive) and x[:, 5].abs().max() < 1e-5, "what does not vary keeps its scale"
    decoded = coder.decode(x)
    for key, value in data.items():
        th.testing.assert_close(decoded[key], value, rtol=1e-4, atol=1e-4)


def toward(goal: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda states: -np.abs(states[:, 0] - goal)


def line_data(n: int = 4_000, length: int = 20) -> OfflineDataset:
    """A point on a line moves by half of its action, drawn uniformly; the reward is for being at 1."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.0, 1.0, (n, 1)).astype(np.float32)
    states, position = [], 0.0
    for step, (action,) in enumerate(actions):
        position = rng.uniform(-1.0, 1.0) if step % length == 0 else position
        following = float(np.clip(position + 0.5 * action, -1.0, 1.0))
        states.append((position, following))
        position = following
    pairs = np.array(states, np.float32)[:, :, None]
    return dataset(pairs[:, 0], actions, pairs[:, 1], length, rewards=toward(1.0)(pairs[:, 1]))


@pytest.fixture(scope="module")
def line_model() -> BellmanDiffusion:
    return make(line_data(), n_diffusion_steps=5, learning_rate=2e-3, train_agent=True, batch_size=128).learn(600)


def test_the_goal_changes_without_training(line_model: BellmanDiffusion, tmp_path: Path) -> None:
    """The actor goes to the learned rewards; with another reward the candidates go there at once."""
    points = np.array([[-0.4], [0.0], [0.4]], np.float32)
    line_model.set_reward_fn(None, n_action_samples=1)
    assert line_model.predict(points, deterministic=True)[0].mean() > 0.3, "the distilled actor goes to 1"
    line_model.set_acting(16)
    assert np.all(line_model.predict(points, deterministic=True)[0] > 0.3), "so do candidates, by learned rewards"
    line_model.set_reward_fn(toward(-1.0), n_action_samples=16)
    assert line_model.n_action_samples == line_model.policy.n_action_samples == 16
    assert np.all(line_model.predict(points, deterministic=True)[0] < -0.3)
    assert np.all(line_model.predict(points)[0] < -0.1)
    with pytest.warns(UserWarning, match="reward_fn"):
        line_model.save(tmp_path / "model")
    with pytest.raises(MissingObjectError, match="reward_fn"):
        BellmanDiffusion.load(tmp_path / "model")
    loaded = BellmanDiffusion.load(tmp_path / "model", custom_objects={"reward_fn": toward(-1.0)}, device="cpu")
    for deterministic in (True, False):
        ours, theirs = (m.predict(points, deterministic=deterministic)[0] for m in (line_model, loaded))
        np.testing.assert_array_equal(ours, theirs)


def test_reward_function_of_an_untrained_model_keeps_the_actor() -> None:
    model = make(line_data(200), n_diffusion_steps=4, train_agent=True)
    mean = float(model.policy.value.mean)
    model.set_reward_fn(lambda states: 100.0 + states[:, 0])
    assert model.n_action_samples == 1 and float(model.policy.value.mean) == pytest.approx(100.0, abs=1.0) != mean
    model.learn(2)


def test_candidates_are_compared_by_the_same_futures(line_model: BellmanDiffusion) -> None:
    """Equal candidates have equal values, and each candidate costs ``n_future_samples`` chains."""
    rows: list[int] = []
    hook = line_model.measure.target.denoiser.net.register_forward_hook(lambda _n, inputs, _o: rows.append(len(inputs[0])))
    line_model.set_acting(5, 3)
    line_model.predict(np.zeros((2, 1), np.float32))
    hook.remove()
    assert rows == [2 * 5 * 3] * 5
    assert line_model.n_future_samples == line_model.policy.n_future_samples == 3
    line_model.set_acting(1, 32)


def test_what_is_refused() -> None:
    for kwargs, message in (
        (dict(gamma=1.0), "horizon"),
        (dict(horizon=0), "horizon"),
        (dict(horizon=5, scheme="stopped"), "logged"),
        (dict(n_steps=2, scheme="logged"), "n_steps"),
        (dict(n_steps=2, measured_policy="actor"), "n_steps"),
        (dict(n_steps=2, agent="rebrac"), "rebrac"),
        (dict(agent="other"), "agent"),
        (dict(measure_penalty="other"), "measure_penalty"),
        (dict(measure_coef=-1.0), "measure_coef"),
        (dict(scheme="logged", measured_policy="actor"), "measured_policy"),
        (dict(scheme="other"), "scheme"),
        (dict(temperature=0.0), "temperature"),
        (dict(sampler="ddpm"), "sampler"),
        (dict(n_sampling_steps=21), "n_sampling_steps"),
        (dict(replay_buffer_class=ReplayBuffer), "FutureStateReplayBuffer"),
    ):
        with pytest.raises(ValueError, match=message):
            BellmanDiffusion("MlpPolicy", POINT_ENV, **kwargs)
    with pytest.raises(ValueError, match="images"):
        BellmanDiffusion("CnnPolicy", image_env(), buffer_size=10)
    discrete = RandomEnv(spaces.MultiDiscrete([3, 2]), spaces.Box(-1.0, 1.0, (1,)))
    with pytest.raises(ValueError, match="vectors"):
        BellmanDiffusion("MlpPolicy", discrete)


def test_offsets_follow_the_form() -> None:
    data = line_data(400)
    discounted, finite, mixed = make(data), make(data, horizon=10), make(data, n_steps=3)
    for model, distribution in ((discounted, "geometric"), (finite, "uniform"), (mixed, "n_step")):
        assert isinstance(model.dataset_buffer, FutureStateReplayBuffer)
        assert model.dataset_buffer.offset_distribution == model.replay_buffer.offset_distribution == distribution
        assert model.dataset_buffer.gamma == 0.8 and model.dataset_buffer.n_steps == model.n_steps
        assert model.dataset_buffer.horizon == model.replay_buffer.horizon == model.horizon


# ReBRAC with a penalty on the measure ---------------------------------------------------------------------------------


def rebrac_model(**kwargs: Any) -> BellmanDiffusion:
    settings: dict[str, Any] = dict(agent="rebrac", train_agent=True, n_diffusion_steps=5, measured_policy="actor")
    return make(line_data(), **{**settings, **kwargs})


def test_critic_loss_row_by_row() -> None:
    model = rebrac_model(critic_bc_coef=0.7, measured_policy="data")
    policy, batch, noise = model.policy, model.sample_batch(6), 0.3 * th.randn(6, 1)
    batch = batch._replace(
        dones=th.tensor([[0.0], [1.0]]).repeat(3, 1), has_next_actions=th.tensor([[1.0], [1.0], [0.0]]).repeat(2, 1)
    )
    expected = []
    for row in range(6):
        one = slice(row, row + 1)
        following, action = batch.next_observations[one], batch.actions[one]
        proposed = (policy.actor_target.mean_and_log_std(following)[0] + noise[one]).clamp(-1.0, 1.0)
        value = policy.critic_target(following, proposed).min()
        if batch.has_next_actions[row] == 1.0:
            value = value - 0.7 * (proposed - batch.next_actions[one]).square().sum()
        target = batch.rewards[row] + (0.8 * value if batch.dones[row] == 0.0 else 0.0)
        expected.append((policy.critic(batch.observations[one], action).flatten() - target).square())
    th.testing.assert_close(model._critic_loss(batch, noise)[0], th.stack(expected).mean())
    model.set_reward_fn(lambda states: np.full(len(states), 2.0))
    batch = batch._replace(dones=th.ones(6, 1))
    q_values = policy.critic(batch.observations, batch.actions)
    th.testing.assert_close(model._critic_loss(batch, noise)[0], (q_values - 2.0).square().mean())


@pytest.mark.parametrize("kind", ["futures", "states"])
def test_the_penalty_row_by_row(kind: str) -> None:
    """It weights its rows one by one, and reaches the actor through the action alone."""
    model = rebrac_model(measure_penalty=kind, level_weighting="ddpm")
    measure, batch, n = model.measure.target, model.sample_batch(6), 6
    batch = batch._replace(absorbed=th.zeros(n, 1).index_fill(0, th.tensor([1]), 1.0), unknown=th.eye(n)[:, 2:3])
    start, noise, levels = th.randn(n, 2), th.randn(n, 2), th.tensor([0, 1, 2, 3, 4, 2])
    actions = model.actor.mean_and_log_std(batch.observations)[0]
    expected = []
    for row in range(n):
        one, level = slice(row, row + 1), levels[row : row + 1]
        condition = measure.condition(batch.observations[one], actions[one])
        if kind == "futures":
            x = measure.coder(batch.future_observations[one], alive=0.0 if row == 1 else 1.0)
        else:
            x = measure(condition, start[one]).detach()
        noisy = measure.denoiser.corrupt(x, noise[one], level)
        goal = measure.denoiser.target(x, noise[one], level) if kind == "futures" else model.policy.state_model(noisy, level)
        error = (measure.denoiser.net(noisy, condition, level) - goal.detach()).square().mean()
        expected.append(measure.level_weights[level[0]] * error * (0.0 if kind == "futures" and row == 2 else 1.0))
    penalty = model._measure_penalty(batch, actions, start, noise, levels)
    th.testing.assert_close(penalty, th.stack(expected))
    ours, theirs = (th.autograd.grad(v.sum(), actions, retain_graph=True)[0] for v in (penalty, th.stack(expected)))
    th.testing.assert_close(ours, theirs)
    assert ours.abs().sum() > 0.0


def test_the_penalty_leads_to_actions_that_make_the_logged_futures() -> None:
    """With neither action values nor distances, the actor finds the logged action by where it led."""
    rng = np.random.default_rng(0)
    start = np.zeros((4_000, 1), np.float32)
    actions = rng.choice([-0.6, 0.6], (4_000, 1)).astype(np.float32) + 0.05 * rng.normal(size=(4_000, 1)).astype(np.float32)
    data = dataset(start, actions, start + actions, 1)  # one step, whose end tells the action
    model = make(data, agent="rebrac", train_agent=True, n_diffusion_steps=5, gamma=0.5, measured_policy="actor").learn(300)
    batch = model.sample_batch(256)
    proposed = (batch.actions.sign() * 0.6).requires_grad_()
    drawn = th.randn(256, 2), th.randn(256, 2), th.full((256,), 1)
    known = batch._replace(future_observations=batch.next_observations, unknown=th.zeros(256, 1))
    right = model._measure_penalty(known, proposed, *drawn).mean()
    wrong = model._measure_penalty(known, -proposed, *drawn).mean()
    assert right < 0.5 * wrong


@pytest.mark.parametrize("kind", ["futures", "states"])
def test_rebrac_learns_and_each_part_counts(kind: str) -> None:
    model = rebrac_model(measure_penalty=kind, batch_size=16)
    before = {name: [p.clone() for p in module.parameters()] for name, module in model.policy.named_children()}
    model.learn(1)
    changed = {
        name: any(not th.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True))
        for name, module in model.policy.named_children()
    }
    assert changed["critic"] and not changed["actor"] and not changed["critic_target"], "the actor waits for its turn"
    assert changed["state_model"] is (kind == "states") and not changed["value"]
    model.learn(1, reset_num_timesteps=False)
    assert not th.equal(before["actor"][0], next(model.actor.parameters()))
    moved, old = next(model.policy.critic_target.parameters()), before["critic_target"][0]
    assert 0.0 < (moved - old).abs().max() < 0.02 * 2e-3 + (next(model.policy.critic.parameters()) - old).abs().max()


def test_rebrac_goes_to_the_reward_and_survives_a_file(tmp_path: Path) -> None:
    model = rebrac_model(learning_rate=2e-3, batch_size=128).learn(400)
    points = np.array([[-0.4], [0.0], [0.4]], np.float32)
    assert np.all(model.predict(points, deterministic=True)[0] > 0.3)
    spread = np.std([model.predict(points[:1])[0] for _ in range(50)])
    assert 0.02 < spread < 0.2, "it explores by a fixed spread"
    model.save(tmp_path / "model")
    loaded = BellmanDiffusion.load(tmp_path / "model", dataset=line_data(), device="cpu")
    for each in (model, loaded):
        each.learn(3, reset_num_timesteps=False)
    np.testing.assert_array_equal(model.predict(points)[0], loaded.predict(points)[0])


class NormExtractor(FlattenExtractor):
    """With batch normalisation."""

    def __init__(self, observation_space: spaces.Space) -> None:
        super().__init__(observation_space)
        self.norm = nn.BatchNorm1d(self.features_dim)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.norm(super().forward(observations))


def test_targets_of_rebrac_get_the_statistics_as_they_are() -> None:
    """Copied where the weights do not move at all."""
    model = rebrac_model(critic_tau=0.0, policy_kwargs=dict(net_arch=[8], features_extractor_class=NormExtractor))
    policy = model.policy
    pairs = [(policy.actor_target, policy.actor), (policy.critic_target, policy.critic)]
    before = [[parameter.clone() for parameter in target.parameters()] for target, _ in pairs]
    model.learn(4)
    for (target, online), weights in zip(pairs, before, strict=True):
        norm, statistics = online.features_extractor.norm, target.features_extractor.norm
        assert not th.equal(norm.running_mean, th.zeros(1)) and not norm.weight.equal(statistics.weight)
        assert norm.running_mean.equal(statistics.running_mean) and norm.running_var.equal(statistics.running_var)
        assert all(map(th.equal, target.parameters(), weights))


@pytest.mark.parametrize("name", sorted(BellmanDiffusion.presets))
def test_presets(name: str) -> None:
    model = BellmanDiffusion.from_preset(name, dataset=line_data(200), device="cpu", batch_size=8)
    model.learn(2)
    settings = BellmanDiffusion.presets[name]
    assert model.agent == settings.get("agent", "distilled") and model.tau == settings.get("tau", 0.05)
    assert model.default_total_timesteps == settings.get("default_total_timesteps", 1_000_000)


def test_advantages_far_below_zero(box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights relative to their mean do not change with a shift of all advantages, however large it is."""
    model = BellmanDiffusion("MlpPolicy", None, dataset=box_dataset, policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu")
    batch = model.sample_batch(32)
    advantages = -th.rand(32, 1, dtype=th.float64)
    losses = []
    for shift in (0.0, 1e4):
        monkeypatch.setattr(model.policy.value, "forward", lambda *_, shift=shift: (advantages - shift, th.zeros(32, 1)))
        losses.append(model._actor_loss(batch)[0].item())
    assert np.isfinite(losses).all()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize(("max_weight", "expected"), [(100.0, (math.e + 7) ** 2 / (math.e**2 + 7)), (2.0, 9**2 / 11)])
def test_effective_sample_size_of_the_actor(
    max_weight: float, expected: float, box_dataset: OfflineDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One action of 8 weighs $e$ at a temperature of one standard deviation, or as much as the bound allows."""
    arguments: dict = dict(max_weight=max_weight, policy_kwargs=dict(net_arch=[8]), seed=0, device="cpu")
    model = BellmanDiffusion("MlpPolicy", None, dataset=box_dataset, **arguments)
    batch = model.sample_batch(8)
    advantages = th.tensor([[1.0]] + [[0.0]] * 7)
    monkeypatch.setattr(model, "temperature", 1.0 / float(advantages.std(correction=0)))
    monkeypatch.setattr(model.policy.value, "forward", lambda *_: (advantages, th.zeros(8, 1)))
    _, parts = model._actor_loss(batch)
    assert parts["effective_sample_size"].item() == pytest.approx(expected, rel=1e-5)
