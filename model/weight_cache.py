"""Ternary codes kept while weights cannot change: between two optimizer steps, during generation.

A cache that outlives a block of code needs a rule for when a weight has changed, and there is none
that holds for every optimizer: writes through `.data` leave a tensor's version as it was. So codes
live only inside `held()`, and whoever opens it states that nothing is trained before it ends. The
version is compared all the same, which catches ordinary in-place writes inside the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Value = TypeVar("Value")


@dataclass(slots=True, kw_only=True)
class _Entry:
    weights: tuple[Tensor, ...]  # kept alive, so that no other tensor can get their identity
    versions: tuple[int, ...]
    value: Any


class TernaryCache:
    """What was computed from weights, by what it is and from which; counts its effects."""

    def __init__(self) -> None:
        self._entries: dict[tuple[object, ...], _Entry] = {}
        self._storages: set[int] | None = None
        self.hits = 0
        self.invalidations = 0

    @contextmanager
    def held(self) -> Iterator[TernaryCache]:
        """Within the block `cached` reuses what this cache holds; nothing may train there."""
        token = _ACTIVE.set(self)
        try:
            yield self
        finally:
            _ACTIVE.reset(token)

    def get(
        self, name: str, weights: tuple[Tensor, ...], setting: int, compute: Callable[[], Any]
    ) -> Any:
        """The value `compute` gave for these very tensors in their present version."""
        key = (name, setting, *map(id, weights))
        versions = tuple(map(version_of, weights))
        entry = self._entries.get(key)
        if entry is not None and entry.versions == versions:
            self.hits += 1
            return entry.value
        self.invalidations += entry is not None
        value = compute()
        self._entries[key] = _Entry(weights=weights, versions=versions, value=value)
        self._storages = None
        return value

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor's memory is what this cache keeps anyway."""
        if self._storages is None:
            values = (entry.value for entry in self._entries.values())
            tensors = (t for v in values for t in (v if isinstance(v, tuple) else (v,)))
            self._storages = {
                t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor)
            }
        return tensor.untyped_storage().data_ptr() in self._storages


def version_of(weight: Tensor) -> int:
    """Changes when the weight is written to in place."""
    # Tensors born under inference_mode have no version; nothing can write to them outside it.
    return -1 if weight.is_inference() else weight._version


_ACTIVE: ContextVar[TernaryCache | None] = ContextVar("ternary_cache", default=None)


def cached(
    name: str, weights: tuple[Tensor, ...], setting: int, compute: Callable[[], Value]
) -> Value:
    """compute(), or what it gave before within the present `held()` block.

    Only what comes from parameters is remembered: anything else is a passing tensor that no later
    call could ask for again. The value must not carry a gradient. A graph that is being traced
    remembers nothing: it would keep the value for ever.
    """
    if torch.compiler.is_compiling():
        return compute()
    cache = _ACTIVE.get()
    if cache is None or not all(isinstance(weight, nn.Parameter) for weight in weights):
        return compute()
    return cache.get(name, weights, setting, compute)


def active_cache() -> TernaryCache | None:
    """The cache of the present `held()` block."""
    return _ACTIVE.get()


def is_held(tensor: Tensor) -> bool:
    """Whether the present `held()` block, if there is one, keeps the tensor's memory."""
    cache = _ACTIVE.get()
    return cache is not None and cache.holds(tensor)
