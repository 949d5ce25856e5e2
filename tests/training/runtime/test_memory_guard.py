"""Measures against short memory: mildest first, no more than needed; and what they are based on."""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import psutil
import pytest
import torch

from training.runtime.memory_guard import (
    MEASURE_INTERVAL_S,
    MemoryGuard,
    Reading,
    Relief,
    clear_caches,
    own_cgroup,
    read_cgroup,
    read_cgroups,
    read_memory,
)


class Machine:
    """A machine whose memory is set by hand; clearing frees `freed` of 1000 bytes."""

    def __init__(self, *, used: int = 0, freed: int = 0, can_shrink: bool = True) -> None:
        self.used, self.freed, self.can_shrink = used, freed, can_shrink
        self.seconds, self.cleared, self.said = 0.0, 0, []
        self.prefetched = 0
        self.guard = MemoryGuard(
            soft=0.90,
            hard=0.97,
            read=lambda: [
                Reading(name="GPU", used=1, limit=1000),
                Reading(name="RAM", used=self.used, limit=1000),
            ],
            say=self.said.append,
            can_shrink=lambda: self.can_shrink,
            shrink_prefetch=self.shrink_prefetch,
            clear=self.clear,
            now=lambda: self.seconds,
        )

    def shrink_prefetch(self) -> bool:
        self.prefetched -= 1
        return self.prefetched >= 0

    def clear(self) -> None:
        self.cleared += 1
        self.used -= self.freed

    def check(self, after_s: float = MEASURE_INTERVAL_S) -> Relief:
        self.seconds += after_s
        return self.guard.check()


def test_below_the_soft_limit_nothing_happens() -> None:
    machine = Machine(used=899)
    assert [machine.check() for _ in range(5)] == [Relief.NONE] * 5
    assert machine.cleared == 0 and machine.said == []


def test_measures_are_taken_mildest_first_and_one_at_a_time() -> None:
    machine = Machine(used=920)
    assert machine.check() is Relief.CLEARED
    assert machine.check(after_s=1.0) is Relief.NONE  # it has not been given time to help
    assert machine.check() is Relief.SMALLER_MICRO_BATCH
    assert machine.check() is Relief.CLEARED  # freed memory is given back only so
    assert machine.check() is Relief.SMALLER_MICRO_BATCH
    machine.can_shrink = False
    assert machine.check() is Relief.CLEARED
    quiet = len(machine.said)
    assert [machine.check() for _ in range(5)] == [Relief.NONE] * 5
    assert len(machine.said) == quiet


def test_less_data_waits_before_a_micro_batch_is_made_smaller() -> None:
    machine = Machine(used=920)
    machine.prefetched = 2
    measures = [machine.check() for _ in range(6)]
    assert measures == [
        Relief.CLEARED,
        Relief.SMALLER_PREFETCH,
        Relief.CLEARED,
        Relief.SMALLER_PREFETCH,
        Relief.CLEARED,
        Relief.SMALLER_MICRO_BATCH,
    ]
    assert sum("less data" in line for line in machine.said) == 2


def test_when_clearing_helps_no_micro_batch_is_made_smaller() -> None:
    machine = Machine(used=950, freed=100)
    assert machine.check() is Relief.CLEARED
    assert [machine.check() for _ in range(3)] == [Relief.NONE] * 3
    assert machine.guard.stage is Relief.NONE and machine.cleared == 1


def test_above_the_hard_limit_the_run_ends_unless_clearing_helps() -> None:
    assert Machine(used=980).check() is Relief.SAVE_AND_STOP
    assert Machine(used=980, freed=50).check() is Relief.CLEARED
    machine = Machine(used=920)
    machine.check()
    machine.used = 990
    assert machine.check(after_s=1.0) is Relief.SAVE_AND_STOP  # not a measure later


def test_memory_is_read_at_most_once_a_second() -> None:
    machine = Machine(used=920)
    machine.check()
    machine.used = 990
    assert machine.check(after_s=0.5) is Relief.NONE


