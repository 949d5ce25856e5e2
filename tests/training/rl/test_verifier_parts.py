"""The verifier over a played sandbox: what it hands on, counts, closes and opens again."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest

from training.rl import verifier as verifier_module
from training.rl.answers import candidate_program
from training.rl.sandbox_child import encode
from training.rl.sandbox_job import ENDED, TIMEOUT, Job, Reply, SandboxFailure
from training.rl.symbolic import SYMPY, Comparison
from training.rl.tasks import draw_task
from training.rl.verifier import Judgement, Verifier

ELAPSED_S = 0.25
EXPRESSION = draw_task("expression", level=1, rng=random.Random(0))
ADD = draw_task("add", level=1, rng=random.Random(0))
POLYNOMIAL = draw_task("symbolic", level=1, rng=random.Random(0))
OTHER_WAY = " 0+" + POLYNOMIAL.solution.strip()


class PlayedSandbox:
    """Answers every program of `right` rightly, says `timeout` of others; fails while told to."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.closed, self.limits = settings, 0, []
        self.failures: list[str] = []

    def run_many(self, jobs: Sequence[Job], *, limit_s: float) -> list[Reply]:
        self.limits.append(limit_s)
        if any(word in job.program for job in jobs for word in self.failures):
            raise SandboxFailure("it is gone")
        return [self.reply(job) for job in jobs]

    def reply(self, job: Job) -> Reply:
        if "slow" in job.program:
            return Reply(outcome=TIMEOUT, elapsed_s=ELAPSED_S, data=b"")
        code = EXPRESSION.code
        assert code is not None
        values = [code.reference(*case) for case in job.cases]
        lines = [json.dumps({"value": encode(value)}).encode() + b"\n" for value in values]
        if "half" in job.program:
            lines[: len(lines) // 2] = [b'{"value": null}\n'] * (len(lines) // 2)
        return Reply(outcome=ENDED, elapsed_s=ELAPSED_S, data=b"".join(lines))

    def close(self) -> None:
        self.closed += 1


class PlayedPool:
    """Formulas: passed in a quarter of a second; `tried` counts attempts at the engine."""

    def __init__(self, *, num_workers: int, limit_s: float, engine: str) -> None:
        self.settings = {"num_workers": num_workers, "limit_s": limit_s, "engine": engine}
        self.closed = self.tried = 0
        self.asked: list[tuple[str, str]] = []

    def try_engine(self) -> None:
        self.tried += 1
        if self.settings["engine"] == "missing":
            raise RuntimeError("no such engine")

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        self.asked += pairs
        return [Comparison(reason="passed", elapsed_s=ELAPSED_S) for _ in pairs]

    def close(self) -> None:
        self.closed += 1


class Stage:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.boxes: list[PlayedSandbox] = []
        self.pools: list[PlayedPool] = []
        self.failures: list[list[str]] = []  # of each sandbox that is opened
        monkeypatch.setattr(verifier_module, "open_sandbox", self.open)
        monkeypatch.setattr(verifier_module, "SymbolicPool", self.pool)

    def open(self, **settings: Any) -> PlayedSandbox:
        box = PlayedSandbox(**settings)
        box.failures = self.failures.pop(0) if self.failures else []
        self.boxes.append(box)
        return box

    def pool(self, **settings: Any) -> PlayedPool:
        self.pools.append(PlayedPool(**settings))
        return self.pools[-1]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def judged(*, passed: bool, reason: str = "wrong", parsed: bool = True) -> Judgement:
    return Judgement(
        passed=passed, parsed=parsed, answer=None, reason=reason, stage="strict",
        elapsed_s=ELAPSED_S,
    )  # fmt: skip


def test_the_settings_reach_those_they_are_for(stage: Stage) -> None:
    opened = Verifier(code=True, timeout_ms=1500, num_workers=3)
    assert opened.limit_s == 1.5
    assert stage.boxes[0].settings == {"num_workers": 3}
    assert stage.pools[0].settings == {"num_workers": 3, "limit_s": 1.5, "engine": SYMPY}
    assert stage.pools[0].tried == 0  # it is always there
    opened.verify([EXPRESSION], [EXPRESSION.solution], rng=random.Random(0))
    assert stage.boxes[0].limits == [1.5]
    assert Verifier(code=False, timeout_ms=1).limit_s == 0.001
    Verifier(code=False, timeout_ms=1)
    assert stage.pools[-1].settings["num_workers"] == 1 and len(stage.boxes) == 1


def test_an_engine_that_may_be_missing_is_tried_and_nothing_stays_open(stage: Stage) -> None:
    Verifier(code=False, timeout_ms=9, engine="math-verify")
    assert stage.pools[0].tried == 1 and stage.pools[0].closed == 0
    with pytest.raises(RuntimeError, match="no such engine"):
        Verifier(code=True, timeout_ms=9, engine="missing")
    assert stage.pools[1].closed == 1 and stage.boxes == []


def test_everything_is_closed_once(stage: Stage) -> None:
    opened = Verifier(code=True, timeout_ms=9)
    opened.close()
    opened.close()
    assert stage.boxes[0].closed == 1 and stage.pools[0].closed >= 1
    with pytest.raises(ValueError, match="--no-verifier-code-enabled"):
        opened.verify([EXPRESSION], [EXPRESSION.solution], rng=random.Random(0))


def test_metrics_are_shares_of_what_was_recorded(stage: Stage) -> None:
    opened = Verifier(code=False, timeout_ms=9)
    tasks = [ADD, ADD, ADD, ADD, EXPRESSION]
    opened.record(
        tasks,
        [
            judged(passed=True),
            judged(passed=True),
            judged(passed=True),
            judged(passed=False, parsed=False),
            judged(passed=False, reason=TIMEOUT),
        ],
    )
    with pytest.raises(ValueError, match="zip"):
        opened.record(tasks, [])
    assert opened.take_metrics() == {
        "verifier_pass_rate": 0.6,
        "verifier_math_pass": 0.75,
        "verifier_code_pass": 0.0,
        "verifier_unparsed_rate": 0.2,
        "verifier_timeouts": 1.0,
        "verifier_latency_ms": 1000 * ELAPSED_S,
    }
    empty = opened.take_metrics()
    assert empty.pop("verifier_timeouts") == 0.0
    assert all(math.isnan(value) for value in empty.values())


def test_only_verify_leaves_a_trace_in_the_metrics(stage: Stage) -> None:
    opened = Verifier(code=False, timeout_ms=9)
    opened.judge([ADD], [ADD.solution], rng=random.Random(0))
    assert math.isnan(opened.take_metrics()["verifier_pass_rate"])
    opened.verify([ADD], [ADD.solution], rng=random.Random(0))
    assert opened.take_metrics()["verifier_pass_rate"] == 1.0


def test_a_program_s_judgement_tells_what_its_verdict_told(stage: Stage) -> None:
    opened = Verifier(code=True, timeout_ms=9)
    texts = [EXPRESSION.solution, " slow", " x + # half", "", EXPRESSION.solution.rstrip() + " +"]
    right, slow, half, empty, cut = opened.verify([EXPRESSION] * 5, texts, rng=random.Random(0))
    assert (right.passed, right.reason, right.share_right) == (True, "passed", 1.0)
    assert right.parsed and right.answer and right.elapsed_s == ELAPSED_S
    assert (slow.passed, slow.reason, slow.share_right) == (False, TIMEOUT, 0.0)
    assert (half.passed, half.reason, half.share_right) == (False, "wrong", 0.5)
    assert (half.parsed, half.answer) == (False, None)
    assert (empty.passed, empty.reason, empty.elapsed_s) == (False, "empty", 0.0)
    assert cut.parsed is False and candidate_program(texts[4], EXPRESSION)
    assert {one.stage for one in (right, slow, half, empty, cut)} == {"strict"}


def test_judgements_come_in_the_order_of_the_tasks(stage: Stage) -> None:
    opened = Verifier(code=True, timeout_ms=9)
    tasks = [ADD, EXPRESSION, POLYNOMIAL, ADD, EXPRESSION, POLYNOMIAL]
    texts = [ADD.solution, " slow", OTHER_WAY, "no", EXPRESSION.solution, "no"]
    found = opened.verify(tasks, texts, rng=random.Random(0))
    assert [one.reason for one in found] == [
        "passed", TIMEOUT, "passed", "unparsed", "passed", "unparsed",
    ]  # fmt: skip
    assert [one.parsed for one in found] == [True, True, True, False, True, False]
    assert [one.passed for one in found] == [True, False, True, False, True, False]
    assert {one.stage for one in found} == {"strict"}


def test_only_what_reads_as_a_formula_is_compared_and_with_the_right_one(stage: Stage) -> None:
    opened = Verifier(code=False, timeout_ms=9)
    found = opened.verify([POLYNOMIAL] * 2, ["no", OTHER_WAY], rng=random.Random(0))
    assert stage.pools[0].asked == [(POLYNOMIAL.answer, OTHER_WAY.strip())]
    assert [one.elapsed_s for one in found] == [0.0, ELAPSED_S]
    assert found[0].answer is None and found[1].answer


def test_a_lost_sandbox_is_opened_once_more_and_the_old_one_closed(stage: Stage) -> None:
    stage.failures = [["slow", "x"], ["slow"]]
    opened = Verifier(code=True, timeout_ms=9, num_workers=2)
    texts = [EXPRESSION.solution, " slow"]
    right, lost = opened.verify([EXPRESSION] * 2, texts, rng=random.Random(0))
    assert [box.closed for box in stage.boxes] == [1, 0]
    assert stage.boxes[1].settings == {"num_workers": 2}
    assert stage.boxes[1].limits == [0.009, 0.009]  # one by one
    assert right.passed
    assert (lost.passed, lost.reason, lost.share_right, lost.elapsed_s) == (False, "lost", 0.0, 0.0)


def test_a_sandbox_that_stays_lost_is_told_to_the_run(stage: Stage) -> None:
    stage.failures = [["def", "x"], ["def", "x"]]
    opened = Verifier(code=True, timeout_ms=9)
    with pytest.raises(SandboxFailure, match="it is gone"):
        opened.verify([EXPRESSION] * 2, [EXPRESSION.solution] * 2, rng=random.Random(0))
    assert len(stage.boxes) == 2


def test_an_integer_is_right_or_wrong_or_none(stage: Stage) -> None:
    opened = Verifier(code=False, timeout_ms=9)
    assert ADD.answer is not None
    texts = [ADD.answer, str(int(ADD.answer) + 1), "no"]
    found = opened.verify([ADD] * 3, texts, rng=random.Random(0))
    assert [one.reason for one in found] == ["passed", "wrong", "unparsed"]
    assert [one.passed for one in found] == [True, False, False]
    assert [one.answer for one in found] == [ADD.answer, texts[1], None]
    assert all(0 <= one.elapsed_s < 60 for one in found)
