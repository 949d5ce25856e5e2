"""Feature `hydra_v21`: adapters per domain, taught, gated and merged, each by a clock of its own.

It knows when something is due and gives it a seed; what is done is training/hydra/learner.py's.
Gates and merges wait for the end of an experiment that is under way, updates do not. One step on
pairs with a margin that changed an adapter counts as an effect.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.hydra.clocks import EventClock
from training.hydra.gate import Decision, Look
from training.hydra_service import HydraService
from training.startup_ramp import RampSettings, ramp_of

LARGEST_SEED = 2**62
COLUMNS = (
    "hydra_domain_id", "hydra_loss", "hydra_train_pairs", "hydra_pair_reward_pos",
    "hydra_pair_reward_neg", "hydra_pair_margin", "hydra_candidate_pass_rate",
    "hydra_rollback_drop", "hydra_eval_score", "hydra_merge_sign_conflict_fraction",
)  # fmt: skip


class HydraFeature(Feature):
    name = "hydra_v21"

    def __init__(self, ramp: RampSettings, clocks: dict[str, EventClock]) -> None:
        self.ramp = ramp
        self.clocks = clocks
        self.row: dict[str, float] = {}
        self._service: HydraService | None = None

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        own = config.hydra
        if not own.enable:
            return None
        opened = ramp_of(config).gate_step
        return Schedule(start_step=-(-opened // own.update_interval) * own.update_interval)

    @classmethod
    def create(cls, config: SigmaConfig) -> HydraFeature:
        own = config.hydra
        intervals = {
            "update": own.update_interval,
            "gate": own.rollback_interval,
            "merge": own.steps_per_phase,
        }
        clocks = {name: EventClock(interval) for name, interval in intervals.items()}
        return cls(ramp_of(config), clocks)

    @property
    def service(self) -> HydraService:
        assert self._service is not None, "on_setup comes first"
        return self._service

    def on_setup(self, ctx: StepContext) -> bool:
        self._service = ctx.hydra
        weights = [f"hydra_merge_weight_{name}" for name in self.service.learner.domains]
        self.row = dict.fromkeys((*COLUMNS, *weights), math.nan)
        return False

    def after_step(self, ctx: StepContext) -> bool:
        step, acted = ctx.step, False
        is_open = self.ramp.is_open(step, real_batches=self.service.real_batches(step))
        if is_open:
            acted = self._events(ctx)
        for name, value in self.row.items():
            ctx.log(name, value)
        counts = self.service.learner.counts
        ctx.log("hydra_active", float(is_open))
        ctx.log("hydra_step_skipped", float(counts["skipped"]))
        ctx.log("hydra_rollback_triggered", float(counts["rollbacks"]))
        ctx.log("hydra_merge_count", float(counts["merges"]))
        return acted

    def _events(self, ctx: StepContext) -> bool:
        """What is due after this step; whether an update changed an adapter."""
        learner, acted = self.service.learner, False
        at_boundary = ctx.policy.token.is_boundary(ctx.step)
        if self.clocks["update"].is_due(ctx.step):
            with self.service.timed():
                update = learner.update(seed=self._seed(ctx))
            self.row = {**self.row, **update.metrics}
            acted = update.applied
        if self.clocks["gate"].is_due(ctx.step, allowed=at_boundary):
            with self.service.timed():
                self._note(learner.gate())
        if self.clocks["merge"].is_due(ctx.step, allowed=at_boundary):
            with self.service.timed():
                record = learner.merge(seed=self._seed(ctx))
            self.service.write_merge(ctx.step, record)
            weights = {f"hydra_merge_weight_{name}": w for name, w in record["weights"].items()}
            conflicts = {"hydra_merge_sign_conflict_fraction": record["sign_conflict_fraction"]}
            self.row = {**self.row, **weights, **conflicts}
        return acted

    def _note(self, looks: dict[str, Look]) -> None:
        """Columns of a gate: mean score of the domains looked at, and the largest fall undone."""
        if not looks:
            return
        undone = [look.drop for look in looks.values() if look.decision is Decision.ROLL_BACK]
        score = sum(look.score for look in looks.values()) / len(looks)
        self.row = {**self.row, "hydra_eval_score": score}
        if undone:
            self.row["hydra_rollback_drop"] = max(undone)

    @staticmethod
    def _seed(ctx: StepContext) -> int:
        assert ctx.rng is not None
        return int(torch.randint(LARGEST_SEED, (), generator=ctx.rng))

    def state_dict(self) -> dict[str, Any]:
        """Events that wait, the last columns, and the learner."""
        return {
            "waiting": {name: clock.waiting for name, clock in self.clocks.items()},
            "row": dict(self.row),
            "learner": self.service.learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, clock in self.clocks.items():
            clock.waiting = state["waiting"][name]
        self.row = dict(state["row"])
        self.service.learner.load_state_dict(state["learner"])

    def close(self) -> None:
        if self._service is not None:
            self._service.close()
