"""A small parent process that reports the deaths its child cannot report itself.

SIGKILL, the kernel's answer to short memory, a crash inside a driver: none of them runs a line of
Python in the process that dies. The parent never imports torch, holds no file of the run, hands
the terminal and every signal through, ends with the child's exit code, and writes the crash JSON
when the child ended otherwise than by its own decision.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from training.config.sigma_config import SigmaConfig
from training.runtime.atomic_io import FileOps, read_file
from training.runtime.signals import HANGUP, SIGNAL_NAMES, STOP_NAME, SignalHandlers

MARK = "SIGMA_SUPERVISED"
OWN_EXIT_CODES = frozenset({0, 1, 2, 130})
STATUS_LIMIT_BYTES = 2**20
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>


class ProcessDied(RuntimeError):
    """The training process ended without a word of its own."""


def take_supervision_mark() -> bool:
    """Whether this process was started by a supervisor; its own children will not think so."""
    return os.environ.pop(MARK, None) is not None


def supervise(command: Sequence[str], arguments: Sequence[str], config: SigmaConfig) -> int:
    """Run the program with `arguments` in a child; its exit code, 1 if it did not end itself."""
    output_dir = Path(config.run.output_dir)
    kills_before, reports_before = read_oom_kills(), list_reports(output_dir)
    with HandedOn(output_dir) as requests:
        child = subprocess.Popen([*command, *arguments], env={**os.environ, MARK: "1"})
        requests.child = child
        code = child.wait()
    silent = code == 1 and list_reports(output_dir) == reports_before
    if code in OWN_EXIT_CODES and not silent:
        return code
    what = describe_death(code, read_oom_kills() - kills_before)
    if config.run.crash_report_enabled:
        report_death(output_dir, what)
    elif not silent:
        print(f"failed: the training process was {what}; the same command resumes", file=sys.stderr)
    return 1


class HandedOn:
    """While entered, a signal to this process asks the child to stop; another one ends it.

    The first is handed on as a STOP file: a terminal, or a service manager that signals the whole
    group, has told the child as well, and a second signal would make it exit without saving.
    """

    def __init__(self, output_dir: Path) -> None:
        self.child: subprocess.Popen[bytes] | None = None
        self._stop = output_dir / STOP_NAME
        self._asked = False
        self._handlers = SignalHandlers(self._receive, names=(*SIGNAL_NAMES, HANGUP))

    def __enter__(self) -> HandedOn:
        self._handlers.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handlers.__exit__(kind, error, trace)
        if self._asked:
            with suppress(OSError):
                self._stop.unlink(missing_ok=True)  # or the next run would obey it

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._asked:
            self._asked = True
            try:
                self._stop.parent.mkdir(parents=True, exist_ok=True)
                self._stop.touch()
            except OSError:  # a full disk: then by the signal that may be sent more than once
                self._signal(_repeatable(number))
        else:
            self._signal(number)

    def _signal(self, number: int) -> None:
        # A console on Windows tells every process by itself, and cannot be imitated.
        if self.child is not None and sys.platform != "win32":
            self.child.send_signal(number)


def _repeatable(number: int) -> int:
    """The hangup, unless the child ignores it as this process does; then `number`."""
    hangup = getattr(signal, HANGUP, number)
    return number if signal.getsignal(hangup) is signal.SIG_IGN else hangup


def list_reports(output_dir: Path) -> set[str]:
    return {path.name for path in (output_dir / "errors").glob("crash_step_*.json")}


def describe_death(code: int, oom_kills: int) -> str:
    """One sentence on how a process ended; `oom_kills`: kills by the kernel meanwhile."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        if -code == getattr(signal, "SIGKILL", None) and oom_kills > 0:
            return f"killed by the kernel ({name}): memory ran out"
        return f"killed by {name}"
    # Windows reports what would be a signal elsewhere as a status of 32 bits.
    return f"ended with exit code {code:#x}" if code > 255 else f"ended with exit code {code}"


def report_death(output_dir: Path, what: str) -> Path | None:
    """Write the crash JSON from what the run itself recorded last."""
    # Only now: what it needs takes a while to import, and most runs never come here.
    from training.runtime.crash_report import write_crash_report

    row = read_status(output_dir)
    step = row.get("step")
    path = write_crash_report(
        output_dir,
        step=step if isinstance(step, int) else 0,
        error=ProcessDied(f"the training process was {what}; the same command resumes"),
        last_metrics=row,
        feature_state={name: v for name, v in row.items() if name.startswith("feature_")},
        config_hash="",
    )
    where = "no crash report was written" if path is None else f"details in {path}"
    print(f"failed: the training process was {what}; {where}", file=sys.stderr)
    return path


def read_status(output_dir: Path) -> dict[str, Any]:
    """The newest metrics row, {} if there is none that can be read."""
    try:
        data = read_file(FileOps(), output_dir / "status_latest.json", limit=STATUS_LIMIT_BYTES)
        row = json.loads(data)
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def read_oom_kills(root: Path = Path("/sys/fs/cgroup")) -> int:
    """How many processes the kernel has killed for memory so far, as far as it tells."""
    for path, key in ((root / "memory.events", "oom_kill"), (Path("/proc/vmstat"), "oom_kill")):
        try:
            lines = path.read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):
            continue
        for line in lines:
            name, _, count = line.partition(" ")
            if name == key:
                return int(count)
    return 0


def die_with_parent() -> None:
    """In the child on Linux: end when the supervisor is killed, or nobody would know of the run."""
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)
