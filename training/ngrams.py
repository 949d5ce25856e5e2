"""Hashes of word 13-grams: what it means that two texts share a passage.

A text is the sequence of its lower-cased words; two texts overlap when thirteen words in a row are
the same, whatever the punctuation (the length used by Brown et al. 2020, section C). Every 13-gram
becomes one 64-bit number, so that a list of forbidden passages can be kept without their text, and
membership is a search in a sorted array: about 2 million words a second and core.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

import numpy as np

NGRAM_WORDS = 13
_WORD = re.compile(r"[^\W_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no word's place is lost modulo 2**64


def words_of(text: str) -> list[str]:
    """Lower-cased runs of letters and digits."""
    return _WORD.findall(text.lower())


def ngram_hashes(text: str) -> np.ndarray:
    """Hash of each 13-gram of a text in order: uint64 (words - 12,), empty for shorter texts."""
    words = words_of(text)
    count = len(words) - NGRAM_WORDS + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    known = {word: _word_hash(word) for word in set(words)}
    hashed = np.fromiter((known[word] for word in words), dtype=np.uint64, count=len(words))
    total = np.zeros(count, dtype=np.uint64)
    factor = 1
    for offset in range(NGRAM_WORDS):
        total += hashed[offset : offset + count] * np.uint64(factor)
        factor = factor * _MULTIPLIER % 2**64
    return total


def index_of(texts: Iterable[str]) -> np.ndarray:
    """All different 13-gram hashes of some texts, sorted: uint64 (n,)."""
    parts = [ngram_hashes(text) for text in texts]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


def count_overlaps(text: str, index: np.ndarray) -> int:
    """How many 13-grams of a text stand in a sorted index."""
    hashes = ngram_hashes(text)
    if not len(hashes) or not len(index):
        return 0
    places = np.searchsorted(index, hashes)
    places[places == len(index)] = 0
    return int((index[places] == hashes).sum())


def _word_hash(word: str) -> int:
    # A word may hold half a surrogate pair, which strict UTF-8 refuses.
    content = word.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
