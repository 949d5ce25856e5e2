"""What a training step reads: rows of tokens with labels, document starts and source ids."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.stream.mixture import Mixture

IGNORED_LABEL = -100


@dataclass(slots=True, kw_only=True)
class Batch:
    """B rows of T tokens. `source_ids` names the source of each input token's document."""

    input_ids: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64; the next token, -100 where there is none
    reset_mask: Tensor  # (B, T) bool; True on the <|endoftext|> that opens a document
    source_ids: Tensor  # (B, T) int16; keys of SOURCE_IDS
    num_bytes: int  # UTF-8 bytes of all labels that count; 0 in a part: not counted again

    def part(self, start: int, stop: int) -> "Batch":
        """Rows start to stop as a batch; the batch itself when that is all of them."""
        if start == 0 and stop == len(self.input_ids):
            return self
        return Batch(
            input_ids=self.input_ids[start:stop],
            labels=self.labels[start:stop],
            reset_mask=self.reset_mask[start:stop],
            source_ids=self.source_ids[start:stop],
            num_bytes=0,
        )


class BatchStream(Protocol):
    """Endless batches with a position; what the trainer asks of its data."""

    @property
    def mixture(self) -> Mixture | None:
        """Whose turns can be reweighted; None for a stream of one text."""
        ...

    def next_batch(self) -> Batch:
        """Waits for data where it must; the batch is the caller's own, on the host."""
        ...

    def position(self) -> dict[str, Any]:
        """Which batch comes next, as a small value for records."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, so that the same batches follow; may hold tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved position; ValueError for one of another stream."""
        ...

    def metrics(self) -> dict[str, float]:
        """The stream's own columns of a row; {} for a stream of one text."""
        ...

    def take_messages(self) -> list[str]:
        """What a person should read, said since the last call."""
        ...

    def shrink_prefetch(self) -> bool:
        """Keep less waiting in memory from now on; False where there is nothing to give up."""
        ...

    def close(self) -> None:
        """End readers and their threads; called once."""
        ...


@contextmanager
def closed_on_error(stream: BatchStream) -> Iterator[None]:
    """Lets go of the stream if the block fails. Its threads would outlive a program that ends for
    another reason, and fail loudly while the interpreter shuts down."""
    try:
        yield
    except BaseException:
        stream.close()
        raise


def to_batch(
    inputs: NDArray[np.int64],
    labels: NDArray[np.int64],
    sources: NDArray[np.int16],
    *,
    end_id: int,
    byte_lengths: NDArray[np.int32],
) -> Batch:
    """A batch of arrays of shape (B, T); `byte_lengths` (vocab_size,) counts the labels' text."""
    counted = labels[labels != IGNORED_LABEL]
    input_ids = torch.from_numpy(np.ascontiguousarray(inputs))
    return Batch(
        input_ids=input_ids,
        labels=torch.from_numpy(np.ascontiguousarray(labels)),
        # Text never encodes to end_id, so wherever it stands, a document opens (or padding begins).
        reset_mask=input_ids == end_id,
        source_ids=torch.from_numpy(np.ascontiguousarray(sources)),
        num_bytes=int(byte_lengths[counted].sum(dtype=np.int64)),
    )
