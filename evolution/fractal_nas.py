"""Search over fractal genomes: function-preserving children, successive halving, a Pareto front.

One generation: a cohort of candidates gets equal shares of compute, the better half goes on with
twice the share, until one is left. The cohort of the first generation are the plain genomes, new.
Every later one holds the best network so far, unchanged, and its rivals: children of parents won
in a tournament, each with one mutation. A child therefore has to beat what more training alone
would have done. Survivors join a population of limited age.

Compute is counted in floating-point operations, so a large network gets fewer steps for its share.
Nothing here reads a clock or a shared random stream: every draw follows from the seed and its
place, so a search can be stopped after any trial and goes on as if it had not been.

`inherit=False` is the control, random search: the same halving at the same compute, but every
genome is drawn from the whole space and begins anew.

Sources: Net2Net 1511.05641; successive halving, Hyperband 1603.06560; regularised evolution
1802.01548.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from evolution.genome import (
    KEEP,
    Genome,
    Mutation,
    mutations,
    plain_genomes,
    sample_genome,
)
from model.config import SigmaModelConfig

TOURNAMENT = 2
STATE_FORMAT = 1


@dataclass(slots=True, kw_only=True, frozen=True)
class Cost:
    """What a network takes: forward operations per token, bytes of its packed weights."""

    flops: int
    bytes: int


class Nursery(Protocol):
    """Where networks are made and trained; candidates are known by their numbers."""

    def found(self, number: int, genome: Genome) -> None:
        """A new network with initial weights."""
        ...

    def grow(self, number: int, parent: int, genome: Genome, mutation: Mutation) -> None:
        """A copy of a parent's network, whose genome is given, after a mutation."""
        ...

    def train(self, number: int, *, flops: float) -> tuple[float, float]:
        """Train with about so many operations; the probe loss and the operations it really took."""
        ...

    def cost(self, genome: Genome) -> Cost:
        """What a network of this genome costs; neither trains nor founds one."""
        ...

    def forget(self, number: int) -> None:
        """Give back the memory of a candidate that takes no further part."""
        ...


@dataclass(slots=True, kw_only=True, frozen=True)
class SearchSettings:
    """budget: operations of the whole search. cohort: candidates of a generation, a power of two.

    inherit: children of the population with one mutation each; otherwise random search.
    """

    budget: float
    seed: int
    generations: int = 6
    cohort: int = 8
    population: int = 4
    inherit: bool = True

    @property
    def rungs(self) -> int:
        """Trials of the candidate that wins a generation."""
        return self.cohort.bit_length()


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One network of the search. loss: on the probe, after its last trial.

    spent: operations on itself; lineage: those of its ancestors as well.
    """

    number: int
    generation: int
    genome: Genome
    mutation: Mutation
    parent: int | None = None
    loss: float = math.inf
    spent: float = 0.0
    lineage: float = 0.0
    trials: int = 0
    cost: Cost = field(default_factory=lambda: Cost(flops=0, bytes=0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them; the loss may be infinite, which JSON has no word
        for."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {
            "genome": self.genome.to_list(),
            "mutation": asdict(self.mutation),
            "cost": asdict(self.cost),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Candidate:
        """The candidate that `to_dict` wrote; TypeError where a field is missing or unknown."""
        return cls(
            **values
            | {
                "genome": Genome.from_list(values["genome"]),
                "mutation": Mutation(**values["mutation"]),
                "cost": Cost(**values["cost"]),
            }
        )


def dominates(one: Candidate, other: Candidate) -> bool:
    """Whether one is nowhere worse than the other (loss, bytes, operations), and better once."""
    ours = (one.loss, one.cost.bytes, one.cost.flops)
    theirs = (other.loss, other.cost.bytes, other.cost.flops)
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs))


def pareto_front(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that no other dominates, by bytes; of equals the first."""
    finite = [candidate for candidate in candidates if math.isfinite(candidate.loss)]
    front: dict[tuple[float, int, int], Candidate] = {}
    for candidate in finite:
        if not any(dominates(other, candidate) for other in finite):
            key = (candidate.loss, candidate.cost.bytes, candidate.cost.flops)
            front.setdefault(key, candidate)
    return sorted(front.values(), key=lambda candidate: (candidate.cost.bytes, candidate.loss))


