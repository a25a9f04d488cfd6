"""Diffuser (arXiv 2205.09991): known laws, slow loops, counts of calls, plans and how they are followed."""

import inspect
import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import PointGoalEnv, RandomEnv
from exact_denoisers import ChainDenoiser, ExactNetwork
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from sb3_diffusion import Diffuser, OfflineDataset, PDTracker, Plan, PlanningWrapper, VecPlanningWrapper
from sb3_diffusion.buffers import TrajectorySamples
from sb3_diffusion.common.samplers import steps_between
from sb3_diffusion.common.schedules import cosine_betas
from sb3_diffusion.diffuser import presets
from sb3_diffusion.diffuser.policies import DiffuserPolicy
from sb3_diffusion.diffuser.windows import shift_windows

OBS_DIM, ACTION_DIM, HORIZON, LENGTH = 3, 2, 4, 10
NET: dict[str, Any] = dict(width=16, n_layers=1, n_heads=2)
TRANSFORMER: dict[str, Any] = dict(backbone="transformer", policy_kwargs=dict(net_kwargs=NET))
UNET: dict[str, Any] = dict(backbone="unet", policy_kwargs=dict(net_kwargs=dict(base_width=16, multipliers=[1, 4])))
PREDICTION_TYPES = ("sample", "noise", "v")
SAMPLERS = ("ddpm", "ddim", "dpm_solver", "heun")


def box(dim: int, bound: float = 1.0) -> spaces.Box:
    return spaces.Box(-bound, bound, (dim,), np.float32)


def make_dataset(lengths: tuple[int, ...] = (LENGTH, 6, LENGTH, 3, LENGTH, 7)) -> OfflineDataset:
    """Random episodes; every other one terminates, the first does not. Each dimension has its own scale and offset."""
    rng = np.random.default_rng(0)
    columns: list[list[np.ndarray]] = [[] for _ in range(6)]
    for number, length in enumerate(lengths):
        states = rng.normal(size=(length + 1, OBS_DIM)) * [1.0, 20.0, 0.1] + [0.0, -30.0, 5.0]
        ends = np.arange(length) == length - 1
        actions = rng.uniform(-0.9, 0.5, (length, ACTION_DIM))
        for column, values in zip(
            columns,
            (states[:-1], actions, rng.normal(size=length), states[1:], ends & (number % 2 == 1), ends & (number % 2 == 0)),
            strict=True,
        ):
            column.append(values if values.dtype == bool else values.astype(np.float32))
    arrays = [np.concatenate(column) for column in columns]
    return OfflineDataset(*arrays, observation_space=box(OBS_DIM, 500.0), action_space=box(ACTION_DIM))


def make_model(dataset: OfflineDataset | None = None, env: Any = None, stirred: bool = True, **kwargs: Any) -> Diffuser:
    """A small model; by default it plans one window without guidance, with weights that are not those of a fresh one."""
    small: dict[str, Any] = dict(
        horizon=HORIZON, n_diffusion_steps=6, n_candidates=1, guidance_scale=0.0, batch_size=16, seed=0, device="cpu"
    )
    if kwargs.get("goal_conditioned"):
        small.update(n_candidates=None, guidance_scale=None)
    dataset = make_dataset() if dataset is None else dataset
    is_dict = isinstance(dataset.observation_space, spaces.Dict)
    settings = {**small, **TRANSFORMER, **kwargs}
    model = Diffuser("MultiInputPolicy" if is_dict else "MlpPolicy", env, dataset=dataset, **settings)
    model.set_logger(Logger(None, []))
    if stirred:
        stir(model)
    return model


def stir(model: Diffuser) -> None:
    """Change all weights, those of the averages in the same way."""
    generator = th.Generator().manual_seed(1)
    for network in model.policy.trained_networks:
        with th.no_grad():
            for parameter in trained(network):
                parameter.add_(0.2 * th.randn(parameter.shape, generator=generator))
        network.update_average(0.0)


def some_observations(n: int) -> np.ndarray:
    """Like those of the data."""
    rng = np.random.default_rng(1)
    return (rng.normal(size=(n, OBS_DIM)) * [1.0, 20.0, 0.1] + [0.0, -30.0, 5.0]).astype(np.float32)


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def weights(module: nn.Module) -> dict[str, th.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def online_weights(network: nn.Module) -> dict[str, th.Tensor]:
    """Of a network without its average."""
    return {name: value for name, value in weights(network).items() if not name.startswith("averaged.")}


def equal(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(th.equal(first[key], second[key]) for key in first)


def same_plan(first: Plan, second: Plan) -> bool:
    return np.array_equal(first.observations, second.observations) and np.array_equal(first.actions, second.actions)


def spy(owner: Any, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """:return: a list that fills with arguments and result of each call of the method"""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append((args, result))
        return result

    setattr(owner, name, wrapped)
    return calls


class Calls:
    """Notes the windows and levels that a network on windows is told."""

    def __init__(self, net: nn.Module) -> None:
        self.windows: list[th.Tensor] = []
        self.levels: list[int] = []
        net.register_forward_pre_hook(self._note)

    def _note(self, net: nn.Module, inputs: tuple[th.Tensor, th.Tensor]) -> None:
        windows, level = inputs
        self.windows.append(windows.detach().clone())
        self.levels.append(int(level.flatten()[0]))

    def take(self) -> tuple[list[int], list[int]]:
        """:return: rows and levels of the calls since the last time"""
        taken = [len(windows) for windows in self.windows], self.levels
        self.windows, self.levels = [], []
        return taken


def calls_of(model: Diffuser) -> tuple[Calls, Calls, Calls]:
    """Of the network that plans, of the one that guides, and of those that are trained."""
    policy = model.policy
    assert policy.value is not None
    idle = Calls(policy.actor.conditioned.net)
    policy.value.conditioned.net.register_forward_pre_hook(idle._note)
    return Calls(policy.actor.planner.conditioned.net), Calls(policy.value.guide.conditioned.net), idle


# ---------------------------------------------------------------- networks that know the law of the data


class Entries(nn.Module):
    """
    A perfectly trained network on windows whose entries are drawn independently.

    :param exact: network on single entries
    """

    def __init__(self, exact: ExactNetwork) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        assert level.shape == (1,)
        entries = x.double().reshape(-1, 1)
        return self.exact(entries, entries.new_zeros(len(entries), 0), level).reshape(x.shape).to(x.dtype)


class Linear(nn.Module):
    """The sum of all entries as value of a window."""

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        return x.sum(dim=(1, 2)).unsqueeze(1)


class Quadratic(nn.Module):
    """Minus half the squared distance from 1, of each entry."""

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        return -0.5 * (x - 1.0).square().sum(dim=(1, 2)).unsqueeze(1)


def exact_policy(
    n_diffusion_steps: int = 20,
    means: tuple[float, ...] = (0.0,),
    std: float = 1.0,
    value: nn.Module | None = None,
    prediction_type: str = "sample",
    **kwargs: Any,
) -> DiffuserPolicy:
    """A policy whose averaged networks are exact for entries from a mixture of normal laws."""
    arguments: dict[str, Any] = dict(horizon=HORIZON, n_candidates=1, guidance_scale=0.1 if value is not None else 0.0)
    policy = DiffuserPolicy(
        box(OBS_DIM),
        box(ACTION_DIM),
        lambda _: 1e-3,
        backbone="transformer",
        net_kwargs=NET,
        n_diffusion_steps=n_diffusion_steps,
        prediction_type=prediction_type,
        **{**arguments, **kwargs},
    )
    exact = ChainDenoiser(cosine_betas(n_diffusion_steps), [[mean] for mean in means], std)
    policy.actor.planner.conditioned.net = Entries(ExactNetwork(exact, prediction_type))
    if value is not None:
        assert policy.value is not None
        policy.value.guide.conditioned.net = value
    return policy


def law_of_plans(policy: DiffuserPolicy) -> tuple[float, float]:
    """Mean and variance of a free entry, whose every draw moves it in proportion: from the slope in each draw."""
    n_draws = policy.actor.latent_shape[0]
    latents = th.cat([th.zeros(1, n_draws), th.eye(n_draws)])[..., None, None].expand(-1, -1, *policy.actor.latent_shape[1:])
    with th.no_grad():
        windows, _ = policy.plan_windows(th.zeros(n_draws + 1, *latents.shape[2:]), latents)
    entry = windows[:, 1, 0].double()
    th.testing.assert_close(windows[:, -1, -1].double(), entry)
    return entry[0].item(), (entry[1:] - entry[0]).square().sum().item()


def test_schedule_of_the_published_runs() -> None:
    denoiser = exact_policy(20).actor.denoiser
    alphas_bar = denoiser.alphas.double().square()
    expected = {0: 0.992007, 1: 0.972093, 10: 0.416312, 18: 0.00605964, 19: 6.0596e-6}
    for i, value in expected.items():
        assert alphas_bar[i].item() == pytest.approx(value, rel=1e-4)
    steps = steps_between(denoiser, denoiser.sampling_levels(20))
    variances = steps.posterior_std.square().flip(0).tolist()
    assert steps.variance[0].item() == pytest.approx(0.999, abs=1e-5)
    assert variances[0] == 0.0
    assert variances[1:4] == pytest.approx([0.005750, 0.015189, 0.026140], abs=1e-6)
    assert variances[18:] == pytest.approx([0.7349, 0.99295], abs=5e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("n_diffusion_steps", "mean", "variance", "expected"),
    [(20, 0.0, 1.0, 0.8118), (64, 0.0, 1.0, 0.9314), (256, 0.0, 1.0, 0.9815), (20, 1.0, 0.1, 0.0676)],
)
def test_plans_of_a_perfect_planner(
    n_diffusion_steps: int, mean: float, variance: float, expected: float, prediction_type: str
) -> None:
    law = law_of_plans(exact_policy(n_diffusion_steps, (mean,), math.sqrt(variance), prediction_type=prediction_type))
    assert law[0] == pytest.approx(mean, abs=2e-4)
    assert law[1] == pytest.approx(expected, abs=1e-4)


def test_plans_of_a_perfect_planner_keep_two_modes_apart() -> None:
    policy = exact_policy(20, (-1.0, 1.0), 0.1)
    with th.no_grad():
        windows, _ = policy.plan_windows(th.zeros(2_000, HORIZON, 5), policy.latents(np.arange(2_000), 1))
    entries = windows[:, ~policy.actor.layout.known()]
    distances = entries.abs()
    assert entries.gt(0.0).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert distances.mean().item() == pytest.approx(0.995, abs=2e-3)
    assert distances.std().item() == pytest.approx(0.067, abs=2e-3)
    assert (distances - 1.0).abs().gt(0.3).float().mean() < 1e-3


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(), 0.2431),
        (dict(guidance_scaling="std"), 0.6371),
        (dict(guidance_scaling=None), 2.0379),
        (dict(n_guidance_steps=1, t_stopgrad=0), 0.1221),
        (dict(guidance_scale=0.0), 0.0),
        (dict(n_guidance_steps=0), 0.0),
        (dict(t_stopgrad=20), 0.0),
    ],
)
def test_guidance_by_a_linear_value_moves_the_mean_alone(kwargs: dict[str, Any], expected: float) -> None:
    mean, variance = law_of_plans(exact_policy(value=Linear(), **kwargs))
    assert mean == pytest.approx(expected, abs=1e-4)
    assert variance == pytest.approx(0.8118, abs=1e-4)


