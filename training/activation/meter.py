"""Counts what autograd keeps for backward: distinct storages, without what the weights hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class SavedMeter:
    """While open, adds up the storages that autograd saves; each counts once, whole.

    is_shared: whether a tensor's memory exists anyway (parameters, buffers, tables).
    """

    def __init__(self, is_shared: Callable[[Tensor], bool]) -> None:
        self._is_shared = is_shared
        self._seen: dict[int, StorageWeakRef] = {}
        self._hooks: list[torch.autograd.graph.saved_tensors_hooks] = []
        self.num_bytes = 0

    def __enter__(self) -> SavedMeter:
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _same)
        hooks.__enter__()
        self._hooks.append(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.pop().__exit__(*error)

    def count(self, tensor: Tensor) -> None:
        """Add the tensor's storage, unless it is shared or was counted and still lives."""
        if self._is_shared(tensor):
            return
        storage = tensor.untyped_storage()
        known = self._seen.get(storage.data_ptr())
        if known is None or known.expired():
            self._seen[storage.data_ptr()] = StorageWeakRef(storage)
            self.num_bytes += storage.nbytes()

    def _pack(self, tensor: Tensor) -> Tensor:
        self.count(tensor)
        return tensor.detach()  # an output that its own node kept would never be freed


def _same(tensor: Tensor) -> Tensor:
    return tensor
