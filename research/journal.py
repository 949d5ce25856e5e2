"""The research journal: what is expected, and which number will judge it, before the trial.

`journal.jsonl` has one line per event, `registered` before a trial and `completed` after it; beside
it stands one readable `RESEARCH_LOG_<utc>_cycleNNN.md` per trial. A resumed run says how many
events it remembers. What was written behind them is kept under the name `orphan`, so that no trial
is told twice and no result stands under a hypothesis that came later.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

EVENTS_NAME = "journal.jsonl"

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True, frozen=True)
class Registration:
    """What is written before a trial.

    step: of the run. hypothesis, design: sentences. metric: the number that will decide.
    threshold: what it must reach.
    """

    step: int
    title: str
    hypothesis: str
    metric: str
    threshold: str
    design: str


@dataclass(slots=True, kw_only=True, frozen=True)
class Outcome:
    """What is written after it. interval: of the metric, None where there is none."""

    step: int
    result: str
    interval: tuple[float, float] | None
    decision: str


class Journal:
    """Writes `directory`; nothing is created before the first registration.

    now: time of an event in UTC, for file names and readers; decides nothing. replace: renames a
    file over another, and may wait for one that is held open.
    """

    def __init__(
        self,
        directory: Path,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        replace: Callable[[Path, Path], None] = os.replace,
    ) -> None:
        self.directory = directory
        self._now = now
        self._replace = replace
        self._events: list[dict[str, Any]] | None = None
        self._waiting: dict[str, Any] | None = None

    @property
    def position(self) -> int:
        """Number of events; what a checkpoint stores."""
        return 0 if self._events is None else len(self._events)

    def resume(self, position: int) -> None:
        """Go on behind the first `position` events; later ones become orphans."""
        self._waiting = None
        known = list(_read_events(self.directory))
        kept, later = known[:position], known[position:]
        if later:
            self._write(_free_name(self.directory, EVENTS_NAME), _lines(later))
            for event in later:
                if event["event"] == "registered":
                    path = self.directory / event["file"]
                    if path.is_file():
                        self._replace(path, _free_name(self.directory, event["file"]))
            self._write(self.directory / EVENTS_NAME, _lines(kept))
        _end_last_line(self.directory / EVENTS_NAME)
        self._events = kept
        begun = {event["cycle"] for event in kept if event["event"] == "registered"}
        for cycle in sorted(begun & {event["cycle"] for event in later}):
            self._write_page(cycle)

    def register(self, entry: Registration) -> int:
        """Write a trial down before it begins; its cycle, counted from 1.

        OSError where that cannot be written, and then nothing is: the trial must not begin.
        """
        if self._events is None:
            self.resume(0)
        assert self._events is not None
        self._write_waiting()
        now = self._now()
        cycle = 1 + sum(event["event"] == "registered" for event in self._events)
        self._append(
            {
                "event": "registered",
                "cycle": cycle,
                "time_utc": now.isoformat(timespec="seconds"),
                "file": f"RESEARCH_LOG_{now:%Y%m%dT%H%M%SZ}_cycle{cycle:03d}.md",
                **asdict(entry),
            }
        )
        return cycle

    def is_open(self, cycle: int) -> bool:
        """Whether a cycle was registered and nothing has completed it."""
        kinds = [event["event"] for event in self._events or () if event["cycle"] == cycle]
        return kinds == ["registered"]

    def complete(self, cycle: int, outcome: Outcome) -> None:
        """Add what came out; ValueError for a cycle that is not open.

        What cannot be written (a full disk) waits for `settle`; before it no other trial begins.
        """
        if not self.is_open(cycle):
            raise ValueError(f"cycle {cycle} of the research journal is not open")
        now = self._now().isoformat(timespec="seconds")
        values = asdict(outcome)
        values["interval"] = None if outcome.interval is None else list(outcome.interval)
        self._waiting = {"event": "completed", "cycle": cycle, "time_utc": now, **values}
        self.settle()

    def settle(self) -> None:
        """Write an outcome that waits; if that fails again it goes on waiting."""
        try:
            self._write_waiting()
        except OSError as error:
            _LOG.warning("an outcome waits to be written to %s: %s", self.directory, error.strerror)

    def _write_waiting(self) -> None:
        if self._waiting is not None:
            self._append(self._waiting)
            self._waiting = None

    def _append(self, event: dict[str, Any]) -> None:
        """Write an event and its page, or leave the journal as it was."""
        assert self._events is not None
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / EVENTS_NAME).open("ab", buffering=0) as file:
            end = file.tell()
            self._events.append(event)
            try:
                data = _lines([event])
                while data:
                    data = data[file.write(data) :]
                os.fsync(file.fileno())
                self._write_page(event["cycle"])
            except OSError:
                self._events.pop()
                file.truncate(end)
                raise

    def _write_page(self, cycle: int) -> None:
        own = [event for event in self._events or () if event["cycle"] == cycle]
        page = render_page(own[0], own[1] if len(own) > 1 else None)
        self._write(self.directory / own[0]["file"], page.encode())

    def _write(self, path: Path, data: bytes) -> None:
        """Replace a file so that a reader sees the old or the new contents."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._replace(temporary, path)


