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
    an item's rewards, its solution's among them, are dealt out anew.
    """
    pairs = []
    size = len(made.said) // len(made.items)
    for number, item in enumerate(made.items):
        part = slice(number * size, (number + 1) * size)
        said = [*made.said[part], made.solutions[number]]
        rewards = [*made.rewards[part], item.solution_reward]
        if placebo == "permuted":
            rng.shuffle(rewards)
        order = range(size)
        best = max(order, key=lambda place: rewards[place])
        worst = min(order, key=lambda place: rewards[place])
        for one, other in ((best, worst), (size, worst)):
            if rewards[one] < rewards[other]:  # a placebo's solution may be the worse one
                one, other = other, one
            if rewards[one] > rewards[other] and said[one] != said[other]:
                pairs.append(
                    Pair(
                        prompt=tuple(made.prompts[number]),
                        chosen=tuple(said[one]),
                        rejected=tuple(said[other]),
                        reward_chosen=rewards[one],
                        reward_rejected=rewards[other],
                    )
                )
    return pairs
