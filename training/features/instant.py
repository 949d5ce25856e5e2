"""Feature `instant`: patches the model's activation memory and reports what it keeps.

A step counts when bytes were saved and backward used decoded tensors or inverted blocks.
"""

from __future__ import annotations

from typing import Any

import torch

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.instant import (
    InstantMemory,
    InstantSettings,
    apply_instant,
    check_inversion,
    instant_memory,
)


def instant_settings(config: SigmaConfig) -> InstantSettings:
    """What `--instant-*` ask for."""
    instant = config.instant
    return InstantSettings(
        mode=config.instant_mode(),
        comp_dim=instant.comp_dim,
        error_threshold=instant.error_threshold,
        reversible_iters=instant.reversible_iters,
        byte_budget_mb=instant.byte_budget_mb,
        seed=config.run.seed,
    )


class InstantFeature(Feature):
    name = "instant"

    def __init__(self, settings: InstantSettings) -> None:
        self.settings = settings
        self.memory: InstantMemory | None = None
        self.start_error = 0.0

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        return None if config.instant_mode() == "off" else Schedule()

    @classmethod
    def create(cls, config: SigmaConfig) -> InstantFeature:
        return cls(instant_settings(config))

    def on_setup(self, ctx: StepContext) -> bool:
        apply_instant(ctx.model, self.settings)
        self.memory = instant_memory(ctx.model)
        self.start_error = check_inversion(ctx.model, seed=self.settings.seed)
        return False

    def on_batch(self, ctx: StepContext) -> bool:
        if ctx.micro == 0:
            assert self.memory is not None and ctx.rng is not None
            seed = int(torch.randint(2**62, (1,), generator=ctx.rng))
            self.memory.begin_step(ctx.step, seed=seed)
        return False

    def before_optim(self, ctx: StepContext) -> bool:
        assert self.memory is not None
        report, patched = self.memory.finish_step(), self.memory.patched()
        ctx.log("instant_reconstruction_error", report.error)
        ctx.log("instant_error_bit_width", report.bits)
        ctx.log("instant_compression_ratio", report.ratio)
        ctx.log("instant_bytes_saved", report.bytes_saved)
        ctx.log("instant_inversion_iters", report.passes)
        ctx.log("instant_inversion_rel_residual", report.residual)
        ctx.log("instant_patched_mamba", patched.mamba)
        ctx.log("instant_patched_mla", patched.mla)
        ctx.log("instant_reversible_rel_error", self.start_error)
        return report.acted

    def state_dict(self) -> dict[str, Any]:
        return {} if self.memory is None else self.memory.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.memory is not None and state:
            self.memory.load_state_dict(state)
