"""What a corpus is: documents with a source and a split that never moves.

A document belongs to validation when a hash of its name says so. The rule reads nothing else, so a
document stays on its side when others are added, removed, reordered or cleaned differently.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Split = Literal["train", "validation"]

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
