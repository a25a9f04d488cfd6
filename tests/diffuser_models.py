"""Small planners on random episodes, and what looks into them."""

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.logger import Logger
from torch import nn

from sb3_diffusion import Diffuser, OfflineDataset, Plan
from sb3_diffusion.buffers import TrajectorySamples

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


class Parameter(nn.Module):
    """Answers with a tensor whose gradient can be looked at."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.output = nn.Parameter(th.randn(shape, generator=th.Generator().manual_seed(0)))

    def forward(self, x: th.Tensor, level: th.Tensor) -> th.Tensor:
        return self.output


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


def planner_loss(model: Diffuser, windows: th.Tensor, batch: TrajectorySamples) -> th.Tensor:
    """The planner's loss at what an update draws for it."""
    return model._planner_loss(windows, batch, model._draw_noise(windows), model._draw_levels(len(windows)))
