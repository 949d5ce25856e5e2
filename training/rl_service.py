"""What a training step knows of reinforcement learning: when data is real, and how to tick."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from training.rl.passed import Passed


class Outcome(Protocol):
    """Of a tick: columns by name, effective calls by feature, and the completions that passed."""

    metrics: dict[str, float]
    effects: dict[str, int]
    passed: list[Passed]


@dataclass(slots=True, kw_only=True)
class RLService:
    """learner: see training/rl/learner.py. real_batches: of a step, how many batches of real data
    were trained on up to it. timed: the span that a tick is charged to. mark: counts effects of a
    feature.
    """

    learner: Any
    real_batches: Callable[[int], int]
    timed: Callable[[], AbstractContextManager[Any]]
    mark: Callable[[str, int], None]

    def tick(self, *, seed: int, weight: float, budget_factor: float = 1.0) -> Outcome:
        """One tick; its effects are counted for the features they belong to."""
        with self.timed():
            result = self.learner.tick(seed=seed, weight=weight, budget_factor=budget_factor)
        for name, count in result.effects.items():
            if count:
                self.mark(name, count)
        return result
