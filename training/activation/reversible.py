"""Two-stream blocks that keep half a byte per number instead of their activations, exactly.

A two-stream block is a chain of couplings `y = x + f(other)`, so x = y - f(other) follows from the
block's outputs in backward. Rounding loses the last bits of x, and here last bits decide: ternary
layers round activations to int8 and routers pick experts, so a difference in the last place becomes
a different code or expert, and grows from block to block. Therefore the forward keeps
bits(x) - bits(fl(y - f)), a count of units in the last place that mostly fits 4 bits, and lists of
those where it takes a byte or more (x far smaller than y). Backward then sees the very inputs of
the forward, in every dtype, and its gradients are the ones it would have had.

Every branch is an autograd node of its own: it is recomputed alone, its gradient taken, and freed,
with its weights' gradients, before the next. So the peak is one branch, where checkpointing holds a
whole block besides all blocks' inputs. Parameters are inputs of the node, so `torch.autograd.grad`
works as for any other.

Sources: RevNet 1707.04585, Reformer 2001.04451; bits kept for exactness as in Maclaurin et al.
1502.03492 and BDIA 2407.09093.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from model.blocks import Block, BlockState
from model.sequence import SequenceContext
from training.activation.meter import SavedMeter

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SAMPLES = 1024


class Correction(NamedTuple):
    """What x differs from fl(y - f) by, in units of the last place.

    near: differences from -7 to 7 as 1 to 15, two in a byte, 0 where one is beyond; far: those, in
    order, as int8; index, large: the numbers beyond that too and their differences, None where a
    second pass was not allowed.
    """

    near: Tensor
    far: Tensor
    index: Tensor | None
    large: Tensor | None

    @property
    def passes(self) -> int:
        return 1 if self.index is None or not self.index.numel() else 2


def correct(x: Tensor, y: Tensor, branch: Tensor, *, max_passes: int) -> Correction:
    """What `invert` needs to find x again from y = x + branch; all (B, T, D)."""
    guess = _bits((y - branch).to(x.dtype))
    gap = (_bits(x) - guess).view(-1)  # wraps, as the addition that undoes it does
    index = large = None
    if max_passes < 2:
        small = gap.clamp_(-127, 127).to(torch.int8)
    else:
        small = gap.to(torch.int8)
        index = (small != gap).nonzero().squeeze(1)
        large = gap[index]
        index = index.int() if x.numel() < 2**31 else index
    is_far = (small < -7) | (small > 7)
    codes = (small + 8).masked_fill_(is_far, 0).view(torch.uint8)
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return Correction(codes[0::2] | (codes[1::2] << 4), small[is_far], index, large)


def invert(y: Tensor, branch: Tensor, correction: Correction, *, dtype: torch.dtype) -> Tensor:
    """x of y = x + branch, in its dtype."""
    guess = _bits((y - branch).to(dtype)).view(-1)
    codes = torch.stack((correction.near & 15, correction.near >> 4), dim=-1).view(-1)
    codes = codes[: guess.numel()].view(torch.int8)
    is_far = codes == 0
    found = guess + (codes - 8)
    found[is_far] = guess[is_far] + correction.far
    if correction.index is not None and correction.large is not None:
        index = correction.index.long()
        found[index] = guess[index] + correction.large
    return found.view(dtype).view(y.shape)


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().view(_BITS[values.element_size()])


@dataclass(slots=True, kw_only=True)
class SegmentRun:
    """One forward through consecutive reversed blocks, shared by their autograd nodes.

    outputs: both streams as the coupling after the one in backward has found its inputs.
    mismatch: relative difference between the first block's inputs and what inversion found for
        them, on a sample of numbers; set by backward.
    """

    max_passes: int
    outputs: tuple[Tensor, Tensor] | None = None
    sample: Tensor | None = None
    mismatch: Tensor | None = None
    passes: int = 0
    original_bytes: int = 0
    stored_bytes: int = 0

    def take_sample(self, streams: tuple[Tensor, Tensor]) -> None:
        self.sample = _sample(streams)
        self.stored_bytes += self.sample.nbytes

    def compare(self, streams: tuple[Tensor, Tensor]) -> None:
        """Set `mismatch` from the inputs (both streams) that inversion found; `take_sample` comes
        first."""
        assert self.sample is not None
        gap = (_sample(streams) - self.sample).norm()
        self.mismatch = gap / self.sample.norm().clamp_min(1e-30)


def _sample(streams: tuple[Tensor, Tensor]) -> Tensor:
    parts = []
    for stream in streams:
        flat = stream.detach().reshape(-1)
        parts.append(flat[:: max(1, flat.numel() // _SAMPLES)].float())
    return torch.cat(parts)


class _Coupling(NamedTuple):
    """One `streams[target] += branch(streams[1 - target])` of a block, and its parameters."""

    target: int
    branch: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]
    parameters: list[nn.Parameter]


@dataclass(slots=True, kw_only=True)
class BlockRun:
    """One reversed block in one forward."""

    block: Block
    input_ids: Tensor | None
    context: SequenceContext
    segment: SegmentRun
    first: bool
    last: bool
    rng: list[dict[str, Any] | None] = field(default_factory=list)
    precision: dict[str, Any] = field(default_factory=dict)
    variables: contextvars.Context = field(default_factory=contextvars.copy_context)
    meter: SavedMeter | None = None

    def couplings(self) -> list[_Coupling]:
        """In the order of `Block.forward`."""
        block, context, nothing = self.block, self.context, BlockState()
        result = []
        if block.engram is not None:
            memory = block.engram

            def recall(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                return block.recall(x, self.input_ids, context, state=nothing)[0], {}

            result.append(_Coupling(1, recall, _trained(memory)))

        def mix(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return block.mix(x, context, state=nothing)[0], {}

        def feed(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return block.feed(x, context)

        result.append(_Coupling(0, mix, _trained(block.mixer_norm, block.mixer)))
        result.append(_Coupling(1, feed, _trained(block.ffn_norm, block.ffn)))
        return result

    def apply(self, streams: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The block's outputs and auxiliary losses, differentiable."""
        pair, aux = list(streams), {}
        couplings = self.couplings()
        for place, coupling in enumerate(couplings):
            step = CouplingRun(
                block=self,
                coupling=coupling,
                place=place,
                first=self.first and place == 0,
                last=self.last and place == len(couplings) - 1,
            )
            pair[coupling.target], *losses = _Reversed.apply(step, *pair, *coupling.parameters)
            aux |= zip(step.aux_names, losses, strict=True)
        return (pair[0], pair[1]), aux


