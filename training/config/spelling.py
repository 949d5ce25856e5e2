"""The did-you-mean of unknown names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

# What a word processor makes of "--".
LONG_DASHES = "\u2013\u2014"


def closest(name: str, known: Iterable[str]) -> str:
    """`; did you mean <known>?` for the likeliest known name, or nothing."""
    names = list(known)
    wanted = _normal(name)
    exact = [item for item in names if _normal(item) == wanted]
    longer = sorted((item for item in names if _normal(item).startswith(wanted)), key=len)
    if len(wanted) < 3:
        longer = []
    similar = get_close_matches(wanted, {_normal(item): item for item in names}, n=1, cutoff=0.6)
    by_normal = {_normal(item): item for item in names}
    candidates = [*exact, *longer, *(by_normal[item] for item in similar)]
    return f"; did you mean {candidates[0]}?" if candidates else ""


def _normal(name: str) -> str:
    return name.lower().lstrip("-" + LONG_DASHES).replace("_", "-")
