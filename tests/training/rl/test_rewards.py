"""Shaping gives an untrained model something to learn from, and never more than a right answer."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.rl.answers import extract_answer
from training.rl.rewards import closeness, shaped_rewards
from training.rl.tasks import Task, draw_task
from training.rl.verifier import Judgement, Verifier

ADD = Task(
    family="add", domain="math", level=3, prompt="70+52=", answer="122", code=None, solution="122\n"
)
CODE = draw_task("expression", level=1, rng=random.Random(0))


def judged(task, text, *, passed=False, share_right=0.0):
    answer = extract_answer(text, task)
    return Judgement(
        passed=passed,
        parsed=answer is not None,
        answer=answer,
        reason="passed" if passed else "wrong",
        stage="strict",
        elapsed_s=0.0,
        share_right=share_right,
    )


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("122\n", 1.0),
        ("121\n", 0.10 + 0.05 + 0.05 * 2 / 3),
        ("22", 0.10 + 0.05 + 0.05 * 2 / 3),
        ("12", 0.10 + 0.05 + 0.05 * 1 / 3),
        ("999", 0.10 + 0.05),
        ("-5", 0.10 + 0.05 / 2),
        ("12 a", 0.05 / 2),
        ("abc", 0.0),
        ("", 0.0),
    ],
)
def test_the_credit_is_that_of_the_definition(text, reward):
    verdict = judged(ADD, text, passed=text == "122\n")
    assert shaped_rewards([verdict], [ADD], [text], pass_rate=0.0) == [pytest.approx(reward)]
    half = shaped_rewards([verdict], [ADD], [text], pass_rate=0.1)
    assert half == [pytest.approx(1.0 if verdict.passed else reward / 2)]
    for rate in (0.2, 0.9, 1.0):
        assert shaped_rewards([verdict], [ADD], [text], pass_rate=rate) == [float(verdict.passed)]


def test_a_program_is_credited_for_its_form_and_its_right_values():
    verdict = judged(CODE, " x", share_right=0.5)
    assert shaped_rewards([verdict], [CODE], [" x"], pass_rate=0) == [pytest.approx(0.125)]
    broken = judged(CODE, " x +")
    assert shaped_rewards([broken], [CODE], [" x +"], pass_rate=0) == [0.0]


@given(st.text(alphabet="0123456789+-. A\n", max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_no_failed_completion_outranks_a_right_one(text, rate, share):
    for task in (ADD, CODE):
        verdict = judged(task, text, share_right=share)
        (reward,) = shaped_rewards([verdict], [task], [text], pass_rate=rate)
        assert 0.0 <= reward <= 0.2 + 1e-12


def test_closeness_counts_digits_from_the_last_one():
    assert closeness("122", "122") == 1.0 and closeness("122", "22") == 2 / 3
    assert closeness("122", "1") == closeness("122", "0") == 0.0 and closeness("", "") == 0.0


def test_noise_of_an_untrained_model_has_variance_to_learn_from():
    """The purpose: without shaping every one of these groups would be all zeros."""
    rng = random.Random(1)
    strict = Verifier(code=False, timeout_ms=1000)
    tasks = [draw_task("multiply", level=5, rng=rng) for _ in range(64)]
    texts = ["".join(rng.choices("0123456789abc", k=6)) for _ in tasks]
    verdicts = strict.verify(tasks, texts, rng=rng)
    assert not any(one.passed for one in verdicts)
    assert len(set(shaped_rewards(verdicts, tasks, texts, pass_rate=0.0))) >= 5
    strict.close()
