"""From a source's documents to a shard: what is left out, and the tokens of the rest.

What looks at one document alone runs in chunks on a pool and in Rust; what remembers documents (the
window of near duplicates) runs afterwards, in the order of reading. So the number of workers
changes the time a shard takes and nothing in it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from training.data import permutation
from training.sources.base import SOURCE_IDS, Document, split_of
from training.stream.shards import Shard
from training.tokenizer import Tokenizer

Check = Callable[[str], str | None]  # the reason to leave a text out, or None
_SPACE = re.compile(r"\s+")


class DuplicateWindow(Protocol):
    """Recent documents of one source, to find near duplicates of them."""

    def check(self, text: str) -> str | None:
        """The reason to leave the text out, or None: then it is remembered."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def prefix_hash(text: str, *, characters: int) -> int:
    """64-bit hash of a text's beginning, without case and spacing."""
    normal = _SPACE.sub(" ", text[: 2 * characters].lower()).strip()[:characters]
    digest = hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(slots=True, kw_only=True, frozen=True)
class _Processed:
    document: Document
    reason: str | None
    tokens: NDArray[np.integer] | None = None
    hash: int = 0


@dataclass(slots=True, kw_only=True)
class DocumentPipeline:
    """The checks and the tokenizer that all sources share; it keeps no state.

    before_window, after_window: checks in their order, around the window of duplicates.
    prefix_characters: how much of a document `Shard.hashes` looks at.
    """

    tokenizer: Tokenizer
    before_window: Sequence[Check] = ()
    after_window: Sequence[Check] = ()
    prefix_characters: int = 4096

    def process(self, documents: Sequence[Document]) -> list[_Processed]:
        """Every document with its tokens, or with the reason to leave it out."""
        reasons = [self._first_reason(document) for document in documents]
        texts = [doc.text for doc, reason in zip(documents, reasons, strict=True) if not reason]
        encoded = iter(self.tokenizer.encode_batch(texts) if texts else [])
        dtype = np.uint16 if self.tokenizer.vocab_size <= 1 << 16 else np.int32
        return [
            _Processed(document=document, reason=reason)
            if reason
            else _Processed(
                document=document,
                reason=None,
                tokens=np.array([self.tokenizer.end_id, *next(encoded)], dtype=dtype),
                hash=prefix_hash(document.text, characters=self.prefix_characters),
            )
            for document, reason in zip(documents, reasons, strict=True)
        ]

    def _first_reason(self, document: Document) -> str | None:
        if split_of(document.id) == "validation":
            return "held_out"
        if not document.text.strip():
            return "empty"
        reasons = (check(document.text) for check in self.before_window)
        return next((reason for reason in reasons if reason), None)

    def contaminated(self, text: str) -> str | None:
        reasons = (check(text) for check in self.after_window)
        return next((reason for reason in reasons if reason), None)


class ShardBuilder:
    """Collects the documents of one shard and makes it when the last one is there.

    A shard is full at `documents` read or at `characters` of text, whichever comes first.
    """

    def __init__(
        self,
        pipeline: DocumentPipeline,
        *,
        number: int,
        documents: int,
        characters: int,
        chunk_size: int,
        pool: Executor | None,
        chunks_in_flight: int,
    ) -> None:
        self._pipeline = pipeline
        self._number = number
        self._limit = documents
        self._characters_left = characters
        self._chunk_size = chunk_size
        self._pool = pool
        self._in_flight = chunks_in_flight
        self._chunk: list[Document] = []
        self._pending: deque[Future[list[_Processed]]] = deque()
        self._done: list[_Processed] = []
        self.num_read = 0

    @property
    def is_full(self) -> bool:
        return self.num_read >= self._limit or self._characters_left <= 0

    def add(self, document: Document) -> None:
        """Take a document; its work may run on the pool. ValueError for a source without an id."""
        if document.source not in SOURCE_IDS:
            raise ValueError(
                f"document {document.id}: source {document.source!r} has no id in SOURCE_IDS"
            )
        self._chunk.append(document)
        self.num_read += 1
        self._characters_left -= len(document.text)
        if len(self._chunk) == self._chunk_size:
            self._send()

    def finish(
        self,
        *,
        before: str,
        window: DuplicateWindow | None,
        seed: int,
        stream: int,
        shuffle: bool,
        rejected: Counter[str],
    ) -> Shard:
        """The shard, its `after` still to be set. `rejected`: what the source itself left out."""
        self._send()
        while self._pending:
            self._done += self._pending.popleft().result()
        kept, left_out = self._select(window)
        if shuffle:
            order = permutation(len(kept), seed=seed, epoch=self._number, stream=stream)
            kept = [kept[index] for index in order]
        pieces = [item.tokens for item in kept if item.tokens is not None]
        starts = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=starts[1:])
        sources = [SOURCE_IDS[item.document.source] for item in kept]
        return Shard(
            number=self._number,
            tokens=np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16),
            starts=starts,
            source_ids=np.array(sources, dtype=np.int16),
            hashes=np.array([item.hash for item in kept], dtype=np.uint64),
            before=before,
            after={},
            rejected=dict(sorted((left_out + rejected).items())),
            num_read=self.num_read,
        )

    def _select(self, window: DuplicateWindow | None) -> tuple[list[_Processed], Counter[str]]:
        kept: list[_Processed] = []
        rejected: Counter[str] = Counter()
        for item in self._done:
            reason = item.reason
            if reason is None and window is not None:
                reason = window.check(item.document.text)
            if reason is None:
                reason = self._pipeline.contaminated(item.document.text)
            if reason is None:
                kept.append(item)
            else:
                rejected[reason] += 1
        return kept, rejected

    def _send(self) -> None:
        if not self._chunk:
            return
        chunk, self._chunk = self._chunk, []
        if self._pool is None:
            self._done += self._pipeline.process(chunk)
            return
        while len(self._pending) >= self._in_flight:
            self._done += self._pending.popleft().result()
        self._pending.append(self._pool.submit(self._pipeline.process, chunk))
