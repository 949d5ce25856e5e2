"""Where the time of a step goes, by named span.

Host spans are always on. A device runs asynchronously, so on a step whose row is logged the clock
synchronises it at span edges; otherwise forward time would be charged to whoever waits next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class PhaseClock:
    """Seconds per span since the last `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.synchronize_edges = False
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, span: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[span] = self.seconds.get(span, 0.0) + self._now() - start

    def reset(self) -> None:
        self.seconds = {}

    def _now(self) -> float:
        if self.synchronize_edges and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
