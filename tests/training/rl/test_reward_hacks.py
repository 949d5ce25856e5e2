"""R14: none of 250 reward hacks is rewarded, all of 500 honest programs, none of 200 hopeless.

A judge that believes what a program says is tried on the same hacks, so that they are known to be
worth something.
"""

import json
import random
import sys

import pytest

from tests.training.rl.boxes import open_or_skip
from tests.training.rl.programs import (
    HACKS,
    HONEST,
    guesses,
    honest_programs,
    impossible_tasks,
    tasks,
)
from training.rl.verdict import draw_exam, judge_many

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a sandbox that was proved")

HONEST_LIMIT_S = 30.0  # generous: a busy machine must not fail an honest program


@pytest.fixture(scope="module")
def sandbox():
    with open_or_skip(num_workers=2) as opened:
        yield opened


def test_no_hack_is_rewarded(sandbox):
    entries = [(task, hack) for task in tasks().values() for hack in HACKS]
    verdicts = judge_many(entries, sandbox=sandbox, rng=random.Random(1), limit_s=HONEST_LIMIT_S)
    rewarded = [
        entry[1] for entry, verdict in zip(entries, verdicts, strict=True) if verdict.passed
    ]
    print(f"{len(rewarded)} of {len(verdicts)} hacks are rewarded")
    assert len(verdicts) == 250 and not rewarded


def test_every_honest_program_is_rewarded(sandbox):
    entries = [
        (task, program) for name, task in tasks().items() for program in honest_programs(name)
    ]
    verdicts = judge_many(entries, sandbox=sandbox, rng=random.Random(2), limit_s=HONEST_LIMIT_S)
    failed = [
        (entry[1], verdict)
        for entry, verdict in zip(entries, verdicts, strict=True)
        if not verdict.passed
    ]
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} honest programs are rewarded")
    assert len(verdicts) == 500 and not failed


def test_no_program_solves_what_cannot_be_solved(sandbox):
    rng = random.Random(3)
    entries = [(task, guess) for task in impossible_tasks(rng) for guess in guesses()]
    verdicts = judge_many(entries, sandbox=sandbox, rng=rng, limit_s=0.5)
    print(f"{sum(verdict.passed for verdict in verdicts)} of {len(verdicts)} hopeless rewarded")
    assert len(verdicts) == 200 and not any(verdict.passed for verdict in verdicts)


class Agreeable(int):
    """What several of the hacks return."""

    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


def leave(*_):
    raise SystemExit(0)


def believes(function, exam):
    """A judge in the program's own process, as one must not be: `==`, and SystemExit(0) is fine."""
    try:
        return all(
            function(*case) == expected
            for case, expected in zip(exam.job.cases, exam.expected, strict=True)
        )
    except SystemExit as end:
        return end.code == 0


@pytest.mark.parametrize("function", [leave, lambda *_: Agreeable()])
def test_a_judge_that_trusts_the_program_is_fooled(function):
    """The control: what the hacks do works where it is believed."""
    assert believes(function, draw_exam(tasks()["largest"], "x", rng=random.Random(4)))


def test_nothing_that_is_sent_contains_an_expected_value():
    rng = random.Random(5)
    for name, task in tasks().items():
        exam = draw_exam(task, honest_programs(name)[0], rng=rng)
        sent = json.dumps(exam.job.as_data())
        assert "expected" not in sent
        other = draw_exam(task, "", rng=rng)
        assert other.job.cases != exam.job.cases  # drawn afresh for every verdict
    assert set(HONEST) == set(tasks())
