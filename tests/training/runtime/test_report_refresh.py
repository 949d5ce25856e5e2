"""A report is built now and then, at little cost, and never ends the run that it is about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from training.runtime.report_html import write_report
from training.runtime.report_refresh import ReportRefresher


class Run:
    """A clock set by hand, and reports that take `cost` seconds or fail with `error`."""

    def __init__(self, *, cost: float = 0.0, error: Exception | None = None) -> None:
        self.seconds, self.cost, self.error = 0.0, cost, error
        self.written: list[float] = []
        self.said: list[str] = []
        self.refresher = self.watched(self.write)

    def watched(self, write: Callable[[Path], object]) -> ReportRefresher:
        return ReportRefresher(write, say=self.said.append, now=lambda: self.seconds)

    def write(self, output_dir: Path) -> None:
        self.written.append(self.seconds)
        self.seconds += self.cost
        if self.error is not None:
            raise self.error

    def save_until(self, end: float) -> None:
        """A save each second, as in a run of short steps."""
        while self.seconds < end:
            self.seconds += 1.0
            self.refresher.refresh(Path(), at_once=False)


def test_a_quick_report_is_built_twice_a_minute() -> None:
    run = Run()
    run.save_until(95.0)
    assert run.written == [30.0, 60.0, 90.0]


def test_a_report_that_takes_long_is_built_seldom() -> None:
    """Of a metrics.jsonl of gigabytes: the share of the time it takes is what counts."""
    run = Run(cost=20.0)
    run.save_until(10_000.0)
    assert 20.0 * len(run.written) < 0.03 * 10_000.0
    run.refresher.refresh(Path(), at_once=True)  # but the one at the end is
    assert run.written[-1] >= 10_000.0


@pytest.mark.parametrize(
    "error",
    [OSError("disk full"), ValueError("no"), KeyError("cycle"), TypeError("no"), MemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_a_report_that_cannot_be_built_is_said(error: Exception) -> None:
    run = Run(error=error)
    run.save_until(65.0)
    assert len(run.written) == 2 and len(run.said) == 2
    assert all("report.html not written: " in line and line[-2:] != ": " for line in run.said)


def test_metrics_that_somebody_moved_away_do_not_end_the_run(tmp_path: Path) -> None:
    run = Run()
    run.watched(write_report).refresh(tmp_path, at_once=True)
    assert len(run.said) == 1 and "holds no metrics.jsonl" in run.said[0]
