"""The hook protocol: what a feature is, and the set that schedules and audits all of them.

| phase | when | may change |
|---|---|---|
| on_setup | once, before the first forward | model (patch, attach), own state |
| on_batch | per micro-batch, before the forward | ctx.batch |
| on_losses | per micro-batch, after the LM loss | ctx.losses[name], ctx.weights[name] |
| before_optim | after backward, before clipping | gradients |
| after_step | after the optimizer step, no grad | shadow weights, plans, schedules |

A step that runs out of memory before its update is replayed, so until after_step a feature may
give its own attributes new values, which are put back, but must not change them in place.

A phase returns whether this call changed anything (a bool, or a 0-dim bool tensor where asking the
device would stall it). FeatureSet alone knows enabled, interval and start step, and counts what the
phases report; no feature tests `step %` or its own switch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from training.config.sigma_config import SigmaConfig
from training.context import StepContext

PHASES = ("on_setup", "on_batch", "on_losses", "before_optim", "after_step")


@dataclass(slots=True, kw_only=True, frozen=True)
class Schedule:
    """When an enabled feature runs: from `start_step` on, every `interval` steps."""

    start_step: int = 0
    interval: int = 1

    @property
    def first_step(self) -> int:
        """The first step of a run at which the feature is called; steps count from 1."""
        return self.start_step if self.start_step > 0 else self.interval

    def covers(self, step: int) -> bool:
        return step >= self.start_step and (step - self.start_step) % self.interval == 0


class Feature:
    """Base of all features: every phase is a no-op that changed nothing."""

    name: ClassVar[str]

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        """When the feature runs under this configuration; None = switched off."""
        raise TypeError(f"feature {cls.__name__} does not say when it runs")

    @classmethod
    def create(cls, config: SigmaConfig) -> Feature:
        """The feature with its own dials taken from the configuration."""
        return cls()

    def on_setup(self, ctx: StepContext) -> bool | Tensor:
        """Called once, whatever the schedule; the state of a checkpoint is loaded after it."""
        return False

    def on_batch(self, ctx: StepContext) -> bool | Tensor:
        """May replace `ctx.batch`, on the device by now. Not yet known: outputs and losses."""
        return False

    def on_losses(self, ctx: StepContext) -> bool | Tensor:
        """May set `ctx.losses[name]` (0-d, with its graph) and `ctx.weights[name]`, 1 where none is
        set."""
        return False

    def before_optim(self, ctx: StepContext) -> bool | Tensor:
        """Gradients of all micro-batches are summed; on fp16 they still carry the loss scale."""
        return False

    def after_step(self, ctx: StepContext) -> bool | Tensor:
        """The update has been applied; a step that was skipped or replayed does not come here."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot derive; {} = no state. Counters and generator are kept by the
        set."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. ValueError here, where a feature without state is given
        some."""
        if state:
            raise ValueError(f"feature {self.name} keeps no state, but the checkpoint has some")

    def close(self) -> None:
        """Release what on_setup took; called once, also after a failure."""


@dataclass(slots=True, kw_only=True)
class _Entry:
    name: str
    feature: Feature | None
    schedule: Schedule | None
    rng: torch.Generator | None
    effective_calls: int = 0
    pending_calls: Tensor | None = None
    total_ms: float = 0.0


class FeatureSet:
    """The features of a run in their fixed order, with schedule, evidence and state.

    Disabled features keep their columns, so that the metrics schema of a run never changes.
    """

    def __init__(self, classes: Sequence[type[Feature]], config: SigmaConfig, *, seed: int) -> None:
        self._entries: list[_Entry] = []
        for feature_class in classes:
            schedule = feature_class.schedule(config)
            enabled = schedule is not None
            self._entries.append(
                _Entry(
                    name=feature_class.name,
                    feature=feature_class.create(config) if enabled else None,
                    schedule=schedule,
                    rng=feature_generator(seed, feature_class.name) if enabled else None,
                )
            )

    def run(self, phase: str, ctx: StepContext) -> None:
        """Call one phase of every feature that is due, in order, and count the effects."""
        for entry in self._entries:
            if entry.feature is None or entry.schedule is None:
                continue
            if phase != "on_setup" and not entry.schedule.covers(ctx.step):
                continue
            ctx.rng = entry.rng
            start = time.perf_counter()
            try:
                effect = getattr(entry.feature, phase)(ctx)
            except Exception as error:
                error.add_note(f"in feature {entry.name}, phase {phase}")
                raise
            entry.total_ms += (time.perf_counter() - start) * 1e3
            if isinstance(effect, Tensor):
                pending = entry.pending_calls
                entry.pending_calls = effect.long() if pending is None else pending + effect.long()
            else:
                entry.effective_calls += bool(effect)

    def remember(self) -> list[tuple[Any, ...]]:
        """Counters, generators and attributes of the enabled features, for `rewind`; cheap."""
        return [
            (
                entry,
                entry.effective_calls,
                entry.pending_calls,
                entry.rng.get_state(),
                dict(vars(entry.feature)),
            )
            for entry in self._entries
            if entry.feature is not None and entry.rng is not None
        ]

    def rewind(self, remembered: list[tuple[Any, ...]]) -> None:
        """Back to where `remember` was called in this step."""
        for entry, calls, pending, rng, attributes in remembered:
            entry.effective_calls, entry.pending_calls = calls, pending
            entry.rng.set_state(rng)
            vars(entry.feature).clear()
            vars(entry.feature).update(attributes)

    def mark(self, name: str, count: int = 1) -> None:
        """Count effects of a feature that is called as a service instead of by phase."""
        self._entry(name).effective_calls += count

    def first_steps(self) -> dict[str, int]:
        """The step at which each enabled feature can first act."""
        return {
            entry.name: entry.schedule.first_step
            for entry in self._entries
            if entry.schedule is not None
        }

    def metrics(self) -> dict[str, float]:
        """`feature_<name>_{enabled,effective_calls,ms}` of all features; reads the device."""
        row: dict[str, float] = {}
        for entry in self._entries:
            self._settle(entry)
            row[f"feature_{entry.name}_enabled"] = int(entry.feature is not None)
            row[f"feature_{entry.name}_effective_calls"] = entry.effective_calls
            row[f"feature_{entry.name}_ms"] = entry.total_ms
        return row

    def metrics_after_failure(self) -> dict[str, float]:
        """`metrics` for a crash report: without the counts that a failed device no longer gives."""
        try:
            return self.metrics()
        except RuntimeError:
            for entry in self._entries:
                entry.pending_calls = None
            return self.metrics()

    def idle_features(self) -> list[str]:
        """Names of enabled features that never had an effect: a finding, in proof mode an error."""
        idle = []
        for entry in self._entries:
            self._settle(entry)
            if entry.feature is not None and entry.effective_calls == 0:
                idle.append(entry.name)
        return idle

    def state_dict(self) -> dict[str, Any]:
        """State, counter and generator of every enabled feature, by name."""
        state = {}
        for entry in self._entries:
            if entry.feature is None or entry.rng is None:
                continue
            self._settle(entry)
            state[entry.name] = {
                "state": entry.feature.state_dict(),
                "effective_calls": entry.effective_calls,
                "rng": entry.rng.get_state(),
            }
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore by name; a feature that was off when the state was written starts fresh."""
        for entry in self._entries:
            saved = state.get(entry.name)
            if saved is None or entry.feature is None or entry.rng is None:
                continue
            entry.feature.load_state_dict(saved["state"])
            entry.effective_calls = saved["effective_calls"]
            entry.pending_calls = None
            entry.rng.set_state(saved["rng"])

    def close(self) -> None:
        """Close every feature; what one of them raises comes after the others are closed."""
        with ExitStack() as closing:
            for entry in reversed(self._entries):
                if entry.feature is not None:
                    closing.callback(entry.feature.close)

    def _entry(self, name: str) -> _Entry:
        for entry in self._entries:
            if entry.name == name:
                return entry
        raise KeyError(f"no feature named {name}")

    @staticmethod
    def _settle(entry: _Entry) -> None:
        if entry.pending_calls is not None:
            entry.effective_calls += int(entry.pending_calls.item())
            entry.pending_calls = None


def feature_generator(seed: int, name: str) -> torch.Generator:
    """A feature's own random stream, so that switching one never shifts another's numbers."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
