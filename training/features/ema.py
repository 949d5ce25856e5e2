"""Feature `ema`: keeps the weight average from its start fraction of the run on."""

from __future__ import annotations

from typing import Any

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.ema import WeightAverage
from training.features.base import Feature, Schedule


class EmaFeature(Feature):
    name = "ema"

    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.ema.enabled:
            return None
        return Schedule(start_step=max(1, int(config.ema.start_fraction * config.run.steps)))

    @classmethod
    def create(cls, config: SigmaConfig) -> EmaFeature:
        return cls(WeightAverage(decay=config.ema.decay))

    def after_step(self, ctx: StepContext) -> bool:
        moved = self.average.update(ctx.model)
        ctx.log("ema_decay", self.average.decay)
        ctx.log("ema_distance", lambda: self.average.distance(ctx.model))
        return moved

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.average.shadow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.shadow = {name: value.clone() for name, value in state["shadow"].items()}