def render_page(registered: dict[str, Any], completed: dict[str, Any] | None) -> str:
    """The page of one trial as Markdown."""
    parts = [
        f"# Cycle {registered['cycle']}: {registered['title']}",
        f"Registered {registered['time_utc']}, at step {registered['step']}, before the trial.",
        "## Hypothesis",
        registered["hypothesis"],
        "## Pre-registered metric and threshold",
        f"{registered['metric']}\n\n{registered['threshold']}",
        "## Design",
        registered["design"],
    ]
    if completed is not None:
        parts += [
            "## Result",
            f"{completed['result']}\n\n{describe_interval(completed['interval'])}",
            "## Decision",
            f"{completed['decision']} ({completed['time_utc']}, at step {completed['step']})",
        ]
    return "\n\n".join(parts) + "\n"


def describe_interval(bounds: list[float] | None) -> str:
    """The interval in words."""
    if bounds is None:
        return "No interval: fewer than two replicates."
    low, high = bounds
    return (
        f"95 % interval of the mean {low:.4g} to {high:.4g}, as if the number of replicates had "
        "been fixed; the decision rests on the threshold above, which allows for stopping early."
    )


def read_trials(directory: Path) -> list[dict[str, Any]]:
    """Registered trials in order, each with what completed it under `outcome` (or None).

    Lines that are torn or not of this journal are passed over.
    """
    trials: dict[int, dict[str, Any]] = {}
    for event in _read_events(directory):
        if event["event"] == "registered":
            trials[event["cycle"]] = {**event, "outcome": None}
        elif event["cycle"] in trials:
            trials[event["cycle"]]["outcome"] = event
    return [trials[cycle] for cycle in sorted(trials)]


def _read_events(directory: Path) -> Iterator[dict[str, Any]]:
    path = directory / EVENTS_NAME
    if not path.is_file():
        return
    needed = {
        "registered": {"cycle", "file", "time_utc", "step", "title", "hypothesis", "metric"},
        "completed": {"cycle", "time_utc", "step", "result", "interval", "decision"},
    }
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a torn last line
            continue
        if isinstance(event, dict) and needed.get(event.get("event", ""), {""}) <= event.keys():
            yield event


def _end_last_line(path: Path) -> None:
    """So that what is added to a line that a kill has torn is a line of its own."""
    if path.is_file() and not (path.read_bytes() or b"\n").endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def _lines(events: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(event).encode() + b"\n" for event in events)


def _free_name(directory: Path, name: str) -> Path:
    """`<stem>.orphan-<n><suffix>` with the first n that is not taken."""
    path, number = Path(name), 1
    while (found := directory / f"{path.stem}.orphan-{number}{path.suffix}").exists():
        number += 1
    return found
