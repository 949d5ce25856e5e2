"""`--mode watch`: look on while another process trains, from the rows that it writes.

Nothing is written, no lock is taken and no model is loaded, so a run cannot notice it; a directory
on another machine's disk will do. On a terminal it is the panel of training, until the last step or
Ctrl+C. Elsewhere (a pipe, a script) and with --json it tells the newest row and ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from training.config.sigma_config import ConfigError, SigmaConfig
from training.report.record import read_settings
from training.runtime.text import format_duration
from training.runtime.ui import RATE_WINDOW, RunConsole, RunDisplay

POLL_S = 0.5
# Without a row for so many gaps between rows, and so many seconds, one is told.
QUIET_GAPS, QUIET_S = 10.0, 60.0
HINT = "Ctrl+C ends the watching, not the run"


class Follower:
    """Rows of a JSON-lines file that grows, each once; a row that is only half written waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """What is new since the last call; everything where the file was cut since, or is gone
        for a moment, as when a resumed run takes steps back. Row by row: they may be gigabytes."""
        try:
            with self.path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._offset += len(line)
                    with suppress(orjson.JSONDecodeError):
                        row = orjson.loads(line)
                        if isinstance(row, dict):
                            yield row
        except FileNotFoundError:
            return


class Watch:
    """A run in a directory, shown on `display` as it goes on."""

    def __init__(
        self,
        directory: Path,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._now: float | None = None  # of a row that is told late
        self.display = RunDisplay(console=console, now=self._time, hint=HINT)
        self._rows = Follower(directory / "metrics.jsonl")
        self._samples = Follower(directory / "samples.jsonl")
        self.row: dict[str, Any] = {}
        self._row_at = self._heard_at = clock()
        self._gap, self._is_told = 0.0, False
        self.total = read_settings(directory).get("run", {}).get("steps", 0)

    @property
    def is_done(self) -> bool:
        return bool(self.row) and self.row["step"] >= self.total

    def take(self) -> None:
        """Show what the run has written since the last call."""
        is_first = not self.row
        rows = deque(self._rows.read(), maxlen=RATE_WINDOW)  # of a long run, the end
        for row in rows:
            if isinstance(row.get("step"), int) and isinstance(row.get("time_utc"), str):
                self._show(row)
        for sample in deque(self._samples.read(), maxlen=1):
            if isinstance(sample.get("text"), str):
                self.display.sample(sample["text"])
        now = self._clock()
        if rows:  # the clock of another machine may be set otherwise
            self._heard_at = min(now, self._row_at) if is_first else now
        quiet = now - self._heard_at
        if quiet > max(QUIET_S, QUIET_GAPS * self._gap) and not self.is_done and not self._is_told:
            self._is_told = True
            self.display.message(
                f"no row for {format_duration(quiet)}: the run has ended, or its steps are long"
            )

    def _show(self, row: dict[str, Any]) -> None:
        self._now = datetime.fromisoformat(row["time_utc"]).timestamp()
        if self.row:
            self._gap = max(0.0, self._now - self._row_at)
        else:
            self.display.start(step=row["step"], total_steps=self.total)
        self.row, self._row_at, self._is_told = row, self._now, False
        if "train_loss" in row:  # not the first row, which says what was built
            self.display.update(row)
        self._now = None

    def _time(self) -> float:
        return self._clock() if self._now is None else self._now


def run(config: SigmaConfig, *, sleep: Callable[[float], object] = time.sleep) -> int:
    """Follow the run in `--output-dir`; ConfigError if there is none."""
    directory = Path(config.run.output_dir)
    if not (directory / "metrics.jsonl").is_file():
        raise ConfigError(
            f"--output-dir {directory} holds no metrics.jsonl; name the directory of a run"
        )
    if config.run.json or not RunConsole().is_terminal:
        return tell_newest(directory, as_json=config.run.json)
    return follow(Watch(directory), sleep=sleep)


def tell_newest(directory: Path, *, as_json: bool) -> int:
    """Print the newest row of a run, whole as JSON or in one line for people."""
    trained = (row for row in Follower(directory / "metrics.jsonl").read() if "train_loss" in row)
    newest = next(iter(deque(trained, maxlen=1)), {})
    if as_json:
        print(orjson.dumps(newest).decode())
        return 0
    display = RunDisplay(console=RunConsole(highlight=False, markup=False, emoji=False))
    total = read_settings(directory).get("run", {}).get("steps", 0)
    display.start(step=0, total_steps=total)
    if newest:
        display.update(newest)
    else:
        display.message("no step is done yet")
    return 0


def follow(watch: Watch, *, sleep: Callable[[float], object]) -> int:
    """Show a run until its last step, or until Ctrl+C."""
    try:
        watch.take()
        while not watch.is_done:
            sleep(POLL_S)
            with suppress(OSError):  # a disk on the network that is away for a moment
                watch.take()
    except KeyboardInterrupt:
        pass
    finally:
        watch.display.close()
    return 0
