"""Feature `diff_mla`: counts the steps in which differential attention really subtracted.

The mechanism lives in the model; this is its evidence. A step counts when the subtracted term is
non-zero (relative norm above 1e-6) and the lambda gates received gradient.
"""

from __future__ import annotations

from torch import Tensor

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule

ANY_VOCABULARY = 4096  # blocks do not depend on it


class DiffMlaFeature(Feature):
    name = "diff_mla"

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        kinds = config.model_config(ANY_VOCABULARY).layer_kinds()
        on = config.model.diff_attention_enabled and "attention" in kinds
        return Schedule() if on else None

    def before_optim(self, ctx: StepContext) -> bool | Tensor:
        return ctx.model.differential_attention_acted()
