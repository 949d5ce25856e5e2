"""Clients, plans of faults, and what a source gives under them."""

from __future__ import annotations

import random
from typing import Any

from tests.fakeworld.server import Plan, Seen
from training.sources.base import Document, DocumentSource, SourceError, SourceExhausted
from training.sources.connection import allow_hosts
from training.sources.net import HttpClient

MAX_PASSING_ERRORS = 200


def make_client(**settings: Any) -> HttpClient:
    """A client that may ask 127.0.0.1 alone, does not pause, and is soon out of patience."""
    defaults: dict[str, Any] = {
        "read_timeout_s": 0.1,
        "allow": allow_hosts("127.0.0.1"),
        "retries": 4,  # two are used up on purpose, the rest is for a busy machine
        "sleep": lambda seconds: None,
        "min_bytes_per_s": 1 << 20,
    }
    return HttpClient(**{**defaults, **settings})


def drain(source: DocumentSource) -> tuple[list[Document], list[SourceError]]:
    """All documents of an epoch, asking again after every passing error."""
    documents: list[Document] = []
    errors: list[SourceError] = []
    while len(errors) < MAX_PASSING_ERRORS:
        try:
            documents.append(source.next_document())
        except SourceExhausted:
            break
        except SourceError as error:
            errors.append(error)
            if not error.transient:
                break
    return documents, errors


def random_faults(kind: str, *, seed: int, share: float = 0.3, most: int = 1000) -> Plan:
    """A share of the requests fails, the same one at most twice in a row and `most` in all."""
    generator = random.Random(f"{kind} {seed}")
    in_a_row: dict[tuple[str, str | None], int] = {}
    left = most

    def plan(seen: Seen) -> str | None:
        nonlocal left
        place = (seen.path, seen.range)
        if left > 0 and in_a_row.get(place, 0) < 2 and generator.random() < share:
            in_a_row[place] = in_a_row.get(place, 0) + 1
            left -= 1
            return kind
        in_a_row[place] = 0
        return None

    return plan


def first_requests(kind: str, *, count: int, path: str | None = None) -> Plan:
    """The first requests, of one path or of all, fail."""
    left = count

    def plan(seen: Seen) -> str | None:
        nonlocal left
        if left > 0 and path in (None, seen.path):
            left -= 1
            return kind
        return None

    return plan
