"""Steps back before the system's own answer to short memory, which is to kill the process.

Watched are the process against the machine's memory, the control group against its limit, and
what tensors hold on the device against its size. Above the soft share measures are taken one per
check, mildest first: clear caches, keep less data waiting, then smaller micro-batches at equal
effective batch. Above the
hard share the caches are cleared at once, and if that does not help the run saves and ends.
What the device allocator keeps in reserve does not count: it is there to be reused.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import psutil
import torch

from training.runtime.spill import SpillWatch

CHECK_INTERVAL_S = 1.0
MEASURE_INTERVAL_S = 10.0
GB = 1e9
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    # Version 2, then version 1: what is in use, the limit, and the statistics beside them.
    ("memory.current", "memory.max", "inactive_file"),
    ("memory/memory.usage_in_bytes", "memory/memory.limit_in_bytes", "total_inactive_file"),
)
# Of a host's memory, and of the device's where it is not taken from torch's own store of it:
# handles and work space of libraries, captured graphs, loaded kernels.
SHORT_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


@dataclass(slots=True, kw_only=True, frozen=True)
class Reading:
    """Bytes in use of `limit` bytes; `name` says of what."""

    name: str
    used: int
    limit: int

    @property
    def share(self) -> float:
        return self.used / self.limit


class Relief(IntEnum):
    """What a check asks for, mildest first; the guard itself does the first two."""

    NONE = 0
    CLEARED = 1
    SMALLER_PREFETCH = 2
    SMALLER_MICRO_BATCH = 3
    SAVE_AND_STOP = 4


class MemoryLimitReached(RuntimeError):
    """Memory stayed above the hard limit; the run was saved at `step` before this was raised."""

    def __init__(self, step: int | None) -> None:
        super().__init__(
            f"memory stays above --memory-hard-limit; saved at step {step}: free memory or lower "
            "--batch-size, the same command resumes there"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory on the device or the host was short.

    Only torch's allocator of device memory has an exception class of its own.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SHORT_MEMORY)


class MemoryGuard:
    """Reads memory at most once a second and says which measure is due.

    read: what is in use now. say: told what is done about it. shrink_prefetch: lets less data
    wait, False where it has been down to the least. can_shrink: whether a micro-batch can still be
    made smaller. spill: asked at every step. stage: the last measure, NONE while memory is below
    the soft share.
    """

    def __init__(
        self,
        *,
        soft: float,
        hard: float,
        read: Callable[[], Sequence[Reading]],
        say: Callable[[str], object],
        can_shrink: Callable[[], bool],
        shrink_prefetch: Callable[[], bool] = lambda: False,
        spill: SpillWatch | None = None,
        clear: Callable[[], object] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage = Relief.NONE
        self._soft, self._hard = min(soft, hard), hard
        self._read = read
        self._say = say
        self._can_shrink = can_shrink
        self._shrink_prefetch = shrink_prefetch
        self._spill = spill
        self._clear = clear or clear_caches
        self._now = now
        self._next_check = self._next_measure = now()

    def check(self) -> Relief:
        """The measure that was taken, or that the caller has to take (a smaller micro-batch)."""
        if self._spill is not None:
            self._spill.check()
        now = self._now()
        if now < self._next_check:
            return Relief.NONE
        self._next_check = now + CHECK_INTERVAL_S
        worst = self._worst()
        if worst is None or worst.share < self._soft:
            self.stage = Relief.NONE
            return Relief.NONE
        if worst.share >= self._hard:
            return self._clear_caches(worst, limit=self._hard)
        if now < self._next_measure:
            return Relief.NONE
        self._next_measure = now + MEASURE_INTERVAL_S
        # Freed memory shows only once it is given back, so every measure is followed by that.
        if self.stage is Relief.CLEARED:
            if self._shrink_prefetch():
                self._say("[MEMORY GUARD] Keeping less data waiting...")
                self.stage = Relief.SMALLER_PREFETCH
                return self.stage
            if not self._can_shrink():
                return Relief.NONE
            self.stage = Relief.SMALLER_MICRO_BATCH
            return self.stage
        return self._clear_caches(worst, limit=self._soft)

    def _clear_caches(self, worst: Reading, *, limit: float) -> Relief:
        self._say(
            f"[MEMORY GUARD] {worst.name} Warning: {worst.used / GB:.1f}GB / "
            f"{limit * worst.limit / GB:.1f}GB Limit"
        )
        self._say("[MEMORY GUARD] Triggering Garbage Collection & Cache Clear...")
        self._clear()
        self.stage = Relief.CLEARED
        after = self._worst()
        if after is not None and after.share >= self._hard:
            self.stage = Relief.SAVE_AND_STOP
        elif after is not None and after.share < limit:
            self._say(f"[MEMORY GUARD] Cooled down to {after.used / GB:.1f}GB")
        return self.stage

    def _worst(self) -> Reading | None:
        return max(self._read(), key=lambda reading: reading.share, default=None)


def read_memory(device: torch.device) -> list[Reading]:
    """Process, control groups (where one has a limit) and device, as far as they can be read."""
    rss, total = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    readings = [Reading(name="RAM", used=rss, limit=total)]
    readings += [group for group in read_cgroups(own_cgroup()) if group.limit < total]
    if device.type == "cuda":
        limit = torch.cuda.get_device_properties(device).total_memory
        used = torch.cuda.memory_allocated(device)
        readings.append(Reading(name="GPU", used=used, limit=limit))
    return readings


def own_cgroup(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Path:
    """Folder of the control group this process is in; the root where that cannot be told."""
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return root
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            return root / path.lstrip("/")
    return root


def read_cgroups(folder: Path, root: Path = CGROUPS) -> list[Reading]:
    """The control group in `folder` and those around it up to `root`, as far as they have a limit.

    A limit holds for all groups below it: that of a container or a batch job is often set above.
    """
    around = [folder, *folder.parents]
    around = around[: around.index(root) + 1] if root in around else [folder]
    readings = [read_cgroup(group) for group in around]
    return [reading for reading in readings if reading is not None]


def read_cgroup(root: Path) -> Reading | None:
    """The control group's memory without file pages the kernel may drop; None without a limit."""
    for current, maximum, droppable in CGROUP_FILES:
        try:
            used = int((root / current).read_text(encoding="ascii"))
            limit = (root / maximum).read_text(encoding="ascii").strip()
            lines = (root / current).with_name("memory.stat").read_text(encoding="ascii")
        except (OSError, ValueError):
            continue
        if limit == "max":
            return None
        statistics = dict(line.split() for line in lines.splitlines())
        cached = int(statistics.get(droppable, 0))
        return Reading(name="Container", used=max(0, used - cached), limit=int(limit))
    return None


def clear_caches() -> None:
    """Give back what Python, torch and the C library keep for reuse."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
        if trim is not None:
            trim(0)
