"""`--perf-profile-enable`: where the time of some hundred steps in the middle of a run goes.

After the warm-up every step is timed from its beginning to its applied update, span by span, and
by its whole turn until the next one begins (rows, evaluation, samples and saves included). The last
steps of the window run under the operator profiler, which slows them: they are not averaged.
Steps that are undone or skipped count for nothing. A run that ends inside the window writes what
there is and says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import torch

from training.config.sections import PerfConfig
from training.runtime.atomic_io import FileOps, make_dirs, replace_file
from training.runtime.clock import bottleneck, phase_columns, stage_seconds, synchronize
from training.runtime.environment import memory_readings
from training.runtime.operator_profile import OperatorProfile

RECENT_S = 600.0
SAMPLE_EVERY_S = 1.0
TOLERANCE = 0.02  # of a step that its phases may leave unexplained


@dataclass(slots=True, kw_only=True)
class StepTimes:
    """One measured step: begun and ended on the clock, its turn and its spans in seconds."""

    begun: float
    ended: float = 0.0
    turn: float = 0.0
    spans: dict[str, float] = field(default_factory=dict)


class PerfWindow:
    """Watches steps through the phase clock and writes its reports when the window is over.

    on_device: whether operators are ranked by the device's clock. tokens_per_step: of one optimizer
    step. say: told where the reports are. now: the clock, in seconds.
    """

    def __init__(
        self,
        settings: PerfConfig,
        *,
        directory: Path,
        device: torch.device,
        on_device: bool,
        tokens_per_step: int,
        config_hash: str,
        say: Callable[[str], object],
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.synchronizes = False
        self.steps: list[StepTimes] = []
        self._settings = settings
        self._directory = directory
        self._device = device
        self._tokens = tokens_per_step
        self._config_hash = config_hash
        self._say = say
        self._now = now
        self._profile = OperatorProfile(on_device=on_device)
        self._num_finished = 0
        self._step: StepTimes | None = None
        self._samples: list[dict[str, float | None]] = []
        self._sampled_at = -SAMPLE_EVERY_S
        self._over = False

    @property
    def _averaged_until(self) -> int:
        settings = self._settings
        return self._profiled_until - settings.perf_profiler_steps

    @property
    def _profiled_until(self) -> int:
        return self._settings.perf_warmup_steps + self._settings.perf_measure_steps

    def begin_step(self, seconds: dict[str, float]) -> None:
        """Close the step before, whose spans are `seconds`, and begin the next."""
        if self._over:
            return
        self._close_step(seconds)
        if self._num_finished >= self._profiled_until:
            self._end(complete=True)
            return
        if self._num_finished < self._settings.perf_warmup_steps:
            return
        self.synchronizes = self._settings.perf_sync_boundaries
        if self._num_finished >= self._averaged_until:
            self._profile.start()
        self._step = StepTimes(begun=self._edge())

    def finish_step(self) -> None:
        """The step's update has been applied."""
        if self._over:
            return
        self._num_finished += 1
        if self._step is None:
            return
        self._step.ended = self._edge()
        self._profile.stop(keep=True)
        if self._step.ended - self._sampled_at >= SAMPLE_EVERY_S:
            self._sampled_at = self._step.ended
            self._samples.append(memory_readings(self._device))

    def close(self, seconds: dict[str, float]) -> None:
        """The run is over: write what was measured if the window was not complete before."""
        if self._over:
            return
        self._close_step(seconds)
        self._end(complete=self._num_finished >= self._profiled_until)

    def _edge(self) -> float:
        if self.synchronizes:
            synchronize(self._device)
        return self._now()

    def _close_step(self, seconds: dict[str, float]) -> None:
        """Keep the step that was begun, unless it was never finished or ran under the profiler."""
        step, self._step = self._step, None
        self._profile.stop(keep=False)
        if step is not None and step.ended and self._num_finished <= self._averaged_until:
            step.turn = self._now() - step.begun
            step.spans = dict(seconds)
            self.steps.append(step)

    def _end(self, *, complete: bool) -> None:
        self._over = True
        self.synchronizes = False
        if not self.steps:
            self._say("performance window: no step was measured, no report")
            return
        recent = recent_steps(self.steps)
        facts = self._facts() | {"complete": complete}
        means = {f"avg_{name}": value for name, value in mean_samples(self._samples).items()}
        reports = {
            "baseline_throughput": averages(self.steps, tokens=self._tokens) | facts,
            "window_10m_summary": averages(recent, tokens=self._tokens) | means | facts,
            "window_10m_bottlenecks": bottlenecks(recent) | facts,
        }
        if self._profile.num_steps:
            reports["window_10m_top_ops"] = self._profile.report() | facts
        self._write(reports)

    def _facts(self) -> dict[str, Any]:
        cuda = self._device.type == "cuda"
        return {
            "tokens_per_step": self._tokens,
            "sync_boundaries": self._settings.perf_sync_boundaries,
            "device": str(self._device),
            "device_name": torch.cuda.get_device_name(self._device) if cuda else "cpu",
            "threads": torch.get_num_threads(),
            "config_hash": self._config_hash,
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _write(self, reports: dict[str, dict[str, Any]]) -> None:
        """A full disk costs the reports, not the run."""
        ops = FileOps()
        try:
            make_dirs(ops, self._directory)
            for name, report in reports.items():
                data = orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n"
                replace_file(ops, self._directory / f"{name}.json", data)
        except OSError as error:
            self._say(f"performance window: {self._directory} was not written: {error.strerror}")
            return
        name, share = bottleneck(reports["window_10m_bottlenecks"]["stages_s"])
        self._say(
            f"performance window: {len(self.steps)} steps, {share:.0%} of the time in {name}; "
            f"{self._directory}"
        )


def recent_steps(steps: Sequence[StepTimes]) -> list[StepTimes]:
    """The steps of the last ten minutes of the window."""
    return [step for step in steps if step.ended >= steps[-1].ended - RECENT_S]


def averages(steps: Sequence[StepTimes], *, tokens: int) -> dict[str, Any]:
    """Mean seconds of a step, of its phases and of its turn, and tokens per second of each.

    phase_sum_share: how much of a step its phases explain.
    """
    count = len(steps)
    spans = mean_spans(steps)
    phases = phase_columns(spans)
    stages = stage_seconds(spans)
    step = sum(one.ended - one.begun for one in steps) / count
    turn = sum(one.turn for one in steps) / count
    explained = sum(stages[name] for name in ("data", "train", "ttrl", "meta")) / step
    return {
        "steps_measured": count,
        "avg_step_time_s": step,
        "avg_core_step_time_s": phases["phase_train_s"],
        "avg_effective_step_time_s": turn,
        "avg_tokens_per_s": tokens / step,
        "avg_effective_tokens_per_s": tokens / turn,
        "avg_core_tokens_per_s": tokens / max(1e-9, phases["phase_train_s"]),
        **{f"avg_{name}": value for name, value in phases.items()},
        "avg_phase_ttrl_s": stages["ttrl"],
        "avg_phase_meta_s": stages["meta"],
        "avg_phase_metrics_s": stages["metrics"],
        "avg_outside_s": turn - step - stages["metrics"],
        "phase_sum_share": explained,
        "phases_explain_step": abs(1.0 - explained) <= TOLERANCE,
    }


def bottlenecks(steps: Sequence[StepTimes]) -> dict[str, Any]:
    """Which stage, and which part of the optimizer's work, the time goes into."""
    spans = mean_spans(steps)
    stages, phases = stage_seconds(spans), phase_columns(spans)
    name, share = bottleneck(stages)
    train = {
        part: phases[f"phase_{part}_s"]
        for part in ("forward", "backward", "opt_step", "zero_grad", "train_other")
    }
    optim = {part: train[part] for part in ("backward", "opt_step", "zero_grad")}
    return {
        "steps_measured": len(steps),
        "stages_s": stages,
        "stage_shares": shares(stages),
        "dominant_stage": name,
        "dominant_stage_share": share,
        "train_shares": shares(train),
        "optim_shares": shares(optim),
        "dominant_optim_substage": max(optim, key=lambda part: optim[part]),
    }


def mean_spans(steps: Sequence[StepTimes]) -> dict[str, float]:
    """Seconds per step of every span that occurs."""
    total: dict[str, float] = {}
    for step in steps:
        for name, seconds in step.spans.items():
            total[name] = total.get(name, 0.0) + seconds
    return {name: seconds / len(steps) for name, seconds in total.items()}


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Each of the total, in [0, 1]; all 0 where nothing took time."""
    total = sum(seconds.values()) or 1.0
    return {name: value / total for name, value in seconds.items()}


def mean_samples(samples: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Mean of every resource reading, without those the driver did not give."""
    result = {}
    for name in samples[0] if samples else ():
        values = [value for sample in samples if (value := sample[name]) is not None]
        if values:
            result[name] = sum(values) / len(values)
    return result
