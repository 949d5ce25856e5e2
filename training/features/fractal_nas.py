"""Feature `fractal_nas` (A): tries tiles of the scan while training, for the runs that follow.

A run takes the best tile known when it begins and keeps it: its values must not depend on what a
clock says on the way, and a resumed run must go on as it was, so the tile is in the checkpoint.
Trials run beside training and fill a cache by device, type and shape. A trial counts, and the tile
taken over at the start.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from evolution.kernel_tuner import Arm, KernelTuner
from model.mamba import Mamba
from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.runtime.environment import autocast_dtype
from training.scan_trials import TOLERANCE, ScanTrials, scan_mixers, use_arm
from training.spare_memory import within_memory
from training.tile_cache import TileCache

_LOG = logging.getLogger(__name__)


class FractalNasFeature(Feature):
    name = "fractal_nas"

    def __init__(self, config: SigmaConfig, cache: TileCache) -> None:
        self._config = config
        self._cache = cache
        self._trials: ScanTrials | None = None
        self._mixers: list[Mamba] = []
        self._tuner = KernelTuner([(0,)], exploration=0.0)
        self._adopted: Arm = (0,)

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        interval = config.fractal.interval_steps
        return Schedule(interval=interval) if interval and config.model.mamba_ratio else None

    @classmethod
    def create(cls, config: SigmaConfig) -> FractalNasFeature:
        return cls(config, TileCache.beside_kernels())

    def on_setup(self, ctx: StepContext) -> bool:
        """Take over the best tile known; where none is known, make the first trial."""
        self._mixers = scan_mixers(ctx.model)
        data, mixer = self._config.data, self._mixers[0]
        device = mixer.control_proj.weight.device
        in_bf16 = autocast_dtype(self._config, device) is torch.bfloat16
        self._trials = ScanTrials(mixer, rows=data.batch_size, length=data.seq_len, in_bf16=in_bf16)
        arms = self._trials.arms
        self._tuner = KernelTuner(arms, exploration=self._config.fractal.ucb_c)
        known = self._cache.read(self._trials.key)
        if known is not None:
            try:
                self._tuner.load_state_dict(known)
            except ValueError as problem:
                _LOG.warning("%s is measured anew: %s", self._cache.path, problem)
        self._adopt(self._tuner.best())
        if known is None:
            return self._try_one()[1]
        return self._adopted != arms[0]

    def after_step(self, ctx: StepContext) -> bool:
        """Try the next tile."""
        with ctx.span("fractal"):
            arm, measured = self._try_one()
        if arm is None:
            return False
        tuner = self._tuner
        ctx.log("fractal_arm_id", tuner.arms.index(arm))
        ctx.log("fractal_trials", tuner.num_trials)
        ctx.log("fractal_best_latency_us", tuner.median(tuner.best()))
        ctx.log("fractal_reward", tuner.reward(arm) if arm in tuner.latencies else 0.0)
        ctx.log("fractal_rejected_arms", len(tuner.rejected))
        return measured

    def _adopt(self, arm: Arm) -> None:
        self._adopted = arm
        for mixer in self._mixers:
            use_arm(mixer, arm)

    def _try_one(self) -> tuple[Arm | None, bool]:
        """The arm, None if there was no memory for it; whether it was measured, not rejected."""
        tuner, trials = self._tuner, self._trials
        assert trials is not None
        arm = tuner.choose()
        is_new = arm not in tuner.latencies and arm != tuner.arms[0]

        def measure(_: int) -> float:
            if is_new and trials.error(arm) > TOLERANCE:
                return math.inf
            return trials.latency(arm)

        found = within_memory(measure, rows=1, what="trial of a tile", say=_LOG.info)
        if found is None:
            return None, False
        if math.isinf(found):
            tuner.reject(arm)
        else:
            tuner.record(arm, found)
        try:
            self._cache.write(trials.key, tuner.state_dict())
        except OSError as problem:
            _LOG.warning("%s was not written: %s", self._cache.path, problem.strerror)
        return arm, not math.isinf(found)

    def state_dict(self) -> dict[str, Any]:
        """The tile of this run, what it is for, and what was measured."""
        key = "" if self._trials is None else self._trials.key
        return {"key": key, "adopted": list(self._adopted), "tuner": self._tuner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the tile of the checkpoint, unless it belongs to another device or backend."""
        if self._trials is None or state["key"] != self._trials.key:
            return
        self._tuner.load_state_dict(state["tuner"])
        self._adopt(tuple(state["adopted"]))
