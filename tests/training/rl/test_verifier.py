"""The strict verifier: right answers pass, nothing else does, and it survives its processes."""

import math
import os
import random
import signal
import sys
from pathlib import Path

import pytest

from scripts.soak_sandbox import processes_below
from training.rl import verifier as verifier_module
from training.rl.sandbox_job import SandboxFailure, SandboxUnavailable
from training.rl.tasks import FAMILIES, LEVELS, draw_task
from training.rl.verifier import Verifier

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs a sandbox that was proved")
MATH = [family for family in FAMILIES if family not in ("expression", "function")]
GENEROUS_MS = 60_000  # a busy machine must not fail an honest program


def drawn(families, *, count=3, seed=0):
    rng = random.Random(seed)
    return [
        draw_task(family, level=level, rng=rng)
        for family in families
        for level in range(1, LEVELS[family] + 1)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def strict():
    try:
        opened = Verifier(code=True, timeout_ms=GENEROUS_MS, num_workers=2)
    except RuntimeError as error:
        if os.environ.get("SIGMA_REQUIRE_TOOLS") == "1":
            raise
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def mathematics():
    opened = Verifier(code=False, timeout_ms=GENEROUS_MS)
    yield opened
    opened.close()


@linux_only
def test_every_reference_solution_passes_and_silence_never(strict):
    tasks = drawn(FAMILIES)
    for silence in ("", "\n", "   "):
        verdicts = strict.verify(tasks, [silence] * len(tasks), rng=random.Random(1))
        assert not any(verdict.passed or verdict.parsed for verdict in verdicts)
    strict.take_metrics()
    solved = strict.verify(tasks, [task.solution for task in tasks], rng=random.Random(2))
    assert [task.prompt for task, one in zip(tasks, solved) if not one.passed] == []
    assert all(one.parsed and one.answer and one.stage == "strict" for one in solved)
    metrics = strict.take_metrics()
    assert metrics["verifier_pass_rate"] == metrics["verifier_code_pass"] == 1.0
    assert metrics["verifier_unparsed_rate"] == metrics["verifier_timeouts"] == 0.0
    assert metrics["verifier_latency_ms"] > 0
    assert math.isnan(strict.take_metrics()["verifier_pass_rate"])


@linux_only
def test_an_echo_of_the_prompt_or_a_neighbour_answers_nothing(strict):
    tasks = drawn(FAMILIES, count=2)
    rng = random.Random(3)
    for texts in (
        [task.prompt for task in tasks],
        [task.prompt + task.solution for task in tasks],
        [f"{task.solution.strip()} {task.solution.strip()}" for task in tasks],
    ):
        verdicts = strict.verify(tasks, texts, rng=rng)
        assert [t.prompt for t, one in zip(tasks, verdicts) if one.passed] == []


@linux_only
def test_reasons_and_metrics_say_what_happened(strict):
    add, expression = (
        draw_task("add", level=1, rng=random.Random(0)),
        draw_task("expression", level=1, rng=random.Random(0)),
    )
    wrong = str(int(add.answer) + 1)
    tasks = [add, add, add, expression, expression, expression]
    texts = [add.solution, wrong, "no", " 1/0", "", " x +"]
    strict.take_metrics()
    verdicts = strict.verify(tasks, texts, rng=random.Random(4))
    assert [one.reason for one in verdicts] == [
        *("passed", "wrong", "unparsed"),
        *("raised", "empty", "raised"),
    ]
    assert [one.parsed for one in verdicts] == [True, True, False, True, False, False]
    metrics = strict.take_metrics()
    assert metrics["verifier_pass_rate"] == pytest.approx(1 / 6)
    assert metrics["verifier_math_pass"] == pytest.approx(1 / 3)
    assert metrics["verifier_code_pass"] == 0.0
    assert metrics["verifier_unparsed_rate"] == pytest.approx(3 / 6)


@linux_only
def test_half_right_is_a_fail_that_says_how_much_was_right(strict):
    task = draw_task("function", level=1, rng=random.Random(5))
    half = f"    return {task.solution.split('return ')[1].strip()} if len(x) % 2 else None\n"
    (found,) = strict.verify([task], [half], rng=random.Random(6))
    assert not found.passed and 0 < found.share_right < 1


@linux_only
def test_a_hundred_endless_programs_leave_no_process():
    with_limit = Verifier(code=True, timeout_ms=50, num_workers=2)
    try:
        task = draw_task("expression", level=1, rng=random.Random(7))
        first = with_limit.verify([task] * 2, [" [*iter(int, 1)]"] * 2, rng=random.Random(8))
        before = len(processes_below(os.getpid()))  # the zygotes
        verdicts = with_limit.verify(
            [task] * 100, [" any(iter(int, 1))"] * 100, rng=random.Random(8)
        )
        assert {one.reason for one in (*first, *verdicts)} == {"timeout"}
        assert len(processes_below(os.getpid())) == before
        assert with_limit.take_metrics()["verifier_timeouts"] == 102
    finally:
        with_limit.close()
    assert len(processes_below(os.getpid())) <= before - 1


@linux_only
def test_workers_that_are_killed_cost_no_verdict(strict):
    tasks = drawn(["expression", "symbolic"], count=2)
    solutions = [task.solution for task in tasks]
    strict.verify(tasks, solutions, rng=random.Random(9))
    for pid in processes_below(os.getpid()):
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)
    verdicts = strict.verify(tasks, solutions, rng=random.Random(9))
    assert all(one.passed for one in verdicts)


