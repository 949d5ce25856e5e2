"""Feature `self_evolve`: looks at one probe batch every few steps and moves the learning rate by a
rule, and the pace of RL by another, at the boundaries of experiments. A step counts when a value
that the run reads changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.run_policy import LR, TTRL_BUDGET, TTRL_INTERVAL
from training.self_evolve import LearningRateRule, PaceRule, PaceSettings, RuleSettings
from training.startup_ramp import RampSettings, ramp_of

GIB = 2**30


class SelfEvolveFeature(Feature):
    name = "self_evolve"

    def __init__(
        self,
        rule: LearningRateRule,
        *,
        interval: int,
        ramp: RampSettings,
        pace: PaceRule | None = None,
        is_shuffled: bool = False,
    ) -> None:
        self.rule = rule
        self.pace = pace  # None without RL
        self.interval = interval
        self.ramp = ramp
        self.is_shuffled = is_shuffled
        self._norms: list[Tensor] = []  # unread, of the steps since the last look

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        opened = ramp_of(config).gate_step
        return Schedule(start_step=opened) if config.self_evolve.interval else None

    @classmethod
    def create(cls, config: SigmaConfig) -> SelfEvolveFeature:
        own = config.self_evolve
        settings = RuleSettings(
            history=own.history,
            up=own.lr_up,
            down=own.lr_down,
            lowest=own.lr_min_factor,
            highest=own.lr_max_factor,
        )
        pace = None
        if config.ttrl.interval:
            pace = PaceRule(
                PaceSettings(
                    interval=config.ttrl.interval,
                    budget=config.ttrl.budget_max,
                    shortest=own.ttrl_interval_min,
                    longest=own.ttrl_interval_max,
                    target_gb=own.target_reserved_gb,
                )
            )
        rule = LearningRateRule(settings)
        ramp = ramp_of(config)
        return cls(rule, interval=own.interval, ramp=ramp, pace=pace, is_shuffled=own.shuffled)

    def on_setup(self, ctx: StepContext) -> bool:
        ctx.policy.enroll(self.name)
        return False

    def after_step(self, ctx: StepContext) -> bool:
        if not self.ramp.is_open_in(ctx):
            return False
        assert ctx.grad_norm is not None
        rule = self.rule
        self._norms = [*self._norms, ctx.grad_norm.detach()]
        if len(self._norms) >= self.interval:
            self._look(ctx)
        changed = False
        if ctx.policy.token.is_boundary(ctx.step):
            reason = f"slope {rule.slope_t:.3g} standard errors, spike: {rule.is_spike}"
            changed = self._apply(ctx, {LR: rule.settle()}, reason)
            if self.pace is not None:
                interval, budget = self.pace.settle()
                factors = {TTRL_INTERVAL: interval, TTRL_BUDGET: budget}
                changed |= self._apply(ctx, factors, f"task-val {self.pace.task_val:.3g}")
        if self.pace is not None:
            ctx.log("self_evolve_ttrl_interval", float(self.pace.interval))
            ctx.log("self_evolve_ttrl_budget", float(self.pace.budget))
        ctx.log("self_evolve_lr_factor", rule.factor)
        ctx.log("self_evolve_loss_delta", rule.loss_delta)
        ctx.log("self_evolve_slope_t", rule.slope_t)
        ctx.log("self_evolve_spike", float(rule.is_spike))
        return changed

    def _apply(self, ctx: StepContext, factors: dict[str, float], reason: str) -> bool:
        """Whether a value that the run reads changed."""
        changed = False
        for name, factor in factors.items():
            proposal = ctx.policy.propose(name, factor, by=self.name, reason=reason)
            changed |= proposal is not None and ctx.policy.apply(proposal)
        return changed

    def _look(self, ctx: StepContext) -> None:
        assert ctx.probe is not None and ctx.rng is not None
        loss = ctx.probe.loss(ctx.model, ctx.probe.batch(0))
        # One wait for the device per look.
        loss, *norms = torch.stack([loss, *(norm.to(loss) for norm in self._norms)]).tolist()
        self._norms = []
        order = None
        if self.is_shuffled:
            known = len(self.rule.losses) + math.isfinite(loss)
            order = torch.randperm(
                min(known, self.rule.settings.history), generator=ctx.rng
            ).tolist()
        self.rule.observe(loss, grad_norms=norms, order=order)
        if self.pace is not None:
            self._look_at_pace(ctx)

    def _look_at_pace(self, ctx: StepContext) -> None:
        assert self.pace is not None
        device = next(ctx.model.parameters()).device
        held = torch.cuda.memory_reserved(device) / GIB if device.type == "cuda" else 0.0
        task_val = ctx.metrics.get("task_val_pass", math.nan)  # of the last tick
        assert isinstance(task_val, float)
        self.pace.observe(reserved_gb=held, task_val=task_val)

    def state_dict(self) -> dict[str, Any]:
        """The rule, and the gradient norms it has not seen yet."""
        norms = torch.zeros(0)
        if self._norms:  # those of a restored state are in host memory
            norms = torch.stack([norm.to(self._norms[-1].device) for norm in self._norms])
        pace = None if self.pace is None else self.pace.state_dict()
        return {"rule": self.rule.state_dict(), "norms": norms, "pace": pace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self._norms = list(state["norms"].unbind())
        if self.pace is not None and state["pace"] is not None:
            self.pace.load_state_dict(state["pace"])