@dataclass(slots=True, kw_only=True)
class CouplingRun:
    """One coupling of a reversed block in one forward.

    first, last: of its segment. versions: of its parameters in forward.
    """

    block: BlockRun
    coupling: _Coupling
    place: int
    first: bool
    last: bool
    aux_names: list[str] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


def _trained(*modules: nn.Module) -> list[nn.Parameter]:
    return [p for module in modules for p in module.parameters() if p.requires_grad]


class _Reversed(torch.autograd.Function):
    """(coupling, stream 0, stream 1, its parameters) -> the changed stream and auxiliary losses.

    Forward builds no graph; backward undoes the coupling.
    """

    @staticmethod
    def forward(ctx: Any, step: CouplingRun, first: Tensor, second: Tensor, *_: Tensor) -> Any:
        run, (target, compute, parameters) = step.block, step.coupling
        segment, streams, device = run.segment, [first, second], first.device
        step.versions = [p._version for p in parameters]
        run.precision = _autocast_state(device.type)
        if step.first:
            segment.take_sample((first, second))
        with torch.autocast(**{**run.precision, "cache_enabled": False}):
            before = _rng_state(device)
            branch, losses = compute(streams[1 - target])
            drew = not _same_rng(before, _rng_state(device))
            run.rng.append(before if drew else None)
            x = streams[target]
            y = streams[target] = x + branch
            correction = correct(x, y, branch, max_passes=segment.max_passes)
        segment.passes = max(segment.passes, correction.passes)
        saved = [*correction, *(streams if step.last else ())]
        segment.stored_bytes += sum(t.nbytes for t in saved if t is not None)
        ctx.save_for_backward(*saved)
        ctx.step, ctx.dtype = step, x.dtype
        step.aux_names = list(losses)
        return (y, *losses.values())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step: CouplingRun = ctx.step
        run, (target, compute, parameters) = step.block, step.coupling
        if [p._version for p in parameters] != step.versions:
            raise RuntimeError(
                "a weight of a reversed block was changed between forward and backward"
            )
        saved = ctx.saved_tensors
        streams = list(saved[4:] if step.last else _take(run.segment))
        source = streams[1 - target].detach().requires_grad_()
        with _as_in_forward(run, step.place, source.device):
            branch, losses = run.variables.run(compute, source)
        streams[target] = invert(
            streams[target], branch.detach(), Correction(*saved[:4]), dtype=ctx.dtype
        )
        given = [grads[0].to(branch.dtype), *grads[1:]]
        edges = [get_gradient_edge(value) for value in (branch, *losses.values())]
        del branch, losses  # the branch's values have done their part; its gradient may take long
        found = torch.autograd.grad(edges, [source, *parameters], given)
        run.segment.outputs = None if step.first else (streams[0], streams[1])
        if step.first:
            run.segment.compare((streams[0], streams[1]))
        if step.place == 0 and run.meter is not None:
            run.segment.original_bytes += run.meter.num_bytes
        pair = (grads[0], found[0]) if target == 0 else (found[0], grads[0])
        return (None, *pair, *found[1:])