class FailingSandbox:
    """Loses every program that holds the word `lost`."""

    def __init__(self, inner):
        self.inner = inner

    def run(self, job, *, limit_s):
        if "lost" in job.program:
            raise SandboxFailure("it is gone")
        return self.inner.run(job, limit_s=limit_s)

    def run_many(self, jobs, *, limit_s):
        return [self.run(job, limit_s=limit_s) for job in jobs]

    def close(self):
        self.inner.close()


@linux_only
def test_a_sandbox_that_fails_over_one_program_fails_that_program_only(monkeypatch):
    opener = verifier_module.open_sandbox
    opened = []

    def failing(**settings):
        opened.append(FailingSandbox(opener(**settings)))
        return opened[-1]

    monkeypatch.setattr(verifier_module, "open_sandbox", failing)
    task = draw_task("expression", level=1, rng=random.Random(10))
    fragile = Verifier(code=True, timeout_ms=GENEROUS_MS)
    try:
        texts = [task.solution, " lost", task.solution]
        verdicts = fragile.verify([task] * 3, texts, rng=random.Random(11))
        assert [one.reason for one in verdicts] == ["passed", "lost", "passed"]
        assert len(opened) == 2  # a new one was opened
        with pytest.raises(SandboxFailure, match="it is gone"):  # no reward is better than none
            fragile.verify([task], [" lost"], rng=random.Random(12))
    finally:
        fragile.close()


def test_without_a_sandbox_code_refuses_to_start_and_mathematics_goes_on(monkeypatch):
    def refuse(**_):
        raise SandboxUnavailable("none here")

    monkeypatch.setattr(verifier_module, "open_sandbox", refuse)
    with pytest.raises(RuntimeError, match=r"none here.*--no-verifier-code-enabled"):
        Verifier(code=True, timeout_ms=2500)
    without = Verifier(code=False, timeout_ms=2500)
    add, code = (draw_task(name, level=1, rng=random.Random(0)) for name in ("add", "function"))
    (found,) = without.verify([add], [add.solution], rng=random.Random(0))
    assert found.passed
    with pytest.raises(ValueError, match="--no-verifier-code-enabled"):
        without.verify([code], [code.solution], rng=random.Random(0))
    without.close()


def test_a_time_limit_must_be_positive():
    with pytest.raises(ValueError, match="--verifier-timeout-ms 0"):
        Verifier(code=False, timeout_ms=0)


def test_every_task_needs_its_completion(mathematics):
    for judge in (mathematics.judge, mathematics.verify):
        with pytest.raises(ValueError):
            judge(drawn(["add"]), ["1"], rng=random.Random(0))


ATTACKS = (
    *("22 23", "17+5=22", "\u0662\u0662", "Answer: 22 or 23", "22\x00", "2e1", "0b10110", "nan"),
    *("True", "9" * 5000, "-" * 5000, "(" * 5000, "[]" * 999, "__import__('os').abort()"),
    *("9^9^9^9", "x^x^x", "1/0", "0*x^99999999", "x/x", "\ud800", "\\frac{1}{2}", "oo", "zoo"),
)


def test_nothing_odd_is_ever_an_answer():
    hurried = Verifier(code=False, timeout_ms=300)  # some of it never ends
    pairs = [(task, attack) for task in drawn(MATH, count=1) for attack in ATTACKS]
    verdicts = hurried.verify(*zip(*pairs), rng=random.Random(0))
    hurried.close()
    assert [pair for pair, one in zip(pairs, verdicts) if one.passed] == []
