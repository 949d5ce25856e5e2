"""What the trainer asks of whoever audits a run, and nothing more.

The trainer sees this interface and not its implementation, so that neither it nor anything it
imports can reach the hidden evaluation (no training component may read it).
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import nn


class RunAudit(Protocol):
    """Guards of a run. They read the model and write columns; nothing they return decides."""

    def observe(self, step: int, model: nn.Module) -> None:
        """Called after every finished step, before its row is written."""

    def metrics(self) -> dict[str, Any]:
        """Columns of a row."""
        ...

    def verify(self, step: int) -> None:
        """Called after every checkpoint save; RuntimeError when the program was changed."""

    def judge(self, idle_features: list[str]) -> None:
        """Called at the end of the last step; RuntimeError when an idle feature is an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to show the columns that the whole run would have shown."""
        ...

    def load_state_dict(self, state: dict[str, Any], *, step: int, model: nn.Module) -> None:
        """Go on from a checkpoint of `step`, whose weights `model` has by now."""
        ...

    def close(self) -> None:
        """Called once at the end of a run, also after a failure."""
        ...
