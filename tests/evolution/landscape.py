"""A planted landscape in place of networks: every genome has a loss it would end at.

Training brings a network's loss nearer to its genome's floor, at a pace set by what the genome
costs. The floor grows with the distance from a hidden best genome, or, as the placebo, is drawn for
each genome alone, so that a good parent says nothing about its children.
"""

from __future__ import annotations

import hashlib
import math
import random

from evolution.fractal_nas import Cost
from evolution.genome import Genome, Letter, Mutation, forward_flops
from model.config import SigmaModelConfig
from tests.evolution.networks import make_base

START = 8.0
BASE = make_base(d_model=64, vocab_size=512)


def planted_genome(seed: int) -> Genome:
    rng = random.Random(f"planted-{seed}")
    kinds = ("mamba", "attention")
    letters = [
        Letter(kind=rng.choice(kinds), width=rng.choice((1, 2, 4)), heads=rng.choice((1, 2)))
        for _ in range(rng.choice((2, 3)))
    ]
    return Genome(scales=tuple(letters))


def distance(genome: Genome, other: Genome) -> float:
    """Scales that one of them lacks, other mixers, and doublings of every multiple."""
    total = 1.5 * abs(len(genome.scales) - len(other.scales))
    for a, b in zip(genome.scales, other.scales):
        total += a.kind != b.kind
        for name in ("width", "experts", "heads", "rank"):
            total += 0.5 * abs(math.log2(getattr(a, name) / getattr(b, name)))
    return total


class Landscape:
    """A nursery without networks. inherits: children begin with their parent's loss."""

    def __init__(self, seed: int, *, placebo: bool = False, inherits: bool = True) -> None:
        self.seed, self.placebo, self.inherits = seed, placebo, inherits
        self.best = planted_genome(seed)
        self.living: dict[int, tuple[Genome, float]] = {}

    def floor(self, genome: Genome) -> float:
        if self.placebo:
            digest = hashlib.sha256(f"{self.seed}{genome}".encode()).digest()
            return 2.0 + 3.0 * int.from_bytes(digest[:4], "big") / 2**32
        return 2.0 + 0.4 * distance(genome, self.best)

    def found(self, number: int, genome: Genome) -> None:
        self.living[number] = (genome, START)

    def grow(self, number: int, parent: int, genome: Genome, mutation: Mutation) -> None:
        assert self.living[parent][0] == genome
        loss = self.living[parent][1] if self.inherits else START
        self.living[number] = (genome.mutated(mutation), loss)

    def train(self, number: int, *, flops: float) -> tuple[float, float]:
        genome, loss = self.living[number]
        floor, pace = self.floor(genome), 2e3 * self.cost(genome).flops
        loss = floor + (loss - floor) * math.exp(-flops / pace)
        self.living[number] = (genome, loss)
        noise = random.Random(f"{self.seed}-{number}-{loss}").gauss(0.0, 0.01)
        return loss + noise, flops

    def cost(self, genome: Genome) -> Cost:
        network = genome.network(BASE)
        return Cost(flops=forward_flops(network, seq_len=64), bytes=network.n_layers)

    def forget(self, number: int) -> None:
        del self.living[number]


def base() -> SigmaModelConfig:
    return BASE
