"""Feature `self_evolve`: looks at one probe batch every few steps and moves the learning rate by a
rule, at the boundaries of experiments. A step counts when the factor on the rate changed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.run_policy import LR
from training.self_evolve import LearningRateRule, RuleSettings


class SelfEvolveFeature(Feature):
    name = "self_evolve"

    def __init__(self, rule: LearningRateRule, *, interval: int, is_shuffled: bool = False) -> None:
        self.rule = rule
        self.interval = interval
        self.is_shuffled = is_shuffled
        self._norms: list[Tensor] = []  # unread, of the steps since the last look

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        return Schedule(start_step=1) if config.self_evolve.interval else None

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
        return cls(LearningRateRule(settings), interval=own.interval, is_shuffled=own.shuffled)

    def on_setup(self, ctx: StepContext) -> bool:
        ctx.policy.enroll(self.name)
        return False

    def after_step(self, ctx: StepContext) -> bool:
        assert ctx.grad_norm is not None
        rule = self.rule
        self._norms = [*self._norms, ctx.grad_norm.detach()]
        if len(self._norms) >= self.interval:
            self._look(ctx)
        changed = False
        if ctx.policy.token.is_boundary(ctx.step):
            reason = f"slope {rule.slope_t:.3g} standard errors, spike: {rule.is_spike}"
            proposal = ctx.policy.propose(LR, rule.settle(), by=self.name, reason=reason)
            changed = proposal is not None and ctx.policy.apply(proposal)
        ctx.log("self_evolve_lr_factor", rule.factor)
        ctx.log("self_evolve_loss_delta", rule.loss_delta)
        ctx.log("self_evolve_slope_t", rule.slope_t)
        ctx.log("self_evolve_spike", float(rule.is_spike))
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

    def state_dict(self) -> dict[str, Any]:
        """The rule, and the gradient norms it has not seen yet."""
        norms = torch.stack(self._norms) if self._norms else torch.zeros(0)
        return {"rule": self.rule.state_dict(), "norms": norms}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])
        self._norms = list(state["norms"].unbind())
