"""Whether an adapter is better or worse than its best version, asked again and again.

Both versions answer the same items. Only items on which they differ say anything; if neither
version is better, each of those is a fair coin (McNemar 1947, exact, two-sided). The n-th look at
one best version is allowed an error of alpha * 6 / (pi n)^2, which adds up to alpha over all looks,
however much one look depends on the one before: the items are always the same and the adapter
changes little, so a test that takes looks for independent would be wrong here. A new best version
begins a new sequence of looks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from evolution.e_process import spent_alpha


class Decision(Enum):
    """PROMOTE and ROLL_BACK need significance; KEEP goes on with the present version as it is."""

    KEEP = "keep"
    PROMOTE = "promote"
    ROLL_BACK = "roll back"


@dataclass(slots=True, kw_only=True, frozen=True)
class GateSettings:
    """threshold: fall of the pass rate below which nothing is undone. alpha: error of all looks at
    one best version, promotions and rollbacks together."""

    threshold: float = 0.01
    alpha: float = 0.05


@dataclass(slots=True, kw_only=True, frozen=True)
class Look:
    """score: pass rate of the present version. drop: that of the best one minus it."""

    decision: Decision
    score: float
    drop: float
    p_value: float


def exact_p(heads: int, tails: int) -> float:
    """Chance that heads + tails throws of a fair coin are at least as uneven."""
    count, more = heads + tails, max(heads, tails)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(more, count + 1)) / 2**count)


class PairedGate:
    """The looks at one best version; `num_looks` is its whole state."""

    def __init__(self, settings: GateSettings) -> None:
        self.settings = settings
        self.num_looks = 0

    def look(self, current: Sequence[bool], best: Sequence[bool]) -> Look:
        """Compare what both versions passed, item by item; a promotion begins a new sequence."""
        self.num_looks += 1
        alpha = spent_alpha(self.settings.alpha, self.num_looks)
        found = compare(current, best)
        decision = Decision.KEEP
        if found.p_value <= alpha and found.drop > self.settings.threshold:
            decision = Decision.ROLL_BACK
        elif found.p_value <= alpha and found.drop < 0.0:
            decision, self.num_looks = Decision.PROMOTE, 0
        return Look(decision=decision, score=found.score, drop=found.drop, p_value=found.p_value)


def compare(current: Sequence[bool], best: Sequence[bool]) -> Look:
    """One comparison by itself, which decides nothing. ValueError without items."""
    if not current:
        raise ValueError("the paired gate needs items")
    pairs = list(zip(current, best, strict=True))
    gained = sum(one and not other for one, other in pairs)
    lost = sum(other and not one for one, other in pairs)
    return Look(
        decision=Decision.KEEP,
        score=sum(current) / len(pairs),
        drop=(lost - gained) / len(pairs),
        p_value=exact_p(gained, lost),
    )
