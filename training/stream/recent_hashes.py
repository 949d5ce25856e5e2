"""A bounded memory of documents, across sources: which of the last `size` were seen before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class RecentHashes:
    """The last `size` 64-bit hashes that were let through, with whose they are; 0 remembers none.

    A source may repeat itself in its next epoch, but neither within one nor after another source.
    """

    def __init__(self, size: int) -> None:
        self._ring = np.zeros(size, dtype=np.uint64)
        self._count = 0
        self._owners: dict[int, tuple[int, int]] = {}  # hash -> (source, epoch)

    def is_new(self, value: int, *, source: int, epoch: int) -> bool:
        """Whether `value` is nobody's, or this source's of an earlier epoch; then it is kept."""
        size = len(self._ring)
        if size == 0:
            return True
        owner = self._owners.get(value)
        if owner is not None:
            if owner[0] != source or owner[1] == epoch:
                return False
            self._owners[value] = (source, epoch)
            return True
        place = self._count % size
        if self._count >= size:
            del self._owners[int(self._ring[place])]
        self._ring[place] = value
        self._owners[value] = (source, epoch)
        self._count += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """count, the ring's hashes (n,) int64 and their owners (n, 2) int64."""
        used = self._ring[: min(self._count, len(self._ring))]
        owners = np.array([self._owners[value] for value in used.tolist()], dtype=np.int64)
        return {
            "count": self._count,
            "ring": torch.from_numpy(used.view(np.int64).copy()),
            "owners": torch.from_numpy(owners.reshape(-1, 2)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the memory by a saved one of at most the same `size`."""
        used = state["ring"].numpy().view(np.uint64)
        self._count = state["count"]
        self._ring[: len(used)] = used
        pairs = zip(used.tolist(), state["owners"].tolist(), strict=True)
        self._owners = {value: (source, epoch) for value, (source, epoch) in pairs}