@pytest.mark.parametrize(("guidance_scale", "expected"), [(0.1, (0.2012, 0.6278)), (1.0, (0.715, 0.211))])
def test_guidance_by_a_quadratic_value(guidance_scale: float, expected: tuple[float, float]) -> None:
    assert law_of_plans(exact_policy(value=Quadratic(), guidance_scale=guidance_scale)) == pytest.approx(expected, abs=5e-4)


def test_gradient_is_that_of_each_window_alone_and_zero_where_entries_are_given() -> None:
    policy = exact_policy(value=Quadratic())
    assert policy.value is not None
    windows, level, known = th.randn(7, HORIZON, 5), th.tensor([3]), policy.actor.layout.known()
    with th.no_grad():  # as when acting
        gradient = policy.value.guide.gradient(windows, th.zeros_like(windows), level)
        alone = policy.value.guide.gradient(windows[2:3], th.zeros(1, HORIZON, 5), level)
    th.testing.assert_close(gradient[:, ~known], -(windows - 1.0)[:, ~known], rtol=1e-6, atol=1e-6)
    assert (gradient[:, known] == 0.0).all()
    assert th.equal(gradient[2:3], alone)
    assert not gradient.requires_grad


@pytest.mark.parametrize("t_stopgrad", [0, 2, 5])
def test_guidance_stops_at_the_last_steps(t_stopgrad: int) -> None:
    policy = exact_policy(value=Linear(), t_stopgrad=t_stopgrad, guidance_scaling=None, n_guidance_steps=3)
    levels, x = policy.actor.sampling_levels, th.randn(2, HORIZON, 5)
    guide, known = policy._make_guide(levels, th.zeros_like(x)), policy.actor.layout.known()
    for k, level in enumerate(levels.tolist()):
        moved = guide(k, x) - x
        if level < t_stopgrad:
            assert (moved == 0.0).all()
        else:
            th.testing.assert_close(moved[:, ~known], th.full_like(moved[:, ~known], 3 * 0.1))
            assert (moved[:, known] == 0.0).all()


# ---------------------------------------------------------------- what is given


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_given_entries_are_clean_to_the_bit_in_every_call(sampler: str, prediction_type: str, goal_conditioned: bool) -> None:
    model = make_model(
        sampler=sampler,
        prediction_type=prediction_type,
        goal_conditioned=goal_conditioned,
        train_value=True,
        n_candidates=2,
        guidance_scale=0.1,
    )
    observations = some_observations(3)
    goal = some_observations(6)[3:] if goal_conditioned else None
    planner, guide, _ = calls_of(model)
    planned = spy(model.policy, "plan_windows")
    plan = model.plan(observations, goal, seed=0)
    (condition, _), (windows, _) = planned[0]
    known = model.actor.layout.known()
    assert known[0].tolist() == [False] * ACTION_DIM + [True] * OBS_DIM
    assert known[-1].tolist() == [False] * ACTION_DIM + [goal_conditioned] * OBS_DIM
    assert not known[1:-1].any()
    assert len(planner.windows) == (11 if sampler == "heun" else 6)
    assert len(guide.windows) == 2 * 4 + 1
    for told in planner.windows + guide.windows:
        assert th.equal(told[:, known], condition.repeat_interleave(2, dim=0)[:, known])
    assert th.equal(windows[:, known], condition[:, known])
    np.testing.assert_allclose(plan.observations[:, 0], observations, rtol=1e-5, atol=1e-5)
    if goal is not None:
        np.testing.assert_allclose(plan.observations[:, -1], goal, rtol=1e-5, atol=1e-5)
    model.plan(observations, goal, seed=1)
    other = planned[1][1][0]
    assert ((other - windows)[:, ~known].abs() > 0.0).all()  # the first action is not given


