"""Rows by expert: which token copies each expert multiplies, and the products over them.

Source: sorting by expert as in MegaBlocks 2211.15841.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.byte_product import times_transposed

_BLOCK_ROWS = 512


@dataclass(slots=True, kw_only=True)
class DispatchPlan:
    """Which rows each expert multiplies: token copies sorted by expert.

    token_of_row: (N,) int64 token of each row, N = tokens * top_k.
    row_of_slot: (tokens, top_k) int64, inverse of the sort.
    expert_of_row: (N,) int64, ascending.
    counts: (E,) int64 rows per expert.
    grouped: True = one grouped matrix product for all experts and no host synchronisation;
        False = one product per block of rows of an expert.
    """

    token_of_row: Tensor
    row_of_slot: Tensor
    expert_of_row: Tensor
    counts: Tensor
    grouped: bool = False

    @classmethod
    def create(cls, experts: Tensor, num_experts: int, *, grouped: bool = False) -> DispatchPlan:
        """Plan for experts (tokens, top_k) int64."""
        flat = experts.flatten()
        expert_of_row, order = flat.sort(stable=True)
        row_of_slot = torch.empty_like(order)
        row_of_slot[order] = torch.arange(order.numel(), device=order.device)
        return cls(
            token_of_row=order // experts.shape[1],
            row_of_slot=row_of_slot.view(experts.shape),
            expert_of_row=expert_of_row,
            counts=count_experts(flat, num_experts),
            grouped=grouped,
        )


def count_experts(experts: Tensor, num_experts: int) -> Tensor:
    """Occurrences (E,) int64 of each expert; unlike bincount it never synchronises a device."""
    every = torch.arange(num_experts, device=experts.device).unsqueeze(1)
    return (experts.reshape(1, -1) == every).sum(1)


class LoopProducts:
    """One product per block of at most _BLOCK_ROWS rows of one expert."""

    def __init__(self, plan: DispatchPlan | None, num_rows: int) -> None:
        self.sizes = [num_rows] if plan is None else plan.counts.tolist()

    def blocks(self) -> Iterator[tuple[slice, int]]:
        """Slices of sorted rows with the expert that multiplies each; together they cover all
        rows."""
        start = 0
        for expert, size in enumerate(self.sizes):
            for offset in range(0, size, _BLOCK_ROWS):
                stop = min(offset + _BLOCK_ROWS, size)
                yield slice(start + offset, start + stop), expert
            start += size

    def times_transposed(self, rows: Tensor, weight: Tensor, expert: int) -> Tensor:
        """rows (n, in) of one block by weight (E, out, in) transposed -> (n, out)."""
        return times_transposed(rows, weight[expert])

    def times(self, rows: Tensor, weight: Tensor, expert: int) -> Tensor:
        """rows (n, out) of one block by weight (E, out, in) -> (n, in)."""
        return rows @ weight[expert]

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, expert: int) -> None:
        """Add left^T right, (n, a) and (n, b) of one block, to total (E, a, b) in place."""
        if left.dtype == total.dtype:
            total[expert].addmm_(left.mT, right)
        else:  # 16-bit products into an fp32 sum
            total[expert].add_(left.mT @ right)

    def row_scale(self, scale: Tensor, expert: int) -> Tensor:
        """The factors of a block's rows out of scale (E, ...): here one for all, grouped one per
        row."""
        return scale[expert]


class GroupedProducts:
    """All experts in one grouped matrix product; the group ends stay on the device."""

    def __init__(self, plan: DispatchPlan, num_rows: int) -> None:
        self.num_rows = num_rows
        self.ends = plan.counts.cumsum(0).to(torch.int32)
        self.expert_of_row = plan.expert_of_row

    def blocks(self) -> Iterator[tuple[slice, int]]:
        yield slice(0, self.num_rows), 0

    def times_transposed(self, rows: Tensor, weight: Tensor, expert: int) -> Tensor:
        return F.grouped_mm(rows, weight.mT, offs=self.ends)

    def times(self, rows: Tensor, weight: Tensor, expert: int) -> Tensor:
        return F.grouped_mm(rows, weight, offs=self.ends)

    def add_outer(self, total: Tensor, left: Tensor, right: Tensor, expert: int) -> None:
        total.add_(F.grouped_mm(left.mT, right, offs=self.ends))

    def row_scale(self, scale: Tensor, expert: int) -> Tensor:
        return scale[self.expert_of_row]


def expert_products(plan: DispatchPlan | None, num_rows: int) -> LoopProducts | GroupedProducts:
    """The products of a plan, of one and the same face; without a plan all rows are expert 0's."""
    if plan is not None and plan.grouped:
        return GroupedProducts(plan, num_rows)
    return LoopProducts(plan, num_rows)


def take_rows(values: Tensor, rows: slice | Tensor) -> Tensor:
    """Rows of values (N, ...): a view for a slice, a copy for an index (faster than values[i])."""
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def slot_of_row(plan: DispatchPlan) -> Tensor:
    """Flat slot (N,) int64 that each sorted row came from: token * top_k + place among its
    experts."""
    slots = torch.empty_like(plan.token_of_row)
    slots[plan.row_of_slot.flatten()] = torch.arange(slots.numel(), device=slots.device)
    return slots
