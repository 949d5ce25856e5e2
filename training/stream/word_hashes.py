"""Hashes of the words of a text and of the runs of words in it, a whole text at a time.

Words are runs of letters and digits in lower case, so that punctuation, mark-up and line breaks do
not hide a copy. A word's hash is a polynomial over its bytes modulo 2^64, taken for all words at
once from one cumulative sum (Karp and Rabin 1987), then mixed (splitmix64, Steele et al. 2014). The
values are the same on every machine and in every process: saved hashes stay true.
"""

import re
from functools import lru_cache

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_STEP = 0xD1B54A32D192ED03
_INVERSE = pow(_BASE, -1, 1 << 64)
_LEAST_POWERS = 1 << 14
_NO_WORD = re.compile(r"[\W_]+")


def normalize(text: str) -> str:
    """Lower case, with every run of other characters than letters and digits as one space."""
    return _NO_WORD.sub(" ", text.lower()).strip()


def hash_words(normalized: str) -> np.ndarray:
    """One uint64 a word of a text from `normalize`, (W,)."""
    data = np.frombuffer(normalized.encode("utf-8", "replace"), dtype=np.uint8)
    if not data.size:
        return np.zeros(0, dtype=np.uint64)
    spaces = np.flatnonzero(data == 0x20)
    starts = np.concatenate(([0], spaces + 1))
    ends = np.concatenate((spaces, [data.size]))
    powers, inverses = _powers(max(_LEAST_POWERS, 1 << int(data.size).bit_length()))
    sums = np.zeros(data.size + 1, dtype=np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[: data.size], out=sums[1:])
    values = (sums[ends] - sums[starts]) * inverses[starts]
    return mix(values + (ends - starts).astype(np.uint64))


def hash_runs(words: np.ndarray, *, size: int) -> np.ndarray:
    """One uint64 for each run of `size` words in a row, (W - size + 1,) or empty."""
    count = len(words) - size + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        total *= np.uint64(_STEP)
        total += words[place : place + count]
    return mix(total)


def mix(values: np.ndarray) -> np.ndarray:
    """A bijection of uint64 under which close values lie far apart."""
    values = values + np.uint64(_BASE)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse modulo 2^64. Sizes are powers of two, so few."""
    steps = np.full((2, size), [[_BASE], [_INVERSE]], dtype=np.uint64)
    steps[:, 0] = 1
    powers = np.cumprod(steps, axis=1, dtype=np.uint64)
    return powers[0], powers[1]
