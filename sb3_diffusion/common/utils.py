"""What several algorithms share and SB3 lacks."""

import inspect
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from torch import nn

from sb3_diffusion.common.allowlist import register_value_class
from sb3_diffusion.common.distributed import average, average_gradients

MIN_SCALE = 1e-3
"""Smallest spread or magnitude that numbers are divided by; data that vary less keep their scale."""


class NonFiniteError(FloatingPointError):
    """A number that has to be finite is NaN or infinite: a loss, a gradient, what an environment returns, a weight."""


@contextmanager
def process_randomness_kept() -> Iterator[None]:
    """What is drawn or seeded inside leaves the process's own generators, of Python, NumPy and torch, as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with th.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def minimize(optimizer: th.optim.Optimizer, loss: th.Tensor, max_grad_norm: float | None = None) -> th.Tensor:
    """
    One optimiser step on ``loss``. Gradients are computed for the parameters of ``optimizer`` alone: networks that the
    loss merely passes through are neither changed nor charged for.

    On the CPU, where looking costs nothing, there is no step if the loss is not finite, or the norm of the gradient where
    it is bounded.

    :param optimizer: optimiser of the parameters to change
    :param loss: scalar tensor
    :param max_grad_norm: largest norm of the gradient; None for no bound
    :return: the loss, detached; where several processes train together, its mean over them
    :raises NonFiniteError: instead of the step
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    on_cpu = loss.device.type == "cpu"
    mean_loss = average(loss.detach())
    if on_cpu and not math.isfinite(value := mean_loss.item()):
        raise NonFiniteError(f"is {value}")
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    average_gradients(parameters)
    if max_grad_norm is not None:
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if on_cpu and not math.isfinite(value := norm.item()):
            raise NonFiniteError(f"has a gradient of norm {value}")
    optimizer.step()
    return mean_loss


def move_average(averages: Iterable[th.Tensor], values: Iterable[th.Tensor], decay: float) -> None:
    """
    Move averages towards values, in place: SB3's ``polyak_update`` for all tensors in one call.

    :param averages: tensors to change
    :param values: tensors of the same shapes, in the same order
    :param decay: share of the averages that stays
    """
    with th.no_grad():
        th._foreach_lerp_(list(averages), list(values), 1.0 - decay)


def warmed_up_decay(decay: float, n_updates: int) -> float:
    """
    Decay of an average that is at first one over the updates so far.

    :param decay: largest share of the average that stays
    :param n_updates: updates made, this one included
    :return: the share that stays now
    """
    return min(decay, n_updates / (n_updates + 10))


@register_value_class
class CosineSchedule:
    r"""
    Learning rate $\frac{1}{2} r_0 (1 + \cos(\pi (1 - p)))$ at remaining progress $p$: from ``initial`` down to 0.

    :param initial: $r_0$
    """

    def __init__(self, initial: float) -> None:
        self.initial = initial

    def __call__(self, progress_remaining: float) -> float:
        return 0.5 * self.initial * (1.0 + math.cos(math.pi * (1.0 - progress_remaining)))

    def __repr__(self) -> str:
        return f"CosineSchedule(initial={self.initial})"


def policy_alias(observation_space: spaces.Space) -> str:
    """
    :param observation_space: of the environment or the data
    :return: alias of the policy that such observations ask for
    """
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


def expectile_loss(error: th.Tensor, expectile: float) -> th.Tensor:
    r"""
    $|\tau - 1(u < 0)| u^2$ of each entry (arXiv 2110.06169, eq. 5).

    :param error: $u$, the target minus the estimate
    :param expectile: $\tau$ in (0, 1); 0.5 is half the squared error
    :return: losses, same shape as ``error``
    """
    return th.where(error < 0.0, 1.0 - expectile, expectile) * error.square()


