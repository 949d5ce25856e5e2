"""Which source speaks next: a pure function of (seed, draw number, weights).

A draw gives its source a turn of so many tokens. A source hands over whole documents and pays with
its credit: what a long document takes more than its turn is owed, and later turns are skipped until
it is paid. So the shares are shares of tokens, whatever the length of a source's documents, and the
state is a counter and one small number per source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

STRATEGIES = ("weighted", "round_robin", "sequential")
_MASK = (1 << 64) - 1


def uniform(seed: int, counter: int, *, stream: int) -> float:
    """A number in [0, 1) that depends on the arguments alone (splitmix64, Steele et al. 2014)."""
    mixed = 0
    for value in (seed, counter, stream):
        mixed = _splitmix64(mixed ^ (value & _MASK))
    return (mixed >> 11) * 2.0**-53


def _splitmix64(state: int) -> int:
    mixed = (state + 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


@dataclass(slots=True, kw_only=True)
class Mixture:
    """weights: by source, in the order of the fallback; a weight of 0 = only as a fallback.
    ids: what stands for each source in `Batch.source_ids`, where it is not the document's own.
    base: the weights asked for."""

    seed: int
    turn_tokens: int
    weights: dict[str, float]
    strategy: str = "weighted"
    counter: int = 0
    credits: dict[str, int] = field(default_factory=dict)
    ids: dict[str, int] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = dict(self.weights)

    def reweigh(self, factors: dict[int, float]) -> None:
        """Multiply the weights that were asked for by the factor of its id (1 if none)."""
        self.weights = {
            key: weight * factors.get(self.ids.get(key, 0), 1.0)
            for key, weight in self.base.items()
        }

    def draw(self, candidates: Sequence[str], *, available: Sequence[str]) -> tuple[str, str]:
        """The source whose turn it is, and the one that takes it.

        `candidates` are all sources that are not used up; the second differs from the first when
        the first is not in `available`: then the draw is repeated among those (by weight), or the
        next one in order is taken. Both lists keep the order of the weights.
        """
        counter = self.counter
        self.counter += 1
        chosen = self._choose(candidates, counter, stream=0)
        if chosen in available:
            return chosen, chosen
        return chosen, self._choose(available, counter, stream=1)

    def has_turn(self, key: str) -> bool:
        """Whether the source still has tokens to its credit; a debt of earlier turns counts."""
        return self.credits.get(key, 0) > 0

    def grant(self, key: str) -> None:
        """Credit a drawn source with one turn."""
        self.credits[key] = self.credits.get(key, 0) + self.turn_tokens

    def pay(self, key: str, tokens: int) -> None:
        """Charge a document's tokens, also beyond the credit."""
        self.credits[key] = self.credits.get(key, 0) - tokens

    def _choose(self, keys: Sequence[str], counter: int, *, stream: int) -> str:
        if self.strategy == "sequential":
            return keys[0]
        if self.strategy == "round_robin":
            return keys[counter % len(keys)]
        weights = [self.weights[key] for key in keys]
        total = sum(weights)
        if total <= 0.0:
            return keys[0]
        place = uniform(self.seed, counter, stream=stream) * total
        for key, weight in zip(keys, weights, strict=True):
            place -= weight
            if place < 0.0:
                return key
        return next(key for key in reversed(keys) if self.weights[key] > 0.0)
