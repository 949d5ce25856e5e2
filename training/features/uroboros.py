"""Feature `uroboros`: tries overlays of the run's settings against a control that runs beside them.

It ends and begins replicates after steps and makes steps follow the overlay in force; the arms run
between steps (`training/overlay_trials.py`). A recorded paired difference counts as an effect.
"""

from __future__ import annotations

from typing import Any

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.overlay_trials import FEATURE, OverlayTrials
from training.run_policy import REPLAY_BIAS, TTRL_BUDGET, TTRL_INTERVAL
from training.startup_ramp import RampSettings, ramp_of


class UroborosFeature(Feature):
    name = FEATURE

    def __init__(self, ramp: RampSettings) -> None:
        self.ramp = ramp
        self._trials: OverlayTrials | None = None

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        own = config.uroboros
        opened = ramp_of(config).gate_step
        return Schedule(start_step=max(own.interval, opened)) if own.enabled else None

    @classmethod
    def create(cls, config: SigmaConfig) -> UroborosFeature:
        return cls(ramp_of(config))

    @property
    def trials(self) -> OverlayTrials:
        assert self._trials is not None
        return self._trials

    def on_setup(self, ctx: StepContext) -> bool:
        self._trials = ctx.trials
        ctx.policy.enroll(self.name)
        return False

    def on_batch(self, ctx: StepContext) -> bool:
        overlay, policy = self.trials.overlay_now, ctx.policy
        for name in policy.present((TTRL_INTERVAL, TTRL_BUDGET, REPLAY_BIAS)):
            factor = getattr(overlay, name)
            proposal = policy.propose(name, factor, by=self.name, reason="overlay in force")
            if proposal is not None:
                policy.apply(proposal)
        return False

    def before_optim(self, ctx: StepContext) -> bool:
        factor = self.trials.overlay_now.lr_factor
        if factor != 1.0:
            for group in ctx.optimizer.param_groups:  # the schedule sets them anew at every step
                group["lr"] *= factor
            ctx.log("lr", float(ctx.metrics["lr"]) * factor)  # pyright: ignore[reportArgumentType]
        return False

    def after_step(self, ctx: StepContext) -> bool:
        return self.ramp.is_open_in(ctx) and self.trials.finish_step(ctx)

    def state_dict(self) -> dict[str, Any]:
        return self.trials.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trials.load_state_dict(state)

    def close(self) -> None:
        if self._trials is not None:
            self._trials.close()