class FractalSearch:
    """The search as a sequence of trials; `advance` makes the next one."""

    def __init__(self, settings: SearchSettings, base: SigmaModelConfig, nursery: Nursery) -> None:
        if settings.cohort < 2 or settings.cohort & (settings.cohort - 1):
            raise ValueError("the cohort of a search must be a power of two of at least 2")
        self.settings = settings
        self.archive: list[Candidate] = []
        self.generation = 0
        self.population: list[int] = []
        self.cohort: list[int] = []
        self._turn = 0  # how many of the cohort have had their trial of this rung
        self._base = base
        self._nursery = nursery

    @property
    def finished(self) -> bool:
        return self.generation >= self.settings.generations

    @property
    def rung_closed(self) -> bool:
        """Whether every candidate that is left has had its trial."""
        return self._turn == 0

    @property
    def spent(self) -> float:
        """Operations so far."""
        return sum(candidate.spent for candidate in self.archive)

    @property
    def trials(self) -> int:
        return sum(candidate.trials for candidate in self.archive)

    def best(self) -> Candidate:
        """The lowest probe loss among the networks that still exist."""
        alive = self.population or self.cohort
        return min((self.archive[number] for number in alive), key=_rank)

    def advance(self) -> Candidate:
        """One trial of one candidate, and what follows from it."""
        if not self.cohort:
            self._open_generation()
        candidate = self.archive[self.cohort[self._turn]]
        loss, flops = self._nursery.train(candidate.number, flops=self._share())
        candidate.loss = loss if math.isfinite(loss) else math.inf
        candidate.spent += flops
        candidate.lineage += flops
        candidate.trials += 1
        self._turn += 1
        if self._turn == len(self.cohort):
            self._close_rung()
        return candidate

    def _share(self) -> float:
        """Operations of one trial: every rung of every generation costs the same in sum."""
        settings = self.settings
        rung = settings.budget / (settings.generations * settings.rungs)
        return rung / len(self.cohort)

    def _open_generation(self) -> None:
        rng = random.Random(f"{self.settings.seed}-cohort-{self.generation}")
        if not self.settings.inherit:
            for _ in range(self.settings.cohort):
                self._found(sample_genome(self._base, rng))
        elif self.generation == 0:
            plain = plain_genomes(self._base)
            rng.shuffle(plain)
            for genome in plain[: self.settings.cohort]:
                self._found(genome)
            while len(self.cohort) < self.settings.cohort:
                self._found(sample_genome(self._base, rng))
        else:
            self._breed(rng)
        self._turn = 0

    def _breed(self, rng: random.Random) -> None:
        """The best as it is, and mutated children of tournament winners, no genome twice."""
        best = self.best()
        self._grow(best, Mutation(what=KEEP))
        seen = {best.genome}
        for _ in range(8 * self.settings.cohort):
            if len(self.cohort) == self.settings.cohort:
                return
            drawn = [self.archive[rng.choice(self.population)] for _ in range(TOURNAMENT)]
            parent = min(drawn, key=_rank)
            found = mutations(parent.genome, self._base)
            if not found:
                continue
            mutation = rng.choice(found)
            genome = parent.genome.mutated(mutation)
            if genome not in seen:
                seen.add(genome)
                self._grow(parent, mutation)
        while len(self.cohort) < self.settings.cohort:  # hardly anything is left to change
            self._found(sample_genome(self._base, rng))

    def _found(self, genome: Genome) -> None:
        candidate = self._enter(genome, Mutation(what=KEEP), parent=None)
        self._nursery.found(candidate.number, genome)

    def _grow(self, parent: Candidate, mutation: Mutation) -> None:
        genome = parent.genome.mutated(mutation)
        candidate = self._enter(genome, mutation, parent=parent)
        self._nursery.grow(candidate.number, parent.number, parent.genome, mutation)

    def _enter(self, genome: Genome, mutation: Mutation, *, parent: Candidate | None) -> Candidate:
        candidate = Candidate(
            number=len(self.archive),
            generation=self.generation,
            genome=genome,
            mutation=mutation,
            parent=None if parent is None else parent.number,
            lineage=0.0 if parent is None else parent.lineage,
            cost=self._nursery.cost(genome),
        )
        self.archive.append(candidate)
        self.cohort.append(candidate.number)
        return candidate

    def _close_rung(self) -> None:
        ranked = sorted(self.cohort, key=lambda number: _rank(self.archive[number]))
        self._turn = 0
        kept, left = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
        if len(ranked) > 2:
            self._forget(left)
        else:  # winner and runner-up live on: a population of winners would be one family
            self.population += left
        self.cohort = kept
        if not kept:
            self._end_generation()

    def _end_generation(self) -> None:
        """The oldest leave, but never the best."""
        self.generation += 1
        best = self.best().number
        surplus = len(self.population) - self.settings.population
        leaving = [number for number in self.population if number != best][: max(0, surplus)]
        self.population = [number for number in self.population if number not in leaving]
        self._forget(leaving)

    def _forget(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self._nursery.forget(number)

    def state_dict(self) -> dict[str, Any]:
        """All of the search but its networks, which are the nursery's to save; plain values."""
        return {
            "format": STATE_FORMAT,
            "settings": asdict(self.settings),
            "archive": [candidate.to_dict() for candidate in self.archive],
            "generation": self.generation,
            "population": list(self.population),
            "cohort": list(self.cohort),
            "turn": self._turn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a search of the same settings was; ValueError for another one's state."""
        own = {"format": STATE_FORMAT, "settings": asdict(self.settings)}
        if {name: state.get(name) for name in own} != own:
            raise ValueError(
                "the saved search had other settings (seed or budget): give the same flags, or "
                "start anew with --no-resume"
            )
        self.archive = [Candidate.from_dict(values) for values in state["archive"]]
        self.generation, self._turn = state["generation"], state["turn"]
        self.population, self.cohort = list(state["population"]), list(state["cohort"])


def _rank(candidate: Candidate) -> tuple[float, int]:
    return candidate.loss, candidate.number
