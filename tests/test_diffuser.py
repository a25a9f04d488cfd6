"""Diffuser (arXiv 2205.09991): statistics, losses as slow loops, averages, files and presets."""

import inspect
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from diffuser_models import (
    ACTION_DIM,
    HORIZON,
    OBS_DIM,
    PREDICTION_TYPES,
    TRANSFORMER,
    UNET,
    Parameter,
    act,
    box,
    calls_of,
    equal,
    make_dataset,
    make_model,
    online_weights,
    planner_loss,
    same_plan,
    sequence,
    some_observations,
    spy,
    trained,
    weights,
)
from envs import RandomEnv
from gymnasium import spaces
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_diffusion import Diffuser, OfflineDataset, PDTracker, PlanningWrapper
from sb3_diffusion.buffers import TrajectorySamples
from sb3_diffusion.common.schedules import cosine_betas
from sb3_diffusion.diffuser import presets
from sb3_diffusion.diffuser.policies import DiffuserPolicy

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


def test_what_no_longer_learns_keeps_its_average() -> None:
    """Else the average would become the last weights."""
    model = make_model(n_value_steps=3, learning_rate=1e-2)
    model.train(3)
    average = weights(model.value.averaged)
    model.train(20)
    assert equal(weights(model.value.averaged), average)
    average = weights(model.actor.averaged)
    assert not equal(average, online_weights(model.actor))
    model.train_planner = False
    model.train(20)
    assert equal(weights(model.actor.averaged), average)


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


def test_layer_sizes_as_sb3_gives_them() -> None:
    """Channels of the levels; the value's last level is a multiple of 64 wide."""

    def policy(net_arch: Any, **kwargs: Any) -> DiffuserPolicy:
        return DiffuserPolicy(box(OBS_DIM), box(ACTION_DIM), lambda _: 1e-3, horizon=8, net_arch=net_arch, **kwargs)

    def shapes(network: th.nn.Module) -> dict[str, th.Size]:
        return {name: value.shape for name, value in network.state_dict().items()}

    def unet(part: str, base_width: int, *multipliers: int) -> dict[str, th.Size]:
        sizes = dict(base_width=base_width, multipliers=multipliers, kernel_size=3)
        return shapes(getattr(policy(None, net_kwargs=sizes, with_value=part == "value"), part))

    with_list = policy([16], net_kwargs=dict(kernel_size=3))
    with_dict = policy(dict(pi=[24, 48], qf=[32, 72]), net_kwargs=dict(kernel_size=3))
    assert (shapes(with_list.actor), shapes(with_list.value)) == (unet("actor", 16, 1), unet("value", 64, 1))
    assert (shapes(with_dict.actor), shapes(with_dict.value)) == (unet("actor", 24, 1, 2), unet("value", 32, 1, 4))
    assert with_dict.predict(np.zeros((2, OBS_DIM), np.float32))[0].shape == (2, ACTION_DIM)
    transformer = policy([32, 32], backbone="transformer", net_kwargs=dict(n_heads=2)).actor.conditioned.net.trunk
    assert len(transformer.blocks) == 2
    for net_arch, kwargs in (([], {}), ([20], {}), ([32, 64], dict(backbone="transformer"))):
        with pytest.raises(ValueError, match="`net_arch` of a"):
            policy(net_arch, **kwargs)


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
    assert isinstance(model.tracker, PDTracker) is name.startswith("maze2d")


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
