"""Asymmetric verification: draft many candidates, verify few, and keep the policy gradient honest.

Where checking is dearer than drafting once more, the candidates worth checking are looked for
first (2510.06135). But a group chosen by score is no sample of the policy: normalising rewards
within a best-of subset biases the gradient. So the group is drawn uniformly from the pool, whose
members are exchangeable, which leaves the expected gradient that of a plain group; only the rest
of the verified goes by score, to feed refinement, replay and evaluation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True, frozen=True)
class Shortlist:
    """Places in the pool: the uniform `group`, and the best-scored `rest` in falling order."""

    group: list[int]
    rest: list[int]

    @property
    def verified(self) -> list[int]:
        return [*self.group, *self.rest]


def pool_size(group: int, multiplier: float) -> int:
    """Candidates to draft for a group; ValueError for a multiplier below 1."""
    if multiplier < 1:
        raise ValueError(f"--ttrl-candidate-pool-multiplier {multiplier}: must be at least 1")
    return round(group * multiplier)


def choose(scores: Sequence[float], group: int, topk: int, *, rng: random.Random) -> Shortlist:
    """`topk` of the pool: `group` of them uniformly, then those that score best of the others.

    Equal scores go by a random order, so that a score which says nothing chooses at random. The
    draw of the group does not depend on any score. ValueError if the pool or topk is below group.
    """
    if len(scores) < group:
        raise ValueError(f"a pool of {len(scores)} has no group of {group}")
    if topk < group:
        raise ValueError(f"--ttrl-discriminative-topk {topk}: must be at least the group, {group}")
    order = rng.sample(range(len(scores)), len(scores))
    others = sorted(order[group:], key=lambda place: -scores[place])  # stable: random among equals
    return Shortlist(group=order[:group], rest=others[: topk - group])


def discriminative_scores(
    mean_log_probs: Sequence[float], p_pass: Sequence[float], *, weight: float
) -> list[float]:
    """weight * sigma(z(mean log-prob)) + (1 - weight) * p_pass, each in [0, 1].

    z standardises within the pool; where all are equal, or not finite, it is 0.
    """
    finite = [value for value in mean_log_probs if math.isfinite(value)]
    mean = sum(finite) / len(finite) if finite else 0.0
    spread = (
        math.sqrt(sum((value - mean) ** 2 for value in finite) / len(finite)) if finite else 0.0
    )
    scores = []
    for value, chance in zip(mean_log_probs, p_pass, strict=True):
        known = math.isfinite(value) and spread > 0
        place = (value - mean) / spread if known else 0.0
        scores.append(weight / (1 + math.exp(-place)) + (1 - weight) * chance)
    return scores


def recall_at_k(correct: Sequence[bool], chosen: Sequence[int]) -> float:
    """Share of the pool's correct candidates that were chosen; not a number if it has none."""
    total = sum(map(bool, correct))
    return sum(bool(correct[place]) for place in chosen) / total if total else math.nan
