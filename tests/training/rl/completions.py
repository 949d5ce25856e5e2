"""Completions as a half-trained model might write them, with their log-probabilities.

Each is the task's solution through a noisy channel: characters are replaced, dropped, doubled or
exchanged; some are foreign text. The log-probability knows a little of the noise. Labels are never
taken from the channel, since a changed solution may still be right, but from the strict verifier.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from training.rl.tasks import Task, draw_task

LEVELS = (
    *(("add", 1), ("add", 3), ("subtract", 2), ("multiply", 2), ("multiply", 4)),
    *(("expression", 1), ("expression", 2), ("expression", 4), ("function", 1), ("function", 2)),
    *(("function", 3), ("symbolic", 1), ("symbolic", 2), ("symbolic", 3)),
)
LETTERS = "0123456789xyzn+-*/%()<> rfor"
FOREIGN = ("the answer is", "print(", "import os", "x" * 40, "def f", "\n\n", "?", "Answer: yes")
# Programs that are right and that only the strict stage can judge.
WORDY = "    total = {}\n    return total"


def noisy(text: str, *, noise: float, rng: random.Random) -> str:
    """`text` with each character changed with probability `noise`."""
    out = []
    for sign in text:
        if sign == "\n" or rng.random() >= noise:
            out.append(sign)
            continue
        kind = rng.randrange(4)
        if kind == 0:
            out.append(rng.choice("0123456789") if sign.isdigit() else rng.choice(LETTERS))
        elif kind == 1:
            out.append(sign * 2)
        elif kind == 2:
            out.append(rng.choice(LETTERS) + sign)
    return "".join(out)


def model_like(*, count: int, rng: random.Random) -> Iterator[tuple[Task, str, float]]:
    """Task, completion and mean log-probability; groups of four share a task, as in a rollout."""
    task = draw_task("add", level=1, rng=rng)
    for number in range(count):
        if number % 4 == 0:
            family, level = rng.choice(LEVELS)
            task = draw_task(family, level=level, rng=rng)
        noise = rng.choice((0.0, 0.0, 0.02, 0.06, 0.15))
        text = task.solution
        if task.family == "function" and rng.random() < 0.2:
            text = WORDY.format(text.split("return ")[1].strip())
        text = noisy(text, noise=noise, rng=rng)
        if rng.random() < 0.08:
            text = rng.choice(FOREIGN)
            noise = 0.3
        yield task, text, -0.2 - 4 * noise + rng.gauss(0, 0.25)
