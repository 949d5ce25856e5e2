"""How many sequences go through the model at once, and what to do when that was too many.

A step that runs out of memory is replayed with half the rows per micro-batch and twice as many
micro-batches. The stream hands out the same rows in the same order and every loss is a mean over
its rows, so the replayed step is the step of a run configured so from the start, to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from training.runtime.memory_guard import is_out_of_memory
from training.stream.batch import Batch, BatchStream


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
        """Go on with the halvings that a run before needed."""
        self.split = state["split"]


class StepRows:
    """The rows of one step, cut into micro-batches, kept until the step is over.

    A replayed step is served from what was drawn already, so the stream is asked for whole batches
    only and never has to go back.
    """

    def __init__(self, stream: BatchStream) -> None:
        self._stream = stream
        self._drawn: list[Batch] = []
        self._place = 0  # rows served of this step
        self._position: dict[str, Any] = {}

    def position(self) -> dict[str, Any]:
        """Where in the stream this step's rows begin."""
        if not self._drawn:
            self._position = self._stream.position()
        return self._position

    def take(self, rows: int) -> Batch:
        """The next `rows` rows, a divisor of the stream's batch size."""
        number, first = self._place, 0
        for batch in self._drawn:
            if number < len(batch.input_ids):
                break
            number -= len(batch.input_ids)
            first += 1
        if first == len(self._drawn):
            self._drawn.append(self._next_batch())
        self._place += rows
        return self._drawn[first].part(number, number + rows)

    def _next_batch(self) -> Batch:
        try:
            return self._stream.next_batch()
        except (RuntimeError, MemoryError) as error:
            # Only a stream of one text is sure to stand where it stood.
            if self._stream.mixture is None or not is_out_of_memory(error):
                raise
            raise RuntimeError(
                "no memory for the next batch: lower --source-prefetch or --prefetch-factor; the "
                "same command resumes from the last checkpoint"
            ) from error

    def rewind(self) -> None:
        """Serve the step's rows again from the first."""
        self._place = 0

    def clear(self) -> None:
        """The step is over."""
        self._drawn.clear()
        self._place = 0


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch on the training device; the copy may still be under way."""
    if device.type == "cpu":
        return batch
    names = ("input_ids", "labels", "reset_mask", "source_ids")
    moved = {name: getattr(batch, name).to(device, non_blocking=True) for name in names}
    return replace(batch, **moved)
