"""Paired comparison of two arms over seeds: mean difference, t interval, verdict.

Runs of one seed share initial weights and data, so their difference leaves out what the seed alone
would have changed. The interval is Student's over the seeds' differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, kw_only=True, frozen=True)
class Comparison:
    """Loss of an arm less that of its counterpart: negative is better."""

    mean: float
    low: float
    high: float
    num_seeds: int

    @property
    def verdict(self) -> str:
        """`helps` or `harms` when the interval leaves out 0, else `no effect`."""
        if self.high < 0.0:
            return "helps"
        return "harms" if self.low > 0.0 else "no effect"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a result file, the verdict in words among them."""
        return {
            "mean": self.mean,
            "interval": [self.low, self.high],
            "num_seeds": self.num_seeds,
            "verdict": self.verdict,
        }


def compare(
    losses: Sequence[float], others: Sequence[float], *, confidence: float = 0.95
) -> Comparison:
    """Losses of two arms by seed, in the same order. ValueError for fewer than two seeds."""
    if len(losses) != len(others) or len(losses) < 2:
        raise ValueError("a paired comparison needs the same two or more seeds in both arms")
    differences = [ours - theirs for ours, theirs in zip(losses, others)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = t_quantile((1.0 + confidence) / 2.0, degrees=len(differences) - 1) * error
    return Comparison(mean=mean, low=mean - reach, high=mean + reach, num_seeds=len(differences))


def overall_verdict(comparisons: Sequence[Comparison]) -> str:
    """One word on a feature: every comparison must agree before it is said to help, and one that
    harms is enough to say so."""
    verdicts = [comparison.verdict for comparison in comparisons]
    if "harms" in verdicts:
        return "harms"
    return "helps" if verdicts and set(verdicts) == {"helps"} else "no effect"


def t_quantile(probability: float, *, degrees: int) -> float:
    """The value that Student's t with `degrees` degrees of freedom stays below with `probability`
    in [0.5, 1)."""
    low, high = 0.0, 1.0
    while _t_cumulative(high, degrees) < probability:
        high *= 2.0
    for _ in range(80):
        middle = (low + high) / 2.0
        if _t_cumulative(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def _t_cumulative(value: float, degrees: int) -> float:
    """P(T <= value) for value >= 0: the finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(value / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = degrees % 2 == 1
    term = cosine if odd else 1.0
    total = term if not odd or degrees > 1 else 0.0
    for step in range(2 if odd else 1, degrees - 1, 2):
        term *= cosine * cosine * step / (step + 1)
        total += term
    within = 2.0 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + within / 2.0
