"""Documents into rows: concatenated without padding, cut where a row is full.

A document's last label is the `<|endoftext|>` that opens the next one, so nothing has to be known
of the next document when a row ends. What a row leaves of a document opens the next row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True, kw_only=True)
class OpenDocument:
    """A document that is being handed out; `offset` tokens of it are gone."""

    key: str
    tokens: NDArray[np.integer]
    source_id: int
    offset: int = 0

    @property
    def is_finished(self) -> bool:
        return self.offset >= len(self.tokens)


class Row:
    """One row in the making."""

    def __init__(self, seq_len: int) -> None:
        self.inputs = np.empty(seq_len, dtype=np.int64)
        self.labels = np.empty(seq_len, dtype=np.int64)
        self.sources = np.empty(seq_len, dtype=np.int16)
        self.filled = 0

    @property
    def is_full(self) -> bool:
        return self.filled == len(self.inputs)

    def take(self, document: OpenDocument, *, end_id: int) -> int:
        """Move what fits from the document into the row; the number of tokens moved."""
        start = document.offset
        count = min(len(document.tokens) - start, len(self.inputs) - self.filled)
        place = slice(self.filled, self.filled + count)
        self.inputs[place] = document.tokens[start : start + count]
        following = document.tokens[start + 1 : start + count + 1]
        self.labels[place] = end_id
        self.labels[self.filled : self.filled + len(following)] = following
        self.sources[place] = document.source_id
        document.offset += count
        self.filled += count
        return count
