"""Plans of Diffuser: known laws, entries that are given, the best of several, and how plans are followed."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch as th
from diffuser_models import (
    ACTION_DIM,
    HORIZON,
    NET,
    OBS_DIM,
    PREDICTION_TYPES,
    SAMPLERS,
    Calls,
    Parameter,
    act,
    box,
    calls_of,
    make_dataset,
    make_model,
    planner_loss,
    same_plan,
    sequence,
    some_observations,
    spy,
)
from envs import PointGoalEnv, RandomEnv
from exact_denoisers import ChainDenoiser, ExactNetwork
from gymnasium import spaces
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_diffusion import Diffuser, OfflineDataset, PDTracker
from sb3_diffusion.common.samplers import steps_between
from sb3_diffusion.common.schedules import cosine_betas
from sb3_diffusion.diffuser.policies import DiffuserPolicy
from sb3_diffusion.diffuser.windows import shift_windows

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
