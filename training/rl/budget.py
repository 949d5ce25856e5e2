"""How often one group of completions is learned from: more often while the policy still fails.

repeats = round(1 + (budget - 1)(1 - mean reward)). The budget starts at its minimum, rises by one
after four ticks in a row with a mean reward below 0.5, and falls by one after four above it.
Ratios are clipped, so a repeat can move the policy only so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TICKS_IN_A_ROW = 4
MIDDLE = 0.5


class RepeatBudget:
    """A number of update repeats within [lowest, highest], moved by the mean rewards of ticks."""

    def __init__(self, *, lowest: int, highest: int) -> None:
        if not 1 <= lowest <= highest:
            raise ValueError("--ttrl-budget-min must be at least 1 and not above --ttrl-budget-max")
        self.lowest, self.highest = lowest, highest
        self.value = lowest
        self._below = self._above = 0

    def repeats(self, mean_reward: float, *, factor: float = 1.0) -> int:
        """Updates on a group of this mean reward in [0, 1]; factor: on the budget, this time."""
        budget = min(self.highest, max(self.lowest, factor * self.value))
        return round(1 + (budget - 1) * (1.0 - min(1.0, max(0.0, mean_reward))))

    def observe(self, mean_reward: float) -> None:
        """Count a tick; a mean reward of exactly 0.5 ends both rows."""
        self._below = self._below + 1 if mean_reward < MIDDLE else 0
        self._above = self._above + 1 if mean_reward > MIDDLE else 0
        if self._below == TICKS_IN_A_ROW:
            self.value, self._below = min(self.highest, self.value + 1), 0
        elif self._above == TICKS_IN_A_ROW:
            self.value, self._above = max(self.lowest, self.value - 1), 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "below": self._below, "above": self._above}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the counts; a value outside these bounds is moved to the nearer one."""
        self.value = min(self.highest, max(self.lowest, state["value"]))
        self._below, self._above = state["below"], state["above"]
