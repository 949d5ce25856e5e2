"""Feature `curriculum`: feeds short rows first; a level change is the effect it counts."""

from __future__ import annotations

from typing import Any

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.curriculum import sequence_divisor, shorten_rows
from training.features.base import Feature, Schedule


class CurriculumFeature(Feature):
    name = "curriculum"

    def __init__(self, boundaries: tuple[float, ...]) -> None:
        self.boundaries = boundaries
        self.divisor = 1  # whole rows, as without the feature

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        return Schedule() if config.curriculum.enabled else None

    @classmethod
    def create(cls, config: SigmaConfig) -> CurriculumFeature:
        return cls(config.curriculum.boundaries())

    def on_batch(self, ctx: StepContext) -> bool:
        divisor = sequence_divisor(
            ctx.step, total_steps=ctx.total_steps, boundaries=self.boundaries
        )
        assert ctx.batch is not None
        ctx.batch = shorten_rows(ctx.batch, divisor)
        changed = divisor != self.divisor
        self.divisor = divisor
        ctx.log("curriculum_seq_len", ctx.batch.input_ids.size(1))
        ctx.log("curriculum_phase", len(self.boundaries) - divisor.bit_length() + 1)
        return changed

    def state_dict(self) -> dict[str, Any]:
        return {"divisor": self.divisor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.divisor = state["divisor"]
