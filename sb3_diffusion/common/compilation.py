"""How losses and plans are run: as they are written or compiled, in full precision or with products of bfloat16."""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch as th
from torch import nn

MethodT = TypeVar("MethodT", bound=Callable[..., Any])

COMPILE_CHOICES = (False, True, "cuda_graphs")
"""Values of the argument ``compile`` of every algorithm."""

PRECISIONS = ("float32", "bfloat16")
"""Values of the argument ``precision`` of every algorithm."""


def autocast(precision: str, device: th.device) -> AbstractContextManager[Any]:
    """
    :param precision: one of ``PRECISIONS``
    :param device: where the tensors are
    :return: context in which matrix products are made in that precision
    """
    return th.autocast(device.type, dtype=th.bfloat16) if precision == "bfloat16" else nullcontext()


def accelerated(method: MethodT) -> MethodT:
    """
    Mark a method of an algorithm, a function of tensors, to be run in the model's ``precision``, and by ``torch.compile``
    where the model asks for it. What it returns, tensors or tuples and dicts of them, is float32 in either precision. It
    neither draws nor logs: what it needs of the first are its arguments, of the second its results.

    The marked method is compiled, not a network: modules and their ``state_dict`` stay as they are. Without a working
    compiler the method is run as it is written from then on, after one warning of the model.

    :param method: method of an [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    :return: the same method, choosing at each call
    """
    return _accelerated(method, _run)


def accelerated_actor_loss(method: MethodT) -> MethodT:
    """
    The same for a loss of the actor, which passes through networks that it does not train. Compiled code makes the gradients
    of all weights it meets, whoever wants them: while the loss runs, none but the actor's ask for any. As it is written, a
    loss is charged for what [minimize][sb3_diffusion.common.utils.minimize] wants.

    :param method: method of an algorithm with an ``actor`` that holds its optimiser
    :return: the same method, choosing at each call
    """
    return _accelerated(method, _run_for_actor)


def _accelerated(method: MethodT, run_method: Callable[..., Any]) -> MethodT:
    def run_in_precision(self: Any, *args: Any) -> Any:
        if self.precision == "float32":
            return run_method(method, self, *args)
        with autocast(self.precision, self.device):
            result = run_method(method, self, *args)
        return _as_float(result)

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        return method(self, *args) if th.compiler.is_compiling() else run_in_precision(self, *args)

    return run  # type: ignore[return-value]


class CompiledInference(nn.Module):
    """
    A base of modules whose network is long to run: outside of training it is called by ``torch.compile`` where
    ``use_compiler`` is set, as it is written otherwise and, after one warning, where there is no working compiler.
    """

    use_compiler = False

    def run(self, network: nn.Module, *args: th.Tensor) -> th.Tensor:
        """
        :param network: to call
        :param args: its arguments
        :return: its result
        """
        if self.use_compiler and not th.is_grad_enabled() and not th.compiler.is_compiling():
            try:
                return _compiled(_call, None)(network, *args)
            except th._dynamo.exc.TorchDynamoException as error:
                self.use_compiler = False
                warnings.warn(f"Plans {_CANNOT_BE_COMPILED.format(_first_line(error))}", stacklevel=3)
        return network(*args)


def _call(network: nn.Module, *args: th.Tensor) -> th.Tensor:
    return network(*args)


_CANNOT_BE_COMPILED = (
    "cannot be compiled here and run as they are written: {} Install a C++ compiler (or Triton, for a GPU), or set "
    "`compile=False`."
)


def _as_float(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_as_float, result))
    if isinstance(result, dict):
        return {name: _as_float(part) for name, part in result.items()}
    return result.float()


def _run(method: Callable[..., Any], self: Any, *args: Any) -> Any:
    if not self.compile or self._compiler_failed:
        return method(self, *args)
    with_graphs = self.compile == "cuda_graphs" and self.device.type == "cuda"
    try:
        return _compiled(method, "reduce-overhead" if with_graphs else None)(self, *args)
    except th._dynamo.exc.TorchDynamoException as error:
        self._compiler_failed = True
        warnings.warn(f"Losses {_CANNOT_BE_COMPILED.format(_first_line(error))}", stacklevel=3)
        return method(self, *args)


def _run_for_actor(method: Callable[..., Any], self: Any, *args: Any) -> Any:
    if not self.compile or self._compiler_failed:
        return method(self, *args)
    learned = {id(p) for group in self.actor.optimizer.param_groups for p in group["params"]}
    others = [p for p in self.policy.parameters() if p.requires_grad and id(p) not in learned]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        return _run(method, self, *args)
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@functools.cache
def _compiled(method: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    return th.compile(method, mode=mode)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") + "."
