"""Numbers that go wrong: training stops with their names, what was saved stays, and values that diverge are reported."""

import warnings
from copy import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from algos import AlgoSpec
from gymnasium import spaces

from sb3_diffusion import DTQL, DiffusionQL, OfflineDataset
from sb3_diffusion.common.utils import NonFiniteError


def weights(model: Any) -> list[th.Tensor]:
    return [parameter.detach().clone() for parameter in model.policy.parameters()]


def test_loss(variant: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = variant.make(dataset=box_dataset).learn(3)
    model.save(tmp_path / "good")
    draw, before = model._draw_batch, weights(model)

    def poisoned(batch_size: int) -> Any:
        batch = draw(batch_size)
        model._last_batch = batch._replace(actions=batch.actions * th.nan)
        return model._last_batch

    monkeypatch.setattr(model, "_draw_batch", poisoned)
    with pytest.raises(NonFiniteError, match=r"update 4, at timestep 3: `\w+_loss` is nan.*`actions` of the batch.*good"):
        model.learn(3, reset_num_timesteps=False)
    for got, expected in zip(weights(model), before, strict=True):
        assert th.equal(got, expected)
    monkeypatch.undo()
    model.learn(1, reset_num_timesteps=False)


def test_gradient(spec: AlgoSpec, box_dataset: OfflineDataset, tmp_path: Path) -> None:
    model = spec.make(dataset=box_dataset)
    network = next(net for name, net in model.policy.networks() if any(p.requires_grad for p in net.parameters()))
    next(p for p in network.parameters() if p.requires_grad).register_hook(lambda gradient: gradient * th.nan)
    with pytest.raises(NonFiniteError, match="weights of"):
        model.learn(20)
    path = tmp_path / "model.zip"
    path.write_bytes(b"what was there")
    with pytest.raises(NonFiniteError, match="not finite, so that nothing is saved"):
        model.save(path)
    assert path.read_bytes() == b"what was there"


def test_bounded_gradient(box_dataset: OfflineDataset) -> None:
    model = DTQL("MlpPolicy", None, dataset=box_dataset, max_grad_norm=1.0, policy_kwargs=dict(net_arch=[8]), device="cpu")
    before = weights(model)
    next(model.critic.parameters()).register_hook(lambda gradient: gradient * th.inf)
    with pytest.raises(NonFiniteError, match="`critic_loss` has a gradient of norm"):
        model.learn(1)
    for got, expected in zip(weights(model), before, strict=True):
        assert th.equal(got, expected)


class Breaking(gym.Env):
    """Gives one number that is not finite in its twentieth step."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))

    def __init__(self, what: str) -> None:
        self.what, self.n_steps = what, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.n_steps += 1
        broken = self.n_steps == 20
        observation = np.full(2, np.inf if broken and "observation" in self.what else 0.0, np.float32)
        reward = np.nan if broken and self.what == "reward" else 0.0
        return observation, reward, broken and self.what == "last observation", self.n_steps % 7 == 0, {}


@pytest.mark.parametrize("what", ["reward", "observation", "last observation"])
def test_environment(spec: AlgoSpec, what: str) -> None:
    spec.need("learns_online")
    model = spec.make(Breaking(what), learning_starts=100)
    with pytest.raises(NonFiniteError, match=f"The {what.split()[-1]} at timestep 20"):
        model.learn(50)
    assert model.replay_buffer.size() == 19


def test_values_that_diverge(box_dataset: OfflineDataset) -> None:
    arguments: dict[str, Any] = dict(policy_kwargs=dict(net_arch=[8]), gamma=0.9, device="cpu")
    model = DiffusionQL("MlpPolicy", None, dataset=box_dataset, **arguments).learn(1)
    with th.no_grad():
        for parameter in model.policy.critic_target.parameters():
            parameter.mul_(1e3)
    with pytest.warns(UserWarning, match="Action values diverge: at timestep 6 ") as caught:
        model.learn(5, reset_num_timesteps=False)
    assert sum("diverge" in str(warning.message) for warning in caught) == 1
    assert model.logger.name_to_value["train/target_size"] > 0.0


def test_values_do_not_diverge_where_no_reward_has_come_yet(box_dataset: OfflineDataset) -> None:
    """What an untrained critic tells is more than rewards of 0 allow."""
    data = copy(box_dataset)
    data.rewards = np.zeros_like(data.rewards)
    model = DiffusionQL("MlpPolicy", None, dataset=data, policy_kwargs=dict(net_arch=[8]), device="cpu")
    with th.no_grad():
        for critic in (model.critic, model.critic_target):
            for parameter in critic.parameters():
                parameter.mul_(10.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(20, log_interval=1)
    assert model.logger.name_to_value["train/target_size"] > 1.0


def degenerate(case: str, n: int = 40) -> OfflineDataset:
    """Data that are poor in one way each."""
    rng = np.random.default_rng(0)
    scale = {"tiny actions": 1e-4, "huge actions": 1e4}.get(case, 1.0)
    n = 1 if case == "single transition" else n
    observations = rng.normal(size=(n + 1, 3)).astype(np.float32)
    if case == "constant observations":
        observations[:] = 0.7
    if case == "one constant dimension":
        observations[:, 1] = -3e3
    rewards = np.full(n, 2.0) if case == "constant rewards" else rng.normal(size=n)
    ends = np.ones(n, bool) if case == "episodes of one step" else np.arange(n) % 20 == 19
    ends[-1] = True
    return OfflineDataset(
        observations[:-1],
        (scale * rng.uniform(-1, 1, (n, 2))).astype(np.float32),
        rewards.astype(np.float32),
        observations[1:],
        ends & (case != "constant rewards"),
        ends & (case == "constant rewards"),
        observation_space=spaces.Box(-np.inf, np.inf, (3,)),
        action_space=spaces.Box(-scale, scale, (2,)),
        name=case,
    )


@pytest.mark.parametrize(
    "case",
    [
        "constant observations",
        "one constant dimension",
        "constant rewards",
        "episodes of one step",
        "single transition",
        "tiny actions",
        "huge actions",
    ],
)
def test_degenerate_data(spec: AlgoSpec, case: str) -> None:
    data = degenerate(case)
    model = spec.make(dataset=data).learn(3)
    actions, _ = model.predict(data.observations[:5], deterministic=True)
    assert data.action_space.contains(actions[0])
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    span = data.action_space.high[0]
    assert np.abs(actions).max() > 1e-6 * span
