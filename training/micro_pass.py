"""Forward and backward of one micro-batch, as a step calls them: here by running the model.

training/step_graph.py has the other way, which replays what was captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.stream.batch import Batch


class MicroPass(Protocol):
    """Called for the micro-batches of a step in order, forward and backward in turn."""

    def forward(self, batch: Batch, *, micro: int, parts: int) -> Any:
        """The model's output (a SigmaOutput) for micro-batch `micro` of `parts`, with its loss."""
        ...

    def backward(self, total_loss: Callable[[], Tensor], *, parts: int) -> None:
        """Add the gradients of that micro-batch's total_loss() / parts, scaled, to `.grad`."""
        ...

    def forget(self) -> None:
        """Give back what is kept for later micro-batches."""
        ...

    def metrics(self) -> dict[str, float]:
        """Columns of a row; {} where there is nothing to count."""
        ...


@dataclass(slots=True, kw_only=True)
class EagerPass:
    """Runs `model`, the model or its compiled form, under `autocast`."""

    model: Callable[..., Any]
    autocast: Callable[[], AbstractContextManager[Any]]
    scaler: torch.amp.GradScaler

    def forward(self, batch: Batch, *, micro: int, parts: int) -> Any:
        with self.autocast():
            return self.model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)

    def backward(self, total_loss: Callable[[], Tensor], *, parts: int) -> None:
        self.scaler.scale(total_loss() / parts).backward()

    def forget(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}
