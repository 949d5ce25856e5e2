"""Trials of overlays inside a run: when an arm is forked, what is recorded, what is put in force.

One replicate: after some step the other arm trains a few steps from the state of that moment, with
the candidate overlay, and is undone (fork.py); then the run does the same steps as always, and both
are scored on the same probe batches. So as long as nothing is promoted the run is the run without
trials, to the bit. What a promotion replaced is kept until three more replicates have not spoken
against it; if they do, the run returns to the step of the promotion.

Everything that follows is a function of the state after a step, so a run that is stopped anywhere
repeats what it had not finished. A replicate is an experiment and holds the run's token meanwhile
(arbitration.py). Decisions: `evolution/uroboros.py`.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from evolution.overlays import Overlay
from evolution.uroboros import Decision, Replicate, Uroboros, Verdict
from training.context import StepContext
from training.fork import Arm, ArmEnd, hash_state, remember_run, return_to, run_arm
from training.probe import Probe
from training.runtime.atomic_io import DISK_FULL
from training.runtime.memory_guard import is_out_of_memory
from training.runtime.metrics import MetricsLog
from training.trial_journal import TrialJournal

FEATURE = "uroboros"
HISTORY_NAME = "uroboros_patch_history.jsonl"
LEAST_STEPS = 4
SCORED_BATCHES = 16
SPIKE = 4.0  # times the median gradient norm of the control


class Phase(Enum):
    IDLE = "idle"
    OTHER_ARM = "other arm"  # runs before the next step
    OWN_ARM = "own arm"  # under way: these are the run's steps
    COMMIT = "commit"  # before the next step
    ROLL_BACK = "roll back"  # before the next step


@dataclass(slots=True, kw_only=True, frozen=True)
class TrialSettings:
    """interval: least steps between the beginnings of two replicates. steps: of an arm.

    commit: put promoted overlays in force; else they are recorded only. placebo: candidates change
    nothing and their arm draws other random numbers.
    """

    interval: int = 10
    steps: int = 12
    commit: bool = True
    placebo: bool = False


class OverlayTrials:
    """The trials of one run. journal: None = nothing is registered. say: told of promotions."""

    def __init__(
        self,
        search: Uroboros,
        settings: TrialSettings,
        *,
        probe: Probe,
        output_dir: Path,
        journal: TrialJournal | None,
        say: Callable[[str], object],
    ) -> None:
        self.search, self.settings = search, settings
        self.journal = journal
        self.phase = Phase.IDLE
        self.begun = self.end = 0  # steps after which the last replicate began and ends
        self.overlay = search.in_force  # of the other arm
        self.arm: Arm | None = None
        self.norms: list[float] = []  # of the own arm so far
        self.counts = {"trials": 0, "promotions": 0, "rollbacks": 0}
        self.figures = {"e_value": 1.0, "effect_size": 0.0, "relative_gain": 0.0}
        self.way_back: dict[str, Any] | None = None
        self._path = output_dir / HISTORY_NAME
        self._probe, self._say = probe, say
        self._history: MetricsLog | None = None
        self._cycle = 0
        self._journal_position = 0  # as restored; what is saved while the journal is off
        self.in_other_arm = False
        self._seconds = 0.0

    @property
    def overlay_now(self) -> Overlay:
        """What the step in progress has to follow."""
        tried = self.in_other_arm and not self.settings.placebo
        return self.overlay if tried else self.search.in_force

    def finish_step(self, ctx: StepContext) -> bool:
        """After a step: end or begin a replicate. Whether a difference was recorded."""
        if self.in_other_arm:
            return False
        start, acted = time.perf_counter(), False
        shown = 1 if self.phase is Phase.OWN_ARM else 0
        if self.phase is Phase.OWN_ARM:
            self.norms.append(float(ctx.grad_norm or 0.0))
            if ctx.step == self.end:
                acted, shown = self._conclude(ctx), 3
        if self.phase is Phase.IDLE and self._begin(ctx):
            shown = shown or 2
        self._log(ctx, shown=shown, seconds=self._seconds + time.perf_counter() - start)
        return acted

    def between_steps(self, trainer: Any, should_stop: Callable[[], bool]) -> bool:
        """Before a step: fork, commit or roll back. False when the step must not follow as it is:
        somebody asked to stop, or the run is at an earlier step now."""
        start, proceed = time.perf_counter(), True
        if self.phase is Phase.OTHER_ARM:
            proceed = self._run_other_arm(trainer, should_stop)
        elif self.phase is Phase.COMMIT:
            self._commit(trainer)
        elif self.phase is Phase.ROLL_BACK:
            self._roll_back(trainer)
            proceed = False
        self._seconds = time.perf_counter() - start
        trainer.clock.add(FEATURE, self._seconds)
        return proceed

    def _begin(self, ctx: StepContext) -> bool:
        steps = min(self.settings.steps, ctx.total_steps - ctx.step)
        if ctx.step - self.begun < self.settings.interval or steps < LEAST_STEPS:
            return False
        if not ctx.policy.token.take(FEATURE, step=ctx.step):
            return False
        assert ctx.rng is not None
        rng = random.Random(int(torch.randint(2**62, (), generator=ctx.rng)))
        tested = self.search.tested
        self.overlay = self.search.next_overlay(rng)
        self.begun, self.end = ctx.step, ctx.step + steps
        if self.search.tested > tested and not self._register(ctx.step, steps):
            ctx.policy.token.give_back(FEATURE)
            return False
        self.phase = Phase.OTHER_ARM
        return True

    def _run_other_arm(self, trainer: Any, should_stop: Callable[[], bool]) -> bool:
        self.in_other_arm = True
        arm = run_arm(
            trainer,
            steps=self.end - self.begun,
            score=self.score,
            seed=self._placebo_seed(),
            keep=(FEATURE,),
            should_stop=should_stop,
        )
        self.in_other_arm = False
        if arm.outcome is ArmEnd.STOPPED:
            return False  # begun again when the run is resumed
        if arm.outcome is ArmEnd.FINISHED and math.isfinite(arm.end):
            self.arm, self.norms, self.phase = arm, [], Phase.OWN_ARM
            return True
        self.phase = Phase.IDLE
        trainer.services.policy.token.give_back(FEATURE)
        if arm.outcome is ArmEnd.NO_MEMORY:
            self._say(f"step {self.begun}: no memory for a second arm, no trial this time")
        elif self.search.watch is not None:
            self._end_watch(self.begun, "kept: what it replaced diverged")
        else:
            self._give_up(self.begun, "dropped", "its arm diverged")
        return True

    def _placebo_seed(self) -> int | None:
        if not self.settings.placebo:
            return None
        return random.Random(f"{self.search.tested}:{self.begun}").getrandbits(62)

    def score(self, model: Any) -> float:
        """Mean loss on the replicate's probe batches, in nats per token."""
        count = min(SCORED_BATCHES, len(self._probe))
        first = self.counts["trials"] * count
        losses = [self._probe.loss(model, self._probe.batch(first + n)) for n in range(count)]
        return float(torch.stack(losses).double().mean())

    def _conclude(self, ctx: StepContext) -> bool:
        assert self.arm is not None
        own_end, arm = self.score(ctx.model), self.arm
        limit = SPIKE * statistics.median(self.norms)
        replicate = Replicate(
            difference=own_end - arm.end,
            control=arm.start - own_end,
            spikes=(max(self.norms) > limit, max(arm.grad_norms) > limit),
        )
        candidate, watched = self.search.open, self.search.watch is not None
        verdict = self.search.observe(replicate)
        self.counts["trials"] += 1
        self.figures = {
            "e_value": verdict.e_value,
            "effect_size": verdict.effect,
            "relative_gain": verdict.gain,
        }
        self._record(
            "replicate",
            ctx.step,
            candidate=self.search.number if watched else candidate.number if candidate else 0,
            against="replaced" if watched else "candidate",
            overlay=self.overlay.to_dict(),
            parent=self.search.in_force.to_dict(),
            parent_id=self.search.number,
            seed=candidate.proposal.seed if candidate else None,
            begun=self.begun,
            difference=replicate.difference,
            control=replicate.control,
            spikes=list(replicate.spikes),
            alpha=candidate.alpha if candidate else None,
            **self.figures,
            decision=verdict.decision.value,
            reason=verdict.reason,
        )
        self.arm, self.phase = None, Phase.IDLE
        ctx.policy.token.give_back(FEATURE)
        self._follow(ctx.step, verdict)
        return True

    def _follow(self, step: int, verdict: Verdict) -> None:
        """Do what a verdict asks for, or leave it to the next `between_steps`."""
        match verdict.decision:
            case Decision.PROMOTE if self.settings.commit:
                self.phase = Phase.COMMIT
            case Decision.PROMOTE:
                self._promote(step, verdict, "; dry run: not put in force")
                self.search.close_candidate()
            case Decision.DROP:
                self._complete(step, verdict, f"dropped: {verdict.reason}")
            case Decision.KEEP:
                self._end_watch(step, f"kept: {verdict.reason}")
            case Decision.ROLL_BACK:
                self.phase = Phase.ROLL_BACK

    def _promote(self, step: int, verdict: Verdict, note: str = "") -> None:
        self.counts["promotions"] += 1
        self._say(f"step {step}: promoted {self.overlay}{note}")
        self._complete(step, verdict, f"promoted: {verdict.reason}{note}")

    def _commit(self, trainer: Any) -> None:
        self.phase = Phase.IDLE
        try:
            self.way_back = remember_run(trainer, leave=(FEATURE,))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = "no memory to keep a way back"
            self._say(f"step {trainer.step}: {reason}, so nothing is changed")
            self._give_up(trainer.step, "not committed", reason)
            return
        parent = self.search.in_force
        self._promote(trainer.step, self.search.commit())
        self._record(
            "commit",
            trainer.step,
            candidate=self.search.number,
            overlay=self.search.in_force.to_dict(),
            parent=parent.to_dict(),
            state_sha256=hash_state(trainer),
        )

    def _roll_back(self, trainer: Any) -> None:
        assert self.way_back is not None
        step, number = trainer.step, self.search.number
        overlay, way_back = self.search.in_force, self.way_back
        return_to(trainer, way_back)
        self.search.end_watch(roll_back=True)
        self.way_back, self.phase, self.begun = None, Phase.IDLE, trainer.step
        self.counts["rollbacks"] += 1
        self._record(
            "rollback",
            step,
            candidate=number,
            overlay=overlay.to_dict(),
            parent=self.search.in_force.to_dict(),
            to_step=trainer.step,
            state_sha256=hash_state(trainer),
        )
        self._say(f"step {step}: {overlay} rolled back, on from step {trainer.step}")

    def _end_watch(self, step: int, reason: str) -> None:
        self.search.end_watch(roll_back=False)
        self.way_back = None
        self._record("kept", step, candidate=self.search.number, reason=reason)

    def _give_up(self, step: int, event: str, reason: str) -> None:
        """Leave the open candidate for a reason that is no evidence."""
        assert self.search.open is not None
        number = self.search.open.number
        verdict = self.search.abandon(reason)
        self._record(event, step, candidate=number, reason=reason)
        self._complete(step, verdict, f"{event}: {reason}")

    def _register(self, step: int, steps: int) -> bool:
        """Write the open candidate down; False where that failed and the candidate is dropped."""
        candidate = self.search.open
        if self.journal is None or candidate is None:
            return True
        try:
            self._cycle = self.journal.register(
                candidate,
                self.search.settings,
                step=step,
                steps=steps,
                interval=self.settings.interval,
                batches=min(SCORED_BATCHES, len(self._probe)),
                placebo=self.settings.placebo,
            )
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            verdict = self.search.abandon("disk full: it could not be registered")
            self._record("dropped", step, candidate=candidate.number, reason=verdict.reason)
            self._say(f"step {step}: no trial of {candidate.proposal.new}; {verdict.reason}")
            return False
        return True

    def _complete(self, step: int, verdict: Verdict, decision: str) -> None:
        if self.journal is None:
            return
        if self.journal.is_open(self._cycle):
            self.journal.complete(self._cycle, verdict, step=step, decision=decision)
        else:  # begun with the journal off, or its files are gone: no reason to stop the run
            self._say(f"step {step}: not in the research journal, where it has no page: {decision}")

    def _record(self, event: str, step: int, **values: Any) -> None:
        if self._history is None:
            self._open_history(0)
        assert self._history is not None
        self._history.append({"event": event, "step": step, **values})

    def _open_history(self, offset: int) -> None:
        self._history = self._history or MetricsLog(self._path)
        self._history.resume(offset)

    def _log(self, ctx: StepContext, *, shown: int, seconds: float) -> None:
        ctx.log("uroboros_state", float(shown))
        for name, value in {**self.counts, **self.figures}.items():
            ctx.log(f"uroboros_{name}", float(value))
        ctx.log("uroboros_active_overlay_id", float(self.search.number))
        ctx.log("phase_uroboros_s", seconds)
        self._seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that decides the rest, with the way back while there is one."""
        if self._history is not None:
            self._history.fsync()
        if self.journal is not None:
            self.journal.settle()
        arm = self.arm
        return {
            "search": self.search.state_dict(),
            "phase": self.phase.value,
            "steps": [self.begun, self.end],
            "overlay": self.overlay.to_dict(),
            "arm": None if arm is None else [arm.start, arm.end, list(arm.grad_norms)],
            "norms": list(self.norms),
            "counts": dict(self.counts),
            "figures": dict(self.figures),
            "way_back": self.way_back,
            "records": [
                0 if self._history is None else self._history.offset,
                self._journal_position if self.journal is None else self.journal.position,
                self._cycle,
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at this step; records written after it become orphans."""
        self.search.load_state_dict(state["search"])
        self.phase = Phase(state["phase"])
        self.begun, self.end = state["steps"]
        self.overlay = Overlay.from_dict(state["overlay"])
        self.arm = None
        if state["arm"] is not None:
            start, end, norms = state["arm"]
            self.arm = Arm(outcome=ArmEnd.FINISHED, start=start, end=end, grad_norms=list(norms))
        self.norms = list(state["norms"])
        self.counts, self.figures = dict(state["counts"]), dict(state["figures"])
        self.way_back = state["way_back"]
        offset, self._journal_position, self._cycle = state["records"]
        self._open_history(offset)
        if self.journal is not None:
            self.journal.resume(self._journal_position)

    def close(self) -> None:
        if self.journal is not None:
            self.journal.settle()
        if self._history is not None:
            self._history.close()
