"""Ticks of a learner, each followed by one GRPO step through TRL on tasks of the same kind.

The learner's own objectives stay as they are: a run with `--grpo-backend trl` does what it does
with `internal` and, in addition, trains on code and math prompts through TRL. Both share one
optimizer, whose moments are those of policy gradients, and one reference snapshot.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol


class Backend(Protocol):
    """What trains on tasks: see training/rl/trl_sigma.py."""

    @property
    def steps_taken(self) -> int: ...

    @property
    def samples(self) -> list[Any]: ...

    def update(self, tasks: list[Any], *, seed: int, reference: Any = None) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrlLearner:
    """`learner` and, after each of its ticks, one update of `backend` on `num_tasks` tasks.

    optimizer: the one that both step; lr: its learning rate where a tick has weight 1. verifier:
    the back end's own, closed with this. facts: columns of every tick.
    """

    def __init__(
        self,
        learner: Any,
        backend: Backend,
        *,
        num_tasks: int,
        optimizer: Any,
        lr: float,
        verifier: Any,
        facts: dict[str, float],
    ) -> None:
        self.learner = learner
        self.backend = backend
        self._num_tasks = num_tasks
        self._optimizer = optimizer
        self._lr = lr
        self._verifier = verifier
        self._facts = facts

    def tick(self, *, seed: int, weight: float = 1.0, budget_factor: float = 1.0) -> Any:
        """The learner's result, with the columns and effects of the GRPO step in it."""
        result = self.learner.tick(seed=seed, weight=weight, budget_factor=budget_factor)
        rng = random.Random(f"{seed} grpo")
        tasks = [self.learner.sampler.draw() for _ in range(self._num_tasks)]
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * weight
        before = self.backend.steps_taken
        result.metrics |= self.backend.update(
            tasks, seed=rng.getrandbits(62), reference=self.learner.update.reference
        )
        result.metrics |= self._facts
        taken = self.backend.steps_taken - before
        for name, count in (("sigma_rl", taken), ("verifier", len(self.backend.samples))):
            result.effects[name] = result.effects.get(name, 0) + count
        return result

    def state_dict(self) -> dict[str, Any]:
        return {**self.learner.state_dict(), "grpo": self.backend.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A run that trained without TRL until now starts its counters at zero."""
        self.learner.load_state_dict(state)
        if "grpo" in state:
            self.backend.load_state_dict(state["grpo"])

    def close(self) -> None:
        self.learner.close()
        self._verifier.close()
