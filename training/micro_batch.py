"""How many sequences go through the model at once, and what to do when that was too many.

A step that runs out of memory is replayed with half the rows per micro-batch and twice as many
micro-batches. The stream hands out the same rows in the same order and every loss is a mean over
its rows, so the replayed step is the step of a run configured so from the start, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from training.data import Batch


@dataclass(slots=True, kw_only=True)
class MicroBatchPlan:
    """batch_size x accumulation sequences per step as configured, `split` times finer as run.

    split: 1, or a power of two that divides batch_size.
    """

    batch_size: int
    accumulation: int
    split: int = 1

    @property
    def rows(self) -> int:
        """Sequences per micro-batch."""
        return self.batch_size // self.split

    @property
    def num_micro_batches(self) -> int:
        return self.accumulation * self.split

    @property
    def can_halve(self) -> bool:
        return self.rows % 2 == 0

    def halve(self) -> None:
        """Half the rows, twice the micro-batches; ValueError where rows cannot be halved."""
        if not self.can_halve:
            raise ValueError(f"{self.rows} rows per micro-batch cannot be halved")
        self.split *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"split": self.split}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.split = state["split"]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory on the device or the host was short.

    The CPU allocator of torch has no exception class of its own.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator: can't allocate memory" in text
        or "DefaultCPUAllocator: not enough memory" in text
    )


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch on the training device; the copy may still be under way."""
    if device.type == "cpu":
        return batch
    names = ("input_ids", "labels", "reset_mask", "source_ids")
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    return replace(batch, **moved)
