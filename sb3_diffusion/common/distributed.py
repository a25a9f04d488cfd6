"""
Training in several processes at once, each with its share of every batch: ``torchrun`` and ``torch.distributed``.

All processes draw the random numbers of the whole batch alike and keep their own rows, average the gradients before each
step, and so make the same step: that of one process with the whole batch, but for rounding.
"""

from collections.abc import Callable, Iterable

import torch as th
from torch import distributed as dist


def n_processes() -> int:
    """:return: number of processes that train together, 1 without a process group"""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """:return: number of this process among them, from 0"""
    return dist.get_rank() if n_processes() > 1 else 0


def own_share(batch_size: int) -> int:
    """
    :param batch_size: rows of a whole batch
    :return: rows of it that each process gets
    :raises ValueError: if they cannot be dealt out evenly
    """
    n = n_processes()
    if batch_size % n:
        raise ValueError(f"`batch_size` must be a multiple of the number of processes, {n}: got {batch_size}.")
    return batch_size // n


def own_rows(draw: Callable[[int], th.Tensor], n: int, dim: int = 0) -> th.Tensor:
    """
    Random numbers for this process's rows, out of those that all processes draw alike for the whole batch.

    :param draw: draws for that many rows
    :param n: rows of this process
    :param dim: axis of the rows
    :return: ``n`` rows
    """
    size = n_processes()
    return draw(n) if size == 1 else draw(size * n).narrow(dim, process_rank() * n, n)


def average(value: th.Tensor) -> th.Tensor:
    """
    :param value: of this process, such as a mean over its rows
    :return: mean over all processes, without gradient if there are several
    """
    return value if n_processes() == 1 else _average(value)


@th.compiler.disable
def _average(value: th.Tensor) -> th.Tensor:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / n_processes()


def standard_deviation(values: th.Tensor) -> th.Tensor:
    """
    :param values: of this process's rows
    :return: standard deviation over all values of all processes, a scalar
    """
    if n_processes() == 1:
        return values.std(correction=0)
    mean = average(values.mean())
    return average((values - mean).square().mean()).sqrt()


def average_gradients(parameters: Iterable[th.Tensor]) -> None:
    """
    :param parameters: whose gradients become the means over all processes, in one message
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if n_processes() == 1 or not gradients:
        return
    means = average(th.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def take_from_first(tensors: Iterable[th.Tensor], device: th.device) -> None:
    """
    :param tensors: that become, in place, what they are in the first process, wherever they are
    :param device: that the processes exchange tensors on: NCCL knows GPUs alone
    """
    if n_processes() == 1:
        return
    for tensor in tensors:
        sent = tensor.to(device)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)
