"""What a corpus is: documents with a source and a split that never moves.

A document belongs to validation when a hash of its name says so. The rule reads nothing else, so a
document stays on its side when others are added, removed, reordered or cleaned differently.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Split = Literal["train", "validation"]
JSON = Any  # what json.dumps takes: plain dicts, lists, strings, numbers, booleans, None

ASSETS_DIRECTORY = Path(__file__).resolve().parent.parent.parent / "assets"
VALIDATION_PERCENT = 4
SOURCE_IDS = {
    "unknown": 0,
    "fineweb": 1,
    "cosmopedia": 2,
    "commoncrawl": 3,
    "synthetic": 4,
    "python-docs": 5,
    "postgresql-docs": 6,
    "sqlite-docs": 7,
    "king-james-bible": 8,
    "local": 9,
    "pdf": 10,
    "hf": 11,
}
_SPLIT_SALT = b"sigma-validation-1\0"


@dataclass(slots=True, kw_only=True, frozen=True)
class Document:
    """One page, chapter or file: `id` is unique and stable, `source` is a key of SOURCE_IDS."""

    id: str
    source: str
    text: str


class DocumentCorpus(Protocol):
    """Documents in a fixed order. `fingerprint` changes whenever any document does."""

    @property
    def fingerprint(self) -> str: ...

    def documents(self) -> Iterator[Document]: ...


class SourceError(RuntimeError):
    """A source cannot give its next document now.

    `reason` is a short word that is counted (`timeout`, `http_503`, `bad_gzip`). `transient`:
    trying again later may help. A permanent one carries the line that the user reads.
    """

    def __init__(self, message: str, *, reason: str, transient: bool) -> None:
        super().__init__(message)
        self.reason = reason
        self.transient = transient


class SourceExhausted(Exception):
    """The source has no further document in this epoch; `rewind` begins the next one."""


class DocumentSource(Protocol):
    """A deterministic sequence of documents with a position.

    Given identity and state, the same documents follow, whatever the timing and however often a
    read had to be repeated. A source knows nothing of tokenizers, threads or mixtures, and yields
    documents of both sides of the split.

    name: a key of SOURCE_IDS.
    rejected: documents or records left out so far, by reason.
    """

    name: str
    rejected: Counter[str]

    def identity(self) -> dict[str, JSON]:
        """What a saved position belongs to: file list, dataset and revision, crawls."""
        ...

    def next_document(self) -> Document:
        """The next document; blocks at most its own read time-out.

        Raises SourceError or SourceExhausted, never anything else for bad material.
        """
        ...

    def state_dict(self) -> dict[str, JSON]:
        """The position after the last returned document, as a small plain value."""
        ...

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to a saved position without replaying the documents before it."""
        ...

    def rewind(self, *, epoch: int) -> None:
        """Begin epoch `epoch` (0-based) at its first document."""
        ...

    def close(self) -> None:
        """Release files and connections; called once."""
        ...


def hash_of(document_id: str) -> int:
    """A 64-bit number that depends on the document's name alone."""
    digest = hashlib.blake2b(_SPLIT_SALT + document_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def in_scoring_order(documents: Iterable[Document]) -> list[Document]:
    """Documents spread so that every stretch holds each source in proportion, to within a document.

    An evaluation that stops early then still sees all sources. Within a source the order is that of
    the hash.
    """
    by_source: dict[str, list[Document]] = {}
    for document in sorted(documents, key=lambda document: (hash_of(document.id), document.id)):
        by_source.setdefault(document.source, []).append(document)
    placed: list[tuple[float, str, Document]] = []
    for source, members in by_source.items():
        total = sum(len(document.text) for document in members)
        before = 0
        for document in members:
            placed.append(((before + len(document.text) / 2) / max(1, total), source, document))
            before += len(document.text)
    placed.sort(key=lambda entry: entry[:2])
    return [document for _, _, document in placed]


def split_of(document_id: str) -> Split:
    """The side of the split a document is on, for ever."""
    return "validation" if hash_of(document_id) % 100 < VALIDATION_PERCENT else "train"
