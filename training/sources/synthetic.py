"""Tasks with their answers, made as they are asked for: arithmetic, strings, lists, number series.

For tests and for looking at what a network can learn when the rule behind a text is known; never
read unless `--synthetic-data` asks for it, and counted under a source id of its own. A document is
a pure function of seed, epoch and number, so that a position is two integers. Numbers come from
BLAKE2b rather than from `random`, whose methods may give others in another version of Python.
"""

import hashlib
from collections import Counter
from collections.abc import Callable

from training.sources.base import JSON, Document, SourceExhausted

DOCUMENTS_PER_EPOCH = 1 << 20
TASKS_PER_DOCUMENT = (6, 20)
_WORDS = (
    "apple basket candle desert engine flower garden hammer island jacket kettle ladder marble"
    " needle orange pencil quarry rabbit silver tunnel umbrella velvet window yellow zebra"
).split()
_STATE_FORMAT = 1


class Draw:
    """Numbers that depend on a key alone, the same ones on every machine and version."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        self._count = 0

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included; uneven by less than 1 in 2^40."""
        self._count += 1
        content = self._key + self._count.to_bytes(8, "little")
        value = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
        return low + value % (high - low + 1)

    def number(self) -> int:
        """A number of one to four digits, each length as often."""
        return self.between(0, 10 ** self.between(1, 4) - 1)

    def word(self) -> str:
        """One of the fixed list of English words."""
        return _WORDS[self.between(0, len(_WORDS) - 1)]


def _sum(draw: Draw) -> str:
    terms = [draw.number() for _ in range(draw.between(2, 4))]
    return f"{' + '.join(map(str, terms))} = {sum(terms)}"


def _difference(draw: Draw) -> str:
    first, second = draw.number(), draw.number()
    return f"{first} - {second} = {first - second}"


def _product(draw: Draw) -> str:
    first, second = draw.number(), draw.between(2, 99)
    return f"{first} * {second} = {first * second}"


def _division(draw: Draw) -> str:
    first, second = draw.number(), draw.between(2, 99)
    return f"{first} divided by {second} is {first // second}, remainder {first % second}"


def _comparison(draw: Draw) -> str:
    first, second = draw.number(), draw.number()
    relation = "equal to" if first == second else "less than" if first < second else "more than"
    return f"{first} is {relation} {second}"


def _reversal(draw: Draw) -> str:
    word = draw.word()
    return f"{word} reversed is {word[::-1]}"


def _count(draw: Draw) -> str:
    word = draw.word()
    letter = word[draw.between(0, len(word) - 1)]
    return f"number of letters {letter} in {word}: {word.count(letter)}"


def _sorting(draw: Draw) -> str:
    numbers = [draw.between(0, 99) for _ in range(draw.between(3, 7))]
    return f"sorted: {' '.join(map(str, numbers))} -> {' '.join(map(str, sorted(numbers)))}"


def _alphabet(draw: Draw) -> str:
    words = [draw.word() for _ in range(draw.between(3, 5))]
    return f"in alphabetical order: {' '.join(words)} -> {' '.join(sorted(words))}"


def _series(draw: Draw) -> str:
    start, step = draw.between(0, 99), draw.between(2, 12)
    shown = [start + step * place for place in range(5)]
    return f"the series {', '.join(map(str, shown))} goes on with {start + step * 5}"


TASKS: dict[str, Callable[[Draw], str]] = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "division": _division,
    "comparison": _comparison,
    "reversal": _reversal,
    "count": _count,
    "sorting": _sorting,
    "alphabet": _alphabet,
    "series": _series,
}


class SyntheticSource:
    """A DocumentSource of tasks; every epoch has other ones."""

    name = "synthetic"

    def __init__(self, *, seed: int, documents_per_epoch: int = DOCUMENTS_PER_EPOCH) -> None:
        self.rejected: Counter[str] = Counter()
        self._seed = seed
        self._size = documents_per_epoch
        self._epoch = self._index = 0

    def identity(self) -> dict[str, JSON]:
        return {"kind": "synthetic", "format": _STATE_FORMAT, "seed": self._seed}

    def next_document(self) -> Document:
        if self._index >= self._size:
            raise SourceExhausted(f"epoch {self._epoch} of {self.name}")
        key = f"{self._seed}/{self._epoch}/{self._index}"
        self._index += 1
        draw = Draw(key)
        kinds = list(TASKS.values())
        lines = [
            kinds[draw.between(0, len(kinds) - 1)](draw)
            for _ in range(draw.between(*TASKS_PER_DOCUMENT))
        ]
        return Document(id=f"synthetic/{key}", source=self.name, text="\n".join(lines) + "\n")

    def state_dict(self) -> dict[str, JSON]:
        return {"epoch": self._epoch, "index": self._index}

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        self._epoch, self._index = state["epoch"], state["index"]

    def rewind(self, *, epoch: int) -> None:
        self._epoch, self._index = epoch, 0

    def close(self) -> None:
        """It holds nothing."""
