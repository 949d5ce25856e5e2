"""A checkpoint that could not be written is tried again soon, and the last one waits for space."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runtime.faults import QuietOps, open_store
from training.runtime.checkpoint import CheckpointError
from training.runtime.save_schedule import FINAL_WAIT_S, RETRY_S, SaveSchedule


class FullDisk(QuietOps):
    full = False
    number = errno.ENOSPC

    def create(self, path: Path) -> int:
        if self.full:
            raise OSError(self.number, os.strerror(self.number))
        return super().create(path)


class Bench:
    """A schedule over a store whose disk can be filled, with a clock that is set by hand."""

    def __init__(self, directory: Path, *, interval: int = 10) -> None:
        self.ops, self.said, self.seconds, self.slept = FullDisk(), [], 0.0, []
        self.store = open_store(directory, ops=self.ops)
        self.schedule = SaveSchedule(
            self.store,
            interval=interval,
            say=self.said.append,
            now=lambda: self.seconds,
            sleep=self.sleep,
        )
        self.on_sleep: Any = lambda: None

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.on_sleep()

    def save(self, step: int, *, block: bool = False) -> bool:
        return self.schedule.save(step, make_state(step), block=block)

    def train(self, steps: range, *, seconds_per_step: float = 1.0) -> list[int]:
        """Steps after which a save was started."""
        saved = []
        for step in steps:
            self.seconds += seconds_per_step
            if self.schedule.is_due(step, requested=False):
                self.save(step)
                saved.append(step)
                while self.store._pending is not None and not self.store._pending.done():
                    pass
        return saved


def make_state(step: int) -> dict[str, Any]:
    return {
        "model": {"w": torch.full((2,), float(step))},
        "optimizer": {"w": {"moment": torch.ones(2)}},
        "features": {},
        "run": {"step": step},
    }


def test_saves_are_due_at_the_interval_and_on_request(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    due = [step for step in range(1, 31) if bench.schedule.is_due(step, requested=step == 7)]
    assert due == [7, 10, 20, 30]


def test_a_failed_save_is_tried_again_before_the_next_interval(ram_path: Path) -> None:
    bench = Bench(ram_path, interval=100)
    assert bench.train(range(1, 101)) == [100]
    bench.store.wait()
    bench.ops.full = True
    assert bench.train(range(101, 300)) == [200, 231, 262, 293]  # every 30 s from each failure
    assert bench.store.last_saved_step == 100  # the older one stays
    assert "disk full" in bench.said[0] and "trying again in 30 s" in bench.said[0]
    bench.ops.full = False
    assert bench.train(range(300, 400))[-1] < 330  # space again: saved soon, then quiet
    bench.store.close()
    assert bench.store.last_saved_step is not None and bench.store.last_saved_step >= 300


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=["linux", "windows", "python"],
)
def test_no_memory_for_the_copy_costs_neither_run_nor_interval(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bench = Bench(ram_path, interval=100)

    def no_room(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    with monkeypatch.context() as short:
        short.setattr("training.runtime.tensor_file.torch.empty", no_room)
        assert bench.train(range(100, 170)) == [100, 130, 160]
    assert "not enough memory" in bench.said[0] and "trying again in 30 s" in bench.said[0]
    assert bench.train(range(170, 200)) == [190]
    bench.store.close()
    assert bench.store.last_saved_step == 190


def test_any_other_error_while_copying_is_not_hidden(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    bench = Bench(ram_path)
    with monkeypatch.context() as broken:
        broken.setattr("training.runtime.tensor_file.torch.empty", fail)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            bench.save(3)
    bench.store.close()


def test_without_failures_the_clock_plays_no_part(ram_path: Path) -> None:
    bench = Bench(ram_path, interval=5)
    assert bench.train(range(1, 21), seconds_per_step=1000.0) == [5, 10, 15, 20]
    bench.store.close()
    assert bench.said == []


def test_the_last_save_waits_until_there_is_space(ram_path: Path) -> None:
    bench = Bench(ram_path)
    bench.ops.full = True

    def free_some() -> None:
        bench.ops.full = len(bench.slept) < 3

    bench.on_sleep = free_some
    bench.schedule.save_last(lambda: bench.save(9, block=True))
    bench.store.close()
    assert bench.slept == [RETRY_S] * 3
    assert bench.store.last_saved_step == 9
    assert "the last step is not saved yet" in bench.said[0]


def test_the_last_save_gives_up_in_the_end(ram_path: Path) -> None:
    bench = Bench(ram_path)
    bench.ops.full = True
    with pytest.raises(CheckpointError, match="disk full"):
        bench.schedule.save_last(lambda: bench.save(9, block=True))
    assert sum(bench.slept) == FINAL_WAIT_S
    bench.store.close()


def test_another_failure_of_the_last_save_is_raised_at_once(ram_path: Path) -> None:
    bench = Bench(ram_path)
    bench.ops.full, bench.ops.number = True, errno.EIO
    with pytest.raises(CheckpointError, match="Input/output error"):
        bench.schedule.save_last(lambda: bench.save(9, block=True))
    assert bench.slept == []
    bench.store.close()


def test_settling_says_what_failed_and_plans_the_next_attempt(ram_path: Path) -> None:
    bench = Bench(ram_path)
    bench.ops.full = True
    assert bench.save(3)
    bench.schedule.settle()
    bench.ops.full = False
    assert len(bench.said) == 1
    bench.seconds += RETRY_S
    assert bench.schedule.is_due(4, requested=False)
    assert bench.save(4) and not bench.schedule.is_due(5, requested=False)
    bench.store.close()


def test_a_failed_save_does_not_hide_what_ended_the_run(ram_path: Path) -> None:
    """The close of a failing run: the pending save failed as well, and is only said."""
    bench = Bench(ram_path)
    bench.ops.full = True
    bench.save(1)
    bench.schedule.close()
    assert any("not written" in line for line in bench.said)
    bench.ops.full = False
    again = open_store(ram_path)  # the directory was given up
    again.save(2, {"model": {"w": torch.ones(1)}}, {}, block=True)
    again.close()
