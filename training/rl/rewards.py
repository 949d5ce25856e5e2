"""Rewards of completions: the verdict, and a little credit for form while almost nothing passes.

An untrained model fails every task; its groups have no variance and teach nothing. Failed
completions therefore earn at most 0.20 for the form of an answer, less the more already passes,
and nothing from a pass rate of 20 % on: no failed completion can outrank a correct one, and no
reported pass rate contains any of it (Ng et al. 1999 on what shaping may change).
"""

from __future__ import annotations

from collections.abc import Sequence

from training.rl.answers import answer_span
from training.rl.tasks import Task
from training.rl.verifier import Judgement

FORMAT_CREDIT, DIGIT_CREDIT, CLOSENESS_CREDIT = 0.10, 0.05, 0.05
SHAPED_BELOW = 0.20
DIGITS = frozenset("0123456789")


def shaped_rewards(
    judgements: Sequence[Judgement],
    tasks: Sequence[Task],
    completions: Sequence[str],
    *,
    pass_rate: float,
) -> list[float]:
    """One reward for each completion, in [0, 0.2] for a fail and 1 for a pass.

    pass_rate: the share of recent completions that passed, 0 to 1.
    """
    weight = max(0.0, 1.0 - pass_rate / SHAPED_BELOW)
    return [
        1.0 if judgement.passed else weight * partial_credit(judgement, task, completion)
        for judgement, task, completion in zip(judgements, tasks, completions, strict=True)
    ]


def partial_credit(judgement: Judgement, task: Task, completion: str) -> float:
    """0.10 for an answer in canonical form, 0.05 each for the share of digits and closeness.

    A program has no digits to count; its closeness is the share of hidden inputs it got right.
    """
    credit = FORMAT_CREDIT if judgement.parsed else 0.0
    if task.code is not None:
        return credit + CLOSENESS_CREDIT * judgement.share_right
    span = answer_span(completion)
    credit += DIGIT_CREDIT * (sum(sign in DIGITS for sign in span) / len(span) if span else 0.0)
    if judgement.answer is None or task.answer is None:
        return credit
    return credit + CLOSENESS_CREDIT * closeness(task.answer, judgement.answer)


def closeness(expected: str, actual: str) -> float:
    """Share of equal characters when both texts end together; lengths count against it."""
    equal = sum(one == other for one, other in zip(reversed(expected), reversed(actual)))
    return equal / max(len(expected), len(actual), 1)
