"""The completions of a tick that passed, for whoever keeps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from training.rl.answers import extract_answer
from training.rl.candidates import Candidates, TaskGroup
from training.rl.tasks import Task


@dataclass(slots=True, kw_only=True, frozen=True)
class Passed:
    """A verified completion. completion: its tokens, a stop token included where it was sampled.

    share: of the task's verified candidates that passed. confidence: share of the votes of the
    task's candidates for its answer. mean_log_prob: None where the sampling was not kept.
    """

    task: Task
    prompt: list[int]
    completion: list[int]
    text: str
    share: float
    confidence: float
    mean_log_prob: float | None


def passed_completions(made: Candidates, *, decode: Callable[[list[int]], str]) -> list[Passed]:
    """All of the groups' completions that passed, and those from outside a group without any."""
    rows = made.rollout.token_rows()
    log_probs = made.rollout.mean_log_probs().tolist()
    found, row = [], 0
    for group in made.groups:
        share = sum(judgement.passed for judgement in group.judgements) / len(group.judgements)
        for text, judgement in zip(group.texts, group.judgements, strict=True):
            if judgement.passed:
                found.append(_passed(group, rows[row], text, share, log_probs[row]))
            row += 1
        if group.passing is not None:
            text = decode(group.passing)
            found.append(_passed(group, group.passing, text, share, None))
    return found


def _passed(
    group: TaskGroup, completion: list[int], text: str, share: float, log_prob: float | None
) -> Passed:
    votes = group.vote.counts
    answer = extract_answer(text, group.task)
    agreeing = 0 if answer is None else votes.get(answer, 0)
    return Passed(
        task=group.task,
        prompt=group.prompt,
        completion=completion,
        text=text,
        share=share,
        confidence=agreeing / max(1, sum(votes.values())),
        mean_log_prob=log_prob,
    )
