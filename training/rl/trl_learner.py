"""Ticks whose update is one GRPO step through TRL, in place of the learner's own objectives.

Everything else is the learner's: its tasks and their levels, the optimizer, whose moments are those
of policy gradients, the reference snapshot, and the looks at task-val.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Protocol

from training.rl.learner import Learner, TickResult
from training.rl.verifier import Verifier


class Backend(Protocol):
    """What trains on tasks: see training/rl/trl_sigma.py."""

    @property
    def steps_taken(self) -> int:
        """Optimizer steps over the whole run, without those that were dropped."""
        ...

    @property
    def samples(self) -> list[Any]:
        """The completions of the last update with their verdicts."""
        ...

    def update(self, tasks: list[Any], *, seed: int, reference: Any = None) -> dict[str, float]:
        """One optimizer step; its metrics. reference: the model that a KL term measures from."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Counters; optimizer and reference are kept by the learner."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting there."""
        ...


class TrlLearner:
    """`learner` with one update of `backend` on `num_tasks` tasks for a tick.

    optimizer: the one that `backend` steps; lr: its learning rate where a tick has weight 1.
    verifier: the back end's own, closed with this. facts: columns of every tick.
    """

    def __init__(
        self,
        learner: Learner,
        backend: Backend,
        *,
        num_tasks: int,
        optimizer: Any,
        lr: float,
        verifier: Verifier,
        facts: dict[str, float],
    ) -> None:
        self.learner = learner
        self.backend = backend
        self._num_tasks = num_tasks
        self._optimizer = optimizer
        self._lr = lr
        self._verifier = verifier
        self._facts = facts

    def tick(self, *, seed: int, weight: float = 1.0, budget_factor: float = 1.0) -> TickResult:
        """One step on tasks that the learner's sampler draws, `weight` times as long; it is one
        whatever the budget."""
        del budget_factor
        rng = random.Random(f"{seed} grpo")
        self.learner.update.begin_tick()
        tasks = [self.learner.sampler.draw() for _ in range(self._num_tasks)]
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * weight
        before = self.backend.steps_taken
        metrics = self.backend.update(
            tasks, seed=rng.getrandbits(62), reference=self.learner.update.reference
        )
        result = TickResult(
            metrics=metrics | self._facts,
            effects={
                "sigma_rl": self.backend.steps_taken - before,
                "verifier": len(self.backend.samples),
            },
        )
        self.learner.finish_tick(result, rng=rng)
        result.metrics |= self._verifier.take_metrics()
        return result

    def state_dict(self) -> dict[str, Any]:
        """The learner's own, and the back end's under `grpo`."""
        return {**self.learner.state_dict(), "grpo": self.backend.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A run that trained without TRL until now starts its counters at zero."""
        self.learner.load_state_dict(state)
        if "grpo" in state:
            self.backend.load_state_dict(state["grpo"])

    def close(self) -> None:
        """End the processes of both verifiers."""
        self.learner.close()
        self._verifier.close()
