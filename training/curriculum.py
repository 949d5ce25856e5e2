"""Sequence-length curriculum: short rows first, at constant tokens per step.

Early in training short contexts teach as much as long ones and attention over them is cheaper.
A batch of B rows of T tokens is cut into B k rows of T / k, so data order and token count stay
those of the run without the curriculum.
"""

from __future__ import annotations

from training.data import Batch


def sequence_divisor(step: int, *, total_steps: int, boundaries: tuple[float, ...]) -> int:
    """By how much rows are shortened at 1-based `step`: 2^(boundaries not yet reached).

    boundaries: increasing fractions of the run; (0.15, 0.40) means T/4, then T/2, then T.
    """
    progress = (step - 1) / total_steps
    return 2 ** sum(progress < boundary for boundary in boundaries)


def shorten_rows(batch: Batch, divisor: int) -> Batch:
    """Cut every row of `batch` into `divisor` rows; T must be a multiple of it."""
    if divisor == 1:
        return batch
    length = batch.input_ids.size(1)
    if length % divisor:
        raise ValueError(f"--curriculum-phases cut rows by {divisor}, but --seq-len is {length}")
    return Batch(
        input_ids=batch.input_ids.reshape(-1, length // divisor),
        labels=batch.labels.reshape(-1, length // divisor),
        reset_mask=batch.reset_mask.reshape(-1, length // divisor),
        source_ids=batch.source_ids.reshape(-1, length // divisor),
        num_bytes=batch.num_bytes,
    )
