"""Feature `sigma_rl`: the RL ticks of a run, after the step of the language model.

It knows when a tick is due and gives it a seed; what a tick is, is training/rl/learner.py's. Its
effects, and those of the features that are parts of a tick, are counted by what the tick found:
one per RL step that a policy gradient moved.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.run_policy import REPLAY_BIAS, TTRL_BUDGET, TTRL_INTERVAL
from training.startup_ramp import TickClock, ramp_of

LARGEST_SEED = 2**62


class SigmaRLFeature(Feature):
    name = "sigma_rl"

    def __init__(self, clock: TickClock) -> None:
        self.clock = clock
        self.row: dict[str, float] = {}
        self._learner: Any = None

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.ttrl.interval:
            return None
        return Schedule(start_step=ramp_of(config).first_tick())

    @classmethod
    def create(cls, config: SigmaConfig) -> SigmaRLFeature:
        return cls(TickClock(ramp_of(config)))

    def on_setup(self, ctx: StepContext) -> bool:
        assert ctx.rl is not None
        self._learner = ctx.rl.learner
        return False

    def after_step(self, ctx: StepContext) -> bool:
        rl = ctx.rl
        assert rl is not None and ctx.rng is not None
        spacing = ctx.policy.multiplier(TTRL_INTERVAL)
        real_batches = rl.real_batches(ctx.step)
        if self.clock.is_due(ctx.step, real_batches=real_batches, factor=spacing):
            seed = int(torch.randint(LARGEST_SEED, (), generator=ctx.rng))
            result = rl.tick(
                seed=seed,
                weight=self.clock.settings.weight(ctx.step),
                budget_factor=ctx.policy.multiplier(TTRL_BUDGET),
            )
            known = {k: v for k, v in result.metrics.items() if not math.isnan(v)}
            self.row = {**dict.fromkeys(result.metrics, math.nan), **self.row, **known}
            if ctx.replay is not None:
                bias = ctx.policy.multiplier(REPLAY_BIAS)
                ctx.replay.admit(result.passed, step=ctx.step, bias=bias)
        for name, value in self.row.items():
            ctx.log(name, value)
        activation = self.clock.activation_step
        ctx.log("meta_features_ready", float(activation is not None))
        ctx.log("meta_activation_step", math.nan if activation is None else float(activation))
        return False

    def state_dict(self) -> dict[str, Any]:
        """The clock, the last tick's columns, and the learner."""
        return {
            "clock": self.clock.state_dict(),
            "row": dict(self.row),
            "learner": self._learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock.load_state_dict(state["clock"])
        self.row = dict(state["row"])
        self._learner.load_state_dict(state["learner"])

    def close(self) -> None:
        if self._learner is not None:
            self._learner.close()
