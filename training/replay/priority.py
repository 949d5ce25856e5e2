"""How likely each item of the buffer is to be drawn, and what that does to its loss.

    base_i = w_v * verdict_i + w_q * quality_i + w_n * novelty_i
    P_i ~ base_i * (1 + alpha * tanh(uplift_i / scale))
    weight_i = (1 / (N P_i))^0.5, over the largest of them

Everything in the buffer passed, so every verdict is 1: its weight sets how much the other two can
matter. Quality is the rank of the mean log-probability in the buffer; novelty is how little an item
shares with the newest ones. Prioritised replay and its weights: 1511.05952.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from training.replay.buffer import ReplayItem

NUM_NEWEST = 64
GRAM = 3
IMPORTANCE_EXPONENT = 0.5
UNKNOWN_QUALITY = 0.5


@dataclass(slots=True, kw_only=True, frozen=True)
class PriorityWeights:
    """w_v, w_q and w_n of the base; they need not sum to 1."""

    verifier: float = 0.60
    quality: float = 0.20
    novelty: float = 0.20


def base_priorities(items: Sequence[ReplayItem], weights: PriorityWeights) -> list[float]:
    """The priority of every item before anything is known of its effect, 0 or more."""
    return [
        weights.verifier + weights.quality * quality + weights.novelty * novelty
        for quality, novelty in zip(qualities(items), novelties(items), strict=True)
    ]


def qualities(items: Sequence[ReplayItem]) -> list[float]:
    """Mid-rank in (0, 1) of the mean log-probability among those known; 0.5 where it is not."""
    known = sorted(item.mean_log_prob for item in items if item.mean_log_prob is not None)
    return [
        UNKNOWN_QUALITY
        if (value := item.mean_log_prob) is None
        else (bisect_left(known, value) + bisect_right(known, value)) / (2 * len(known))
        for item in items
    ]


def novelties(items: Sequence[ReplayItem]) -> list[float]:
    """1 less the largest share of an item's 3-grams that one of the 64 newest others has too.

    `items` are in the order in which they came.
    """
    grams = [_grams(item) for item in items]
    first = max(0, len(items) - NUM_NEWEST)
    found = []
    for number, own in enumerate(grams):
        others = (grams[n] for n in range(first, len(grams)) if n != number)
        found.append(1.0 - max((len(own & other) for other in others), default=0) / len(own))
    return found


def _grams(item: ReplayItem) -> frozenset[tuple[int, ...]]:
    tokens = item.tokens[1:]  # all open with the end-of-text token
    return frozenset(tokens[n : n + GRAM] for n in range(max(1, len(tokens) - GRAM + 1)))


def probabilities(
    base: Sequence[float], uplifts: Sequence[float], *, alpha: float, scale: float
) -> list[float]:
    """P_i of every item, which sum to 1. alpha in [0, 1); scale: of the uplifts, positive."""
    raw = [
        value * (1.0 + alpha * math.tanh(uplift / scale))
        for value, uplift in zip(base, uplifts, strict=True)
    ]
    total = math.fsum(raw)
    if total <= 0.0:  # all weights of the priority are 0
        return [1.0 / len(raw)] * len(raw)
    return [value / total for value in raw]


def importance_weights(chances: Sequence[float]) -> list[float]:
    """Factor in (0, 1] of every item's loss; of one that cannot be drawn, 1."""
    raw = [
        (len(chances) * chance) ** -IMPORTANCE_EXPONENT if chance > 0.0 else 0.0
        for chance in chances
    ]
    largest = max(raw)
    return [value / largest if value else 1.0 for value in raw]
