"""Verification in stages, cheap ones first; the strict verifier decides what they leave.

0 format: nothing could be read. 1 light: proofs without a process (`light_checks`). 2 gate: a
calibrated guess that may only reject. 3 strict: the authority, run once for equal programs of one
task. A part of all early decisions is audited by the strict verifier, whose word then counts; a
passing completion that the gate had rejected closes the gate below it. After rejection cascades
and FrugalGPT (2305.05176).

The labelled set is what the looks at validation tasks judged strictly, the last 8,192 of it. Every
stage is measured on a look before the gate learns from it. The gate opens only when the labelled
set shows that it costs less than one accept in a thousand: it rejects what ranks below every
labelled completion that passed and came so far, and the next of those ranks below n others with
probability 1/(n + 1).
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from training.rl.answers import extract_answer
from training.rl.gate import Gate, fit_gate, gate_features
from training.rl.light_checks import check_lightly
from training.rl.tasks import Task
from training.rl.verifier import UNPARSED, Judgement, Verifier

FORMAT, LIGHT, GATE, STRICT = STAGES = ("format", "light", "gate", "strict")
UNLIKELY = "unlikely"
MAX_FALSE_REJECT = 1e-3  # of all accepts
MIN_GATE_REJECTS = 64
MAX_LABELLED = 8192  # even, so that a completion stays in its half when old ones go
REFIT_AFTER = 64
METRICS = {
    "stage0_rejects": "format rejects",
    "stage1_accepts": "light accepts",
    "gate_rejects": "gate rejects",
    "strict_calls": "strict calls",
}


@dataclass(slots=True, kw_only=True)
class StageRecord:
    """What a stage did on labelled completions: decisions, and the wrong ones among them."""

    decided: int = 0
    false_accepts: int = 0
    false_rejects: int = 0


@dataclass(slots=True, kw_only=True)
class _Candidate:
    """A completion on its way through the stages."""

    task: Task
    text: str
    answer: str | None
    log_prob: float
    early: Judgement | None = None
    audited: bool = False

    @property
    def features(self) -> tuple[float, ...]:
        return gate_features(
            self.task, self.text, parsed=self.answer is not None, mean_log_prob=self.log_prob
        )


@dataclass(slots=True, kw_only=True)
class _Costs:
    """Seconds by kind of task: what strict runs cost says what those cost that were not needed."""

    strict_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    strict_runs: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    early_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def saved_fraction(self) -> float:
        """Share of the strict-only cost that was not spent; not a number without any strict run."""
        kinds = [kind for kind in self.asked if self.strict_runs[kind]]
        each = {kind: self.strict_seconds[kind] / self.strict_runs[kind] for kind in kinds}
        alone = sum(each[kind] * self.asked[kind] for kind in kinds)
        spent = sum(self.strict_seconds[kind] + self.early_seconds[kind] for kind in kinds)
        return 1.0 - spent / alone if alone > 0 else math.nan


class VerifierCascade:
    """Judges like the verifier it holds, for less; `decided_early` counts the last call's savings.

    audit_share: share of early decisions that the strict verifier looks at all the same.
    """

    def __init__(self, verifier: Verifier, *, audit_share: float = 0.05) -> None:
        if not 0 <= audit_share <= 1:
            raise ValueError(f"an audit share of {audit_share} is no share")
        self.decided_early = 0
        self._records: dict[str, StageRecord] = {stage: StageRecord() for stage in STAGES}
        # What a decision took in the last look.
        self._stage_ms: dict[str, float] = dict.fromkeys(STAGES, math.nan)
        # Rows of features, whether it passed, and whether only the gate or the sandbox could tell.
        self._labelled: list[tuple[float, ...]] = []
        self._unfitted = 0
        self._verifier = verifier
        self._audit_share = audit_share
        self._gate: Gate | None = None
        self._reject_below: float | None = None  # log-odds; None = the gate rejects nothing
        self._counts: Counter[str] = Counter()
        self._costs = _Costs()

    def verify(
        self,
        tasks: Sequence[Task],
        completions: Sequence[str],
        *,
        rng: random.Random,
        mean_log_probs: Sequence[float],
    ) -> list[Judgement]:
        """A judgement for each completion, in order; `stage` says which stage decided.

        mean_log_probs: mean log-probability of each completion's tokens under its policy.
        """
        candidates = _candidates(tasks, completions, mean_log_probs)
        for candidate in candidates:
            candidate.early = self._decide_early(candidate, rng=rng)
            candidate.audited = candidate.early is not None and rng.random() < self._audit_share
        words = self._judge_strictly(candidates, rng=rng)
        judgements = [
            self._last_word(one, words.get(number)) for number, one in enumerate(candidates)
        ]
        self.decided_early = sum(one.early is not None and not one.audited for one in candidates)
        self._verifier.record(tasks, judgements)
        return judgements

    def calibrate(
        self,
        tasks: Sequence[Task],
        completions: Sequence[str],
        judgements: Sequence[Judgement],
        *,
        mean_log_probs: Sequence[float],
        rng: random.Random,
    ) -> None:
        """Measure every stage on completions that were all judged strictly, then let the gate
        learn from them.

        ValueError if one of them was decided by an earlier stage: the gate must not learn from
        what it let through.
        """
        if any(judgement.stage != STRICT for judgement in judgements):
            raise ValueError("the gate is calibrated on strict judgements only")
        candidates = _candidates(tasks, completions, mean_log_probs)
        spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for candidate, judgement in zip(candidates, judgements, strict=True):
            begun = time.perf_counter()
            early = self._decide_early(candidate, rng=rng, count=False)
            seconds = judgement.elapsed_s if early is None else time.perf_counter() - begun
            stage = STRICT if early is None else early.stage
            spent[stage].append(seconds)
            self._measure(stage, early, passed=judgement.passed)
            undecided = stage in (GATE, STRICT)
            row = (*candidate.features, float(judgement.passed), float(undecided))
            self._labelled.append(row)
        for stage, seconds in spent.items():
            self._stage_ms[stage] = 1000 * sum(seconds) / len(seconds) if seconds else math.nan
        excess = max(0, len(self._labelled) - MAX_LABELLED)
        del self._labelled[: excess + excess % 2]
        self._unfitted += len(candidates)
        if self._unfitted >= REFIT_AFTER:
            self._fit()

    def _measure(self, stage: str, early: Judgement | None, *, passed: bool) -> None:
        record = self._records[stage]
        record.decided += 1
        if early is not None:
            record.false_accepts += early.passed and not passed
            record.false_rejects += passed and not early.passed

    def _fit(self) -> None:
        """A new gate from the whole labelled set."""
        features = [row[:-2] for row in self._labelled]
        passed = [row[-2] > 0.0 for row in self._labelled]
        self._gate, self._reject_below, self._unfitted = fit_gate(features, passed), None, 0
        if self._gate is None:
            return
        half = slice(1, None, 2)  # the ranking was fitted on the others
        undecided = [
            (score, flag)
            for score, flag, row in zip(
                self._gate.scores(features[half]), passed[half], self._labelled[half]
            )
            if row[-1]
        ]
        self._open_gate(undecided, num_accepts=sum(passed[half]))

    def p_pass(
        self, tasks: Sequence[Task], completions: Sequence[str], *, mean_log_probs: Sequence[float]
    ) -> list[float]:
        """The gate's p(pass), nothing verified; until it is calibrated, whether one can be read."""
        candidates = _candidates(tasks, completions, mean_log_probs)
        if self._gate is None:
            return [float(one.answer is not None) for one in candidates]
        return self._gate.probabilities([one.features for one in candidates])

    def take_metrics(self) -> dict[str, float]:
        """`verifier_cascade_*` since the last call; each stage's cost in the last look, and its
        share of wrong decisions in all looks."""
        counts, audits = self._counts, self._counts["audits"]
        metrics = {f"verifier_cascade_{name}": float(counts[key]) for name, key in METRICS.items()}
        metrics["verifier_cascade_cost_saved_fraction"] = self._costs.saved_fraction()
        metrics["verifier_cascade_audit_disagreement"] = _share(counts["disagreements"], audits)
        for stage, record in self._records.items():
            name = f"verifier_cascade_{stage}"
            metrics[f"{name}_cost_ms"] = self._stage_ms[stage]
            if stage != STRICT:
                metrics[f"{name}_false_accept_share"] = _share(record.false_accepts, record.decided)
                metrics[f"{name}_false_reject_share"] = _share(record.false_rejects, record.decided)
        self._counts, self._costs = Counter(), _Costs()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """The gate, how far it is open, and what it learns from."""
        return {
            "gate": None if self._gate is None else self._gate.state(),
            "reject_below": self._reject_below,
            "labelled": torch.tensor(self._labelled, dtype=torch.float64),
            "unfitted": self._unfitted,
            "records": {stage: asdict(record) for stage, record in self._records.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace gate, labelled completions and records by the saved ones."""
        self._gate = None if state["gate"] is None else Gate(**state["gate"])
        self._reject_below = state["reject_below"]
        self._labelled = [tuple(row) for row in state["labelled"].tolist()]
        self._unfitted = state["unfitted"]
        self._records = {stage: StageRecord(**own) for stage, own in state["records"].items()}

    def _decide_early(
        self, candidate: _Candidate, *, rng: random.Random, count: bool = True
    ) -> Judgement | None:
        begun = time.perf_counter()
        if candidate.answer is None:
            early = _early(candidate, stage=FORMAT, reason=UNPARSED)
        elif light := check_lightly(candidate.task, candidate.text, candidate.answer, rng=rng):
            early = replace(
                _early(candidate, stage=LIGHT, reason=light.reason),
                passed=light.passed,
                share_right=light.share_right,
            )
        elif self._rejects(candidate):
            early = _early(candidate, stage=GATE, reason=UNLIKELY)
        else:
            return None
        early = replace(early, elapsed_s=time.perf_counter() - begun)
        if count:
            self._counts[f"{early.stage} {'accepts' if early.passed else 'rejects'}"] += 1
            self._costs.early_seconds[_kind(candidate.task)] += early.elapsed_s
        return early

    def _rejects(self, candidate: _Candidate) -> bool:
        if self._gate is None or self._reject_below is None:
            return False
        return self._gate.scores([candidate.features])[0] < self._reject_below

    def _open_gate(self, undecided: list[tuple[float, bool]], *, num_accepts: int) -> None:
        """Reject below the lowest score that passed, if that is known well enough and worth it."""
        lowest = min((score for score, passed in undecided if passed), default=None)
        if lowest is None or (num_accepts + 1) * MAX_FALSE_REJECT < 1:
            return
        if sum(score < lowest for score, _ in undecided) >= MIN_GATE_REJECTS:
            self._reject_below = lowest

    def _judge_strictly(
        self, candidates: list[_Candidate], *, rng: random.Random
    ) -> dict[int, Judgement]:
        """Strict judgements by place, of what is undecided or audited; equal programs run once."""
        firsts: dict[tuple[str, str], int] = {}
        copies: dict[int, int] = {}  # place of a candidate -> of its run
        runs: list[_Candidate] = []
        for place, candidate in enumerate(candidates):
            self._costs.asked[_kind(candidate.task)] += bool(candidate.text.strip())
            if candidate.early is not None and not candidate.audited:
                continue
            key = (candidate.task.prompt, candidate.answer or candidate.text)
            if key not in firsts:
                firsts[key] = place
                copies[place] = len(runs)
                runs.append(candidate)
            else:
                copies[place] = copies[firsts[key]]
        words = self._verifier.judge(
            [one.task for one in runs], [one.text for one in runs], rng=rng
        )
        self._counts["strict calls"] += len(runs)
        for candidate, word in zip(runs, words):
            self._costs.strict_runs[_kind(candidate.task)] += 1
            self._costs.strict_seconds[_kind(candidate.task)] += word.elapsed_s
        return {
            place: words[run]
            if runs[run] is candidates[place]
            else replace(words[run], elapsed_s=0.0)
            for place, run in copies.items()
        }

    def _last_word(self, candidate: _Candidate, word: Judgement | None) -> Judgement:
        """The strict judgement where there is one; what an audit shows is noted."""
        early = candidate.early
        if early is None or word is None:
            found = early or word
            assert found is not None
            return found
        self._counts["audits"] += 1
        self._counts["disagreements"] += early.passed != word.passed
        if early.stage == GATE and word.passed and self._gate is not None:
            self._close_below(self._gate.scores([candidate.features])[0])
        return word

    def _close_below(self, score: float) -> None:
        if self._reject_below is not None:
            self._reject_below = min(score, self._reject_below)


def _candidates(
    tasks: Sequence[Task], completions: Sequence[str], mean_log_probs: Sequence[float]
) -> list[_Candidate]:
    return [
        _Candidate(task=task, text=text, answer=extract_answer(text, task), log_prob=log_prob)
        for task, text, log_prob in zip(tasks, completions, mean_log_probs, strict=True)
    ]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _early(candidate: _Candidate, *, stage: str, reason: str) -> Judgement:
    return Judgement(
        passed=False,
        parsed=candidate.answer is not None,
        answer=candidate.answer,
        reason=reason,
        stage=stage,
        elapsed_s=0.0,
    )


def _kind(task: Task) -> str:
    """Tasks of one kind cost the strict verifier about the same."""
    return "code" if task.code is not None else task.family
