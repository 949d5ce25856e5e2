"""Which of several launch settings is fastest, found by UCB1 from noisy latencies.

The reward of a trial is the best arm's median latency over this trial's: in (0, 1] up to noise, on
the scale of the bonus, and of latency alone. Rewards are formed anew whenever they are asked for,
because what is best changes. The first arm is the default; another must beat it by more than
medians of one arm differ before it is preferred.

Source: UCB1 (Auer, Cesa-Bianchi, Fischer 2002).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

Arm = tuple[int, ...]
MARGIN = 0.97  # of the default's latency


class KernelTuner:
    """Arms, their measured latencies in microseconds, and those that failed the gate."""

    def __init__(self, arms: Sequence[Arm], *, exploration: float) -> None:
        if not arms or len(set(arms)) != len(arms):
            raise ValueError("a tuner needs one or more arms, each of them once")
        self.arms = tuple(arms)
        self.exploration = exploration
        self.latencies: dict[Arm, list[float]] = {}
        self.rejected: set[Arm] = set()

    @property
    def num_trials(self) -> int:
        return sum(map(len, self.latencies.values()))

    def choose(self) -> Arm:
        """The arm to try next: one never tried, else the one with the highest upper bound."""
        allowed = [arm for arm in self.arms if arm not in self.rejected]
        for arm in allowed:
            if arm not in self.latencies:
                return arm
        total = math.log(self.num_trials)

        def bound(arm: Arm) -> float:
            bonus = math.sqrt(total / len(self.latencies[arm]))
            return self.reward(arm) + self.exploration * bonus

        return max(allowed, key=bound)

    def record(self, arm: Arm, microseconds: float) -> None:
        """A trial of an arm that passed the gate."""
        if microseconds <= 0.0:
            raise ValueError("a latency must be positive")
        self.latencies.setdefault(arm, []).append(microseconds)

    def reject(self, arm: Arm) -> None:
        """The arm computes something else. ValueError for the default, which is the measure."""
        if arm == self.arms[0]:
            raise ValueError("the default setting cannot be left out")
        self.rejected.add(arm)
        self.latencies.pop(arm, None)

    def median(self, arm: Arm) -> float:
        """Of the arm's latencies, in microseconds; KeyError for one never tried, or rejected."""
        return statistics.median(self.latencies[arm])

    def reward(self, arm: Arm) -> float:
        """Mean over the arm's trials of the best median over the trial's latency."""
        best = min(map(statistics.median, self.latencies.values()))
        return statistics.fmean(best / value for value in self.latencies[arm])

    def best(self) -> Arm:
        """The fastest arm so far; the default unless it was tried and clearly beaten."""
        default = self.arms[0]
        if default not in self.latencies:
            return default
        fastest = min(self.latencies, key=self.median)
        return fastest if self.median(fastest) < MARGIN * self.median(default) else default

    def state_dict(self) -> dict[str, Any]:
        """JSON values, which `load_state_dict` takes."""
        return {
            "latencies": [[list(arm), times] for arm, times in self.latencies.items()],
            "rejected": sorted(map(list, self.rejected)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What was measured of the arms that there still are. ValueError for what is no state."""
        try:
            latencies = {tuple(arm): [float(t) for t in times] for arm, times in state["latencies"]}
            rejected = set(map(tuple, state["rejected"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no state of a kernel tuner: {error}") from error
        if not all(times and min(times) > 0.0 for times in latencies.values()):
            raise ValueError("a latency must be positive")
        self.rejected = (rejected & set(self.arms)) - {self.arms[0]}
        allowed = set(self.arms) - self.rejected
        self.latencies = {arm: times for arm, times in latencies.items() if arm in allowed}
