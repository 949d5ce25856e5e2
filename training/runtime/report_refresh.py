"""Rebuilds report.html while a run lasts, no more often than somebody would look at it.

Each time the whole of metrics.jsonl is read: of a run of weeks, for longer than a step. So a report
that took long waits for longer until it is built again, and its cost stays a small share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

REPORT_INTERVAL_S = 30.0
LEAST_PAUSE = 50.0  # in times of what the last report took
# Of files that somebody has moved away or changed under way, or that are too large for memory.
FAILURES = (OSError, ValueError, TypeError, LookupError, MemoryError)


class ReportRefresher:
    """Calls `write` at most twice a minute and for 2 % of the time; a report that cannot be written
    is said, not raised."""

    def __init__(
        self,
        write: Callable[[Path], object],
        *,
        say: Callable[[str], object],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._write = write
        self._say = say
        self._now = now
        self._next = now() + REPORT_INTERVAL_S

    def refresh(self, output_dir: Path, *, at_once: bool) -> None:
        """Rebuild the report of `output_dir` if it is time, or now."""
        begun = self._now()
        if not at_once and begun < self._next:
            return
        try:
            self._write(output_dir)
        except FAILURES as error:
            self._say(f"report.html not written: {str(error) or type(error).__name__}")
        ended = self._now()
        self._next = max(begun + REPORT_INTERVAL_S, ended + LEAST_PAUSE * (ended - begun))
