"""Rebuilds report.html while a run lasts, no more often than somebody would look at it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

REPORT_INTERVAL_S = 30.0


class ReportRefresher:
    """Calls `write` at most twice a minute; a report that cannot be written is said, not raised."""

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
        self._written = now()

    def refresh(self, output_dir: Path, *, at_once: bool) -> None:
        """Rebuild the report of `output_dir` if it is time, or now."""
        if not at_once and self._now() - self._written < REPORT_INTERVAL_S:
            return
        self._written = self._now()
        try:
            self._write(output_dir)
        except OSError as error:
            self._say(f"report.html not written: {error}")
