"""What a person sees while a run goes on: a live panel on a terminal, plain lines elsewhere.

The panel shows the newest row, the time left and how to stop; whatever must not be missed
(messages, evaluations) is printed above it and stays in the scrollback. A pipe, a log file or CI
gets one line per row. A display that can no longer be written (the terminal was closed) falls
silent: a run that outlives its window (nohup) does not fail for want of it.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from training.runtime.text import format_duration, format_number, one_line

REFRESH_PER_SECOND = 2
RATE_WINDOW = 64
LONGEST_GAP = 10.0  # in medians: more (a laptop that slept) does not count as work
SAMPLE_LINES = 4
PHASES = {
    "data": "phase_data_s",
    "forward": "phase_forward_s",
    "backward": "phase_backward_s",
    "optimizer": "phase_opt_step_s",
}
STOP_HINT = "Ctrl+C finishes the step, saves and stops; the same command resumes exactly there"


class StepRate:
    """Seconds per step over the last rows, without what was not work.

    A mean, because evaluations and checkpoints recur and belong to the time left; each gap is
    limited to ten medians, because a suspended machine does not.
    """

    def __init__(self) -> None:
        self._points: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW)

    def add(self, step: int, seconds: float) -> None:
        """Record that `step` was done at time `seconds`; a step back starts anew."""
        if self._points and step <= self._points[-1][0]:
            self._points.clear()
        self._points.append((step, seconds))

    @property
    def seconds_per_step(self) -> float | None:
        """None until two steps are known."""
        points = list(self._points)
        gaps = [
            (later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in pairwise(points)
        ]
        if not gaps:
            return None
        limit = LONGEST_GAP * statistics.median(seconds / steps for steps, seconds in gaps)
        total = sum(min(seconds, limit * steps) for steps, seconds in gaps)
        return total / sum(steps for steps, _ in gaps)


class RunConsole(Console):
    """rich's console, but for what it does when its reader is gone: it would end the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        if self.file is sys.stdout:
            # Nothing can be flushed there any more; Python would complain at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class RunDisplay:
    """The run as a person sees it. Every method may be called at any time, also after `close`.

    now: seconds of any clock. hint: what the last line of the panel says of Ctrl+C.
    """

    def __init__(
        self,
        *,
        console: Console | None = None,
        now: Callable[[], float] = time.monotonic,
        hint: str = STOP_HINT,
    ) -> None:
        self._console = console or RunConsole(highlight=False, markup=False, emoji=False)
        self._now = now
        self._hint = hint
        self._live: Live | None = None
        self._silent = False
        self._rate = StepRate()
        self._row: dict[str, Any] = {}
        self._last: dict[str, tuple[int, float]] = {}  # metric -> (step, value), last known
        self._step = self._total = 0
        self._step_time = 0.0
        self._sample = ""

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def start(self, *, step: int, total_steps: int) -> None:
        """Begin at `step` of `total_steps`; opens the panel if this is a terminal."""
        self._step, self._total, self._step_time = step, total_steps, self._now()
        self._rate.add(step, self._step_time)
        if not self._console.is_terminal or self._console.is_dumb_terminal or self._live:
            return
        live = self._live = Live(
            get_renderable=self._panel,
            console=self._console,
            refresh_per_second=REFRESH_PER_SECOND,
        )
        self._attempt(live.start)
        # A second Ctrl+C ends the process at once and could not bring a hidden cursor back.
        self._attempt(lambda: self._console.show_cursor(True))

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a metrics row."""
        self._row = dict(row)
        self._step, self._step_time = int(row.get("step", self._step)), self._now()
        self._rate.add(self._step, self._step_time)
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._last[name] = (self._step, float(value))
        evaluated = row.get("eval_bpb") is not None
        if self._live is None or evaluated:
            self._print(self.row_line())

    def message(self, text: str) -> None:
        """Tell something that stays readable."""
        self._print(one_line(text))

    def sample(self, text: str) -> None:
        """Show text that the model wrote."""
        self._sample = one_line(text)
        if self._live is None:
            self._print(f"sample: {self._sample}")

    def close(self) -> None:
        """Leave the panel's last state on the screen; may be called twice."""
        if self._live is not None:
            live, self._live = self._live, None
            self._attempt(live.stop)

    def seconds_left(self) -> float | None:
        """Expected time to the last step; None before a step is done."""
        rate = self._rate.seconds_per_step
        if rate is None:
            return None
        since = self._now() - self._step_time
        return max(0.0, rate * (self._total - self._step) - since)

    def row_line(self) -> str:
        """The newest row in one line."""
        row, parts = self._row, [f"step {self._step}/{self._total}"]
        for name, label in (("train_loss", "loss"), ("loss_ema", "average"), ("eval_bpb", "bpb")):
            if row.get(name) is not None:
                parts.append(f"{label} {row[name]:.4f}")
        if row.get("lr") is not None:
            parts.append(f"lr {format_number(row['lr'])}")
        if row.get("tokens_per_s_ema") is not None:
            parts.append(f"{row['tokens_per_s_ema']:,.0f} tok/s")
        if row.get("ram_process_gb") is not None:
            parts.append(self._memory_text())
        left = self.seconds_left()
        if left is not None and self._step < self._total:
            parts.append(f"left {format_duration(left)}")
        return "  ".join(parts)

    def _panel(self) -> RenderableType:
        left = self.seconds_left()
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        share = self._step / max(1, self._total)
        head.add_row(
            Text(f"step {self._step:,} of {self._total:,}", style="bold"),
            ProgressBar(total=max(1, self._total), completed=self._step),
            Text(f"{share:.1%}, {_left_text(left, done=share >= 1.0)}", style="bold"),
        )
        body = Table.grid(padding=(0, 2))
        body.add_column(style="dim", no_wrap=True)
        body.add_column()
        for label, text in self._facts():
            body.add_row(label, Text(text))
        parts: list[RenderableType] = [head, body]
        if self._sample:
            limit = SAMPLE_LINES * max(20, self._console.width - 16)
            short = self._sample if len(self._sample) <= limit else self._sample[:limit] + "..."
            body.add_row("it writes", Text(self._encodable(short), style="italic"))
        if self._step < self._total:
            parts.append(Text(self._hint, style="dim"))
        return Panel(Group(*parts), title="SIGMA", title_align="left", border_style="cyan")

    def _facts(self) -> list[tuple[str, str]]:
        if not self._row:
            return [("state", "the first steps are being computed")]
        facts = [("loss", self._loss_text())]
        if "eval_bpb" in self._last:
            step, value = self._last["eval_bpb"]
            facts.append(("quality", f"{value:.4f} bits per byte, held-out text, at step {step:,}"))
        speed = self._value("tokens_per_s_ema")
        if speed is not None:
            seen = self._value("tokens_total") or 0.0
            wall = self._value("wall_s") or 0.0
            facts.append(
                (
                    "speed",
                    f"{speed:,.0f} tokens/s, {seen:,.0f} tokens in {format_duration(wall)}",
                )
            )
        shares = self._phase_text()
        if shares:
            facts.append(("time", shares))
        if self._value("ram_process_gb") is not None:
            facts.append(("memory", self._memory_text()))
        saved = self._value("checkpoint_step")
        if saved is not None and saved > 0:
            facts.append(("saved", f"checkpoint of step {saved:,.0f}"))
        return facts

    def _loss_text(self) -> str:
        loss, average = self._value("train_loss"), self._value("loss_ema")
        text = "-" if loss is None else f"{loss:.4f} nats per token"
        return text if average is None else f"{text}, average {average:.4f}"

    def _phase_text(self) -> str:
        known = {label: self._value(name) or 0.0 for label, name in PHASES.items()}
        total = (self._value("phase_data_s") or 0.0) + (self._value("phase_train_s") or 0.0)
        if total <= 0.0:
            return ""
        known["other"] = max(0.0, total - sum(known.values()))
        return "  ".join(f"{label} {seconds / total:.0%}" for label, seconds in known.items())

    def _memory_text(self) -> str:
        text = f"{self._value('ram_process_gb') or 0.0:.1f} GiB"
        device = self._value("gpu_mem_peak_gb")
        return f"{text} host, {device:.1f} GiB GPU peak" if device else text

    def _value(self, name: str) -> float | None:
        known = self._last.get(name)
        return None if known is None else known[1]

    def _encodable(self, text: str) -> str:
        encoding = self._console.encoding
        return text.encode(encoding, errors="replace").decode(encoding)

    def _print(self, line: str) -> None:
        text = Text(self._encodable(line))
        self._attempt(lambda: self._console.print(text, soft_wrap=True))

    def _attempt(self, write: Callable[[], object]) -> None:
        """Write unless the terminal or pipe is gone; then say nothing more."""
        if self._silent:
            return
        try:
            write()
            self._console.file.flush()
        except (OSError, ValueError):
            # ValueError: "I/O operation on closed file".
            self._silent = True


def _left_text(left: float | None, *, done: bool) -> str:
    if done:
        return "done"
    return "measuring" if left is None else f"{format_duration(left)} left"
