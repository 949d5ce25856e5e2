"""Windows' passing errors through a file-system shim: a scanner holds files for a while.

Real directories, a clock that is not. The shim raises what Windows raises (5 access denied,
32 sharing violation, 145 directory not empty) where Windows does, until the scanner lets go.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any, cast

import pytest

from research.journal import Outcome, Registration, read_trials
from tests.training.runtime.faults import QuietOps, assert_is_example, example, open_store
from training.build_trials import build_trials
from training.config.cli import parse_args, write_resolved
from training.runtime import atomic_io
from training.runtime.atomic_io import TRANSIENT_WAIT_S, FileOps
from training.runtime.checkpoint import CheckpointError

ERRORS = {"replace": (5, 32), "rename": (5, 32), "unlink": (5, 32), "rmdir": (5, 32, 145)}


class WindowsError(OSError):
    """An OSError with the number that only Windows adds."""

    def __init__(self, winerror: int) -> None:
        super().__init__(13, "in use by another process")
        self.winerror = winerror


class Scanner:
    """Holds every path it has not seen before for up to `longest_s` seconds of a fake clock."""

    def __init__(self, seed: int, *, longest_s: float, share: float = 0.5) -> None:
        self.now = 0.0
        self.pauses: list[float] = []
        self.held: dict[tuple[str, str], float] = {}
        self._draw = random.Random(seed)
        self._longest_s, self._share = longest_s, share

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def check(self, call: str, path: Any) -> None:
        key = (call, os.fspath(path))
        if key not in self.held:
            busy = self._draw.random() < self._share
            self.held[key] = self.now + (self._draw.uniform(0, self._longest_s) if busy else 0.0)
        if self.now < self.held[key]:
            raise WindowsError(self._draw.choice(ERRORS[call]))


class WindowsOps(QuietOps):
    transient_wait_s = TRANSIENT_WAIT_S


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a scanner between atomic_io and the system."""

    def place(scanner: Scanner) -> Scanner:
        for name in ERRORS:
            original = getattr(os, name)

            def call(path: Any, *rest: Any, _name: str = name, _original: Any = original) -> None:
                scanner.check(_name, path)
                _original(path, *rest)

            monkeypatch.setattr(atomic_io.os, name, call)
        monkeypatch.setattr(FileOps, "sleep", staticmethod(scanner.sleep))
        return scanner

    return place


@pytest.mark.parametrize("seed", range(5))
def test_saving_retention_and_quarantine_wait_for_a_scanner(
    ram_path: Path, install: Any, seed: int
) -> None:
    """Held for less than 30 s each, nothing is lost, left over or reported."""
    store = open_store(ram_path, ops=WindowsOps(), keep=2)
    scanner = install(Scanner(seed, longest_s=29.0))
    for step in range(1, 9):
        store.save(step, *example(step), block=True)
    (ram_path / "checkpoint_step_00000008" / "state.json").write_bytes(b"damaged")
    found = store.load_newest()
    assert found is not None and found.step == 7
    assert_is_example(found)
    store.close()
    names = sorted(path.name for path in ram_path.iterdir() if path.is_dir())
    assert names == ["checkpoint_step_00000007", "quarantine"]
    assert len(scanner.pauses) > 50
    assert scanner.pauses[0] == pytest.approx(0.01) and max(scanner.pauses) > 5.0


def test_a_manifest_that_stays_held_fails_the_save_after_thirty_seconds(
    ram_path: Path, install: Any
) -> None:
    store = open_store(ram_path, ops=WindowsOps())
    store.save(1, *example(1), block=True)
    scanner = install(Scanner(0, longest_s=0.0))
    held = ram_path / "checkpoint_step_00000002" / "MANIFEST.json.tmp"
    scanner.held["replace", str(held)] = float("inf")
    with pytest.raises(CheckpointError, match="in use by another process"):
        store.save(2, *example(2), block=True)
    assert sum(scanner.pauses) == pytest.approx(TRANSIENT_WAIT_S)
    found = store.load_newest()
    assert found is not None and found.step == 1
    store.close()


def test_without_retries_the_same_scanner_is_noticed(ram_path: Path, install: Any) -> None:
    """Negative control: an implementation that does not wait fails under this shim."""

    ops = WindowsOps()
    ops.transient_wait_s = 0.0
    store = open_store(ram_path, ops=ops, keep=2)
    install(Scanner(0, longest_s=29.0))
    failed = 0
    for step in range(1, 9):
        try:
            store.save(step, *example(step), block=True)
        except CheckpointError:
            failed += 1
    store.close()
    assert failed > 0


def test_a_start_waits_for_a_viewer_of_the_resolved_settings(tmp_path: Path, install: Any) -> None:
    write_resolved(parse_args(["--steps", "1"]), tmp_path)
    scanner = install(Scanner(0, longest_s=29.0, share=1.0))
    write_resolved(parse_args(["--steps", "2"]), tmp_path)
    assert scanner.pauses
    for name in ("config.json", "resolved_args.txt"):
        assert parse_args([f"@{tmp_path / name}"]).run.steps == 2


def test_the_journal_of_a_run_waits_for_a_viewer_of_its_pages(tmp_path: Path, install: Any) -> None:
    scanner = install(Scanner(0, longest_s=29.0, share=1.0))
    flags = ["--uroboros-enabled", "--output-dir", str(tmp_path)]
    trials = build_trials(parse_args(flags), cast(Any, object()), say=print)
    assert trials is not None and trials.journal is not None
    journal = trials.journal._journal
    entry = Registration(step=1, title="t", hypothesis="h", metric="m", threshold="1", design="d")
    cycle = journal.register(entry)
    outcome = Outcome(step=2, result="r", interval=None, decision="dropped")
    journal.complete(cycle, outcome)
    journal.resume(0)  # the page and the events become orphans
    assert read_trials(tmp_path / "research") == []
    names = sorted(path.name for path in (tmp_path / "research").iterdir())
    assert len(names) == 3 and sum("orphan-1" in name for name in names) == 2
    assert {Path(path).name for _, path in scanner.held} >= {"journal.jsonl.tmp"}
