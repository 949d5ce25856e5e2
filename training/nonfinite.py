"""What happens when a loss or gradient is NaN or infinite.

The update is skipped and the batch recorded; the same step is then tried on the next batch. Three
failures in a row mean that the weights, not the batch, are to blame: the trainer goes back one
checkpoint and leaves those batches out. A failed attempt enters no statistic (RELIABILITY 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

FAILURES_BEFORE_ROLLBACK = 3
ROLLBACKS_BEFORE_GIVING_UP = 3


class Verdict(Enum):
    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"


@dataclass(slots=True)
class NonFiniteGuard:
    """Counts failed attempts of the current step; active from the first step on."""

    consecutive_failures: int = 0
    rollbacks: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, *, finite: bool, step: int, position: dict[str, Any]) -> Verdict:
        """What to do with this attempt; `position` names the batch in the stream.

        Raises RuntimeError when even rolling back three times brought no finite step.
        """
        if finite:
            self.consecutive_failures = 0
            return Verdict.APPLY
        self.skipped.append({"step": step, "position": position})
        self.consecutive_failures += 1
        if self.consecutive_failures < FAILURES_BEFORE_ROLLBACK:
            return Verdict.SKIP
        self.consecutive_failures = 0
        self.rollbacks += 1
        if self.rollbacks > ROLLBACKS_BEFORE_GIVING_UP:
            raise RuntimeError(
                f"step {step} stays non-finite after {ROLLBACKS_BEFORE_GIVING_UP} rollbacks; "
                "lower --lr or --grad-clip, or start again with --no-resume"
            )
        return Verdict.ROLL_BACK

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Only the record: the failure counts belong to the process that saw them."""
        self.skipped = list(state["skipped"])
