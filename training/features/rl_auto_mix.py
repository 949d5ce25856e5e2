"""Feature `rl_auto_mix`: a bandit that blends the RL objectives.

Part of a tick (training/rl/auto_mix.py), which counts for it: one per change of the weights,
the first ones included, that an update used whose gradient was not the main objective's alone.
"""

from __future__ import annotations

from training.config.sigma_config import SigmaConfig
from training.features.base import Feature, Schedule
from training.startup_ramp import ramp_of


class RlAutoMixFeature(Feature):
    name = "rl_auto_mix"

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        if not config.ttrl.interval or not config.sigma_rl.sigma_rl_auto_mix_enabled:
            return None
        return Schedule(start_step=ramp_of(config).first_tick())
