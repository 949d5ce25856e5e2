"""Feature `asym_verify`: drafts more candidates than are verified.

Part of a tick (training/rl/shortlist.py), which counts for it: one per tick in which the scorer
kept a candidate out of verification.
"""

from __future__ import annotations

from training.config.sigma_config import SigmaConfig
from training.features.base import Feature, Schedule
from training.startup_ramp import ramp_of


class AsymVerifyFeature(Feature):
    name = "asym_verify"

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.ttrl.interval or not config.ttrl.asym_verify_enabled:
            return None
        return Schedule(start_step=ramp_of(config).first_tick())
