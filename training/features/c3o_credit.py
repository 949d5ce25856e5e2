"""Feature `c3o_credit`: probes the update every few steps, so that C3O knows its blocks' credit.

The probe is text of the training split that is never trained on. A step counts when at least one
block's factor differed from one in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.credit_signal import CreditSignal
from training.features.base import Feature, Schedule


class C3oCreditFeature(Feature):
    name = "c3o_credit"

    def __init__(self, signal: CreditSignal, *, interval: int) -> None:
        self.signal = signal
        self.interval = interval
        self.num_probes = 0
        self.steps_to_probe = 0
        self.num_scaled = 0
        self.loss_before = self.loss_gain = self.probe_loss = 0.0

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        on = config.c3o.credit_enabled and config.optim.optimizer == "c3o"
        return Schedule(start_step=1) if on else None

    @classmethod
    def create(cls, config: SigmaConfig) -> C3oCreditFeature:
        own = config.c3o
        signal = CreditSignal(
            loss_weight=own.credit_loss_weight,
            speed_weight=own.credit_speed_weight,
            beta=own.credit_ema_beta,
            clip=own.credit_clip_value,
        )
        return cls(signal, interval=own.probe_interval)

    def before_optim(self, ctx: StepContext) -> bool:
        if self.steps_to_probe == 0:
            assert ctx.probe is not None
            ctx.optimizer.control.begin_probe()
            self.loss_before = float(ctx.probe.loss(ctx.model, ctx.probe.batch(self.num_probes)))
        return False

    def after_step(self, ctx: StepContext) -> bool | Tensor:
        control = ctx.optimizer.control
        acted = (control.scales - 1.0).abs().max() > 1e-6
        self.signal.tick()
        if self.steps_to_probe == 0:
            self._probe(ctx)
            self.steps_to_probe = self.interval
        self.steps_to_probe -= 1
        ctx.log("probe_loss", self.probe_loss)
        ctx.log("c3o_loss_gain", self.loss_gain)
        ctx.log("c3o_speed_gain", self.signal.speed_gain)
        ctx.log("c3o_credit_signal", self.signal.value)
        ctx.log("c3o_credit_centered", self.signal.centred)
        ctx.log("c3o_block_scaling_batches", float(self.num_scaled))
        ctx.log("c3o_block_scaling_skipped", float(self.num_probes - self.num_scaled))
        return acted

    def _probe(self, ctx: StepContext) -> None:
        assert ctx.probe is not None and ctx.rng is not None
        probe, model, control = ctx.probe, ctx.model, ctx.optimizer.control
        batch = probe.batch(self.num_probes)
        loss, gradients = probe.gradient(model, batch)
        control.finish_probe(
            gradients, evaluate=lambda: probe.loss(model, batch), generator=ctx.rng
        )
        self.num_probes += 1
        # One wait for the device per probe.
        self.probe_loss, scaled = torch.stack([loss, control.active.to(loss)]).tolist()
        self.num_scaled += int(scaled)
        self.loss_gain = self.loss_before - self.probe_loss
        self.signal.observe(self.loss_gain)

    def state_dict(self) -> dict[str, Any]:
        """The clock of the probes and the figures of the last one."""
        return {
            "clock": [self.num_probes, self.steps_to_probe, self.num_scaled],
            "figures": [self.probe_loss, self.loss_gain],
            "signal": self.signal.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_probes, self.steps_to_probe, self.num_scaled = state["clock"]
        self.probe_loss, self.loss_gain = state["figures"]
        self.signal.load_state_dict(state["signal"])
