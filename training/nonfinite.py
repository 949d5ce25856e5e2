"""What happens when a loss or gradient is NaN or infinite.

The update is skipped and the batch recorded; the same step is then tried on the next batch. Three
failures in a row mean that the weights, not the batch, are to blame: the trainer goes back one
checkpoint and leaves those batches out. A failed attempt enters no statistic.

A loss can stay finite over weights that are not: an expert nobody was routed to, a row of a table
nobody read, a moment that makes its weight stand still. So weights and moments are looked at as
well, before every update and every save. They are not the batch's fault: the run goes back to the
checkpoint and repeats the same batches; only if that ends the same way does it take new ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from training.optimizer import OptimizerSet

FAILURES_BEFORE_ROLLBACK = 3
ROLLBACKS_BEFORE_GIVING_UP = 3


class Verdict(Enum):
    """SKIP: try the next batch. ROLL_BACK: one checkpoint back, on new data; RESTORE: on the
    same."""

    APPLY = "apply"
    SKIP = "skip"
    ROLL_BACK = "roll back"
    RESTORE = "restore"


@dataclass(slots=True)
class NonFiniteGuard:
    """Counts failed attempts of the current step; active from the first step on.

    rollbacks: without a finite step beyond the furthest one that failed, which is what makes them
    hopeless; over weeks any number of them may be needed, each for a reason of its own.
    """

    consecutive_failures: int = 0
    rollbacks: int = 0
    furthest_failure: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    restored_from: int | None = None

    def judge_state(self, *, finite: bool, step: int) -> Verdict:
        """What to do with weights and moments as they are; RuntimeError as in `judge`."""
        if finite:
            return Verdict.APPLY
        again, self.restored_from = self.restored_from == step, step
        self._count_rollback(step)
        return Verdict.ROLL_BACK if again else Verdict.RESTORE

    def judge(self, *, finite: bool, step: int, position: dict[str, Any]) -> Verdict:
        """What to do with this attempt; `position` names the batch in the stream.

        Raises RuntimeError when even rolling back three times brought no finite step.
        """
        if finite:
            self.consecutive_failures = 0
            if step > self.furthest_failure:
                self.rollbacks = 0
            return Verdict.APPLY
        self.skipped.append({"step": step, "position": position})
        self.consecutive_failures += 1
        if self.consecutive_failures < FAILURES_BEFORE_ROLLBACK:
            return Verdict.SKIP
        self._count_rollback(step)
        return Verdict.ROLL_BACK

    def _count_rollback(self, step: int) -> None:
        self.consecutive_failures = 0
        self.rollbacks += 1
        self.furthest_failure = max(self.furthest_failure, step)
        if self.rollbacks > ROLLBACKS_BEFORE_GIVING_UP:
            raise RuntimeError(
                f"step {step} stays non-finite after {ROLLBACKS_BEFORE_GIVING_UP} rollbacks; "
                "lower --lr or --grad-clip, or start again with --no-resume"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Only the record: the failure counts belong to the process that saw them."""
        self.skipped = list(state["skipped"])


def state_is_finite(model: nn.Module, optimizer: OptimizerSet) -> Tensor:
    """0-d bool, unread: whether all weights, saved buffers and moments are finite (below 1e19)."""
    tensors = list(model.state_dict().values())
    for part in optimizer.parts:
        for state in part.state.values():
            # 0-d: AdamW's step counters, which live on the host.
            tensors += [v for v in state.values() if isinstance(v, Tensor) and v.dim()]
    floating = [t for t in tensors if t.is_floating_point() and t.numel()]
    norms = torch._foreach_norm(floating, 2)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack([norm.float() for norm in norms]).isfinite().all()
