"""Whatever fails, every part of a run is closed, and the first error is the one reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.runtime.reported_run import ReportedRun


class Part:
    def __init__(self, name: str, closed: list[str], error: BaseException | None = None) -> None:
        self.name, self.closed, self.error = name, closed, error

    def close(self) -> None:
        self.closed.append(self.name)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("failing", range(3))
@pytest.mark.parametrize("error", [None, KeyError("first"), KeyboardInterrupt()])
def test_every_part_is_closed_whatever_fails(failing: int, error: BaseException | None) -> None:
    closed: list[str] = []
    reported: list[Exception] = []
    last = OSError("last")
    parts = [Part(name, closed, last if name == "abc"[failing] else None) for name in "abc"]

    def report(problem: Exception) -> Path:
        assert closed == ([] if error else ["a", "b", "c"])  # a failure is on disk before
        reported.append(problem)
        return Path("report.json")

    with pytest.raises(BaseException) as caught, ReportedRun(parts, report=report):
        if error is not None:
            raise error
    seen = error or last
    assert caught.value is seen and closed == ["a", "b", "c"]
    assert reported == ([seen] if isinstance(seen, Exception) else [])
    assert getattr(seen, "crash_report", None) == (Path("report.json") if reported else None)


def test_a_report_that_fails_hides_nothing_and_keeps_nothing_open() -> None:
    closed: list[str] = []

    def report(problem: Exception) -> Path:
        raise RuntimeError("the device is gone")

    with pytest.raises(KeyError) as caught, ReportedRun([Part("a", closed)], report=report):
        raise KeyError("first")
    assert closed == ["a"] and caught.value.crash_report is None  # type: ignore[attr-defined]
