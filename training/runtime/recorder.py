"""Turns steps into evidence: metrics rows, the status file, samples, the live display.

One row per log step, every value read from the device in one go. What a resumed run must continue
(token count, moving averages, the length of metrics.jsonl) is this object's state.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import torch

from training.context import Metric, StepContext
from training.runtime.clock import STAGES, PhaseClock, bottleneck, phase_columns, stage_seconds
from training.runtime.environment import memory_readings
from training.runtime.metrics import MetricsLog, write_status
from training.runtime.ui import RunDisplay


class RunRecorder:
    """Writes `<output_dir>/metrics.jsonl`, `status_latest.json` and `samples.jsonl`."""

    def __init__(
        self,
        output_dir: Path,
        *,
        display: RunDisplay,
        device: torch.device,
        tokens_per_step: int,
        ema_beta: float,
        is_synthetic: bool = False,
    ) -> None:
        self.output_dir = output_dir
        self.display = display
        self.last_row: dict[str, Any] = {}
        self._device = device
        self._tokens_per_step = tokens_per_step
        self._beta = ema_beta
        self._synthetic = is_synthetic  # generated tasks are never mixed with real text
        self._log: MetricsLog | None = None
        self._samples: MetricsLog | None = None
        self._loss_ema: torch.Tensor | None = None
        self._loss_ema_weight = 0.0
        self._speed_ema: float | None = None
        self._wall_before = 0.0
        self._opened = self._last_row_time = time.perf_counter()
        self._last_row_step = 0

    def open(self, *, metrics_offset: int | None, step: int = 0) -> None:
        """Start new records, or continue metrics whose length a checkpoint of `step` knows."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self._log = MetricsLog(self.output_dir / "metrics.jsonl")
        self._log.resume(0 if metrics_offset is None else metrics_offset, last_step=step)
        self._samples = MetricsLog(self.output_dir / "samples.jsonl")
        self._samples.resume(self._samples.offset, last_step=step)

    def write_start_row(self, step: int, facts: dict[str, Any]) -> None:
        """The row of step 0, or of the step a resumed run starts from."""
        self._last_row_step, self._last_row_time = step, time.perf_counter()
        if step == 0:
            self._write({"step": 0, "time_utc": _now(), "tokens_total": 0, **facts})

    def observe(self, ctx: StepContext) -> None:
        """Fold a finished step into the moving averages; no device read."""
        assert ctx.train_loss is not None
        loss = ctx.train_loss.detach()
        self._loss_ema_weight = self._beta * self._loss_ema_weight + (1.0 - self._beta)
        previous = torch.zeros_like(loss) if self._loss_ema is None else self._loss_ema
        self._loss_ema = self._beta * previous + (1.0 - self._beta) * loss

    def write_row(self, ctx: StepContext, clock: PhaseClock, extra: dict[str, Any]) -> None:
        """The metrics row of a logged step."""
        start = time.perf_counter()
        seconds = max(1e-9, start - self._last_row_time)
        steps = max(1, ctx.step - self._last_row_step)
        effective = steps * self._tokens_per_step / seconds
        self._speed_ema = (
            effective
            if self._speed_ema is None
            else self._beta * self._speed_ema + (1.0 - self._beta) * effective
        )
        assert self._loss_ema is not None
        phases = phase_columns(clock.seconds)
        row = {
            "step": ctx.step,
            "time_utc": _now(),
            "wall_s": self.wall_seconds(),
            "tokens_total": ctx.step * self._tokens_per_step,
            "train_loss": _number(ctx.train_loss),
            "train_loss_real_data": None if self._synthetic else _number(ctx.train_loss),
            "train_loss_synth_data": _number(ctx.train_loss) if self._synthetic else None,
            "loss_ema": _number(self._loss_ema / self._loss_ema_weight),
            "grad_norm": _number(ctx.grad_norm),
            "core_step_time_s": phases["phase_train_s"],
            "core_tokens_per_s": self._tokens_per_step / max(1e-9, phases["phase_train_s"]),
            "effective_step_time_s": seconds / steps,
            "effective_tokens_per_s": effective,
            "tokens_per_s_ema": self._speed_ema,
            **phases,
            **{name: _number(value) for name, value in ctx.metrics.items()},
            **extra,
            **memory_readings(self._device),
        }
        row["phase_metrics_s"] = time.perf_counter() - start
        stages = stage_seconds(clock.seconds) | {"metrics": row["phase_metrics_s"]}
        stage, row["perf_bottleneck_share"] = bottleneck(stages)
        row["perf_bottleneck_stage_id"] = STAGES.index(stage)
        self._last_row_step, self._last_row_time = ctx.step, time.perf_counter()
        self._write(row)
        self.display.update(row)
        clock.add("metrics", time.perf_counter() - start)

    def write_sample(self, step: int, text: str | None) -> None:
        """Append a line to samples.jsonl and show the text; None writes nothing."""
        if text is None:
            return
        assert self._samples is not None
        ascii_text = json.dumps(text)  # for readers to whom a line also ends at U+2028
        self._samples.append({"step": step, "text": orjson.Fragment(ascii_text)})
        self.display.sample(text)

    def wall_seconds(self) -> float:
        """Wall time of the run so far, over all its processes."""
        return self._wall_before + time.perf_counter() - self._opened

    def state_dict(self) -> dict[str, Any]:
        """Flushes metrics.jsonl to disk: a checkpoint must not point behind its end."""
        assert self._log is not None and self._samples is not None
        self._log.fsync()
        self._samples.fsync()
        return {
            "metrics_offset": self._log.offset,
            "loss_ema": self._loss_ema,
            "loss_ema_weight": self._loss_ema_weight,
            "speed_ema": self._speed_ema,
            "wall_s": self.wall_seconds(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Averages and wall time go on from there; the files stay as they are (see `rewind`)."""
        self._loss_ema = state["loss_ema"]
        if self._loss_ema is not None:
            self._loss_ema = self._loss_ema.to(self._device)
        self._loss_ema_weight = state["loss_ema_weight"]
        self._speed_ema = state["speed_ema"]
        self._wall_before = state["wall_s"]
        self._opened = time.perf_counter()

    def rewind(self, state: dict[str, Any], *, step: int) -> None:
        """Go back to the records of `step`; rows written since are kept as an orphan file."""
        assert self._log is not None and self._samples is not None
        self._log.resume(state["metrics_offset"], last_step=step)
        self._samples.resume(self._samples.offset, last_step=step)
        wall = self.wall_seconds()
        self.load_state_dict(state)
        self._wall_before = wall
        self._last_row_step, self._last_row_time = step, time.perf_counter()

    def close(self) -> None:
        """Close display and files, also when one of them fails; what it raised comes last."""
        with ExitStack() as closing:  # all of them, whatever one of them does
            closing.callback(self.display.close)
            for log in (self._samples, self._log):
                if log is not None:
                    closing.callback(log.close)

    def _write(self, row: dict[str, Any]) -> None:
        assert self._log is not None
        self._log.append(row)
        write_status(self.output_dir / "status_latest.json", row)
        self.last_row = row


def _number(value: Metric | None) -> float | None:
    if value is None:
        return None
    if callable(value) and not isinstance(value, torch.Tensor):
        value = value()
    number = float(value)
    return number if math.isfinite(number) else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
