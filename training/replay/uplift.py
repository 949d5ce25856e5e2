"""What an injection does to the probe loss, by cluster, from randomised coins.

Of every coin the propensity p and a baseline m of the outcome are fixed before it falls, so

    psi = (Z - p) / (p (1 - p)) * (Y - m)

has the mean E[Y | heads] - E[Y | tails] whatever m is: the falling loss of a run, which both sides
share, is in Y and not in the mean of psi. m takes most of it out of the variance. (Augmented
inverse propensity weighting, Robins et al. 1994, with one outcome model for both sides.) What is
known of a cluster is the mean of its psi with weights that decay by beta from one to the next, as
what helps early need not help late.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

REACH = 1.96  # standard errors, of a 95 % interval
LEAST_WINDOWS = 12  # before an interval is believed: it takes the variance for known


@dataclass(slots=True)
class ClusterUplift:
    """Posterior of one cluster's uplift: normal, by the decayed sums of psi."""

    count: int = 0
    weight: float = 0.0
    squared_weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def observe(self, psi: float, *, beta: float) -> None:
        """Add one psi; those before it count `beta` times as much as they did."""
        self.count += 1
        self.weight = beta * self.weight + 1.0
        self.squared_weight = beta * beta * self.squared_weight + 1.0
        self.total = beta * self.total + psi
        self.squares = beta * self.squares + psi * psi

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight else 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite until it can be told."""
        if self.count < 2:
            return math.inf
        effective = self.weight * self.weight / self.squared_weight
        if effective <= 1.0:
            return math.inf
        spread = max(0.0, self.squares / self.weight - self.mean**2)
        return math.sqrt(spread / (effective - 1.0))

    @property
    def is_trusted(self) -> bool:
        """Whether the 95 % interval leaves out 0."""
        return self.count >= LEAST_WINDOWS and abs(self.mean) > REACH * self.error


class UpliftEstimator:
    """The clusters' posteriors, and the running baseline of the outcome."""

    def __init__(self, *, beta: float) -> None:
        self.beta = beta
        self.clusters: dict[str, ClusterUplift] = {}
        self._outcomes = 0.0
        self._weight = 0.0

    @property
    def baseline(self) -> float:
        """Decayed mean of the outcomes so far, 0 before the first."""
        return self._outcomes / self._weight if self._weight else 0.0

    def observe(
        self, cluster: str, outcome: float, *, heads: bool, propensity: float, baseline: float
    ) -> None:
        """A window is over. baseline: as it was when the coin was flipped."""
        lean = (heads - propensity) / (propensity * (1.0 - propensity))
        own = self.clusters.setdefault(cluster, ClusterUplift())
        own.observe(lean * (outcome - baseline), beta=self.beta)
        self._outcomes = self.beta * self._outcomes + outcome
        self._weight = self.beta * self._weight + 1.0

    def sample(
        self, clusters: Iterable[str], *, seed: int, shuffled: bool = False
    ) -> dict[str, float]:
        """A draw from every cluster's posterior; 0 where the interval holds 0 or nothing is known.

        shuffled: the placebo; the draws are dealt out among the clusters anew.
        """
        names = sorted(set(clusters))
        drawn = []
        for name in names:
            own = self.clusters.get(name)
            gauss = random.Random(f"{seed} {name}").gauss(0.0, 1.0)
            drawn.append(own.mean + own.error * gauss if own and own.is_trusted else 0.0)
        if shuffled:
            random.Random(f"{seed} shuffled").shuffle(drawn)
        return dict(zip(names, drawn, strict=True))

    @property
    def scale(self) -> float:
        """Root mean square of the trusted means, 1 without any: what counts as a large uplift."""
        trusted = [own.mean**2 for own in self.clusters.values() if own.is_trusted]
        return math.sqrt(math.fsum(trusted) / len(trusted)) if trusted else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "clusters": {
                name: [own.count, own.weight, own.squared_weight, own.total, own.squares]
                for name, own in self.clusters.items()
            },
            "outcomes": [self._outcomes, self._weight],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.clusters = {name: ClusterUplift(*values) for name, values in state["clusters"].items()}
        self._outcomes, self._weight = state["outcomes"]
