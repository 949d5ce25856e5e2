"""A bounded memory of numbers: which of the last `size` were seen before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class RecentHashes:
    """The last `size` 64-bit hashes that were let through; size 0 remembers none."""

    def __init__(self, size: int) -> None:
        self._ring = np.zeros(size, dtype=np.uint64)
        self._count = 0
        self._known: set[int] = set()

    def is_new(self, value: int) -> bool:
        """Whether `value` is not among them; a new one is remembered."""
        size = len(self._ring)
        if size == 0:
            return True
        if value in self._known:
            return False
        place = self._count % size
        if self._count >= size:
            self._known.remove(int(self._ring[place]))
        self._ring[place] = value
        self._known.add(value)
        self._count += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        used = self._ring[: min(self._count, len(self._ring))]
        return {"count": self._count, "ring": torch.from_numpy(used.view(np.int64).copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        used = state["ring"].numpy().view(np.uint64)
        self._count = state["count"]
        self._ring[: len(used)] = used
        self._known = set(used.tolist())
