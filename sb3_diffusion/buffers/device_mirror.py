"""The arrays of a buffer as tensors on the device where batches are needed."""

from __future__ import annotations

import warnings

import numpy as np
import torch as th

#: share of the free device memory that is left to networks and optimizers
DEVICE_MEMORY_RESERVE = 0.2


class DeviceMirror:
    """
    The arrays of a buffer as tensors to gather rows from.

    Where ``copy`` is off, the tensors are views of the arrays: nothing is copied and nothing can be out of date. Where it
    is on, arrays are copied to ``device``, smallest first, as far as ``budget`` allows; uint8 images stay on the host.
    Rows of an array that stayed are gathered there and then moved, so that the caller sees no difference.

    :param arrays: of shape ``(n_rows, n_envs, ...)``, by name
    :param device: where the gathered rows are needed
    :param n_rows: number of rows in use, counted from the first; the others need no copy
    :param copy: None means exactly when ``device`` is not the CPU
    :param budget: bytes that copies may take; None means the free memory of a CUDA device less
        `DEVICE_MEMORY_RESERVE`, no limit elsewhere
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        device: th.device,
        n_rows: int,
        copy: bool | None = None,
        budget: float | None = None,
    ) -> None:
        self.device = device
        self.copied: set[str] = set()
        self._host = {name: _as_tensor(array) for name, array in arrays.items()}
        self._tables: dict[str, th.Tensor] = {}
        self._axes: dict[str, list[int]] = {}
        if copy is None:
            copy = device.type != "cpu"
        if budget is None:
            budget = float("inf")
            if copy and device.type == "cuda":
                budget = (1 - DEVICE_MEMORY_RESERVE) * th.cuda.mem_get_info(device)[0]
        for name, host in sorted(self._host.items(), key=lambda item: item[1].nbytes):
            is_image = host.dtype == th.uint8 and host.ndim >= 5
            if copy and not is_image and host.nbytes <= budget:
                budget -= host.nbytes
                self.copied.add(name)
                self._tables[name] = th.empty(host.shape, dtype=host.dtype, device=device).flatten(0, 1)
                self.refresh(name, 0, n_rows)
            else:
                self._set_view(name, host)
        self._elsewhere = {name for name in self._tables if name not in self.copied and device.type != "cpu"}

    def _set_view(self, name: str, host: th.Tensor) -> None:
        """
        Gather from the array itself; if it is a transposed view, from the layout that lies in memory, as this is faster.

        :param name: of the array
        :param host: view of the array, ``(n_rows, n_envs, ...)``
        """
        flat = host.flatten(0, 1)
        strides = flat.stride()
        order = sorted(range(flat.ndim), key=lambda axis: -strides[axis])
        if order[0] == 0 and order != list(range(flat.ndim)):
            self._axes[name] = [order.index(axis) for axis in range(flat.ndim)]
            flat = flat.permute(order)
        self._tables[name] = flat

    def refresh(self, name: str, first: int, n_rows: int) -> None:
        """
        Copy rows that have changed on the host; does nothing for an array that has no copy.

        :param name: of the array
        :param first: first row, taken modulo the number of rows
        :param n_rows: how many, going on at row 0 after the last one
        """
        if name not in self.copied or n_rows == 0:
            return
        host = self._host[name]
        table = self._tables[name].unflatten(0, host.shape[:2])
        first %= len(host)
        n_rows = min(n_rows, len(host))
        end = min(first + n_rows, len(host))
        table[first:end].copy_(host[first:end])
        if n_rows > end - first:
            table[: n_rows - (end - first)].copy_(host[: n_rows - (end - first)])

    def gather(self, name: str, index: th.Tensor) -> th.Tensor:
        """
        Rows of one array.

        :param name: of the array
        :param index: flat indices ``row * n_envs + env`` on the device, of any shape
        :return: new tensor on the device, ``(*index.shape, ...)``
        """
        table = self._tables[name]
        flat = index if index.ndim == 1 else index.flatten()
        if name in self._elsewhere:
            values = table.index_select(0, flat.cpu()).to(self.device)
        else:
            values = table.index_select(0, flat)
        if name in self._axes:
            values = values.permute(self._axes[name])
        return values if index.ndim == 1 else values.unflatten(0, index.shape)


def _as_tensor(array: np.ndarray) -> th.Tensor:
    """
    :param array: may be read-only, which torch cannot express; nothing here writes to it
    :return: view of the array
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return th.from_numpy(array)
