"""When what stands above plain training starts in a run, and how RL comes up to speed.

Two rules. Reinforcement learning, replay, adapters and the controllers (self-improver, rule, trials
of overlays) do nothing until so many batches of real data have been trained on, at the latest until
step 24. Up to the end of the ramp, ticks are `multiplier` times as far apart at
first, falling linearly to the plain interval, and their weight rises linearly from 0 to 1. A ramp
of 0 steps switches both rules off. Everything is a function of the step, of the batches seen and of
the last tick, so a resumed run ticks where the whole run would have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.config.sigma_config import SigmaConfig
from training.context import StepContext

LATEST_GATE_STEP = 24


@dataclass(slots=True, kw_only=True, frozen=True)
class RampSettings:
    """interval: steps between ticks, 0 = never. ramp_steps: length of the ramp. multiplier: of the
    interval at step 0. buffer_steps: batches of real data before the first tick, -1 = interval.
    """

    interval: int
    ramp_steps: int
    multiplier: int
    buffer_steps: int = -1

    @property
    def gate_batches(self) -> int:
        """Real batches after which the gate opens."""
        if self.ramp_steps == 0:
            return 0
        return self.interval if self.buffer_steps < 0 else self.buffer_steps

    def spacing(self, step: int) -> float:
        """Steps that a tick at `step` must lie behind the one before."""
        if step > self.ramp_steps or self.ramp_steps == 0:
            return float(self.interval)
        left = 1.0 - step / self.ramp_steps
        return self.interval * (1.0 + (self.multiplier - 1) * left)

    def weight(self, step: int) -> float:
        """Weight in (0, 1] of a tick at `step`."""
        return 1.0 if step >= self.ramp_steps else step / self.ramp_steps

    def is_open(self, step: int, *, real_batches: int) -> bool:
        """Whether what stands above plain training may act; keeps no memory of it."""
        return real_batches >= self.gate_batches or step >= LATEST_GATE_STEP

    @property
    def gate_step(self) -> int:
        """The step the gate opens at in a run that trains on real data from its first step."""
        return min(max(1, self.gate_batches), LATEST_GATE_STEP)

    def is_open_in(self, ctx: StepContext) -> bool:
        """Whether the gate is open at this step of a run."""
        seen = ctx.step if ctx.rl is None else ctx.rl.real_batches(ctx.step)
        return self.is_open(ctx.step, real_batches=seen)

    def first_tick(self) -> int:
        """The step of the first tick of a run that trains on real data from its first step."""
        clock, step = TickClock(self), 1
        while not clock.is_due(step, real_batches=step):
            step += 1
        return step


class TickClock:
    """Counts steps to the next tick. State: the last tick, and the step the gate opened at."""

    def __init__(self, settings: RampSettings) -> None:
        self.settings = settings
        self.last_tick = 0
        self.activation_step: int | None = None

    def is_due(self, step: int, *, real_batches: int, factor: float = 1.0) -> bool:
        """Whether `step` ticks; steps are asked in order. factor: on the spacing, at this step."""
        if self.activation_step is None:
            if not self.settings.is_open(step, real_batches=real_batches):
                return False
            self.activation_step = step
        if step - self.last_tick < factor * self.settings.spacing(step):
            return False
        self.last_tick = step
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"last_tick": self.last_tick, "activation_step": self.activation_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last_tick = state["last_tick"]
        self.activation_step = state["activation_step"]


def ramp_of(config: SigmaConfig) -> RampSettings:
    """The rules of the `--startup-*` flags."""
    return RampSettings(
        interval=config.ttrl.interval,
        ramp_steps=config.startup.meta_ramp_steps,
        multiplier=config.startup.ttrl_interval_multiplier,
        buffer_steps=config.startup.meta_real_data_buffer_steps,
    )
