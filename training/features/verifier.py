"""Feature `verifier`: judges the completions of RL ticks.

Part of a tick (training/rl/verifier.py), which counts for it: one per verdict by a check that ran.
"""

from __future__ import annotations

from training.config.sigma_config import SigmaConfig
from training.features.base import Feature, Schedule
from training.startup_ramp import ramp_of


class VerifierFeature(Feature):
    name = "verifier"

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.ttrl.interval:
            return None
        return Schedule(start_step=ramp_of(config).first_tick())
