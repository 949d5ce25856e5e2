"""Which completions are preferred to which: the best to the worst, the solution to a failure."""

from __future__ import annotations

import random
from dataclasses import dataclass

from training.hydra.dpo import Pair
from training.hydra.sources import Item


@dataclass(slots=True, kw_only=True)
class Candidates:
    """What was written for some items, item after item, equally many each.

    said: tokens of every candidate, with the one that ended it. spread: the item of each. rewards:
    of each. solutions: tokens of every item's solution.
    """

    items: list[Item]
    prompts: list[list[int]]
    said: list[list[int]]
    spread: list[Item]
    rewards: list[float]
    solutions: list[list[int]]


def make_pairs(made: Candidates, *, rng: random.Random, placebo: str = "none") -> list[Pair]:
    """Up to two pairs of every item: its best candidate against its worst, and its solution against
    its worst. None without a margin.

    The solution gives a model that never passes something to prefer. With the placebo "permuted"
    they are the same pairs, and a coin says which of the two rewards belongs to which.
    """
    pairs = []
    size = len(made.said) // len(made.items)
    for number, item in enumerate(made.items):
        part = slice(number * size, (number + 1) * size)
        said = [*made.said[part], made.solutions[number]]
        rewards = [*made.rewards[part], item.solution_reward]
        best = max(range(size), key=rewards.__getitem__)
        worst = min(range(size), key=rewards.__getitem__)
        for better in (best, size):
            if rewards[better] <= rewards[worst] or said[better] == said[worst]:
                continue
            first, second = said[better], said[worst]
            if placebo == "permuted" and rng.random() < 0.5:
                first, second = second, first
            pairs.append(
                Pair(
                    prompt=tuple(made.prompts[number]),
                    chosen=tuple(first),
                    rejected=tuple(second),
                    reward_chosen=rewards[better],
                    reward_rejected=rewards[worst],
                )
            )
    return pairs
