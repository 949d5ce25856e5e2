"""A run that stands still leaves the stacks of all threads, once per hang, by its own clock."""

from __future__ import annotations

import threading
from pathlib import Path

from training.runtime.watchdog import HangWatchdog


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def stand_here(entered: threading.Event, release: threading.Event) -> None:
    entered.set()
    release.wait()


def test_stacks_of_all_threads_are_dumped_once_per_hang(tmp_path: Path) -> None:
    clock, said = Clock(), []
    entered, release = threading.Event(), threading.Event()
    worker = threading.Thread(target=stand_here, args=(entered, release))
    worker.start()
    entered.wait()
    watchdog = HangWatchdog(tmp_path, timeout_s=60.0, say=said.append, now=clock)
    watchdog.beat(7)
    clock.seconds += 59.0
    assert watchdog.check() is None
    clock.seconds += 1.0
    path = watchdog.check()
    assert path is not None and path.name.startswith("hang_step_00000007_")
    assert path.parent == tmp_path / "errors"
    text = path.read_text(encoding="utf-8")
    assert "stand_here" in text and "test_stacks_of_all_threads" in text
    assert "no step for 60 s after step 7" in text
    clock.seconds += 1000.0
    assert watchdog.check() is None  # still the same hang
    watchdog.beat(8)
    clock.seconds += 61.0
    assert watchdog.check() is not None
    assert len(said) == 2 and str(path) in said[0]
    release.set()
    worker.join()


def test_a_run_that_beats_is_left_alone(tmp_path: Path) -> None:
    clock = Clock()
    watchdog = HangWatchdog(tmp_path, timeout_s=60.0, say=lambda _: None, now=clock)
    for step in range(100):
        clock.seconds += 59.9
        assert watchdog.check() is None
        watchdog.beat(step)
    assert list(tmp_path.iterdir()) == []


def test_the_thread_finds_a_hang_by_itself(tmp_path: Path) -> None:
    found = threading.Event()
    with HangWatchdog(tmp_path, timeout_s=0.01, say=lambda _: found.set()):
        assert found.wait(30.0)
    assert len(list((tmp_path / "errors").iterdir())) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


class Pauses:
    """Stands for the event that the watchdog's thread waits for: each wait takes what it says."""

    def __init__(self, clock: Clock, seconds: list[float]) -> None:
        self.clock, self.seconds = clock, seconds

    def wait(self, timeout: float) -> bool:
        assert timeout == 10.0
        if self.seconds:
            self.clock.seconds += self.seconds.pop(0)
            return False
        return True


def test_a_machine_that_was_suspended_has_not_hung(tmp_path: Path) -> None:
    """Nor has a process that was stopped; what stands still afterwards has."""
    clock, said = Clock(), []
    watchdog = HangWatchdog(tmp_path, timeout_s=80.0, say=said.append, now=clock)
    for seconds in ([10.0, 8000.0, 10.0], [10.0] * 4, [10.0]):
        assert said == []
        watchdog._closed = Pauses(clock, seconds)  # type: ignore[assignment]
        watchdog._watch()
    assert len(said) == 1 and "no step for 80 s" in said[0]


def test_a_thread_that_only_comes_late_finds_a_hang(tmp_path: Path) -> None:
    clock, said = Clock(), []
    watchdog = HangWatchdog(tmp_path, timeout_s=80.0, say=said.append, now=clock)
    watchdog._closed = Pauses(clock, [60.0, 60.0])  # type: ignore[assignment]
    watchdog._watch()
    assert len(said) == 1


def test_switched_off_it_starts_no_thread(tmp_path: Path) -> None:
    with HangWatchdog(tmp_path, timeout_s=0.0, say=lambda _: None):
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]


def test_a_dump_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "errors").write_bytes(b"")
    clock, said = Clock(), []
    watchdog = HangWatchdog(tmp_path, timeout_s=1.0, say=said.append, now=clock)
    clock.seconds += 2.0
    assert watchdog.check() is None
    assert "could not be written" in said[0]
