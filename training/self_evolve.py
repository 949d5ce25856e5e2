"""Bounded rules on a run: the learning rate by the probe loss, the pace of RL by memory.

The slope of the last probe losses, all of one batch, over its standard error is the signal: above
2, or after a gradient whose norm lies more than four robust deviations above the median, the factor
is lowered; below -2 it is raised. A loss that falls as losses do while a model learns is nearly
always significant, so in a healthy run the rule climbs to its upper bound.

RL gets rarer and shorter while the device holds more memory than it should, and more frequent while
there is room and the pass rate on validation tasks rises. What a CPU holds is not looked at.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SIGNIFICANT = 2.0  # standard errors
SPIKE = 4.0  # robust deviations
DEVIATION_OF_MEDIAN = 1.4826  # of a normal variable: its deviation / median absolute deviation
SMALLEST_SPREAD = 1e-3  # of the median
LEAST_NORMS = 8
ROOM = 0.9  # of the memory target, below which RL may get more frequent


@dataclass(slots=True, kw_only=True, frozen=True)
class RuleSettings:
    """history: probe losses that are looked at. up, down: steps of the factor within bounds."""

    history: int = 24
    up: float = 1.03
    down: float = 0.94
    lowest: float = 0.50
    highest: float = 1.80


class LearningRateRule:
    """The factor, the values it was decided by, and a decision that waits for its moment.

    `observe` decides, `settle` carries out what was decided last: between the two an experiment may
    end that must not be disturbed. However many looks it takes, the factor moves once.
    """

    def __init__(self, settings: RuleSettings) -> None:
        self.settings = settings
        self.factor = 1.0
        self.slope_t = 0.0
        self.is_spike = False
        self.losses: list[float] = []
        self._norms: list[float] = []
        self._pending = 1.0

    @property
    def loss_delta(self) -> float:
        """By how much the probe loss changed since the look before."""
        return self.losses[-1] - self.losses[-2] if len(self.losses) > 1 else 0.0

    def observe(
        self, loss: float, *, grad_norms: Sequence[float], order: Sequence[int] | None = None
    ) -> None:
        """Take the probe loss, and the gradient norms of the steps since the last look.

        order: places of the losses as they are to be read, for the placebo. A loss or norm that is
        not finite is left out.
        """
        size = self.settings.history
        if math.isfinite(loss):
            self.losses = [*self.losses, loss][-size:]
        known = [norm for norm in grad_norms if math.isfinite(norm)]
        self.is_spike = any(is_spike(norm, self._norms) for norm in known)
        self._norms = [*self._norms, *known][-max(size, LEAST_NORMS) :]
        if len(self.losses) < size:
            return
        read = self.losses if order is None else [self.losses[place] for place in order]
        self.slope_t = slope_statistic(read)
        if self.slope_t > SIGNIFICANT or self.is_spike:
            self._pending = self.settings.down
        elif self.slope_t < -SIGNIFICANT:
            self._pending = self.settings.up
        else:
            self._pending = 1.0

    def settle(self) -> float:
        """Carry out the last decision, once; the factor."""
        own = self.settings
        self.factor = min(own.highest, max(own.lowest, self.factor * self._pending))
        self._pending = 1.0
        return self.factor

    def state_dict(self) -> dict[str, Any]:
        return {
            "factor": [self.factor, self._pending],
            "last": [self.slope_t, self.is_spike],
            "losses": list(self.losses),
            "norms": list(self._norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self._pending = state["factor"]
        self.slope_t, self.is_spike = state["last"]
        self.losses, self._norms = list(state["losses"]), list(state["norms"])


@dataclass(slots=True, kw_only=True, frozen=True)
class PaceSettings:
    """interval, budget: what the flags say; the interval stays in [shortest, longest], the budget
    in [1, budget]. target_gb: of device memory."""

    interval: int
    budget: int
    shortest: int = 2
    longest: int = 16
    target_gb: float = 10.5


class PaceRule:
    """Steps between RL ticks and updates per tick; `settle` carries out what was decided last."""

    def __init__(self, settings: PaceSettings) -> None:
        self.settings = settings
        self.interval, self.budget = settings.interval, settings.budget
        self.task_val = math.nan
        self._pending = [0, 0]

    def observe(self, *, reserved_gb: float, task_val: float) -> None:
        """Take the memory held now and the newest pass rate, nan while there is none."""
        own, improving = self.settings, task_val > self.task_val
        if reserved_gb > own.target_gb:
            self._pending = [1, -1]
        elif reserved_gb < ROOM * own.target_gb and improving:
            self._pending = [-1, 0]
        else:
            self._pending = [0, 0]
        self.task_val = task_val

    def settle(self) -> tuple[float, float]:
        """Carry out the last decision, once; the factors on interval and budget.

        An interval that the flags put outside the bounds is left alone until it is told to move
        towards them.
        """
        own = self.settings
        shortest, longest = min(own.shortest, own.interval), max(own.longest, own.interval)
        self.interval = min(longest, max(shortest, self.interval + self._pending[0]))
        self.budget = max(1, self.budget + self._pending[1])
        self._pending = [0, 0]
        return self.interval / own.interval, self.budget / own.budget

    def state_dict(self) -> dict[str, Any]:
        return {
            "now": [self.interval, self.budget],
            "task_val": self.task_val,
            "pending": list(self._pending),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.interval, self.budget = state["now"]
        self.task_val, self._pending = state["task_val"], list(state["pending"])


def slope_statistic(values: Sequence[float]) -> float:
    """Least-squares slope of `values` over their places, divided by its standard error.

    Infinite for a line without error, 0 for a constant. ValueError for fewer than three values.
    """
    count = len(values)
    if count < 3:
        raise ValueError("a slope with an error takes three values or more")
    middle, mean = (count - 1) / 2.0, statistics.fmean(values)
    spread = math.fsum((place - middle) ** 2 for place in range(count))
    slope = math.fsum((p - middle) * (v - mean) for p, v in enumerate(values)) / spread
    errors = math.fsum((v - mean - slope * (p - middle)) ** 2 for p, v in enumerate(values))
    error = math.sqrt(errors / (count - 2) / spread)
    # Below what rounding leaves over, a slope or an error is none.
    resolution = 1e-12 * max(map(abs, values)) / count
    if abs(slope) <= resolution:
        return 0.0
    return slope / error if error > resolution else math.copysign(math.inf, slope)


def is_spike(norm: float, before: Sequence[float]) -> bool:
    """Whether a gradient norm stands out from those before it; False for fewer than LEAST_NORMS."""
    if len(before) < LEAST_NORMS:
        return False
    median = statistics.median(before)
    spread = DEVIATION_OF_MEDIAN * statistics.median(abs(value - median) for value in before)
    return norm > median + SPIKE * max(spread, SMALLEST_SPREAD * median)
