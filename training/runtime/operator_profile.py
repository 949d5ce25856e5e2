"""Operators by the time they take, summed over steps that are profiled one at a time.

One profiler session over many steps keeps every event of every step in memory; a session per step
keeps one step's, and the sums. A step that is undone is left out of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from training.runtime.environment import EnvironmentProblem

LONGEST_LIST = 50


@dataclass(slots=True, kw_only=True)
class OperatorTime:
    """Sums over all profiled steps; self times leave out the operators called inside."""

    calls: int = 0
    self_cpu_us: float = 0.0
    self_device_us: float = 0.0


class OperatorProfile:
    """Starts and stops a profiler around single steps and adds them up."""

    def __init__(self, *, on_device: bool) -> None:
        self.on_device = on_device
        self.num_steps = 0
        self.operators: dict[str, OperatorTime] = {}
        self._running: profile | None = None

    def start(self) -> None:
        """Begin a session; every one is ended by `stop`."""
        activities = [ProfilerActivity.CPU]
        if self.on_device:
            activities.append(ProfilerActivity.CUDA)
        session = self._running = profile(activities=activities)
        session.start()

    def stop(self, *, keep: bool) -> None:
        """End the session, if one runs, and add its operators unless they are to be forgotten."""
        session, self._running = self._running, None
        if session is None:
            return
        session.stop()
        if not keep:
            return
        self.num_steps += 1
        for event in session.key_averages():
            total = self.operators.setdefault(event.key, OperatorTime())
            total.calls += event.count
            total.self_cpu_us += event.self_cpu_time_total
            total.self_device_us += event.self_device_time_total

    def report(self) -> dict[str, Any]:
        """The operators with most time first, each with its share of all."""

        def time_of(item: tuple[str, OperatorTime]) -> float:
            return item[1].self_device_us if self.on_device else item[1].self_cpu_us

        ranked = sorted(self.operators.items(), key=time_of, reverse=True)
        total = sum(map(time_of, ranked)) or 1.0
        steps = max(1, self.num_steps)
        return {
            "clock": "device" if self.on_device else "cpu",
            "steps_profiled": self.num_steps,
            "operators": [
                {
                    "name": name,
                    "share": time_of((name, entry)) / total,
                    "calls_per_step": entry.calls / steps,
                    "self_cpu_ms_per_step": entry.self_cpu_us / steps / 1e3,
                    "self_device_ms_per_step": entry.self_device_us / steps / 1e3,
                }
                for name, entry in ranked[:LONGEST_LIST]
            ],
        }


def times_on_device(mode: str, device: torch.device) -> bool:
    """Whether `--perf-device-time-mode` asks a device; EnvironmentProblem if it has no clock."""
    if mode in ("cuda", "device") and device.type != "cuda":
        raise EnvironmentProblem(
            f"--perf-device-time-mode {mode} needs CUDA, and the device is {device.type}",
            "use --perf-device-time-mode auto",
        )
    return mode != "cpu" and device.type == "cuda"
