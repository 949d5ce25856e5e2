"""An always-valid test of paired differences: it may be looked at after every one of them.

Betting on the next difference being positive, with a stake fixed before it is seen, multiplies the
wealth by 1 + stake * x. If nothing is gained on average, so is the wealth not, at any stopping time
(Ville), and reaching 1/alpha has a probability of at most alpha, however often one looks. A
fixed-sample test that is peeked at has no such bound (Waudby-Smith and Ramdas 2010.09686; mSPRT
1512.04922).

Stakes are in units of the noise, told from what successive differences do not share: an effect that
grows or fades over the trials would count as noise in their spread about one mean (von Neumann
1941).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

LARGEST_BET = 0.75
SMALLEST_BET = 0.25  # without it a losing candidate would cost nothing more and never be dropped
CLIP_SCALES = 3.0
PRIOR_WEIGHT = 3.0  # differences that the scale known beforehand counts for
# Two-sided 95 % points of Student's t with 1 to 31 degrees of freedom.
T_POINTS = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042, 2.040,
)  # fmt: skip


class EProcess:
    """Evidence that paired differences are positive on average.

    scale: their standard deviation as far as known beforehand, in the same unit; None = unknown,
    and then nothing is staked before two differences have shown it.
    """

    def __init__(self, *, scale: float | None = None) -> None:
        self.scale = scale
        self.value = 1.0  # E_n
        self.differences: list[float] = []
        self._stakes = [0.0, 0.0]  # sum of x and of x squared

    @property
    def count(self) -> int:
        return len(self.differences)

    def observe(self, difference: float) -> float:
        """Take one finite difference; the new value of the process."""
        x = self._standardise(difference)
        bet = (0.25 + self._stakes[0]) / (1.0 + self._stakes[1])
        self.value *= 1.0 + min(LARGEST_BET, max(SMALLEST_BET, bet)) * x
        self._stakes = [self._stakes[0] + x, self._stakes[1] + x * x]
        self.differences.append(difference)
        return self.value

    def _standardise(self, difference: float) -> float:
        """clip(d / 3s, -1, 1) with the scale of what was seen before; 0 while there is none."""
        weight = 0.0 if self.scale is None else PRIOR_WEIGHT
        squares = squared_steps(self.differences) / 2.0 + weight * (self.scale or 0.0) ** 2
        freedom = weight + max(0, self.count - 1)
        scale = math.sqrt(squares / freedom) if freedom else 0.0
        return max(-1.0, min(1.0, difference / (CLIP_SCALES * scale))) if scale else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "value": self.value,
            "differences": list(self.differences),
            "stakes": list(self._stakes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on as a test with this past; the lists are copied."""
        self.scale, self.value = state["scale"], state["value"]
        self.differences, self._stakes = list(state["differences"]), list(state["stakes"])


def mean(values: list[float]) -> float:
    """0 without values."""
    return math.fsum(values) / len(values) if values else 0.0


def squared_deviations(values: list[float]) -> float:
    """Sum of squares about the mean."""
    centre = mean(values)
    return math.fsum((value - centre) ** 2 for value in values)


def squared_steps(values: list[float]) -> float:
    """Sum of squares of each value less the one before: twice the noise's share of each."""
    return math.fsum((after - before) ** 2 for before, after in itertools.pairwise(values))


def deviation(values: list[float]) -> float:
    """Standard deviation of the sample; 0 below two values."""
    return math.sqrt(squared_deviations(values) / (len(values) - 1)) if len(values) > 1 else 0.0


def effect_size(values: list[float]) -> float:
    """Mean over standard deviation; 0 where either is."""
    spread = deviation(values)
    return mean(values) / spread if spread else 0.0


def interval(values: list[float]) -> tuple[float, float] | None:
    """95 % interval of the mean as if their number had been fixed; None below two values."""
    count = len(values)
    if count < 2:
        return None
    half = T_POINTS[min(count, len(T_POINTS) + 1) - 2] * deviation(values) / math.sqrt(count)
    return mean(values) - half, mean(values) + half


def spent_alpha(alpha: float, candidate: int) -> float:
    """Share of the error budget for the `candidate`-th test, counted from 1: all sum to `alpha`."""
    return alpha * 6.0 / (math.pi * candidate) ** 2
