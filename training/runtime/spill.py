"""Names the moment when a driver moves tensors to host memory instead of failing.

On Windows the display driver answers a full card by paging (WDDM): no allocation fails, and every
step takes many times as long. Nothing can be done about it from inside; a person who is told can
close another program or lower the batch.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable

import torch

FULL_SHARE = 0.97
SLOWER = 3.0
WINDOW = 32
FEWEST = 8
SAY_AGAIN_S = 600.0


class SpillWatch:
    """Asked once per step; says so when steps became slow while the device is full.

    read: share of the device's memory in use by all programs, asked after a slow step only.
    """

    def __init__(
        self,
        *,
        read: Callable[[], float],
        say: Callable[[str], object],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._say, self._now = read, say, now
        self._usual: deque[float] = deque(maxlen=WINDOW)
        self._slow_before = False
        self._last: float | None = None
        self._quiet_until = float("-inf")

    def check(self) -> bool:
        """Whether it was said just now: two steps in a row were slow (one alone evaluates)."""
        now = self._now()
        seconds = None if self._last is None else now - self._last
        self._last = now
        if seconds is None:
            return False
        usual = statistics.median(self._usual) if len(self._usual) >= FEWEST else None
        slow = usual is not None and seconds > SLOWER * usual
        if not slow:
            self._usual.append(seconds)
        again, self._slow_before = slow and self._slow_before, slow
        if usual is None or not again or now < self._quiet_until:
            return False
        share = self._read()
        if share < FULL_SHARE:
            return False
        self._quiet_until = now + SAY_AGAIN_S
        self._say(
            f"[VRAM SPILL] a step takes {seconds:.1f} s instead of {usual:.1f} s and {share:.0%} "
            "of the GPU's memory is in use: the driver pages to RAM. Close other programs or "
            "lower --batch-size"
        )
        return True


def watch_for_spill(device: torch.device, say: Callable[[str], object]) -> SpillWatch | None:
    """A watch where drivers page: CUDA on Windows."""
    if device.type != "cuda" or sys.platform != "win32":
        return None

    def read() -> float:
        free, total = torch.cuda.mem_get_info(device)
        return 1.0 - free / total

    return SpillWatch(read=read, say=say)