def _take(segment: SegmentRun) -> tuple[Tensor, Tensor]:
    outputs, segment.outputs = segment.outputs, None
    if outputs is None:
        raise RuntimeError("a reversed block's backward ran without that of the block after it")
    return outputs


@contextmanager
def _as_in_forward(run: BlockRun, place: int, device: torch.device) -> Iterator[None]:
    """Gradients on, precision and random numbers as they were when the branch first ran."""
    now = None
    if run.rng[place] is not None:
        now = _rng_state(device)
        _set_rng(run.rng[place], device)
    try:
        with torch.enable_grad(), torch.autocast(**{**run.precision, "cache_enabled": False}):
            if run.meter is None:
                yield
            else:
                with run.meter:
                    yield
    finally:
        if now is not None:
            _set_rng(now, device)


def _autocast_state(device_type: str) -> dict[str, Any]:
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
    }


def _rng_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng(state: dict[str, Any] | None, device: torch.device) -> None:
    if state is None:
        return
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _same_rng(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def measure_inversion(
    block: Block,
    streams: tuple[Tensor, ...],
    input_ids: Tensor | None,
    context: SequenceContext,
    *,
    max_passes: int,
) -> float:
    """Largest ||found - x|| / ||x|| over the block's couplings, every branch computed twice."""
    segment = SegmentRun(max_passes=max_passes)
    run = BlockRun(
        block=block, input_ids=input_ids, context=context, segment=segment, first=True, last=True
    )
    states, worst = list(streams), 0.0
    device = states[0].device
    for coupling in run.couplings():
        before = _rng_state(device)
        source, x = states[1 - coupling.target], states[coupling.target]
        branch = coupling.branch(source)[0]
        y = x + branch
        correction = correct(x, y, branch, max_passes=max_passes)
        after = _rng_state(device)
        _set_rng(before, device)
        found = invert(y, coupling.branch(source)[0], correction, dtype=x.dtype)
        _set_rng(after, device)
        worst = max(worst, float((found - x).float().norm() / x.float().norm().clamp_min(1e-30)))
        states[coupling.target] = y
    return worst