def test_what_is_said() -> None:
    gigabytes = int(1e9)
    said: list[str] = []
    used = [10.5, 9.2]
    MemoryGuard(
        soft=0.5,
        hard=1.0,
        read=lambda: [Reading(name="RAM", used=int(used[0] * gigabytes), limit=20 * gigabytes)],
        say=said.append,
        can_shrink=lambda: True,
        clear=lambda: used.pop(0),
        now=lambda: 0.0,
    ).check()
    assert said == [
        "[MEMORY GUARD] RAM Warning: 10.5GB / 10.0GB Limit",
        "[MEMORY GUARD] Triggering Garbage Collection & Cache Clear...",
        "[MEMORY GUARD] Cooled down to 9.2GB",
    ]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.current": "700\n", "memory.max": "1000\n"}, (600, 1000)),
        ({"memory.current": "700", "memory.max": "max"}, None),
        ({"memory/memory.usage_in_bytes": "700", "memory/memory.limit_in_bytes": "900"},
         (500, 900)),
        ({"memory.current": "damaged", "memory.max": "1000"}, None),
        ({}, None),
    ],
    ids=["v2", "v2 without limit", "v1", "unreadable", "none"],
)  # fmt: skip
def test_the_control_group_is_read_without_droppable_pages(
    tmp_path: Path, files: dict[str, str], expected: tuple[int, int] | None
) -> None:
    (tmp_path / "memory").mkdir()
    statistics = "anon 500\ninactive_file 100\ntotal_inactive_file 200\n"
    (tmp_path / "memory.stat").write_text(statistics, encoding="ascii")
    (tmp_path / "memory" / "memory.stat").write_text(statistics, encoding="ascii")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="ascii")
    reading = read_cgroup(tmp_path)
    assert (reading and (reading.used, reading.limit)) == expected


def test_the_own_control_group_is_found(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("1:name=systemd:/x\n0::/user.slice/run.scope\n", encoding="ascii")
    assert own_cgroup(tmp_path, membership) == tmp_path / "user.slice" / "run.scope"
    assert own_cgroup(tmp_path, tmp_path / "missing") == tmp_path


def test_a_limit_above_the_own_control_group_counts(tmp_path: Path) -> None:
    """As in a container that runs systemd, and in a step of a batch job."""
    own = tmp_path / "job" / "step" / "task"
    own.mkdir(parents=True)
    limits = {tmp_path: "5000", tmp_path / "job": "1000", tmp_path / "job" / "step": "max"}
    for folder, limit in limits.items():
        (folder / "memory.max").write_text(limit, encoding="ascii")
        (folder / "memory.current").write_text("700", encoding="ascii")
        (folder / "memory.stat").write_text("inactive_file 100\n", encoding="ascii")
    found = read_cgroups(own, tmp_path)
    assert [(reading.used, reading.limit) for reading in found] == [(600, 1000), (600, 5000)]
    assert [reading.limit for reading in read_cgroups(tmp_path, tmp_path)] == [5000]
    assert read_cgroups(tmp_path / "job", tmp_path / "elsewhere")[0].limit == 1000


def test_this_process_is_measured() -> None:
    reading = read_memory(torch.device("cpu"))[0]
    assert reading.name == "RAM" and reading.limit == psutil.virtual_memory().total
    before = reading.used
    with mmap.mmap(-1, 64 * 2**20) as block:  # not from the heap, which may have room
        for place in range(0, len(block), mmap.PAGESIZE):
            block[place] = 1  # touched, so resident
        assert read_memory(torch.device("cpu"))[0].used - before > 48 * 2**20


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_clearing_gives_freed_memory_back_to_the_system() -> None:
    """Many small blocks on the heap, freed but for the last, stay with the C library until then."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("another C library")
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(4096) for _ in range(20_000)]
    for block in blocks:
        ctypes.memset(block, 1, 4096)
    for block in blocks[:-1]:
        libc.free(block)
    full = psutil.Process().memory_info().rss
    clear_caches()
    assert full - psutil.Process().memory_info().rss > 40 * 2**20
    libc.free(blocks[-1])
