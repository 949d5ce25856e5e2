"""Feature `verifier_cascade`: verifies in stages, the strict one last.

Part of a tick (training/rl/cascade.py), which counts for it: one per tick in which a candidate was
decided before the strict stage.
"""

from __future__ import annotations

from training.config.sigma_config import SigmaConfig
from training.features.base import Feature, Schedule
from training.startup_ramp import ramp_of


class VerifierCascadeFeature(Feature):
    name = "verifier_cascade"

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.ttrl.interval or not config.verifies_in_stages():
            return None
        return Schedule(start_step=ramp_of(config).first_tick())