def make_optimizer(
    optimizer_class: type[th.optim.Optimizer],
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    optimizer_kwargs: dict[str, Any] | None = None,
) -> th.optim.Optimizer:
    """
    Build an optimiser; Adam and AdamW take their fused form, one pass over all parameters, unless told otherwise.

    :param optimizer_class: class of the optimiser
    :param parameters: what it changes; those without gradients are left out
    :param learning_rate: initial learning rate
    :param optimizer_kwargs: further arguments of ``optimizer_class``
    :return: the optimiser
    """
    kwargs: dict[str, Any] = dict(optimizer_kwargs or {})
    if optimizer_class in (th.optim.Adam, th.optim.AdamW) and not {"fused", "foreach", "differentiable"} & kwargs.keys():
        kwargs["fused"] = True
    return optimizer_class([p for p in parameters if p.requires_grad], lr=learning_rate, **kwargs)  # type: ignore[call-arg]


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """
    :param name: name of an argument
    :param value: its value
    :param low: smallest value allowed
    :param high: largest value allowed
    :raises ValueError: if the value is no number, or lies outside
    """
    if not isinstance(value, Real) or not low <= value <= high:
        raise ValueError(f"`{name}` must lie in [{low}, {high}]: got {value!r}.")


def check_integer(name: str, value: int, low: int, high: float = float("inf")) -> None:
    """
    :param name: name of an argument that counts something
    :param value: its value, of Python or NumPy
    :param low: smallest value allowed
    :param high: largest value allowed
    :raises ValueError: if the value is no integer, or lies outside
    """
    if not isinstance(value, Integral):
        raise ValueError(f"`{name}` must be an integer in [{low}, {high}]: got {value!r}.")
    check_range(name, value, low, high)


def check_bound(name: str, value: float | None) -> None:
    """
    :param name: name of an argument
    :param value: its value, a bound; None for no bound
    :raises ValueError: if it is not positive
    """
    if value is not None and not (isinstance(value, Real) and value > 0.0):
        raise ValueError(f"`{name}` must be positive, or None for no bound: got {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """
    :param name: name of an argument
    :param value: its value
    :param choices: values allowed
    :raises ValueError: if the value is another
    """
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {list(choices)}: got {value!r}.")


def check_arguments(name: str, arguments: Iterable[str], cls: type) -> None:
    """
    :param name: of an argument that holds arguments of a constructor
    :param arguments: their names
    :param cls: class of the constructor
    :raises TypeError: if it takes no such arguments
    """
    taken: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        parameters = inspect.signature(base).parameters
        taken.update(parameters)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
        if not base.__module__.startswith("sb3_diffusion."):
            return  # what it takes out of its `**kwargs` nobody knows
    unknown = [argument for argument in arguments if argument not in taken]
    if unknown:
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names = sorted(name for name, parameter in taken.items() if parameter.kind not in variable)
        raise TypeError(f"`{name}` must be arguments of {cls.__name__}, {', '.join(names)}: got {', '.join(unknown)}.")


class ActionSpaceError(ValueError, AssertionError):
    """An action space that no method can act in: a wrong value, for which SB3's algorithms raise an `AssertionError`."""


def check_action_space(user: str, space: spaces.Space) -> None:
    """
    :param user: what acts in it or stores its actions, for the message
    :param space: of the actions
    :raises ActionSpaceError: unless it is a Box whose actions can be scaled to [-1, 1] and back, in float32
    """
    if not isinstance(space, spaces.Box) or not np.isfinite([space.low, space.high]).all():
        raise ActionSpaceError(
            f"{user} needs a Box action space with finite bounds: got {space}. Wrap the environment so that it takes such "
            "actions."
        )
    with np.errstate(over="ignore"):
        width = space.high.astype(np.float32) - space.low.astype(np.float32)
    if not ((width > 0.0) & (width < np.inf)).all():
        raise ActionSpaceError(
            f"{user} scales actions to [-1, 1], so that low < high must hold in every dimension, with a difference that "
            f"float32 can tell: got {space}. Leave out dimensions that cannot vary."
        )
