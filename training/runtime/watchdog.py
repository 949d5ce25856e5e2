"""Notices that a run stands still, and writes down where every thread stands.

A hang leaves no exception: a deadlocked loader or a device that never answers looks like a slow
step. The watchdog measures the time since the last sign of life on a monotonic clock (a machine
whose clock was set has not hung) and dumps all stacks once per hang. Some of these clocks go on
while the machine is suspended, and all do while the process is stopped (Ctrl+Z): then the thread of
the watchdog has not run either, and what it missed does not count. It never ends the run: a long
compilation or evaluation looks the same from here.
"""

from __future__ import annotations

import faulthandler
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

CHECKS_PER_TIMEOUT = 8


class HangWatchdog:
    """Watches for `timeout_s` seconds without a `beat` while it is entered; 0 = never.

    say: told in one line what was found. The dump holds files, lines and functions, no values.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        timeout_s: float,
        say: Callable[[str], object],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory = output_dir / "errors"
        self._timeout_s = timeout_s
        self._say = say
        self._now = now
        self._step = 0
        self._last = now()
        self._reported = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, step: int) -> None:
        """The run is alive and has finished `step`."""
        self._step, self._last, self._reported = step, self._now(), False

    def check(self) -> Path | None:
        """The dump of a hang that was found just now, None otherwise."""
        waited = self._now() - self._last
        if self._reported or waited < self._timeout_s:
            return None
        self._reported = True
        stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S_%fZ}"
        path = self._directory / f"hang_step_{self._step:08d}_{stamp}.txt"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                file.write(f"no step for {waited:.0f} s after step {self._step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            self._say(f"no step for {waited:.0f} s; stacks could not be written: {error}")
            return None
        self._say(f"no step for {waited:.0f} s; where every thread stands is in {path}")
        return path

    def __enter__(self) -> HangWatchdog:
        self._closed.clear()
        self.beat(self._step)
        if self._timeout_s > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        pause, looked = self._timeout_s / CHECKS_PER_TIMEOUT, self._now()
        while not self._closed.wait(pause):
            missed, looked = self._now() - looked - pause, self._now()
            if missed >= self._timeout_s:
                self._last = min(looked, self._last + missed)
            self.check()
