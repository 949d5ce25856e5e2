"""Feature `causal_replay`: flips the coins of replay and reads the probe after every step.

It starts when the start-up ramp lets it, after a first look at the probe. An injection whose
outcome is recorded beside controls counts as an effect. Everything random in a coin follows from
one number of the feature's generator, so that both arms of a fork flip the same coins.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.replay.causal_replay import CausalReplay, Coin
from training.replay.injection import inject, item_loss
from training.startup_ramp import RampSettings, ramp_of

LARGEST_SEED = 2**62
PROBE_BATCH = 0  # the same one at every step: losses of different batches do not compare


class CausalReplayFeature(Feature):
    name = "causal_replay"

    def __init__(self, ramp: RampSettings, *, inject_every: int) -> None:
        self.ramp = ramp
        self.inject_every = inject_every
        self.is_open = False
        self.steps_to_coin = 0
        self._coin: Coin | None = None
        self._replay: CausalReplay | None = None

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.replays():
            return None
        return Schedule(start_step=ramp_of(config).gate_step)

    @classmethod
    def create(cls, config: SigmaConfig) -> CausalReplayFeature:
        return cls(ramp_of(config), inject_every=config.replay.replay_inject_every)

    @property
    def replay(self) -> CausalReplay:
        assert self._replay is not None, "on_setup comes first"
        return self._replay

    def on_setup(self, ctx: StepContext) -> bool:
        self._replay = ctx.replay
        return False

    def on_batch(self, ctx: StepContext) -> bool:
        if ctx.micro > 0:
            return False
        self._coin = None
        if self.replay.loss is None or self.steps_to_coin > 0:
            return False
        assert ctx.batch is not None and ctx.rng is not None
        seed = int(torch.randint(LARGEST_SEED, (), generator=ctx.rng))
        self._coin = self.replay.flip(seed=seed, row_tokens=ctx.batch.input_ids.shape[1])
        if self._coin is not None and self._coin.heads:
            ctx.batch = inject(ctx.batch, self._coin.item)
        return False

    def on_losses(self, ctx: StepContext) -> bool:
        coin = self._coin
        if ctx.micro > 0 or coin is None or not coin.heads:
            return False
        assert ctx.batch is not None
        share = 1.0 / len(ctx.batch.input_ids)
        ctx.losses["replay"] = item_loss(ctx.model, ctx.outputs.hidden, coin.item)
        ctx.weights["replay"] = share * coin.weight
        ctx.weights["lm"] = 1.0 - share
        return False

    def after_step(self, ctx: StepContext) -> bool:
        start, coin, replay = time.perf_counter(), self._coin, self.replay
        wait = self.steps_to_coin if coin is None else self.inject_every
        self.steps_to_coin = max(0, wait - 1)
        self.is_open = self.is_open or self.ramp.is_open_in(ctx)
        if self.is_open:
            assert ctx.probe is not None
            loss = float(ctx.probe.loss(ctx.model, ctx.probe.batch(PROBE_BATCH)))
            replay.finish_step(loss, coin=coin)
        for name, value in replay.metrics().items():
            ctx.log(name, value)
        ctx.log("phase_causal_s", time.perf_counter() - start)
        return coin is not None and coin.heads

    def state_dict(self) -> dict[str, Any]:
        """The clock, the buffer, the open windows and what is known."""
        return {
            "clock": [self.is_open, self.steps_to_coin],
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.is_open, self.steps_to_coin = state["clock"]
        self.replay.load_state_dict(state["replay"])
