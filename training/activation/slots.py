"""The saved tensors of compressed blocks: what each is, in how many bits it is kept, what it costs.

A block saves its tensors in the same order in every forward, so (layer, position) names one, its
slot, and what was learned about it holds for the next step. Every PROBE_INTERVAL calls a slot is
probed: is it a form of a weight (then it is left alone), small integers (then int8 without loss),
or does the cheapest coding stay below the error threshold? 8 bits, once needed, are kept until the
next probe. Left alone as well are tensors much smaller than the residual stream (one number per
head: steps and decays, by some of which backward divides) and those with one number a row (norms):
cheap to keep, with an error of a whole row's gradient (at 4 bits the scan's norms, one number in
200, made 0.86 of the squared error of all tensors). So are the router's: the gradient of a maximum
looks for the entries that are equal to it, and rounded ones never are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from training.activation.meter import SavedMeter
from training.activation.quantize import (
    Packed,
    as_integers,
    encode,
    encode_low_rank,
    find_basis,
    relative_error,
)

PROBE_INTERVAL = 32
MIN_ELEMENTS = 4096
STREAM_SHARE = 8  # tensors up to this part of the residual stream stay as they are
# Codings from the cheapest on; "exact" keeps the tensor.
CODINGS = ("int4", "low_rank", "int8")
WIDTHS = {"int4": 4, "int5": 5, "int6": 6, "int8": 8}  # those between for byte budgets


@dataclass(slots=True, kw_only=True)
class Slot:
    """One saved tensor of one block.

    coding: "weight", "exact", "integers", or one of CODINGS; None before the first probe.
    calls: since the last probe. error: relative, at the last probe. assigned: coding that a byte
    budget has given, which probes then leave alone. basis: (D, r) of "low_rank". kind: dtype and
    number of dimensions of the tensor; another one is another tensor, of which nothing is known.
    """

    coding: str | None = None
    calls: int = 0
    error: float = 0.0
    elements: int = 0
    assigned: str | None = None
    basis: Tensor | None = None
    kind: str = ""

    def state_dict(self) -> dict[str, Any]:
        """The fields by name; `basis` is the tensor itself."""
        names = ("coding", "calls", "error", "elements", "assigned", "basis", "kind")
        return {name: getattr(self, name) for name in names}


class Kept(NamedTuple):
    """What stands in the graph for a saved tensor: `packed`, and the view it was of the numbers."""

    packed: Packed
    shape: torch.Size
    stride: tuple[int, ...]


@dataclass(slots=True, kw_only=True)
class Tally:
    """Bytes of one forward: what autograd would have kept, and what is kept instead."""

    original: int = 0
    stored: int = 0
    decoded: int = 0  # tensors that backward has decoded
    squared_error: float = 0.0
    bits: float = 0.0
    elements: int = 0


@dataclass(slots=True, kw_only=True)
class CodingRules:
    """error_threshold: largest relative error of a coding below 8 bits; rank: of "low_rank".
    budgeted: a byte budget decides instead; 4 bits until it has."""

    error_threshold: float = 0.01
    rank: int = 64
    budgeted: bool = False


@dataclass(slots=True)
class SlotBook:
    """All slots of a model, by "layer.position"."""

    rules: CodingRules
    slots: dict[str, Slot] = field(default_factory=dict)

    def get(self, layer: int, position: int) -> Slot:
        """The slot of a block's `position`-th saved tensor, made on the first call."""
        return self.slots.setdefault(f"{layer}.{position}", Slot())

    def assign(self, codings: dict[str, str]) -> None:
        """Take over a budget's decision; the next call of each slot probes it."""
        for name, coding in codings.items():
            slot = self.slots.setdefault(name, Slot())
            slot.assigned, slot.coding = coding, None

    def state_dict(self) -> dict[str, Any]:
        return {name: slot.state_dict() for name, slot in self.slots.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace all slots; those that a block got from `get` before are no longer of this
        book."""
        self.slots = {name: Slot(**values) for name, values in state.items()}


class BlockTensors:
    """Saved-tensor hooks of one block in one forward.

    is_shared: tensors whose memory exists anyway. weight_forms: gives, for a tensor of a weight's
    shape, the tensors it might be, for "weight". stream_elements: numbers of a residual stream.
    num_experts: width of the router's tensors, 0 = no router. random: gives seeds of roundings.
    """

    def __init__(
        self,
        book: SlotBook,
        *,
        layer: int,
        is_shared: Callable[[Tensor], bool],
        weight_forms: Callable[[Tensor], Iterator[Tensor]],
        stream_elements: int,
        num_experts: int,
        random: Random,
        tally: Tally,
    ) -> None:
        self.book, self.layer, self.tally = book, layer, tally
        self.position = 0
        self._is_shared = is_shared
        self._weight_forms = weight_forms
        self._least = max(MIN_ELEMENTS, stream_elements // STREAM_SHARE + 1)
        self._num_experts = num_experts
        self._random = random
        self._meter, self._stored = SavedMeter(is_shared), SavedMeter(is_shared)
        self._kept: dict[tuple[Any, ...], tuple[StorageWeakRef, Kept | Tensor]] = {}
        self._asked: set[tuple[Any, ...]] = set()
        self.fixed_bytes = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context for the block's forward: autograd packs what it saves and unpacks it in
        backward."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> Kept | Tensor:
        position = self.position
        self.position += 1
        tensor = tensor.detach()  # an output that its own node kept would never be freed
        if self._is_shared(tensor):
            return tensor
        slot = self.book.get(self.layer, position)
        key = _view_key(tensor)
        known = self._kept.get(key)
        if known is not None and not known[0].expired():
            return known[1]
        kept = self._encode(slot, tensor)
        if slot.coding != "weight":
            before = self._meter.num_bytes
            self._meter.count(tensor)
            self.tally.original += self._meter.num_bytes - before
        self._kept[key] = (StorageWeakRef(tensor.untyped_storage()), kept)
        return kept

    def may_round(self, position: int, tensor: Tensor) -> bool:
        """Whether a budget decides about this tensor; `fixed_bytes` sums up what it does not."""
        key = _view_key(tensor)
        if self._is_shared(tensor) or key in self._asked:
            return False
        self._asked.add(key)
        large = self._is_large(tensor)
        if large and self._is_weight(tensor):
            return False
        finite = large and bool(tensor.isfinite().all())
        if finite and as_integers(_flat(tensor)[0]) is None:
            return True
        self.fixed_bytes += tensor.numel() * (1 if finite else tensor.element_size())
        return False

    def _is_large(self, tensor: Tensor) -> bool:
        """Whether rounding the tensor is worth it, and backward only multiplies with it."""
        if not tensor.is_floating_point() or tensor.numel() < self._least:
            return False
        return tensor.shape[-1] not in (1, self._num_experts)

    def _is_weight(self, tensor: Tensor) -> bool:
        return any(torch.equal(tensor, form) for form in self._weight_forms(tensor))

    def finish(self) -> None:
        """Call after the block's forward: what the graph needs it holds itself."""
        self._kept.clear()

    def _encode(self, slot: Slot, tensor: Tensor) -> Kept | Tensor:
        if not self._is_large(tensor):
            slot.coding = "exact"
            return self._compact(tensor)
        values, stride = _flat(tensor)
        kind = f"{tensor.dtype} {tensor.dim()}"
        if slot.kind != kind:
            slot.coding, slot.kind = None, kind
        due = slot.coding is None or slot.calls >= PROBE_INTERVAL
        packed: Packed | None = None
        if due:
            slot.calls = 0
            packed = self._probe(slot, tensor, values)
        slot.calls += 1
        slot.elements = values.numel()
        if packed is None and slot.coding not in ("weight", "exact"):
            packed = self._code(slot, values, tensor.shape[-1])
        if packed is None:
            return tensor if slot.coding == "weight" else self._compact(tensor)
        self.tally.stored += packed.num_bytes
        self.tally.bits += 8.0 * packed.num_bytes
        self.tally.elements += values.numel()
        self.tally.squared_error += slot.error**2 * values.numel()
        return Kept(packed, tensor.shape, stride)

    def _probe(self, slot: Slot, tensor: Tensor, values: Tensor) -> Packed | None:
        """Settle the slot's coding; what the chosen one made of the values."""
        slot.error = 0.0
        if self._is_weight(tensor):
            slot.coding = "weight"
            return None
        if not bool(values.isfinite().all()):  # a mask of infinities has no range
            slot.coding = "exact"
            return None
        integers = as_integers(values)
        if integers is not None:
            slot.coding = "integers"
            return integers
        if self.book.rules.budgeted:
            slot.coding = slot.assigned or "int4"
            return self._measured(slot, values, tensor.shape[-1])
        packed = None
        for slot.coding in CODINGS:
            if slot.coding == "low_rank" and not self._fits_low_rank(values, tensor.shape[-1]):
                continue
            packed = self._measured(slot, values, tensor.shape[-1])
            if slot.error <= self.book.rules.error_threshold:
                break
        if slot.coding != "low_rank":
            slot.basis = None
        return packed

    def _measured(self, slot: Slot, values: Tensor, width: int) -> Packed | None:
        if slot.coding == "exact":
            return None
        if slot.coding == "low_rank":
            slot.basis = find_basis(
                values.view(-1, width), rank=self.book.rules.rank, seed=self._seed()
            )
        packed = self._code(slot, values, width)
        slot.error = relative_error(packed, values)
        return packed

    def _fits_low_rank(self, values: Tensor, width: int) -> bool:
        """Whether basis and 4-bit codes together are smaller than 8-bit codes."""
        rank = self.book.rules.rank
        return 0 < rank <= width // 5 and not values.numel() % width

    def _code(self, slot: Slot, values: Tensor, width: int) -> Packed:
        """values in the slot's coding; one that no longer fits them is settled anew."""
        if slot.coding == "integers":
            integers = as_integers(values)
            if integers is not None:
                return integers
            slot.coding, slot.calls = "int8", PROBE_INTERVAL
        if slot.coding == "low_rank" and slot.basis is not None:
            if not values.numel() % width and len(slot.basis) == width:
                slot.basis = slot.basis.to(values.device)  # a checkpoint brings it to the host
                return encode_low_rank(values, basis=slot.basis, bits=4, seed=self._seed())
            slot.coding, slot.calls = "int8", PROBE_INTERVAL
        bits = WIDTHS.get(slot.coding or "", 8)
        packed = encode(values, bits=bits, seed=self._seed())
        if bits == 4 and slot.calls and not self.book.rules.budgeted:
            slot.error = relative_error(packed, values)
            if slot.error > self.book.rules.error_threshold:
                slot.coding = "int8"
                return encode(values, bits=8, seed=self._seed())
        return packed

    def _seed(self) -> int:
        return self._random.getrandbits(63)

    def _compact(self, tensor: Tensor) -> Tensor:
        """The tensor, without the rest of a much larger storage that it would keep alive."""
        if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes:
            tensor = tensor.clone()
        before = self._stored.num_bytes
        self._stored.count(tensor)
        self.tally.stored += self._stored.num_bytes - before
        return tensor

    def _unpack(self, kept: Kept | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self.tally.decoded += 1
        return kept.packed.decode().as_strided(kept.shape, kept.stride)


def _view_key(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for equal views of the same numbers, as long as their storage lives."""
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.shape, tensor.stride(), tensor.dtype, tensor._version)


def _flat(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor's numbers as one contiguous row, and the strides that lay them out again.

    A tensor that fills a stretch of memory (transposed or expanded included) is taken in memory
    order, each number once; any other is made contiguous.
    """
    sizes = [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]
    span = 1 + sum((n - 1) * s for n, s in sizes)
    distinct = math.prod(n for n, s in sizes if s)
    if span == distinct:
        return tensor.as_strided((span,), (1,)), tensor.stride()
    tensor = tensor.contiguous()
    return tensor.view(-1), tensor.stride()
