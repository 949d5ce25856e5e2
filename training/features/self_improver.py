"""Feature `self_improver`: tries small changes of the run's policy both ways and keeps what helps.

A quadruple of trials is an experiment and holds the token meanwhile. One counts when it moved theta
and with it at least one value that the run reads.
"""

from __future__ import annotations

import math
from typing import Any

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.self_improver import REACH, ImproverSettings, SelfImprover
from training.startup_ramp import RampSettings, ramp_of

# Column of a knob's factor; null where the run has nothing that the knob would turn.
COLUMNS = {
    "lr": "policy_lr_mul",
    "ttrl_interval": "policy_ttrl_interval_mul",
    "ttrl_budget": "policy_ttrl_budget_bias",
    "replay_bias": "policy_replay_bias",
}


class SelfImproverFeature(Feature):
    name = "self_improver"

    def __init__(self, settings: ImproverSettings, *, interval: int, ramp: RampSettings) -> None:
        self.settings = settings
        self.ramp = ramp
        self.interval = interval
        self.steps_left = 0  # of the trial under way
        self.num_begun = 0
        self._improver: SelfImprover | None = None
        self._centre: dict[str, float] = {}  # factors before the quadruple

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        opened = ramp_of(config).gate_step
        return Schedule(start_step=opened) if config.self_improver.enabled else None

    @classmethod
    def create(cls, config: SigmaConfig) -> SelfImproverFeature:
        own = config.self_improver
        settings = ImproverSettings(
            sigma=own.mutation_sigma,
            sigma_min=own.sigma_min,
            sigma_max=own.sigma_max,
            is_adaptive=own.adaptive_sigma_enabled,
            beta=own.sigma_ema_beta,
            gain_up=own.sigma_gain_up,
            gain_down=own.sigma_gain_down,
            is_shuffled=own.shuffled,
        )
        return cls(settings, interval=own.interval, ramp=ramp_of(config))

    def on_setup(self, ctx: StepContext) -> bool:
        ctx.policy.enroll(self.name)
        self._improver = SelfImprover(self.settings, knobs=ctx.policy.present(REACH))
        return False

    @property
    def improver(self) -> SelfImprover:
        assert self._improver is not None, "on_setup comes first"
        return self._improver

    def after_step(self, ctx: StepContext) -> bool:
        if not self.ramp.is_open_in(ctx):
            return False
        effect = False
        if self.improver.is_running:
            self.steps_left -= 1
            if self.steps_left == 0:
                effect = self._end_trial(ctx)
        if not self.improver.is_running and ctx.policy.token.take(self.name, step=ctx.step):
            self._begin(ctx)
        self._log(ctx)
        return effect

    def _begin(self, ctx: StepContext) -> None:
        assert ctx.rng is not None
        self._centre = self.improver.factors
        self.num_begun += 1
        self.improver.begin(self._probe_loss(ctx), generator=ctx.rng)
        self._begin_trial(ctx)

    def _begin_trial(self, ctx: StepContext) -> None:
        self.steps_left = self.interval
        self._apply(ctx, self.improver.factors, "a trial")

    def _end_trial(self, ctx: StepContext) -> bool:
        assert ctx.rng is not None
        if not self.improver.end_trial(self._probe_loss(ctx), generator=ctx.rng):
            self._begin_trial(ctx)
            return False
        self._apply(ctx, self._centre, "the end of a quadruple")
        ctx.policy.token.give_back(self.name)
        return self._apply(ctx, self.improver.factors, "what the quadruple showed")

    def _apply(self, ctx: StepContext, factors: dict[str, float], reason: str) -> bool:
        """Take every factor to what is given; whether a value that the run reads changed."""
        changed = False
        for name, factor in factors.items():
            proposal = ctx.policy.propose(
                name, factor, by=self.name, reason=reason, seed=self.num_begun
            )
            changed |= proposal is not None and ctx.policy.apply(proposal)
        return changed

    def _probe_loss(self, ctx: StepContext) -> float:
        """Loss of the quadruple's own probe batch."""
        assert ctx.probe is not None
        return float(ctx.probe.loss(ctx.model, ctx.probe.batch(self.num_begun)))

    def _log(self, ctx: StepContext) -> None:
        own = self.improver
        factors = own.factors
        for name, column in COLUMNS.items():
            ctx.log(column, factors.get(name, math.nan))
        ctx.log("self_improver_knobs", float(len(own.knobs)))
        ctx.log("self_improver_sigma", own.sigma)
        ctx.log("self_improver_reward_plus", own.reward_plus)
        ctx.log("self_improver_reward_minus", own.reward_minus)
        ctx.log("self_improver_theta_norm", math.hypot(*own.theta))
        ctx.log("self_improver_quadruples", float(own.num_quadruples))

    def state_dict(self) -> dict[str, Any]:
        """The search and the clock of its trials."""
        return {
            "clock": [self.steps_left, self.num_begun],
            "centre": dict(self._centre),
            "improver": None if self._improver is None else self._improver.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_left, self.num_begun = state["clock"]
        self._centre = dict(state["centre"])
        self.improver.load_state_dict(state["improver"])