class Parameter(nn.Module):
    """Answers with a tensor whose gradient can be looked at."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.output = nn.Parameter(th.randn(shape, generator=th.Generator().manual_seed(0)))

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        return self.output


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_given_entries_are_clean_in_training_and_free_of_gradient(prediction_type: str, goal_conditioned: bool) -> None:
    model = make_model(prediction_type=prediction_type, goal_conditioned=goal_conditioned)
    net = model.actor.conditioned.net = Parameter(16, HORIZON, 5)
    calls = Calls(net)
    batch = model.sample_batch(16)
    windows = model._normalized_windows(batch)
    planner_loss(model, windows, batch._replace(mask=th.ones_like(batch.mask))).backward()
    known = model.actor.layout.known()
    gradient = net.output.grad
    assert gradient is not None
    assert (gradient[:, known] == 0.0).all()
    assert (gradient[:, ~known] != 0.0).all()
    assert th.equal(calls.windows[0][:, known], windows[:, known])
    assert (calls.windows[0][:, ~known] != windows[:, ~known]).all()


# ---------------------------------------------------------------- statistics


@pytest.mark.parametrize("padding", ["repeat", "zeros", None])
@pytest.mark.parametrize("stride", [1, 2])
def test_gaussian_statistics_are_those_of_the_steps_of_the_data(padding: str | None, stride: int) -> None:
    """Rows behind the end of an episode do not count, each dimension counts on its own."""
    data = make_dataset()
    model = make_model(data, padding=padding, stride=stride, horizon=3)
    normalizer = model.actor.window_normalizer
    rows = np.concatenate([np.tile(data.actions, stride), data.observations], axis=1)
    np.testing.assert_allclose(normalizer.shift.numpy(), rows.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(normalizer.scale.numpy(), rows.std(axis=0), rtol=1e-5)
    normalized = normalizer(th.as_tensor(rows))
    np.testing.assert_allclose(normalized.mean(dim=0).numpy(), 0.0, atol=1e-4)
    np.testing.assert_allclose(normalized.std(dim=0, correction=0).numpy(), 1.0, rtol=1e-4)
    np.testing.assert_allclose(normalizer.inverse(normalized).numpy(), rows, rtol=1e-5, atol=1e-5)


def test_limits_map_the_range_of_the_data_to_one() -> None:
    data = make_dataset()
    normalizer = make_model(data, normalization="limits").actor.window_normalizer
    rows = np.concatenate([data.actions, data.observations], axis=1)
    normalized = normalizer(th.as_tensor(rows))
    np.testing.assert_allclose(normalized.amin(dim=0).numpy(), -1.0, rtol=1e-5)
    np.testing.assert_allclose(normalized.amax(dim=0).numpy(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(normalizer.inverse(normalized).numpy(), rows, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", ["gaussian", "limits"])
def test_dimensions_that_do_not_vary_keep_their_scale(normalization: str) -> None:
    data = make_dataset()
    data.observations[:, 1] = data.next_observations[:, 1] = 7.0
    data.actions[:, 0] = 0.25
    model = make_model(data, normalization=normalization)
    normalizer = model.actor.window_normalizer
    assert normalizer.scale[[0, ACTION_DIM + 1]].tolist() == [1.0, 1.0]
    assert normalizer.shift[[0, ACTION_DIM + 1]].tolist() == [0.25, 7.0]
    model.train(2)
    assert np.isfinite(model.plan(data.observations[:3]).observations).all()


def test_all_networks_share_frozen_statistics() -> None:
    model = make_model()
    normalizers = model.policy.window_normalizers
    assert len(normalizers) == 4  # planner and value, each with its average
    before = [weights(normalizer) for normalizer in normalizers]
    assert all(equal(state, before[0]) for state in before)
    assert not equal(before[0], weights(type(normalizers[0])("gaussian", OBS_DIM + ACTION_DIM)))
    model.train(3)
    moved = make_dataset((5, 5))
    moved.observations += 100.0
    model.set_dataset(moved)  # a trained model keeps them
    assert all(equal(weights(normalizer), before[0]) for normalizer in normalizers)


def test_statistics_of_a_vec_normalize_take_the_place_of_our_own() -> None:
    env = VecNormalize(DummyVecEnv([lambda: RandomEnv(box(OBS_DIM, 500.0), box(ACTION_DIM))]))
    data = make_dataset()
    model = make_model(data, env, goal_conditioned=True)
    normalizer = model.actor.window_normalizer
    assert normalizer.scale[ACTION_DIM:].tolist() == [1.0] * OBS_DIM
    assert normalizer.shift[ACTION_DIM:].tolist() == [0.0] * OBS_DIM
    np.testing.assert_allclose(normalizer.scale[:ACTION_DIM].numpy(), data.actions.std(axis=0), rtol=1e-5)
    states = model._normalized_windows(model.sample_batch(512))[:, 0, ACTION_DIM:]
    np.testing.assert_allclose(states.mean(dim=0).numpy(), 0.0, atol=0.2)
    np.testing.assert_allclose(states.std(dim=0).numpy(), 1.0, atol=0.2)
    normalized = env.normalize_obs(data.observations)
    np.testing.assert_allclose(model.goal_space.low, normalized.min(axis=0), rtol=1e-4)
    np.testing.assert_allclose(model.goal_space.high, normalized.max(axis=0), rtol=1e-4)


def test_space_of_goals_is_the_range_of_the_data() -> None:
    data = make_dataset()
    space = make_model(data, goal_conditioned=True).goal_space
    np.testing.assert_allclose(space.low, data.observations.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(space.high, data.observations.max(axis=0), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, -400.0])
def test_space_of_goals_has_width_where_the_data_have_none(value: float) -> None:
    """An agent over the planner scales its actions to this space and back."""
    data = make_dataset()
    data.observations[:, 1] = data.next_observations[:, 1] = value
    model = make_model(data, goal_conditioned=True)
    space = model.goal_space
    assert space.low[1] < value < space.high[1] and space.high[1] - space.low[1] <= 2.1e-3 * max(1.0, abs(value))
    np.testing.assert_allclose(space.low[[0, 2]], data.observations.min(axis=0)[[0, 2]], rtol=1e-5)
    env = PlanningWrapper(RandomEnv(box(OBS_DIM, 500.0), box(ACTION_DIM)), model, mode="goal")
    action, _ = SAC("MlpPolicy", env, buffer_size=10, seed=0).predict(env.reset(seed=0)[0])
    assert space.contains(action)


# ---------------------------------------------------------------- losses


def drawn(model: Diffuser) -> Callable[[], tuple[th.Tensor, th.Tensor]]:
    """:return: a function that gives the noise and the levels that the last loss drew"""
    noises, levels = spy(model, "_draw_noise"), spy(model, "_draw_levels")
    return lambda: (noises[-1][1], levels[-1][1])


def slow_noisy(model: Diffuser, window: th.Tensor, noise: th.Tensor, level: int) -> th.Tensor:
    """Of one window, with the given entries clean."""
    alpha_bar = (1.0 - cosine_betas(model.n_diffusion_steps))[: level + 1].prod().item()
    noisy = window.clone()
    for h in range(model.horizon):
        for c in range(window.shape[1]):
            given = c >= ACTION_DIM and (h == 0 or (model.goal_conditioned and h == model.horizon - 1))
            if not given:
                noisy[h, c] = math.sqrt(alpha_bar) * window[h, c] + math.sqrt(1.0 - alpha_bar) * noise[h, c]
    return noisy


def planner_loss(model: Diffuser, windows: th.Tensor, batch: TrajectorySamples) -> th.Tensor:
    """The losses at what an update draws for them."""
    return model._planner_loss(windows, batch, model._draw_noise(windows), model._draw_levels(len(windows)))


def value_loss(model: Diffuser, windows: th.Tensor, batch: TrajectorySamples) -> th.Tensor:
    level = model._draw_levels(len(windows))
    return model._value_loss(model.value, windows, batch, model._draw_noise(windows), level)


def slow_planner_loss(
    model: Diffuser, windows: th.Tensor, batch: TrajectorySamples, noise: th.Tensor, levels: th.Tensor
) -> float:
    """Squared errors of all entries, weighted; those of rows that do not count are left out of sum and number."""
    total, n_rows = 0.0, 0
    mean_weight = sum(model.loss_discount**h for h in range(model.horizon)) / model.horizon
    for i, window in enumerate(windows):
        level = int(levels[i])
        alpha_bar = (1.0 - cosine_betas(model.n_diffusion_steps))[: level + 1].prod().item()
        told = model.actor.conditioned.net(slow_noisy(model, window, noise[i], level)[None], levels[i : i + 1])[0]
        clean, eps = window, noise[i]
        target = {
            "sample": clean,
            "noise": eps,
            "v": math.sqrt(alpha_bar) * eps - math.sqrt(1.0 - alpha_bar) * clean,
        }[model.prediction_type]
        for h in range(model.horizon):
            if not (batch.mask[i, h] or batch.terminated[i] or model.count_padding):
                continue
            n_rows += 1
            for c in range(window.shape[1]):
                if c >= ACTION_DIM and (h == 0 or (model.goal_conditioned and h == model.horizon - 1)):
                    continue
                weight = model.loss_discount**h / mean_weight
                if c < ACTION_DIM and h == 0:
                    weight = model.action_weight
                total += weight * (told[h, c] - target[h, c]).item() ** 2
    return total / (n_rows * windows.shape[2])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(padding="zeros", count_padding=True),
        dict(padding=None, horizon=6),
        dict(loss_discount=0.8, action_weight=3.0),
        dict(goal_conditioned=True, normalization="limits"),
    ],
)
def test_planner_loss_is_a_loop(prediction_type: str, kwargs: dict[str, Any]) -> None:
    model = make_model(prediction_type=prediction_type, **kwargs)
    batch, last = model.sample_batch(12), drawn(model)
    windows = model._normalized_windows(batch)
    with th.no_grad():
        loss = planner_loss(model, windows, batch).item()
        slow = slow_planner_loss(model, windows, batch, *last())
    assert loss == pytest.approx(slow, rel=1e-4)
    assert 0.0 < batch.mask.mean() < 1.0 or model.padding is None


def test_windows_are_actions_then_states_normalised() -> None:
    data = make_dataset()
    model = make_model(data)
    batch = model.sample_batch(8)
    windows = model._normalized_windows(batch)
    for i in range(8):
        for h in range(HORIZON):
            row = np.concatenate([batch.actions[i, h], batch.observations[i, h]])
            mean = np.concatenate([data.actions.mean(axis=0), data.observations.mean(axis=0)])
            std = np.concatenate([data.actions.std(axis=0), data.observations.std(axis=0)])
            np.testing.assert_allclose(windows[i, h].numpy(), (row - mean) / std, rtol=1e-3, atol=1e-4)


def rows_that_count(model: Diffuser, batch: TrajectorySamples) -> th.Tensor:
    """Which rows of the windows the loss depends on, bool, shape ``(batch_size, horizon)``."""
    net = model.actor.conditioned.net = Parameter(len(batch.mask), model.horizon, OBS_DIM + ACTION_DIM)
    planner_loss(model, model._normalized_windows(batch), batch).backward()
    assert net.output.grad is not None
    return net.output.grad.abs().sum(dim=2) > 0.0


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("padding", ["repeat", "zeros"])
def test_padding_counts_after_terminations_and_where_it_is_asked_for(padding: str, count_padding: bool) -> None:
    model = make_model(padding=padding, count_padding=count_padding)
    batch = model.sample_batch(64)
    is_padding, terminated = batch.mask == 0.0, batch.terminated.bool().expand(-1, HORIZON)
    assert (is_padding & terminated).any() and (is_padding & ~terminated).any()
    assert th.equal(rows_that_count(model, batch), ~is_padding | terminated | count_padding)


def test_first_action_counts_tenfold_and_rows_by_their_discount() -> None:
    model = make_model(loss_discount=0.5, action_weight=10.0)
    mean = (1.0 + 0.5 + 0.25 + 0.125) / 4
    expected = th.tensor([[1.0], [0.5], [0.25], [0.125]]).expand(4, 5) / mean
    expected = expected.clone()
    expected[0, :ACTION_DIM] = 10.0
    th.testing.assert_close(model._loss_weights, expected)
    plain = make_model()._loss_weights
    assert plain[0].tolist() == [10.0] * ACTION_DIM + [1.0] * OBS_DIM
    assert (plain[1:] == 1.0).all()


def test_error_of_the_first_action_pulls_ten_times_as_hard() -> None:
    model = make_model()
    batch = model.sample_batch(16)
    windows = model._normalized_windows(batch)
    net = model.actor.conditioned.net = Parameter(16, HORIZON, 5)
    with th.no_grad():
        net.output.copy_(windows + 1.0)  # the same error everywhere
    planner_loss(model, windows, batch._replace(mask=th.ones_like(batch.mask))).backward()
    assert net.output.grad is not None
    first, second = net.output.grad[:, 0, :ACTION_DIM], net.output.grad[:, 1, :ACTION_DIM]
    th.testing.assert_close(first / second, th.full_like(first, 10.0), rtol=1e-3, atol=0.0)


def slow_returns(data: OfflineDataset, gamma: float, penalty: float) -> np.ndarray:
    """Of each step to the end of its episode, with the penalty at the last step of those that terminated."""
    returns, following = np.zeros(len(data.rewards)), 0.0
    for t in reversed(range(len(returns))):
        if data.terminations[t] or data.truncations[t]:
            following = 0.0
        following = data.rewards[t] + penalty * data.terminations[t] + gamma * following
        returns[t] = following
    return returns


def test_scale_of_returns_is_that_of_the_data() -> None:
    data = make_dataset()
    model = make_model(data, gamma=0.9, termination_penalty=-5.0)
    returns = slow_returns(data, 0.9, -5.0)
    for value in (model.value, model.value.guide):
        assert value.return_mean.item() == pytest.approx(returns.mean(), rel=1e-5)
        assert value.return_std.item() == pytest.approx(returns.std(ddof=1), rel=1e-5)


@pytest.mark.parametrize("kwargs", [dict(), dict(goal_conditioned=True, train_value=True)])
def test_value_loss_is_a_loop(kwargs: dict[str, Any]) -> None:
    data = make_dataset()
    model = make_model(data, gamma=0.9, termination_penalty=-5.0, **kwargs)
    assert model.dataset_buffer is not None and model.value is not None
    index, returns = [0, 9, 12, 15, 26, 40], slow_returns(data, 0.9, -5.0)
    batch, last = model.dataset_buffer._get_samples(np.array(index)), drawn(model)
    windows = model._normalized_windows(batch)
    with th.no_grad():
        loss = value_loss(model, windows, batch).item()
        noise, levels = last()
        total = 0.0
        for i, t in enumerate(index):
            told = model.value.conditioned.net(
                slow_noisy(model, windows[i], noise[i], int(levels[i]))[None], levels[i : i + 1]
            ).item()
            estimate = returns.mean() + returns.std(ddof=1) * told
            total += (estimate - returns[t]) ** 2 / returns.std(ddof=1) ** 2
    assert loss == pytest.approx(total / len(index), rel=1e-3)


def test_value_is_in_units_of_the_rewards() -> None:
    model = make_model()
    assert model.value is not None
    windows, level = th.randn(4, HORIZON, 5), th.tensor([2])
    before = model.value(windows, windows, level)
    model.value.return_mean.fill_(100.0)
    model.value.return_std.fill_(7.0)
    told = model.value.conditioned(windows, windows, level)
    th.testing.assert_close(model.value(windows, windows, level), 100.0 + 7.0 * told)
    assert not th.allclose(model.value(windows, windows, level), before)


def test_losses_draw_uniform_levels_and_normal_noise() -> None:
    model = make_model()
    counts = th.bincount(model._draw_levels(6_000), minlength=6).double()
    assert counts.shape == (6,)
    assert ((counts - 1_000.0) / math.sqrt(1_000.0)).abs().max() < 4.0
    noise = model._draw_noise(th.zeros(2_000, HORIZON, 5))
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise.std().item() == pytest.approx(1.0, abs=0.02)


def test_planner_and_value_learn_each_from_its_own_loss() -> None:
    both, planner_alone, value_alone = make_model(), make_model(n_value_steps=0), make_model(train_planner=False)
    start = [online_weights(network) for network in both.policy.trained_networks]
    for model in (both, planner_alone, value_alone):
        model.train(3)
    assert not equal(online_weights(both.actor), start[0])
    assert not equal(online_weights(both.value), start[1])
    assert equal(online_weights(planner_alone.value), start[1])
    assert equal(online_weights(value_alone.actor), start[0])
    assert not equal(online_weights(value_alone.value), start[1])


def test_an_update_of_the_value_needs_no_planner_and_the_other_way_round() -> None:
    """Gradients of one loss alone, as both optimisers would see them."""
    model = make_model()
    batch = model.sample_batch(16)
    windows = model._normalized_windows(batch)
    value_loss(model, windows, batch).backward()
    assert all(parameter.grad is None for parameter in trained(model.actor))
    assert all(parameter.grad is not None for parameter in trained(model.value))
    for parameter in trained(model.value):
        parameter.grad = None
    planner_loss(model, windows, batch).backward()
    assert all(parameter.grad is None for parameter in trained(model.value))
    assert all(parameter.grad is not None for parameter in trained(model.actor))


def test_value_stops_learning_after_its_steps() -> None:
    model = make_model(n_value_steps=2)
    states = []
    for _ in range(4):
        model.train(1)
        states.append((online_weights(model.value), online_weights(model.actor)))
    assert not equal(states[0][0], states[1][0])
    assert equal(states[1][0], states[2][0]) and equal(states[2][0], states[3][0])
    assert not equal(states[2][1], states[3][1])


def test_updates_call_each_trained_network_once() -> None:
    model = make_model()
    planner, guide, idle = calls_of(model)
    model.train(3)
    assert idle.take()[0] == [16] * 6
    assert planner.take()[0] == guide.take()[0] == []


def test_losses_are_logged_under_their_names() -> None:
    model = make_model()
    planner_losses, value_losses = spy(model, "_planner_loss"), spy(model, "_value_loss")
    model.learn(3)
    logged = model.logger.name_to_value
    assert logged["train/planner_loss"] == pytest.approx(np.mean([loss.item() for _, loss in planner_losses]), rel=1e-5)
    assert logged["train/value_loss"] == pytest.approx(np.mean([loss.item() for _, loss in value_losses]), rel=1e-5)
    assert logged["train/n_updates"] == 3


def test_learning_rates_and_bounds_of_gradients() -> None:
    model = make_model(learning_rate=1e-3, value_learning_rate=lambda progress: 5e-3 * progress, max_grad_norm=1e-3)
    model.learn(2)
    assert model.actor.optimizer.param_groups[0]["lr"] == 1e-3
    assert model.value.optimizer.param_groups[0]["lr"] == pytest.approx(2.5e-3)
    for network in (model.actor, model.value):
        norm = th.cat([parameter.grad.flatten() for parameter in trained(network)]).norm().item()
        assert norm == pytest.approx(1e-3, rel=1e-3)
    for network in (model.actor, model.value):
        (group,) = network.optimizer.param_groups
        assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained(network)]


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(action_weight=1.0),
        dict(loss_discount=0.5),
        dict(padding="zeros"),
        dict(count_padding=True),
        dict(noise_schedule="vp"),
        dict(prediction_type="noise"),
        dict(clip_denoised=0.1),
        dict(normalization="limits"),
        dict(normalize_observations=False),
        dict(goal_conditioned=True, train_value=True, n_candidates=1),
        dict(gamma=0.5),
        dict(termination_penalty=0.0),
        dict(stride=2, n_candidates=1),
        dict(max_grad_norm=1e-4),
        dict(learning_rate=1e-2),
        dict(value_learning_rate=1e-2),
    ],
)
def test_each_setting_matters(kwargs: dict[str, Any]) -> None:
    """Of what is learned, or of what is planned with it."""
    plain, other = make_model(guidance_scale=0.1), make_model(**{"guidance_scale": 0.1, **kwargs})
    for model in (plain, other):
        model.train(2)
    goal = some_observations(2)[1] if other.goal_conditioned else None
    first, second = plain.plan(some_observations(2), seed=0), other.plan(some_observations(2), goal, seed=0)
    assert first.actions.shape != second.actions.shape or np.abs(first.values - second.values).max() > 1e-6


# ---------------------------------------------------------------- moving averages


def test_averages_are_over_all_updates_at_first() -> None:
    """Decay n / (n + 10) after n updates, up to 1 - tau."""
    model = make_model(tau=0.6, learning_rate=1e-2)
    expected = [online_weights(network) for network in model.policy.trained_networks]
    for n in range(1, 11):
        model.train(1)
        decay = min(0.4, n / (n + 10))
        for average, network in zip(expected, model.policy.trained_networks, strict=True):
            for name, value in online_weights(network).items():
                average[name] = decay * average[name] + (1.0 - decay) * value
                th.testing.assert_close(weights(network.averaged)[name], average[name], rtol=1e-4, atol=1e-6)


def test_decay_of_the_averages_in_the_long_run() -> None:
    assert moves_of_the_averages(make_model(), range(100_000, 100_003)) == dict.fromkeys(range(100_000, 100_003), 0.0005)


def moves_of_the_averages(model: Diffuser, updates: range) -> dict[int, float]:
    """
    Share of the way to the trained weights that both averages went, by the number of the update; only those that moved.

    The learning rate is 0, so that the trained weights stay where they are.
    """
    moves = {}
    model.lr_schedule = model.value_lr_schedule = lambda _: 0.0
    for n in updates:
        model._n_updates = n
        shares = set()
        for network in model.policy.trained_networks:
            with th.no_grad():
                for average in network.averaged.parameters():
                    average.sub_(1.0)
        model.train(1)
        for network in model.policy.trained_networks:
            online = dict(network.named_parameters())
            left = [online[name] - average for name, average in network.averaged.named_parameters()]
            for difference in left:
                th.testing.assert_close(difference, difference.mean().expand_as(difference), rtol=0.0, atol=1e-5)
            shares.add(round(1.0 - left[0].mean().item(), 5))
            network.update_average(0.0)
        (share,) = shares
        if share != 0.0:
            moves[n] = share
    return moves


def test_averages_of_the_published_runs() -> None:
    """Copies for 2,000 updates, then every tenth by 0.005; updates are counted from 0."""
    model = make_model(tau=0.005, ema_start=2_000, ema_interval=10)
    copies = {0: 1.0, 1: 1.0, 1_998: 1.0, 1_999: 1.0}
    assert moves_of_the_averages(model, range(2)) | moves_of_the_averages(model, range(1_998, 2_022)) == {
        **copies,
        2_000: 0.005,
        2_010: 0.005,
        2_020: 0.005,
    }


@pytest.mark.parametrize("name", ["actor", "value"])
def test_planning_is_by_the_averages(name: str) -> None:
    model = make_model(n_candidates=3, guidance_scale=0.5)
    network = getattr(model, name)
    observations = some_observations(4)
    plan = model.plan(observations, seed=0)
    with th.no_grad():
        for parameter in trained(network):
            parameter.add_(0.1)
    assert same_plan(plan, model.plan(observations, seed=0))
    network.update_average(0.0)
    assert not same_plan(plan, model.plan(observations, seed=0))


@pytest.mark.parametrize("kwargs", [dict(), dict(ema_start=2, ema_interval=2, tau=0.3), UNET])
def test_files_keep_averages_and_both_optimisers(kwargs: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = make_model(**kwargs), make_model(**kwargs)
    whole.train(6)
    parts.train(3)
    parts.save(tmp_path / "model")
    loaded = Diffuser.load(tmp_path / "model", dataset=make_dataset(), device="cpu")
    loaded.set_logger(Logger(None, []))
    for network, other in zip(parts.policy.trained_networks, loaded.policy.trained_networks, strict=True):
        assert equal(weights(network), weights(other))  # the average is in it
        assert not equal(online_weights(network), weights(network.averaged))
    loaded.train(3)
    assert equal(weights(whole.policy), weights(loaded.policy))
    for network, other in zip(whole.policy.trained_networks, loaded.policy.trained_networks, strict=True):
        states = (network.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"])
        assert states[0].keys() == states[1].keys() and len(states[0]) == len(trained(network))
        for key in states[0]:
            assert equal(states[0][key], states[1][key])
    assert same_plan(whole.plan(some_observations(2), seed=0), loaded.plan(some_observations(2), seed=0))


# ---------------------------------------------------------------- best of several


def test_the_plan_with_the_highest_value_is_chosen() -> None:
    policy = make_model().policy
    condition = policy.actor.condition(th.as_tensor(some_observations(5)))
    latents = policy.latents(np.arange(5), 8)
    with th.no_grad():
        best, values = policy.plan_windows(condition, latents)
        all_windows, all_values = policy.plan_windows(condition.repeat_interleave(8, dim=0), latents)
    all_windows, all_values = all_windows.reshape(5, 8, HORIZON, -1), all_values.reshape(5, 8)
    th.testing.assert_close(values, all_values.amax(dim=1))
    chosen = all_values.argmax(dim=1)
    assert len(set(chosen.tolist())) > 1
    th.testing.assert_close(best, all_windows[range(5), chosen])


@pytest.mark.parametrize("guidance_scale", [0.0, 0.1])
def test_values_grow_with_the_number_of_candidates(guidance_scale: float) -> None:
    policy = make_model(guidance_scale=guidance_scale).policy
    condition = policy.actor.condition(th.as_tensor(some_observations(6)))
    latents = policy.latents(np.arange(6), 32).unflatten(0, (6, 32))
    values = []
    for n in (1, 4, 32):
        with th.no_grad():
            values.append(policy.plan_windows(condition, latents[:, :n].flatten(0, 1))[1])
    assert (values[1] >= values[0]).all() and (values[2] >= values[1]).all()
    assert values[0].mean() < values[1].mean() < values[2].mean()


def test_finished_windows_are_ranked() -> None:
    model = make_model(n_candidates=3, guidance_scale=0.1)
    _, guide, _ = calls_of(model)
    sampled, planned = spy(model.policy.actor.planner, "sample"), spy(model.policy, "plan_windows")
    plan = model.plan(some_observations(2))
    _, finished = sampled[0]
    assert th.equal(guide.windows[-1], finished)
    assert guide.levels[-1] == 0
    values = model.policy.value.guide(finished, finished, th.zeros(1, dtype=th.long)).reshape(2, 3)
    np.testing.assert_allclose(plan.values, values.amax(dim=1).detach().numpy(), rtol=1e-5)
    assert th.equal(planned[0][1][1], th.as_tensor(plan.values))


@pytest.mark.parametrize(
    ("kwargs", "levels", "guided"),
    [
        (dict(), [5, 4, 3, 2, 1, 0], [5, 5, 4, 4, 3, 3, 2, 2]),
        (dict(n_guidance_steps=1, t_stopgrad=0), [5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]),
        (dict(n_guidance_steps=3, t_stopgrad=5), [5, 4, 3, 2, 1, 0], [5, 5, 5]),
        (dict(guidance_scale=0.0), [5, 4, 3, 2, 1, 0], []),
        (dict(n_guidance_steps=0), [5, 4, 3, 2, 1, 0], []),
        (dict(sampler="ddim", n_sampling_steps=3), [5, 2, 0], [5, 5, 2, 2]),
        (dict(sampler="heun", n_sampling_steps=3), [5, 2, 2, 0, 0], [5, 5, 2, 2]),
        (dict(sampler="dpm_solver", n_sampling_steps=1), [5], [5, 5]),
    ],
)
def test_calls_of_the_networks_for_a_plan(kwargs: dict[str, Any], levels: list[int], guided: list[int]) -> None:
    """All candidates of all rows in one batch, and one evaluation of the finished windows."""
    model = make_model(**{"n_candidates": 4, "guidance_scale": 0.1, **kwargs})
    planner, guide, idle = calls_of(model)
    model.plan(some_observations(3))
    assert planner.take() == ([12] * len(levels), levels)
    assert guide.take() == ([12] * (len(guided) + 1), [*guided, 0])
    assert idle.take()[0] == []


@pytest.mark.parametrize(
    "settings",
    [
        dict(n_candidates=4),
        dict(guidance_scale=0.0),
        dict(guidance_scale=0.3),
        dict(guidance_scaling="std"),
        dict(guidance_scaling=None),
        dict(n_guidance_steps=1),
        dict(n_guidance_steps=0),
        dict(t_stopgrad=4),
        dict(t_stopgrad=0),
    ],
)
def test_each_part_of_planning_changes_the_plan(settings: dict[str, Any]) -> None:
    model = make_model(n_candidates=2, guidance_scale=0.2, guidance_scaling="variance", t_stopgrad=2)
    plan = model.plan(some_observations(8), seed=0)
    assert same_plan(plan, model.plan(some_observations(8), seed=0))
    model.set_planning(**settings)
    assert not same_plan(plan, model.plan(some_observations(8), seed=0))


def test_a_model_without_value_plans_one_window() -> None:
    model = make_model(train_value=False)
    assert model.value is None and model.policy.value is None
    model.train(2)
    plan = model.plan(some_observations(3))
    assert np.isnan(plan.values).all()
    assert "train/value_loss" not in model.logger.name_to_value
    for call in (lambda: model.plan(some_observations(1), n_candidates=2), lambda: model.set_planning(n_candidates=2)):
        with pytest.raises(ValueError, match="needs a value.*train_value=False"):
            call()


# ---------------------------------------------------------------- plans


def test_shapes_and_units_of_a_plan() -> None:
    model = make_model(n_candidates=3)
    observations = some_observations(5)
    plan = model.plan(observations, seed=3)
    assert plan.observations.shape == (5, HORIZON, OBS_DIM)
    assert plan.actions.shape == (5, HORIZON, ACTION_DIM)
    assert plan.values.shape == (5,)
    assert (np.abs(plan.actions) <= 1.0).all()
    single = model.plan(observations[0], seed=3)
    assert single.observations.shape == (HORIZON, OBS_DIM)
    assert single.actions.shape == (HORIZON, ACTION_DIM)
    assert single.values.shape == ()
    np.testing.assert_allclose(single.actions, plan.actions[0], atol=1e-5)
    assert not same_plan(plan, model.plan(observations, seed=4))
    assert not same_plan(model.plan(observations), model.plan(observations))
    assert same_plan(*(model.plan(observations, deterministic=True) for _ in range(2)))


def test_planned_actions_are_clipped_to_their_space() -> None:
    model = make_model()
    windows = th.stack([th.full((HORIZON, 5), value) for value in (-50.0, 0.0, 50.0)])
    actions = model.policy.decode(windows, th.zeros(3)).actions
    assert (actions[0] == -1.0).all() and (actions[2] == 1.0).all()
    np.testing.assert_allclose(actions[1], np.tile(make_dataset().actions.mean(axis=0), (HORIZON, 1)), rtol=1e-4)


def test_planned_actions_have_the_units_of_the_environment() -> None:
    model = make_model()
    low, high = np.array([-0.5, -2.0], np.float32), np.array([1.5, 2.0], np.float32)
    data = make_dataset()
    other = OfflineDataset(
        data.observations,
        (0.5 * (low + high) + 0.5 * (high - low) * data.actions).astype(np.float32),
        data.rewards,
        data.next_observations,
        data.terminations,
        data.truncations,
        observation_space=data.observation_space,
        action_space=spaces.Box(low, high),
    )
    scaled = make_model(other)
    first, second = (m.plan(some_observations(3), seed=0).actions for m in (model, scaled))
    np.testing.assert_allclose(second, 0.5 * (low + high) + 0.5 * (high - low) * first, rtol=1e-3, atol=1e-3)


def test_a_stride_gives_one_row_per_step_of_the_environment() -> None:
    """The states between planned ones are interpolated, those behind the last one repeat it."""
    model = make_model(stride=3)
    decoded = spy(model.policy, "decode")
    plan = model.plan(some_observations(2))
    assert plan.observations.shape == (2, 3 * HORIZON, OBS_DIM)
    assert plan.actions.shape == (2, 3 * HORIZON, ACTION_DIM)
    (windows, *_), _ = decoded[0]
    normalizer = model.actor.window_normalizer
    rows = normalizer.inverse(windows).numpy()
    states, actions = rows[..., 3 * ACTION_DIM :], rows[..., : 3 * ACTION_DIM].clip(-1.0, 1.0)
    for k in range(3 * HORIZON):
        row, part = divmod(k, 3)
        following = states[:, min(row + 1, HORIZON - 1)]
        expected = states[:, row] + part / 3 * (following - states[:, row])
        np.testing.assert_allclose(plan.observations[:, k], expected, rtol=1e-4, atol=1e-4)
        expected = actions[:, row, part * ACTION_DIM : (part + 1) * ACTION_DIM]
        np.testing.assert_allclose(plan.actions[:, k], expected, rtol=1e-5, atol=1e-6)


def test_end_of_a_goal_conditioned_plan_is_the_goal() -> None:
    model = make_model(goal_conditioned=True)
    assert (model.value, model.n_candidates, model.guidance_scale) == (None, 1, 0.0)
    observations, goals = some_observations(3), some_observations(6)[3:]
    plan = model.plan(observations, goals)
    np.testing.assert_allclose(plan.observations[:, 0], observations, rtol=1e-5)
    np.testing.assert_allclose(plan.observations[:, -1], goals, rtol=1e-5)
    shared = model.plan(observations, goals[0])
    np.testing.assert_allclose(shared.observations[:, -1], np.tile(goals[0], (3, 1)), rtol=1e-5)


@pytest.fixture
def goal_model(random_dataset: Callable[..., OfflineDataset]) -> Diffuser:
    """Plans in the observations of a goal environment, both ends given."""
    env = PointGoalEnv()
    return make_model(random_dataset(env.observation_space, env.action_space), goal_conditioned=True)


def goal_observations(n: int) -> dict[str, np.ndarray]:
    points = np.random.default_rng(2).uniform(-1.0, 1.0, (3, n, 2)).astype(np.float32)
    return {"observation": points[0], "achieved_goal": points[1], "desired_goal": points[2]}


def test_goals_of_dict_observations(goal_model: Diffuser) -> None:
    observations = goal_observations(4)
    layout = goal_model.actor.layout
    assert layout.dim == 2 + 4  # the desired goal is no part of a window
    plan = goal_model.plan(observations)
    assert set(plan.observations) == set(observations)
    for key in ("observation", "achieved_goal"):
        assert plan.observations[key].shape == (4, HORIZON, 2)
        np.testing.assert_allclose(plan.observations[key][:, 0], observations[key], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(plan.observations["achieved_goal"][:, -1], observations["desired_goal"], atol=1e-6)
    for h in range(HORIZON):
        np.testing.assert_array_equal(plan.observations["desired_goal"][:, h], observations["desired_goal"])
    other = goal_model.plan(observations, goal=[0.25, -0.5])
    np.testing.assert_allclose(other.observations["achieved_goal"][:, -1], [[0.25, -0.5]] * 4, atol=1e-6)
    np.testing.assert_allclose(other.observations["desired_goal"], np.broadcast_to([0.25, -0.5], (4, HORIZON, 2)))
    data = goal_model.dataset
    assert data is not None and isinstance(data.observations, dict)
    np.testing.assert_allclose(goal_model.goal_space.low, data.observations["achieved_goal"].min(axis=0), atol=1e-6)


def test_acting_towards_the_goals_of_observations(goal_model: Diffuser) -> None:
    """Along the first plan, whose goal is that of the observation it was made from."""
    goal_model.set_planning(n_action_steps=2)
    observations, space = goal_observations(3), goal_model.action_space
    plan = goal_model.plan(observations, deterministic=True)
    first, state = goal_model.predict(observations, deterministic=True)
    second, state = goal_model.predict(goal_observations(3), state, deterministic=True)
    np.testing.assert_allclose(first, plan.actions[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, plan.actions[:, 1], rtol=1e-5, atol=1e-6)
    assert all(space.contains(action) for action in first)
    env = DummyVecEnv([PointGoalEnv])
    env.reset()
    moved = {**observations, "desired_goal": -observations["desired_goal"]}
    assert np.abs(goal_model.predict(moved, deterministic=True)[0] - first).max() > 1e-4


def test_a_goal_that_moves_is_planned_to_at_once(goal_model: Diffuser) -> None:
    """In its row alone; the other plans go on."""
    goal_model.set_planning(n_action_steps=4)
    observations = goal_observations(3)
    _, state = goal_model.predict(observations, deterministic=True)
    moved = {key: value.copy() for key, value in observations.items()}
    moved["desired_goal"][1] *= -1.0
    kept, _ = goal_model.predict(observations, state, deterministic=True)
    followed, state = goal_model.predict(moved, state, deterministic=True)
    np.testing.assert_array_equal(followed[[0, 2]], kept[[0, 2]])
    np.testing.assert_allclose(followed[1], goal_model.plan(moved, deterministic=True).actions[1, 0], rtol=1e-5, atol=1e-6)
    assert np.abs(followed[1] - kept[1]).max() > 1e-4
    assert state is not None
    np.testing.assert_array_equal(state[1], [2, 1, 2])  # steps taken of each plan


def test_dict_observations_without_goals_are_planned_whole(random_dataset: Callable[..., OfflineDataset]) -> None:
    env = PointGoalEnv()
    model = make_model(random_dataset(env.observation_space, env.action_space), n_candidates=2)
    observations = goal_observations(3)
    assert model.actor.layout.dim == 2 + 6
    plan = model.plan(observations)
    for key, values in observations.items():
        np.testing.assert_allclose(plan.observations[key][:, 0], values, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- acting


def act(model: Diffuser, observations: list[np.ndarray], episode_starts: Any = None, **kwargs: Any) -> list[np.ndarray]:
    """Actions for one batch of observations after the other, the state handed on."""
    state, actions = None, []
    for t, batch in enumerate(observations):
        starts = None if episode_starts is None else episode_starts[t]
        action, state = model.predict(batch, state, starts, **kwargs)
        actions.append(action)
    return actions


def sequence(n_steps: int, n: int) -> list[np.ndarray]:
    return list(some_observations(n_steps * n).reshape(n_steps, n, OBS_DIM))


@pytest.mark.parametrize("n_steps", [1, 4, 7])
@pytest.mark.parametrize("n_action_steps", [1, 2, 3, HORIZON])
def test_plans_are_made_when_they_are_used_up(n_steps: int, n_action_steps: int) -> None:
    model = make_model(n_action_steps=n_action_steps)
    planned = spy(model.policy, "plan_windows")
    observations = sequence(n_steps, 2)
    actions = act(model, observations, deterministic=True)
    assert len(planned) == math.ceil(n_steps / n_action_steps)
    for t in range(n_steps):
        begin = t - t % n_action_steps
        plan = model.plan(observations[begin], deterministic=True)
        np.testing.assert_allclose(actions[t], plan.actions[:, t - begin], rtol=1e-4, atol=1e-5)


def test_without_state_each_call_plans() -> None:
    model = make_model(n_action_steps=4)
    planned = spy(model.policy, "plan_windows")
    observations = some_observations(2)
    first, second = (model.predict(observations)[0] for _ in range(2))
    assert len(planned) == 2
    assert np.abs(first - second).max() > 1e-4


def test_state_is_not_written_to() -> None:
    model = make_model(n_action_steps=2)
    _, state = model.predict(some_observations(2))
    copies = [array.copy() for array in state]
    model.predict(some_observations(2), state, np.array([True, False]))
    for array, copy in zip(state, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_only_rows_whose_episode_begins_drop_their_plan() -> None:
    model = make_model(n_action_steps=4)
    planned = spy(model.policy, "plan_windows")
    starts = [np.array(row) for row in ([True] * 3, [False] * 3, [False, True, False], [False] * 3, [False] * 3)]
    observations = sequence(5, 3)
    actions = act(model, observations, starts, deterministic=True)
    # All rows at first, one after two steps, and after four steps the two that used theirs up
    assert [len(arguments[0]) for arguments, _ in planned] == [3, 1, 2]
    plan = model.plan(observations[2][1], deterministic=True)
    for t in (2, 3, 4):
        np.testing.assert_allclose(actions[t][1], plan.actions[t - 2], rtol=1e-4, atol=1e-5)


def test_single_observations_have_a_state_too() -> None:
    model = make_model(n_action_steps=2)
    observations = some_observations(2)
    action, state = model.predict(observations[0], deterministic=True)
    assert action.shape == (ACTION_DIM,)
    action, state = model.predict(observations[1], state, np.array([False]), deterministic=True)
    np.testing.assert_allclose(action, model.plan(observations[0], deterministic=True).actions[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kwargs", [dict(), dict(n_candidates=3, guidance_scale=0.1), dict(warm_start=0.5)])
def test_a_row_does_not_depend_on_its_neighbours(deterministic: bool, kwargs: dict[str, Any]) -> None:
    """Nor do its random numbers: they travel in the state."""
    model = make_model(n_action_steps=2, **kwargs)
    observations = sequence(5, 3)
    _, state = model.predict(observations[0], deterministic=deterministic)
    alone = [tuple(array[i : i + 1] for array in state) for i in range(3)]
    for t in range(1, 5):
        starts = np.array([False, t == 2, False])
        actions, state = model.predict(observations[t], state, starts, deterministic)
        for i in range(3):
            action, alone[i] = model.predict(observations[t][i : i + 1], alone[i], starts[i : i + 1], deterministic)
            np.testing.assert_allclose(action[0], actions[i], rtol=1e-3, atol=1e-4)
    if not deterministic:
        equal_rows = np.repeat(observations[0][:1], 3, axis=0)
        actions, _ = model.predict(equal_rows)
        assert np.abs(actions[0] - actions[1]).max() > 1e-4


@pytest.mark.parametrize(("warm_start", "batches"), [(0.0, [[0, 1, 2, 3]]), (0.5, [[1], [0, 2, 3]])])
def test_rows_that_are_due_are_planned_together(warm_start: float, batches: list[list[int]]) -> None:
    model = make_model(warm_start=warm_start, n_action_steps=1)
    observations = sequence(2, 4)
    _, state = model.predict(observations[0])
    planned = spy(model.policy, "plan_windows")
    model.predict(observations[1], state, np.array([False, True, False, False]))
    conditions = model.policy.actor.condition(th.as_tensor(observations[1]))
    assert [len(arguments[0]) for arguments, _ in planned] == [len(rows) for rows in batches]
    for (arguments, _), rows in zip(planned, batches, strict=True):
        assert th.equal(arguments[0], conditions[rows])


def test_each_plan_of_a_row_draws_anew() -> None:
    model = make_model()
    observations = some_observations(2)
    actions = np.stack(act(model, [observations] * 4))
    for first in range(4):
        for second in range(first):
            assert (np.abs(actions[first] - actions[second]).max(axis=1) > 1e-4).all()


def test_latents_are_those_of_the_seeds_or_shared_by_all_rows() -> None:
    policy = make_model().policy
    shape = policy.actor.latent_shape
    assert shape == (6, HORIZON, 5)  # the start and the noise of each step but the last
    latents = policy.latents(np.array([7, 8, 7]), 2).reshape(3, 2, *shape)
    assert th.equal(latents[0], latents[2])
    assert th.equal(latents[1], policy.latents(np.array([8]), 2))
    assert not th.equal(latents[0, 0], latents[0, 1]) and not th.equal(latents[0], latents[1])
    assert latents.mean().abs() < 0.1 and (latents.std() - 1.0).abs() < 0.1
    shared = policy.latents(np.array([7, 8, 7]), 2, deterministic=True).reshape(3, 2, *shape)
    assert (shared[:, 0] == 0.0).all()
    assert th.equal(shared[0], shared[1]) and th.equal(shared[0], shared[2])
    assert shared[:, 1].std() > 0.5
    policy.actor.set_sampler("ddim", 3)
    assert policy.actor.latent_shape == (1, HORIZON, 5)


def test_evaluate_policy_hands_the_state_on() -> None:
    """Two episodes of 12 steps in each of two envs, planned anew every fourth step."""
    env = DummyVecEnv([lambda: RandomEnv(box(OBS_DIM, 500.0), box(ACTION_DIM)) for _ in range(2)])
    model = make_model(n_action_steps=4)
    planned = spy(model.policy, "plan_windows")
    returns, lengths = evaluate_policy(model, env, n_eval_episodes=4, return_episode_rewards=True, warn=False)
    assert lengths == [12] * 4
    assert len(returns) == 4
    assert [len(arguments[0]) for arguments, _ in planned] == [2] * 6


def test_plans_are_followed_while_collecting_transitions() -> None:
    model = make_model(env=RandomEnv(box(OBS_DIM, 500.0), box(ACTION_DIM)), n_action_steps=4, learning_starts=0)
    model.train(1)
    planned = spy(model.policy, "plan_windows")
    model.learn(24, offline=False)
    assert len(planned) == 6


@pytest.mark.parametrize(("warm_start", "levels"), [(0.5, [2, 1, 0]), (0.2, [0]), (0.01, [0]), (0.9, [4, 3, 2, 1, 0])])
def test_warm_start_refines_the_previous_plan_in_fewer_steps(warm_start: float, levels: list[int]) -> None:
    model = make_model(warm_start=warm_start, n_action_steps=2, n_candidates=2)
    planner, _, _ = calls_of(model)
    cold, observations = [5, 4, 3, 2, 1, 0], sequence(4, 2)
    _, state = model.predict(observations[0])
    assert planner.take()[1] == cold
    _, state = model.predict(observations[1], state)
    assert planner.take()[1] == []
    _, state = model.predict(observations[2], state)
    assert planner.take() == ([4] * len(levels), levels)
    _, state = model.predict(observations[3], state, np.array([True, False]))  # the first plan of an episode is cold
    assert planner.take() == ([2] * 6, cold)


def test_warm_start_begins_from_the_shifted_plan_with_noise() -> None:
    model = make_model(warm_start=0.5, n_action_steps=2, n_candidates=3)
    planner, _, _ = calls_of(model)
    corrupted, observations = spy(model.actor.planner.denoiser, "corrupt"), sequence(3, 2)
    _, state = model.predict(observations[0])
    _, state = model.predict(observations[1], state)
    before = state[0].copy()
    model.predict(observations[2], state)
    ((windows, noise, level), noisy), known = corrupted[-1], model.actor.layout.known()
    assert level.tolist() == [2]
    expected = np.concatenate([before[:, 2:], before[:, -1:], before[:, -1:]], axis=1)
    np.testing.assert_array_equal(windows.numpy(), np.repeat(expected, 3, axis=0))  # for each candidate
    first_told = planner.windows[-3]
    assert th.equal(first_told[:, ~known], noisy[:, ~known])
    given = model.actor.states(first_told)[::3, 0].numpy()
    np.testing.assert_allclose(given, observations[2], rtol=1e-5, atol=1e-4)  # the new state
    assert noise.std() > 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("n_sampling_steps", [1, 2, 3])
def test_warm_start_with_a_shorter_chain(sampler: str, n_sampling_steps: int) -> None:
    model = make_model(warm_start=0.5, sampler=sampler, n_sampling_steps=n_sampling_steps)
    for action in act(model, sequence(3, 2)):
        assert np.isfinite(action).all()


def test_windows_are_shifted_by_rows() -> None:
    windows = np.arange(2 * 4 * 1).reshape(2, 4, 1)
    assert shift_windows(windows, np.array([1, 3]))[..., 0].tolist() == [[1, 2, 3, 3], [7, 7, 7, 7]]
    assert shift_windows(windows, np.array([0, 9]))[..., 0].tolist() == [[0, 1, 2, 3], [7, 7, 7, 7]]


def test_warm_start_counts_rows_of_a_stride() -> None:
    model = make_model(warm_start=0.5, stride=2, n_action_steps=4)
    corrupted, observations = spy(model.actor.planner.denoiser, "corrupt"), sequence(5, 1)
    state = None
    for batch in observations:
        windows = None if state is None else state[0]
        _, state = model.predict(batch, state)
    expected = np.concatenate([windows[:, 2:], windows[:, -1:], windows[:, -1:]], axis=1)
    np.testing.assert_array_equal(corrupted[-1][0][0].numpy(), expected)


def test_a_stride_is_followed_step_by_step() -> None:
    model = make_model(stride=2, n_action_steps=2 * HORIZON)
    observations = sequence(2 * HORIZON, 2)
    plan = model.plan(observations[0], deterministic=True)
    actions = act(model, observations, deterministic=True)
    np.testing.assert_allclose(np.stack(actions, axis=1), plan.actions, rtol=1e-4, atol=1e-5)


def test_tracker_is_proportional_derivative_control() -> None:
    tracker = PDTracker(positions=[0, 2], velocities=[1, 3], kp=10.0, kd=-1.0)
    now, ahead = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[1.5, 2.5, 2.0, 7.0]])
    actions = tracker(now, ahead, np.zeros((1, 2), np.float32))
    np.testing.assert_allclose(actions, [[10.0 * 0.5 - 0.5, 10.0 * -1.0 - 3.0]])
    assert actions.dtype == np.float32
    published = PDTracker()
    np.testing.assert_allclose(published(now, ahead, np.zeros((1, 2))), [[0.5 - 1.0, 0.5 + 3.0]])
    as_dict = published({"observation": now, "achieved_goal": now}, {"observation": ahead}, np.zeros((1, 2, 1)))
    np.testing.assert_allclose(as_dict[..., 0], [[-0.5, 3.5]])


@pytest.mark.parametrize(
    ("tracker", "size", "n_actions", "message"),
    [
        (PDTracker(), 3, 2, r"2 indices .* size of the observation, 3: got \[0, 1\] and \[2, 3\]"),
        (PDTracker(), 4, 1, r"1 indices .*: got \[0, 1\] and \[2, 3\]"),
        (PDTracker([0, 1], [2]), 4, 2, r"2 indices .*: got \[0, 1\] and \[2\]"),
        (PDTracker([-5, 1], [2, 3]), 4, 2, r"2 indices .*: got \[-5, 1\] and \[2, 3\]"),
    ],
)
def test_tracker_has_to_fit(tracker: PDTracker, size: int, n_actions: int, message: str) -> None:
    observations = np.zeros((1, size))
    with pytest.raises(ValueError, match=r"`positions` and `velocities` must hold " + message):
        tracker(observations, observations, np.zeros((1, n_actions)))


def test_tracker_acts_on_planned_states() -> None:
    seen: list[tuple[Any, ...]] = []

    def tracker(*arguments: Any) -> np.ndarray:
        seen.append(arguments)
        return 100.0 * arguments[2]

    model = make_model(n_action_steps=HORIZON, tracker=tracker)
    observations = sequence(HORIZON, 2)
    plan = model.plan(observations[0], deterministic=True)
    actions = act(model, observations, deterministic=True)
    for t in range(HORIZON):
        now, ahead, planned = seen[t]
        np.testing.assert_array_equal(now, observations[t])
        np.testing.assert_allclose(ahead, plan.observations[:, min(t + 1, HORIZON - 1)], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(planned, plan.actions[:, t], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(actions[t], np.clip(100.0 * planned, -1.0, 1.0), rtol=1e-5)


def test_tracker_sees_dict_observations(goal_model: Diffuser) -> None:
    goal_model.set_planning(tracker=PDTracker([0, 1], [0, 1], kp=0.5, kd=0.0))
    observations, space = goal_observations(3), goal_model.action_space
    plan = goal_model.plan(observations, deterministic=True)
    actions, _ = goal_model.predict(observations, deterministic=True)
    expected = 0.5 * (plan.observations["observation"][:, 1] - observations["observation"])
    np.testing.assert_allclose(actions, np.clip(expected, space.low, space.high), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- settings and files

CHANGED: dict[str, Any] = dict(
    n_candidates=3,
    guidance_scale=0.3,
    guidance_scaling="std",
    n_guidance_steps=1,
    t_stopgrad=1,
    n_action_steps=3,
    warm_start=0.5,
    tracker=PDTracker([0, 1], [1, 2], kp=3.0),
)


@pytest.mark.parametrize("of_policy", [False, True])
def test_files_remember_how_plans_are_made(of_policy: bool, tmp_path: Path) -> None:
    model = make_model()
    model.set_planning(**CHANGED)
    model.set_sampler("ddim", 3)
    source = model.policy if of_policy else model
    source.save(tmp_path / "file")
    loaded = type(source).load(tmp_path / "file", device="cpu")
    policy = loaded if of_policy else loaded.policy
    for name, value in CHANGED.items():
        if name != "tracker":
            assert getattr(policy, name) == value
            assert getattr(loaded, name) == value
    assert isinstance(policy.tracker, PDTracker)
    assert vars(policy.tracker) == vars(CHANGED["tracker"])
    assert (policy.actor.sampler, policy.actor.n_sampling_steps) == ("ddim", 3)
    assert (policy.actor.planner.sampler, policy.actor.planner.n_sampling_steps) == ("ddim", 3)
    observations = sequence(4, 2)
    first, second = (act(each, observations, deterministic=True) for each in (model, loaded))
    np.testing.assert_array_equal(first, second)


def test_tracker_is_written_without_pickle(tmp_path: Path) -> None:
    make_model(tracker=CHANGED["tracker"]).save(tmp_path / "model")
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = archive.namelist()
        assert all(name.endswith((".json", ".safetensors")) for name in names), names
        text = b"".join(archive.read(name) for name in names if name.endswith(".json"))
    assert b"PDTracker" in text
    assert Diffuser.load(tmp_path / "model", device="cpu").tracker.kp == 3.0


def test_a_function_as_tracker_is_asked_for(tmp_path: Path) -> None:
    def tracker(*arguments: Any) -> np.ndarray:
        return 0.0 * arguments[2]

    model = make_model(tracker=tracker)
    with pytest.warns(UserWarning, match="tracker"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="custom_objects"):
        Diffuser.load(tmp_path / "model", device="cpu")
    loaded = Diffuser.load(tmp_path / "model", custom_objects={"tracker": tracker}, device="cpu")
    assert (loaded.predict(some_observations(2))[0] == 0.0).all()


def test_images_are_refused() -> None:
    env = RandomEnv(spaces.Box(0, 255, (36, 36, 1), np.uint8), box(ACTION_DIM))
    with pytest.raises(ValueError, match="Diffuser plans over vectors.*no image.*DTQL, DiffusionQL and DiffSR take images"):
        Diffuser("CnnPolicy", env, device="cpu")


def test_hindsight_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a TrajectoryReplayBuffer, got HerReplayBuffer.*goal_conditioned=True"):
        make_model(replay_buffer_class=HerReplayBuffer)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(horizon=0), "`horizon` must lie in \\[1, inf\\]: got 0"),
        (dict(stride=0), "`stride` must lie in"),
        (dict(n_diffusion_steps=0), "`n_diffusion_steps` must lie in"),
        (dict(n_candidates=0), "`n_candidates` must lie in"),
        (dict(guidance_scaling="sigma"), "`guidance_scaling` must be one of"),
        (dict(n_guidance_steps=-1), "`n_guidance_steps` must lie in"),
        (dict(n_action_steps=0), "`n_action_steps` must lie in \\[1, 4\\]: got 0"),
        (dict(n_action_steps=5), "`n_action_steps` must lie in \\[1, 4\\]: got 5"),
        (dict(n_action_steps=9, stride=2), "`n_action_steps` must lie in \\[1, 8\\]: got 9"),
        (dict(warm_start=-0.1), "`warm_start` must lie in"),
        (dict(warm_start=1.5), "`warm_start` must lie in"),
        (dict(action_weight=-1.0), "`action_weight` must lie in"),
        (dict(loss_discount=-0.1), "`loss_discount` must lie in"),
        (dict(ema_start=-1), "`ema_start` must lie in"),
        (dict(ema_interval=0), "`ema_interval` must lie in"),
        (dict(max_grad_norm=0.0), "`max_grad_norm` must be positive"),
        (dict(train_value=False, n_candidates=2), "needs a value.*train_value=True.*got 2"),
        (dict(train_value=False, guidance_scale=0.1), "needs a value"),
        (dict(backbone="mlp"), "`backbone` must be one of"),
        (dict(normalization="cdf"), "`normalization` must be one of"),
        (dict(padding="last"), "`padding` must be one of"),
        (dict(prediction_type="x0"), "`prediction_type` must be one of"),
        (dict(noise_schedule="sine"), "sine"),
        (dict(sampler="euler"), "`sampler` must be one of"),
        (dict(n_sampling_steps=7), "`n_sampling_steps` must lie in \\[1, 6\\]: got 7"),
        (dict(horizon=5, **UNET), "horizon"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_model(**kwargs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_candidates", 0),
        ("guidance_scaling", "sigma"),
        ("n_guidance_steps", -1),
        ("n_action_steps", 0),
        ("n_action_steps", 5),
        ("warm_start", 1.5),
        ("horizon", 8),
    ],
)
def test_bad_settings_are_named_and_change_nothing(name: str, value: Any) -> None:
    model = make_model(n_candidates=2)
    with pytest.raises(ValueError, match=name):
        model.set_planning(t_stopgrad=5, **{name: value})
    assert model.t_stopgrad == model.policy.t_stopgrad == 2


def test_errors_of_plan() -> None:
    observations, model, to_goals = some_observations(3), make_model(), make_model(goal_conditioned=True)
    with pytest.raises(ValueError, match="`goal` needs a model that was trained.*goal_conditioned=True"):
        model.plan(observations, goal=observations[0])
    for call in (to_goals.plan, to_goals.predict):
        with pytest.raises(ValueError, match="pass `goal` to plan"):
            call(observations)
    with pytest.raises(ValueError, match="`n_candidates` must lie in"):
        model.plan(observations, n_candidates=0)
    _, state = model.predict(observations)
    with pytest.raises(ValueError, match="`state` must come from a call with as many observations: got 3, now 2"):
        model.predict(observations[:2], state)
    with pytest.raises(ValueError, match="tuple"):
        model.predict((observations, {}))


@pytest.mark.parametrize("shape", [(2,), (2, OBS_DIM), (1, 1, 4)])
def test_goal_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="`goal`"):
        make_model(goal_conditioned=True).plan(some_observations(3), goal=np.zeros(shape))


# ---------------------------------------------------------------- presets

SHARED: dict[str, Any] = dict(
    learning_rate=2e-4,
    batch_size=64,
    tau=0.005,
    gamma=0.997,
    ema_start=2_000,
    ema_interval=10,
    n_guidance_steps=2,
    guidance_scaling="variance",
    prediction_type="sample",
    noise_schedule="cosine",
    sampler="ddpm",
    n_sampling_steps=None,
    termination_penalty=-100.0,
    loss_discount=1.0,
)
LOCOMOTION = dict(
    SHARED,
    horizon=32,
    n_diffusion_steps=20,
    guidance_scale=0.1,
    t_stopgrad=2,
    n_candidates=64,
    normalization="gaussian",
    clip_denoised=None,
    padding="zeros",
    count_padding=True,
    action_weight=10.0,
    n_value_steps=200_000,
    n_action_steps=1,
    default_total_timesteps=1_000_000,
)
CHEETAH = dict(LOCOMOTION, horizon=4, guidance_scale=0.001, t_stopgrad=4)
MAZE = dict(
    SHARED,
    goal_conditioned=True,
    train_value=False,
    n_candidates=1,
    guidance_scale=0.0,
    normalization="limits",
    clip_denoised=1.0,
    padding=None,
    action_weight=1.0,
    default_total_timesteps=2_000_000,
)
PUBLISHED = {
    **{f"{env}-{data}": LOCOMOTION for env in ("hopper", "walker2d") for data in ("medium", "medium-replay", "medium-expert")},
    "hopper-medium-expert": dict(LOCOMOTION, guidance_scale=1e-4, t_stopgrad=4),
    **{f"halfcheetah-{data}": CHEETAH for data in ("medium", "medium-replay", "medium-expert")},
    "maze2d-umaze": dict(MAZE, horizon=128, n_diffusion_steps=64, n_action_steps=128),
    "maze2d-medium": dict(MAZE, horizon=256, n_diffusion_steps=256, n_action_steps=256),
    "maze2d-large": dict(MAZE, horizon=384, n_diffusion_steps=256, n_action_steps=384),
    "walker2d-expert": dict(
        horizon=8,
        n_diffusion_steps=20,
        learning_rate=4e-5,
        batch_size=32,
        tau=1.0,
        action_weight=1.0,
        normalization="limits",
        clip_denoised=1.0,
        n_candidates=1,
        guidance_scale=0.0,
        train_value=False,
        default_total_timesteps=500_000,
    ),
}


def test_what_the_presets_share_is_not_our_default() -> None:
    defaults = inspect.signature(Diffuser.__init__).parameters
    assert [name for name, value in presets.PUBLISHED.items() if defaults[name].default == value] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_settings(name: str) -> None:
    data = make_dataset((400,)) if name.startswith("maze2d") else make_dataset()
    model = Diffuser.from_preset(f"{name}-v2", dataset=data, device="cpu", **TRANSFORMER)
    assert {key: getattr(model, key) for key in PUBLISHED[name]} == PUBLISHED[name]


def test_every_published_task_has_a_preset() -> None:
    assert set(Diffuser.presets) == set(PUBLISHED)
    with pytest.raises(ValueError, match="Diffuser has no preset 'hopper-middling'.*hopper-medium"):
        Diffuser.from_preset("hopper-middling", dataset=make_dataset())


@pytest.mark.parametrize(
    ("name", "obs_dim", "action_dim", "n_planner", "n_value"),
    [
        ("walker2d-medium", 17, 6, 3_958_327, 2_296_545),
        ("hopper-medium", 11, 3, 3_956_302, None),
        ("halfcheetah-medium", 17, 6, 4_114_423, None),
        ("maze2d-umaze", 4, 2, 3_682_118, None),
    ],
)
def test_preset_has_the_published_networks(
    name: str, obs_dim: int, action_dim: int, n_planner: int, n_value: int | None
) -> None:
    settings = {key: value for key, value in Diffuser.presets[name].items() if key in ("horizon", "goal_conditioned")}
    net_kwargs = Diffuser.presets[name].get("policy_kwargs", {})
    with_value = n_value is not None
    policy = DiffuserPolicy(box(obs_dim), box(action_dim), lambda _: 2e-4, with_value=with_value, **settings, **net_kwargs)
    assert sum(parameter.numel() for parameter in trained(policy.actor)) == n_planner
    if n_value is not None:
        assert policy.value is not None
        assert sum(parameter.numel() for parameter in trained(policy.value)) == n_value


# ---------------------------------------------------------------- it learns: lines in two directions

STEP, LINE_HORIZON, LINE_LENGTH = 0.2, 8, 12


class LineEnv(gym.Env):
    """A point in the plane, moved by the action; upwards is rewarded."""

    observation_space, action_space = box(2, 10.0), box(2)

    def __init__(self) -> None:
        self.actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.time = self.np_random.uniform(-1.0, 1.0, 2).astype(np.float32), 0
        return self.position.copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.actions.append(action.copy())
        self.position, self.time = (self.position + 2.0 * STEP * action).astype(np.float32), self.time + 1
        return self.position.copy(), float(2.0 * action[1]), False, self.time == LINE_LENGTH, {}


def line_dataset(n_episodes: int = 200) -> OfflineDataset:
    """Half of the episodes go right, the others up, which is rewarded by 1 a step."""
    rng = np.random.default_rng(0)
    up = np.repeat(np.arange(n_episodes) % 2, LINE_LENGTH)
    directions = np.eye(2, dtype=np.float32)[up]
    times = np.tile(np.arange(LINE_LENGTH), n_episodes)
    starts = np.repeat(rng.uniform(-1.0, 1.0, (n_episodes, 2)), LINE_LENGTH, axis=0)
    positions = (starts + STEP * times[:, None] * directions).astype(np.float32)
    ends = times == LINE_LENGTH - 1
    return OfflineDataset(
        positions,
        0.5 * directions,
        up.astype(np.float32),
        positions + np.float32(STEP) * directions,
        np.zeros_like(ends),
        ends,
        observation_space=LineEnv.observation_space,
        action_space=LineEnv.action_space,
    )


def train_on_lines(**kwargs: Any) -> Diffuser:
    model = make_model(
        line_dataset(),
        stirred=False,
        horizon=LINE_HORIZON,
        n_diffusion_steps=20,
        padding=None,
        learning_rate=2e-3,
        batch_size=64,
        tau=0.01,
        policy_kwargs=dict(net_kwargs=dict(width=32, n_layers=1, n_heads=2)),
        **kwargs,
    )
    model.train(1_000)
    return model


@pytest.fixture(scope="module")
def _trained_on_lines() -> Diffuser:
    return train_on_lines()


@pytest.fixture
def line_model(_trained_on_lines: Diffuser) -> Iterator[Diffuser]:
    """Plans one line from where it stands; each test may change how, the weights are trained once."""
    _trained_on_lines.set_planning(n_candidates=1, guidance_scale=0.0, n_action_steps=1, tracker=None)
    yield _trained_on_lines


def line_starts(n: int = 200) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1.0, 1.0, (n, 2)).astype(np.float32)


def goes_up(plan: Plan) -> np.ndarray:
    moves = plan.observations[:, -1] - plan.observations[:, 0]
    return moves[:, 1] > moves[:, 0]


def test_plans_are_lines_of_the_data(line_model: Diffuser) -> None:
    plan = line_model.plan(line_starts(), seed=0)
    np.testing.assert_allclose(plan.observations[:, 0], line_starts(), atol=1e-6)
    assert 0.4 < goes_up(plan).mean() < 0.6
    moves = np.diff(plan.observations, axis=1)
    lengths = np.linalg.norm(moves, axis=2)
    assert lengths.mean() == pytest.approx(STEP, rel=0.1)
    assert (np.abs(lengths - STEP) < 0.5 * STEP).mean() > 0.95
    whole = np.sort(np.abs(moves.sum(axis=1)), axis=1)
    assert whole[:, 1].mean() == pytest.approx(STEP * (LINE_HORIZON - 1), rel=0.05)
    assert whole[:, 0].mean() < 0.1 * whole[:, 1].mean()  # along one axis
    np.testing.assert_allclose(2.0 * STEP * plan.actions[:, :-1].mean(axis=1), moves.mean(axis=1), atol=0.03)


def test_the_best_of_several_plans_earns_more(line_model: Diffuser) -> None:
    shares = [goes_up(line_model.plan(line_starts(100), n_candidates=n, seed=0)).mean() for n in (1, 3, 16)]
    assert shares[0] + 0.15 < shares[1] < shares[2]
    assert shares[2] > 0.95


def test_guidance_earns_more(line_model: Diffuser) -> None:
    shares = []
    for guidance_scale in (0.0, 0.1, 1.0):
        line_model.set_planning(guidance_scale=guidance_scale)
        plan = line_model.plan(line_starts(), seed=0)
        shares.append(goes_up(plan).mean())
        lengths = np.linalg.norm(np.diff(plan.observations, axis=1), axis=2)
        assert lengths.mean() == pytest.approx(STEP, rel=0.1)  # still lines of the data
    assert shares[0] + 0.1 < shares[1] < shares[2]
    assert shares[2] > 0.95


def test_values_are_the_returns_of_the_data(line_model: Diffuser) -> None:
    plan = line_model.plan(line_starts(), seed=0)
    up = goes_up(plan)
    # From a step that is equally likely one of those whose window ends within the episode
    expected = np.mean([sum(0.997**k for k in range(n)) for n in range(LINE_HORIZON, LINE_LENGTH + 1)])
    assert plan.values[up].mean() == pytest.approx(expected, rel=0.1)
    assert np.abs(plan.values[~up]).mean() < 0.1 * expected


def test_acting_on_plans_earns_the_best_return(line_model: Diffuser) -> None:
    line_model.set_planning(n_candidates=16, n_action_steps=4)
    env = DummyVecEnv([LineEnv for _ in range(5)])
    env.seed(0)
    mean, _ = evaluate_policy(line_model, env, n_eval_episodes=5, deterministic=False, warn=False)
    assert mean > 0.9 * LINE_LENGTH
    line_model.set_planning(n_candidates=1)
    env.seed(0)
    assert evaluate_policy(line_model, env, n_eval_episodes=5, deterministic=False, warn=False)[0] < 0.8 * LINE_LENGTH


def test_plans_to_a_goal_are_continuous() -> None:
    model = train_on_lines(goal_conditioned=True)
    starts = line_starts()
    directions = np.eye(2, dtype=np.float32)[np.arange(len(starts)) % 2]
    goals = starts + np.float32(STEP * (LINE_HORIZON - 1)) * directions
    plan = model.plan(starts, goals, seed=0)
    np.testing.assert_allclose(plan.observations[:, 0], starts, atol=1e-6)
    np.testing.assert_allclose(plan.observations[:, -1], goals, atol=1e-6)
    lengths = np.linalg.norm(np.diff(plan.observations, axis=1), axis=2)
    assert lengths.max() < 2.0 * STEP
    assert lengths.mean() == pytest.approx(STEP, rel=0.1)
    np.testing.assert_allclose(2.0 * plan.actions[:, :-1].mean(axis=1), directions, atol=0.15)


# ---------------------------------------------------------------- wrappers


class Deterministic:
    """Plans of a model that draw nothing at random."""

    def __init__(self, model: Diffuser) -> None:
        self.model, self.horizon, self.tracker = model, model.horizon, model.tracker

    def plan(self, observations: np.ndarray) -> Plan:
        return self.model.plan(observations, deterministic=True)


@pytest.mark.parametrize("n_action_steps", [1, 3, LINE_HORIZON])
@pytest.mark.parametrize("tracker", [None, PDTracker([0, 1], [0, 1], kp=2.0, kd=0.25)])
def test_wrapper_acts_as_predict_does(line_model: Diffuser, n_action_steps: int, tracker: PDTracker | None) -> None:
    line_model.set_planning(n_candidates=4, guidance_scale=0.1, n_action_steps=n_action_steps, tracker=tracker)
    wrapped = PlanningWrapper(LineEnv(), Deterministic(line_model), n_action_steps=n_action_steps)
    env = LineEnv()
    for episode in range(2):
        wrapped.reset(seed=episode)
        observation, _ = env.reset(seed=episode)
        state, start = None, np.array([True])
        for _ in range(LINE_LENGTH):
            wrapped.step()
            action, state = line_model.predict(observation, state, start, deterministic=True)
            observation, start = env.step(action)[0], np.array([False])
    actions = np.stack(env.actions)
    np.testing.assert_allclose(np.stack(wrapped.unwrapped.actions), actions, rtol=1e-4, atol=1e-5)
    assert actions.std(axis=0).max() > 1e-3


def test_wrapper_of_several_envs_acts_as_predict_does(line_model: Diffuser) -> None:
    line_model.set_planning(n_candidates=4, n_action_steps=3)
    wrapped = VecPlanningWrapper(DummyVecEnv([LineEnv] * 3), Deterministic(line_model), n_action_steps=3)
    venv = DummyVecEnv([LineEnv] * 3)
    for each in (wrapped, venv):
        each.seed(0)
    planned = spy(line_model, "plan")
    wrapped.reset()
    observations, state, starts = venv.reset(), None, np.ones(3, bool)
    for _ in range(2 * LINE_LENGTH):
        wrapped.step()
        actions, state = line_model.predict(observations, state, starts, deterministic=True)
        observations, _, starts, _ = venv.step(actions)
    assert [len(arguments[0]) for arguments, _ in planned] == [3] * (2 * LINE_LENGTH // 3)
    for first, second in zip(wrapped.unwrapped.envs, venv.envs, strict=True):
        np.testing.assert_allclose(np.stack(first.actions), np.stack(second.actions), rtol=1e-4, atol=1e-5)
    del line_model.plan


def test_wrapper_seeds_plans_of_the_model_itself(line_model: Diffuser) -> None:
    runs = []
    for seed in (0, 0, 1):
        env = PlanningWrapper(LineEnv(), line_model, n_action_steps=2)
        env.reset(seed=seed)
        env.unwrapped.position = np.zeros(2, np.float32)
        for _ in range(LINE_LENGTH):
            *_, info = env.step()
        runs.append(np.stack(env.unwrapped.actions))
        assert info["plan_observations"].shape == (LINE_HORIZON, 2)
    np.testing.assert_array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 1e-3


def test_wrapper_passes_goals_on() -> None:
    model = make_model(goal_conditioned=True)
    space = make_dataset().observation_space
    goal = some_observations(1)[0]
    env = PlanningWrapper(RandomEnv(space, box(ACTION_DIM)), model, goal=goal)
    env.reset(seed=0)
    *_, info = env.step()
    np.testing.assert_allclose(info["plan_observations"][-1], goal, rtol=1e-5)
    chosen = PlanningWrapper(RandomEnv(space, box(ACTION_DIM)), model, mode="goal")
    assert chosen.action_space == model.goal_space
    chosen.reset(seed=0)
    *_, info = chosen.step(model.goal_space.high)
    np.testing.assert_allclose(info["plan_observations"][-1], model.goal_space.high, rtol=1e-4)


def test_goals_with_several_candidates_train_the_value_that_chooses() -> None:
    """Several plans, or guidance, need a value; where neither is asked for, a model for goals has none."""
    assert make_model(goal_conditioned=True).value is None
    model = make_model(goal_conditioned=True, n_candidates=3)
    assert model.value is not None and model.guidance_scale == 0.0
    observations = make_dataset().observations[:2]
    plan = model.plan(obs=observations, goal=observations[::-1], n_candidates=4)
    assert plan.observations.shape[:2] == (2, HORIZON) and plan.values.shape == (2,)
    np.testing.assert_allclose(plan.observations[:, -1], observations[::-1], rtol=1e-3, atol=1e-3)
    assert make_model(goal_conditioned=True, guidance_scale=0.1).value is not None
