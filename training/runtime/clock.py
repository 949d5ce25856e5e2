"""Where the time of a step goes, by named span.

Host spans are always on. A device runs asynchronously, so on a step whose row is logged, and in a
performance window with `--perf-sync-boundaries`, the clock synchronises it at span edges;
otherwise forward time would be charged to whoever waits next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch

META_SPANS = ("hydra", "self_evolve", "fractal", "uroboros", "causal", "credit")
STAGES = ("data", "train", "ttrl", "meta", "metrics")  # position = perf_bottleneck_stage_id


class StepWindow(Protocol):
    """Who watches whole steps: `training.runtime.perf_window`."""

    @property
    def synchronizes(self) -> bool:
        """Whether the device is waited for at every span's edges while the window is open."""
        ...

    def begin_step(self, seconds: dict[str, float]) -> None:
        """A step begins; `seconds` are the spans of the one before, also of what followed it."""

    def finish_step(self) -> None:
        """The step that was begun has been applied."""

    def close(self, seconds: dict[str, float]) -> None:
        """The run is over; `seconds` are the spans since the last `begin_step`."""
        ...


class PhaseClock:
    """Seconds per span since the last `reset`, which begins a step."""

    def __init__(self, device: torch.device, *, window: StepWindow | None = None) -> None:
        self._device = device
        self._window = window
        self.synchronize_edges = False
        self.seconds: dict[str, float] = {}
        self._inside = 0.0  # of the open span's seconds, those of spans inside it

    @contextmanager
    def __call__(self, span: str) -> Iterator[None]:
        """Charge the block to `span`, but for the spans inside it, which are charged themselves."""
        start, outside = self._now(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
            seconds = self._now() - start
            self.add(span, seconds - self._inside)
            self._inside = outside + seconds

    def add(self, span: str, seconds: float) -> None:
        """Charge seconds that were measured elsewhere."""
        self.seconds[span] = self.seconds.get(span, 0.0) + seconds

    def reset(self) -> None:
        """Begin a step."""
        if self._window is not None:
            self._window.begin_step(self.seconds)
        self.seconds = {}

    def finish_step(self) -> None:
        """The step is applied; what follows (evaluation, saving) is not part of it."""
        if self._window is not None:
            self._window.finish_step()

    def close(self) -> None:
        """Tell the window, if there is one, that the run is over."""
        if self._window is not None:
            self._window.close(self.seconds)

    def _now(self) -> float:
        within = self._window is not None and self._window.synchronizes
        if self.synchronize_edges or within:
            synchronize(self._device)
        return time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def phase_columns(seconds: Mapping[str, float]) -> dict[str, float]:
    """Span seconds under their metric names, with what they sum to."""
    parts = {name: seconds.get(name, 0.0) for name in ("forward", "backward", "opt_step")}
    zero_grad, other = seconds.get("zero_grad", 0.0), seconds.get("features", 0.0)
    optim = parts["backward"] + parts["opt_step"] + zero_grad
    return {
        "phase_data_s": seconds.get("data", 0.0),
        "phase_train_s": parts["forward"] + optim + other,
        "phase_forward_s": parts["forward"],
        "phase_optim_s": optim,
        "phase_backward_s": parts["backward"],
        "phase_opt_step_s": parts["opt_step"],
        "phase_zero_grad_s": zero_grad,
        "phase_train_other_s": other,
        "phase_ttrl_s": seconds.get("ttrl", 0.0),
        "phase_hydra_s": seconds.get("hydra", 0.0),
        "phase_fractal_s": seconds.get("fractal", 0.0),
    }


def stage_seconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each of the STAGES; a stage whose spans never ran has none."""
    columns = phase_columns(seconds)
    return {
        "data": columns["phase_data_s"],
        "train": columns["phase_train_s"],
        "ttrl": seconds.get("ttrl", 0.0),
        "meta": sum(seconds.get(span, 0.0) for span in META_SPANS),
        "metrics": seconds.get("metrics", 0.0),
    }


def bottleneck(stages: Mapping[str, float]) -> tuple[str, float]:
    """The stage with most seconds and its share of all; share 0 when nothing was measured."""
    name = max(STAGES, key=lambda stage: stages[stage])
    total = sum(stages.values())
    return name, stages[name] / total if total else 0.0
