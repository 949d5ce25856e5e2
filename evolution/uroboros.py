"""Uroboros: which overlay to try next, and when the evidence is enough to keep or to leave it.

A candidate is compared with the present overlay in replicates: the same steps from the same state,
twice. The evidence is an always-valid test whose error budget is spent over the candidates, so the
chance that any of them is kept for nothing stays below `alpha`, however many come. What was kept is
watched for three more replicates against what it replaced.

The next candidate comes from a kernel regression over past replicates: of a few random overlays the
one whose improvement, taken optimistically, is largest. The spread of what is unknown is the same
everywhere, so a larger change is never preferred for its size.

Sources: population based training 1711.09846; sequential tests as in e_process.py.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from evolution.e_process import (
    EProcess,
    deviation,
    effect_size,
    interval,
    mean,
    spent_alpha,
    squared_steps,
)
from evolution.overlays import NEUTRAL, Overlay, Proposal, distance, draw_overlay

MAX_REPLICATES = 48
FUTILE = 0.05
OPTIMISM = 1.3  # standard deviations
BANDWIDTH = 0.15  # of the kernel, in the unit cube
LEAST_DISTANCE = 0.05  # what is closer to the present overlay is no change
WATCHED_REPLICATES = 3
# One-sided 5 % point of Student's t with 2 degrees of freedom: asked once, after the third.
REVERSAL_T = 2.920
PASSED = "significant, and every gate is passed"


class Decision(Enum):
    """PROMOTE and DROP end a candidate, KEEP and ROLL_BACK the watch over what was promoted."""

    CONTINUE = "continue"
    PROMOTE = "promote"
    DROP = "drop"
    KEEP = "keep"
    ROLL_BACK = "roll back"


@dataclass(slots=True, kw_only=True, frozen=True)
class SearchSettings:
    """alpha: error budget of the whole run. min_effect: mean difference / standard deviation.

    min_gain: mean difference / what the control gained; asked for only with `gain_enforced`.
    strict: a candidate whose arms spike more often than the control's is not promoted. window:
    replicates that are remembered. trials: overlays drawn per proposal. patches: candidates taken
    from one draw. names: fields of an overlay that this run follows.
    """

    alpha: float = 0.05
    min_effect: float = 0.15
    min_gain: float = 0.15
    gain_enforced: bool = True
    strict: bool = True
    window: int = 64
    trials: int = 8
    patches: int = 3
    names: tuple[str, ...] = ("lr_factor",)


@dataclass(slots=True, kw_only=True, frozen=True)
class Replicate:
    """Two arms from one state. difference: how much further the candidate's probe loss fell.

    control: how far the control's fell. spikes: whether gradients jumped in control and candidate.
    """

    difference: float
    control: float
    spikes: tuple[bool, bool] = (False, False)


@dataclass(slots=True, kw_only=True, frozen=True)
class Verdict:
    """What follows from a replicate, and the figures it follows from."""

    decision: Decision
    reason: str
    e_value: float
    effect: float
    gain: float
    count: int
    interval: tuple[float, float] | None


@dataclass(slots=True, kw_only=True)
class Candidate:
    """An overlay under test; number: counted from 1 over the run."""

    number: int
    proposal: Proposal
    alpha: float
    process: EProcess
    controls: list[float] = field(default_factory=list)
    spikes: list[int] = field(default_factory=lambda: [0, 0])

    @property
    def gain(self) -> float:
        """Mean difference over the mean size of what the controls moved; 0 while they did not
        move."""
        moved = mean([abs(value) for value in self.controls])
        return mean(self.process.differences) / moved if moved else 0.0


@dataclass(slots=True, kw_only=True)
class Watch:
    """What was put in force last, on trial against what it replaced."""

    replaced: Overlay
    replaced_number: int
    gain: float
    differences: list[float] = field(default_factory=list)


class Uroboros:
    """The search of one run. Plain numbers: states, arms and files are the caller's."""

    def __init__(self, settings: SearchSettings) -> None:
        self.settings = settings
        self.in_force = NEUTRAL
        self.number = 0  # of the overlay in force, 0 = none
        self.tested = 0
        self.open: Candidate | None = None
        self.watch: Watch | None = None
        self._queue: list[Overlay] = []
        self._level = 0.0  # what the overlays in force are worth together, as a relative gain
        # Per replicate: candidate, lr_factor and so on, difference, control, level at the time.
        self._archive: list[dict[str, Any]] = []

    def next_overlay(self, rng: random.Random) -> Overlay:
        """The overlay of the next replicate's other arm; may open a candidate."""
        if self.watch is not None:
            return self.watch.replaced
        if self.open is None:
            self.open_candidate(self._next_candidate(rng), rng)
        assert self.open is not None
        return self.open.proposal.new

    def open_candidate(self, overlay: Overlay, rng: random.Random) -> Candidate:
        """Begin to test `overlay`; RuntimeError while another is under test or watched."""
        if self.open is not None or self.watch is not None:
            raise RuntimeError("one experiment at a time: another is under way")
        self.tested += 1
        expected, spread = self.predict(overlay)
        self.open = Candidate(
            number=self.tested,
            proposal=Proposal(
                what="overlay",
                old=self.in_force,
                new=overlay,
                reason=f"expected relative gain {expected - self._level:+.3f} +- {spread:.3f} "
                f"from {len(self._archive)} replicates",
                seed=rng.getrandbits(32),
            ),
            alpha=spent_alpha(self.settings.alpha, self.tested),
            process=EProcess(scale=self._scale()),
        )
        return self.open

    def observe(self, replicate: Replicate) -> Verdict:
        """Take a replicate of the open candidate, or of the watch."""
        if self.watch is not None:
            return self._observe_watch(self.watch, replicate)
        assert self.open is not None
        found = self.open
        found.process.observe(replicate.difference)
        found.controls.append(replicate.control)
        found.spikes = [n + bool(s) for n, s in zip(found.spikes, replicate.spikes)]
        self._archive.append(
            {
                "candidate": found.number,
                "overlay": found.proposal.new.to_dict(),
                "difference": replicate.difference,
                "control": replicate.control,
                "level": self._level,
            }
        )
        del self._archive[: -self.settings.window]
        decision, reason = self._decide(found)
        verdict = _verdict(found, decision, reason)
        if decision is Decision.DROP:
            self.open = None
        return verdict

    def abandon(self, reason: str) -> Verdict:
        """Drop the open candidate without a number, as when its arm diverged."""
        assert self.open is not None
        verdict = _verdict(self.open, Decision.DROP, reason)
        self.open = None
        return verdict

    def commit(self) -> Verdict:
        """Put the open candidate in force, and watch it; the evidence for it."""
        assert self.open is not None
        found, self.open = self.open, None
        self.watch = Watch(replaced=self.in_force, replaced_number=self.number, gain=found.gain)
        self.in_force, self.number = found.proposal.new, found.number
        self._level += found.gain
        self._queue.clear()
        return _verdict(found, Decision.PROMOTE, PASSED)

    def close_candidate(self) -> None:
        """Leave a promoted candidate as it is, without putting it in force (dry run)."""
        self.open = None

    def end_watch(self, *, roll_back: bool) -> None:
        """What is in force stays, or what it replaced comes back."""
        assert self.watch is not None
        watch, self.watch = self.watch, None
        if roll_back:
            self.in_force, self.number = watch.replaced, watch.replaced_number
            self._level -= watch.gain

    def predict(self, overlay: Overlay) -> tuple[float, float]:
        """Expected level of an overlay and its standard deviation, as relative gains."""
        moved = mean([abs(row["control"]) for row in self._archive]) or 1.0
        values, weights = [], []
        for row in self._archive:
            apart = distance(overlay, Overlay.from_dict(row["overlay"])) / BANDWIDTH
            weights.append(math.exp(-0.5 * apart * apart))
            values.append(row["level"] + row["difference"] / moved)
        prior = max(deviation(values), self.settings.min_gain)
        total = 1.0 + math.fsum(weights)
        expected = (self._level + math.fsum(w * v for w, v in zip(weights, values))) / total
        spread = math.fsum(w * (v - expected) ** 2 for w, v in zip(weights, values))
        # The variance of a weighted mean whose one prior observation has the prior's variance.
        return expected, math.sqrt((prior**2 + spread) / total / total)

    def _next_candidate(self, rng: random.Random) -> Overlay:
        """From the queue of the round, or the best of a new draw."""
        if not self._queue:
            drawn: list[Overlay] = []
            while len(drawn) < self.settings.trials:
                overlay = draw_overlay(rng, names=self.settings.names)
                if distance(overlay, self.in_force) >= LEAST_DISTANCE:
                    drawn.append(overlay)
            ranked = sorted(drawn, key=self._acquisition, reverse=True)  # stable: ties as drawn
            self._queue = ranked[: self.settings.patches]
        return self._queue.pop(0)

    def _acquisition(self, overlay: Overlay) -> float:
        """Improvement over what is in force, expected optimistically."""
        expected, spread = self.predict(overlay)
        return expected + OPTIMISM * spread - self._level

    def _scale(self) -> float | None:
        """Noise of differences, from those in a row of one candidate; None below two in a row."""
        groups: dict[int, list[float]] = {}
        for row in self._archive:
            groups.setdefault(row["candidate"], []).append(row["difference"])
        freedom = sum(len(values) - 1 for values in groups.values())
        squares = math.fsum(squared_steps(values) for values in groups.values())
        return math.sqrt(squares / freedom / 2.0) if freedom and squares else None

    def _decide(self, found: Candidate) -> tuple[Decision, str]:
        own, process = self.settings, found.process
        if process.value >= 1.0 / found.alpha:
            missing = []
            if effect_size(process.differences) < own.min_effect:
                missing.append("the effect is too small")
            if own.gain_enforced and found.gain < own.min_gain:
                missing.append("the relative gain is too small")
            if own.strict and found.spikes[1] > found.spikes[0]:
                missing.append("its gradients spike more often")
            if not missing:
                return Decision.PROMOTE, PASSED
            reason = "significant, but " + " and ".join(missing)
        elif process.value < FUTILE:
            return Decision.DROP, f"futile: evidence below {FUTILE:g}"
        else:
            reason = "not decided"
        if process.count >= MAX_REPLICATES:
            return Decision.DROP, f"{reason} after {MAX_REPLICATES} replicates"
        return Decision.CONTINUE, reason

    def _observe_watch(self, watch: Watch, replicate: Replicate) -> Verdict:
        watch.differences.append(replicate.difference)
        values, decision = watch.differences, Decision.CONTINUE
        statistic = effect_size(values) * math.sqrt(len(values))
        reason = "watched"
        if len(values) == WATCHED_REPLICATES:
            reversed_sign = statistic > REVERSAL_T
            decision = Decision.ROLL_BACK if reversed_sign else Decision.KEEP
            reason = f"t = {statistic:.2f} in favour of what was replaced"
        return Verdict(
            decision=decision,
            reason=reason,
            e_value=1.0,
            effect=effect_size(values),
            gain=0.0,
            count=len(values),
            interval=interval(values),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values without the settings, which a resumed run brings itself."""
        return {
            "in_force": self.in_force.to_dict(),
            "number": self.number,
            "tested": self.tested,
            "open": None if self.open is None else _candidate_state(self.open),
            "watch": None if self.watch is None else _watch_state(self.watch),
            "queue": [overlay.to_dict() for overlay in self._queue],
            "level": self._level,
            "archive": [dict(row) for row in self._archive],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where a saved overlay is outside the bounds of today's SCHEMA."""
        self.in_force = Overlay.from_dict(state["in_force"])
        self.number, self.tested = state["number"], state["tested"]
        self.open = None if state["open"] is None else _candidate_from(state["open"])
        self.watch = None if state["watch"] is None else _watch_from(state["watch"])
        self._queue = [Overlay.from_dict(values) for values in state["queue"]]
        self._level = state["level"]
        self._archive = [dict(row) for row in state["archive"]]


def _verdict(found: Candidate, decision: Decision, reason: str) -> Verdict:
    values = found.process.differences
    return Verdict(
        decision=decision,
        reason=reason,
        e_value=found.process.value,
        effect=effect_size(values),
        gain=found.gain,
        count=len(values),
        interval=interval(values),
    )


def _candidate_state(found: Candidate) -> dict[str, Any]:
    return {
        "number": found.number,
        "proposal": found.proposal.to_dict(),
        "alpha": found.alpha,
        "process": found.process.state_dict(),
        "controls": list(found.controls),
        "spikes": list(found.spikes),
    }


def _candidate_from(state: dict[str, Any]) -> Candidate:
    process = EProcess()
    process.load_state_dict(state["process"])
    return Candidate(
        number=state["number"],
        proposal=Proposal.from_dict(state["proposal"]),
        alpha=state["alpha"],
        process=process,
        controls=list(state["controls"]),
        spikes=list(state["spikes"]),
    )


def _watch_state(watch: Watch) -> dict[str, Any]:
    return {
        "replaced": watch.replaced.to_dict(),
        "replaced_number": watch.replaced_number,
        "gain": watch.gain,
        "differences": list(watch.differences),
    }


def _watch_from(state: dict[str, Any]) -> Watch:
    return Watch(
        replaced=Overlay.from_dict(state["replaced"]),
        replaced_number=state["replaced_number"],
        gain=state["gain"],
        differences=list(state["differences"]),
    )
