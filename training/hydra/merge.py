"""One adapter from several: TIES and DARE-TIES on the products B A, and back to factors.

Factors cannot be merged one by one: the mean of the Bs times the mean of the As is not the mean of
the products. Of each matrix, over the domains d with weights w_d:

    TIES       trim every product to its largest entries by magnitude; elect per entry the sign of
               sum_d w_d P_d; take the weighted mean of those entries that have it
    DARE-TIES  before that, drop entries at random and divide the rest by the share kept; no trim

An entry that was trimmed or dropped is no vote for zero: it does not enter the mean. The result has
more than rank r; its truncated singular value decomposition is the nearest of rank r.

Sources: TIES 2306.01708; DARE 2311.03099.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

METHODS = ("ties", "dare_ties")
LEAST_WEIGHT, LARGEST_WEIGHT = 0.05, 0.80


@dataclass(slots=True, kw_only=True, frozen=True)
class MergeSettings:
    """density: share of each product's entries that is kept, exactly or in expectation."""

    method: str = "ties"
    density: float = 1.0


@dataclass(slots=True, kw_only=True)
class Merged:
    """products: (out, in) by layer. conflicts: share of the entries that any domain kept on which
    two domains disagree in sign."""

    products: dict[str, Tensor]
    conflicts: float


def domain_weights(deltas: Mapping[str, float]) -> dict[str, float]:
    """In proportion to what each domain gained, within [0.05, 0.80]; equal where none gained.

    They need not add up to one: the merge takes weighted means.
    """
    gains = {name: max(0.0, delta) for name, delta in deltas.items()}
    total = sum(gains.values())
    shares = {
        name: gain / total if total > 0.0 else 1.0 / len(gains) for name, gain in gains.items()
    }
    return {name: min(LARGEST_WEIGHT, max(LEAST_WEIGHT, share)) for name, share in shares.items()}


def merge_products(
    domains: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    settings: MergeSettings,
    *,
    generator: torch.Generator,
) -> Merged:
    """Merge the products of all domains layer by layer; computed in fp64 on the CPU.

    `generator` (CPU) decides what DARE drops; TIES draws nothing from it.
    """
    if settings.method not in METHODS:
        raise ValueError(f"--merge-method is {settings.method!r}; choose ties or dare_ties")
    products, conflicting, kept = {}, 0, 0
    factors = torch.tensor(list(weights), dtype=torch.float64)
    for name in domains[0]:
        stack = torch.stack([domain[name].detach().double().cpu() for domain in domains])
        if settings.method == "dare_ties":
            stack = drop_and_rescale(stack, density=settings.density, generator=generator)
        else:
            stack = torch.stack([trim(matrix, density=settings.density) for matrix in stack])
        conflict = (stack > 0.0).any(0) & (stack < 0.0).any(0)
        conflicting += int(conflict.sum())
        kept += int((stack != 0.0).any(0).sum())
        products[name] = elect_and_mean(stack, factors)
    return Merged(products=products, conflicts=conflicting / kept if kept else 0.0)


def trim(matrix: Tensor, *, density: float) -> Tensor:
    """The ceil(density * n) entries of largest magnitude, the others 0; equals go by position."""
    count = max(1, math.ceil(density * matrix.numel()))
    order = matrix.flatten().abs().sort(descending=True, stable=True).indices
    mask = torch.zeros(matrix.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return torch.where(mask.view(matrix.shape), matrix, 0.0)


def drop_and_rescale(stack: Tensor, *, density: float, generator: torch.Generator) -> Tensor:
    """Keep each entry with probability `density`, divided by it: the same in expectation."""
    keep = torch.rand(stack.shape, generator=generator, dtype=torch.float64) < density
    return torch.where(keep, stack / density, 0.0)


def elect_and_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """Per entry of stack (D, out, in): weighted mean of the values with the elected sign.

    A sum of exactly 0 elects +.
    """
    shares = weights.view(-1, 1, 1)
    sign = torch.where((shares * stack).sum(0) >= 0.0, 1.0, -1.0)
    agreeing = stack * sign > 0.0
    total = (shares * agreeing).sum(0)
    mean = (shares * stack * agreeing).sum(0) / total.clamp_min(torch.finfo(stack.dtype).tiny)
    return torch.where(total > 0.0, mean, 0.0)


def factorise(product: Tensor, *, rank: int, scale: float) -> tuple[Tensor, Tensor, float]:
    """down (r, in), up (out, r) with up @ down * scale nearest to the product, and how near.

    The last value is the share of the squared norm that `rank` singular values hold, 1 for a
    product of 0.
    """
    left, values, right = torch.linalg.svd(product, full_matrices=False)
    roots = values[:rank].sqrt()
    up = left[:, :rank] * roots
    down = roots.unsqueeze(1) * right[:rank] / scale
    total = float(values.square().sum())
    return down, up, float(values[:rank].square().sum()) / total if total else 1.0
