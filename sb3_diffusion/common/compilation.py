"""How losses are run: as they are written, or compiled."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch as th

MethodT = TypeVar("MethodT", bound=Callable[..., Any])

COMPILE_CHOICES = (False, True, "cuda_graphs")
"""Values of the argument ``compile`` of every algorithm."""


def compiled_loss(method: MethodT) -> MethodT:
    """
    Mark a method of an algorithm, a function of tensors, to be run by ``torch.compile`` where the model asks for it.

    The marked method is compiled, not a network: modules and their ``state_dict`` stay as they are. Without a working
    compiler the method is run as it is written from then on, after one warning of the model.

    :param method: method of an [OfflineAlgorithm][sb3_diffusion.OfflineAlgorithm]
    :return: the same method, choosing at each call
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any) -> Any:
        if th.compiler.is_compiling() or not self.compile or self._compiler_failed:
            return method(self, *args)
        with_graphs = self.compile == "cuda_graphs" and self.device.type == "cuda"
        # Draws of one run must not be repeated by the second one
        before = self.generator.get_state()
        try:
            return _compiled(method, "reduce-overhead" if with_graphs else None)(self, *args)
        except th._dynamo.exc.TorchDynamoException as error:
            self._compiler_failed = True
            warnings.warn(
                f"Losses cannot be compiled here and run as they are written: {_first_line(error)} "
                "Install a C++ compiler (or Triton, for a GPU), or set `compile=False`.",
                stacklevel=2,
            )
            self.generator.set_state(before)
            return method(self, *args)

    return run  # type: ignore[return-value]


@functools.cache
def _compiled(method: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    return th.compile(method, mode=mode)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") + "."
