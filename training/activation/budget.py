"""Bits for saved tensors under a byte budget, by how much each one's rounding disturbs gradients.

The sensitivity of a slot is measured: the block's gradients are taken once from exact tensors and
once with this one tensor at 4 bits; the relative squared difference is what 4 bits cost. Variance
goes with the square of the step, so 8 bits cost (15/255)^2 of it and a little more, as their groups
are twice as long and so reach farther. All slots start at 4 bits, and the budget buys, in the order
of error removed per byte, 5, 6 and 8 bits and then the exact tensor.

Source: GACT 2206.11357 (sensitivity from gradients, bits by a greedy allocation).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from training.activation.quantize import SCALE_BITS, encode, group_size
from training.activation.slots import WIDTHS

_LADDER = (*WIDTHS, "exact")
# Squared range of 64 normal numbers over that of 32 (4.75 and 4.14 standard deviations).
_LONGER_GROUP = 1.32


@dataclass(slots=True, kw_only=True)
class SlotCost:
    """A slot that may be rounded. sensitivity: of the gradients at 4 bits, relative and squared."""

    name: str
    elements: int
    element_size: int
    sensitivity: float

    def num_bytes(self, coding: str) -> float:
        """Bytes that the tensor takes in a coding, its groups' scales included."""
        if coding == "exact":
            return float(self.elements * self.element_size)
        bits = WIDTHS[coding]
        return self.elements * (bits + SCALE_BITS / group_size(bits)) / 8.0

    def error(self, coding: str) -> float:
        """Expected relative squared error of the gradients in a coding; 0 for "exact"."""
        if coding == "exact":
            return 0.0
        bits = WIDTHS[coding]
        reach = 1.0 if group_size(bits) == group_size(4) else _LONGER_GROUP
        return self.sensitivity * reach * (15.0 / (2.0**bits - 1.0)) ** 2


def allocate(costs: Sequence[SlotCost], *, budget_bytes: float) -> dict[str, str]:
    """Coding of every slot by name; ValueError names the least budget if it is too small."""
    chosen = {cost.name: 0 for cost in costs}
    spent = sum(cost.num_bytes(_LADDER[0]) for cost in costs)
    if spent > budget_bytes:
        raise ValueError(
            f"--instant-byte-budget-mb is too small: compressed blocks keep at least "
            f"{spent / 2**20:.1f} MiB at 4 bits, {budget_bytes / 2**20:.1f} MiB are left for them"
        )
    offers = [_offer(cost, 0) for cost in costs]
    heapq.heapify(offers)
    by_name = {cost.name: cost for cost in costs}
    while offers:
        _, name, price = heapq.heappop(offers)
        if spent + price > budget_bytes:
            continue
        spent += price
        chosen[name] += 1
        if chosen[name] < len(_LADDER) - 1:
            heapq.heappush(offers, _offer(by_name[name], chosen[name]))
    return {name: _LADDER[level] for name, level in chosen.items()}


def _offer(cost: SlotCost, level: int) -> tuple[float, str, float]:
    """(minus error removed per byte, slot, bytes) of the next step up the ladder."""
    low, high = _LADDER[level], _LADDER[level + 1]
    price = cost.num_bytes(high) - cost.num_bytes(low)
    return -(cost.error(low) - cost.error(high)) / price, cost.name, price


def measure_sensitivity(
    forward: Callable[[], list[Tensor]],
    *,
    inputs: list[Tensor],
    may_round: Callable[[int, Tensor], bool],
    random: Random,
) -> dict[int, tuple[Tensor, float]]:
    """By position among the saved tensors: the tensor, and its sensitivity.

    forward: outputs of a block, from `inputs` (streams and parameters, all of which need gradients
    and are reached). may_round: which positions are asked for. Gradients of the outputs are random
    directions of unit variance per number, as far as scalars are concerned one.
    """
    saved: list[Tensor] = []
    rounded: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> int:
        saved.append(tensor.detach())
        return len(saved) - 1

    def unpack(position: int) -> Tensor:
        return rounded.get(position, saved[position])

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        outputs = forward()
    device = inputs[0].device
    generator = torch.Generator(device).manual_seed(random.getrandbits(63))
    directions = [
        torch.randn(out.shape, generator=generator, device=device).to(out.dtype)
        if out.dim()
        else torch.ones_like(out)
        for out in outputs
    ]

    def gradients() -> list[Tensor]:
        found = torch.autograd.grad(outputs, inputs, directions, retain_graph=True)
        return [grad.detach().float() for grad in found]

    exact = gradients()
    size = sum(float(grad.square().sum()) for grad in exact)
    result = {}
    for position, tensor in enumerate(saved):
        if not may_round(position, tensor):
            continue
        flat = tensor.contiguous().view(-1)
        codes = encode(flat, bits=4, seed=random.getrandbits(63))
        rounded[position] = codes.decode().view(tensor.shape)
        pairs = zip(gradients(), exact, strict=True)
        gap = sum(float((grad - true).square().sum()) for grad, true in pairs)
        rounded.clear()
        result[position] = (tensor, gap / max(size, 1e-30))
    return result
