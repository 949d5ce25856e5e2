"""One training forward under INSTANT: each block goes the way its plan says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from random import Random
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.bitlinear import BitLinear, expand_scale, ternarize
from model.blocks import Block, BlockState
from model.mla import MLA
from model.moe import MoE
from model.sequence import SequenceContext
from model.sigma_llm import BlockResult, RunBlock
from model.weight_cache import is_held
from training.activation.budget import SlotCost, allocate, measure_sensitivity
from training.activation.meter import SavedMeter
from training.activation.reversible import BlockRun, SegmentRun
from training.activation.slots import BlockTensors, SlotBook, Tally


class Memory(Protocol):
    """What a forward reads of the patch it belongs to.

    plans: "reverse", "compress" or "keep" by block. random: where the seeds of roundings come from.
    max_passes: of an inverse's correction.
    """

    plans: list[str]
    book: SlotBook
    random: Random

    @property
    def max_passes(self) -> int: ...


class InstantForward:
    """run_block of one forward.

    owned: addresses of parameters and buffers. budget_bytes: to be shared out by measured
    sensitivity; 0 = that is done.
    """

    def __init__(
        self, memory: Memory, run_block: RunBlock, *, owned: set[int], budget_bytes: int = 0
    ) -> None:
        self.memory, self.run_block = memory, run_block
        self.layer = 0
        self.tally = Tally()
        self.segments: list[tuple[list[int], SegmentRun]] = []
        self._owned = owned
        self._tables: tuple[int, set[int]] = (-1, set())
        self._costs: list[SlotCost] = []
        self._fixed_bytes = 0
        self._budget_bytes = budget_bytes

    def __call__(
        self,
        block: nn.Module,
        streams: tuple[Tensor, ...],
        input_ids: Tensor | None,
        context: SequenceContext,
        state: BlockState | None,
    ) -> BlockResult:
        layer = self.layer
        self.layer += 1
        plan = self.memory.plans[layer]
        assert isinstance(block, Block)
        if plan == "reverse":
            return self._reverse(layer, block, streams, input_ids, context)
        if plan == "keep":
            return self.run_block(block, streams, input_ids, context, state)
        return self._compress(layer, block, streams, input_ids, context)

    def _reverse(
        self,
        layer: int,
        block: Block,
        streams: tuple[Tensor, ...],
        input_ids: Tensor | None,
        context: SequenceContext,
    ) -> BlockResult:
        plans = self.memory.plans
        first = layer == 0 or plans[layer - 1] != "reverse"
        if first:
            passes = self.memory.max_passes
            self.segments.append(([], SegmentRun(max_passes=passes)))
        layers, segment = self.segments[-1]
        layers.append(layer)
        run = BlockRun(
            block=block,
            input_ids=input_ids,
            context=context,
            segment=segment,
            first=first,
            last=layer + 1 == len(plans) or plans[layer + 1] != "reverse",
            meter=SavedMeter(lambda tensor: self._is_shared(tensor, context)),
        )
        outputs, aux = run.apply(streams)
        return outputs, aux, None

    def _compress(
        self,
        layer: int,
        block: Block,
        streams: tuple[Tensor, ...],
        input_ids: Tensor | None,
        context: SequenceContext,
    ) -> BlockResult:
        if self._budget_bytes:
            self._measure(layer, block, streams, input_ids, context)
        tensors = self._block_tensors(layer, block, streams, context)
        with tensors.hooks():
            result = self.run_block(block, streams, input_ids, context, None)
        tensors.finish()
        return result

    def _block_tensors(
        self, layer: int, block: Block, streams: tuple[Tensor, ...], context: SequenceContext
    ) -> BlockTensors:
        return BlockTensors(
            self.memory.book,
            layer=layer,
            is_shared=lambda tensor: self._is_shared(tensor, context),
            weight_forms=lambda tensor: _weight_forms(block, tensor),
            stream_elements=streams[0].numel(),
            num_experts=block.ffn.config.n_routed_experts if isinstance(block.ffn, MoE) else 0,
            random=self.memory.random,
            tally=self.tally,
        )

    def _is_shared(self, tensor: Tensor, context: SequenceContext) -> bool:
        """Whether the tensor's memory belongs to the model, its held codes or this forward."""
        place = tensor.untyped_storage().data_ptr()
        if self._tables[0] != len(context.cache):
            tables = {t.untyped_storage().data_ptr() for t in _inside(context)}
            self._tables = (len(context.cache), tables)
        return place in self._owned or place in self._tables[1] or is_held(tensor)

    def _measure(
        self,
        layer: int,
        block: Block,
        streams: tuple[Tensor, ...],
        input_ids: Tensor | None,
        context: SequenceContext,
    ) -> None:
        """Add the block's slots to those that share the budget; after the last one, share it."""
        tensors = self._block_tensors(layer, block, streams, context)
        inputs = [stream.detach().requires_grad_() for stream in streams]
        trained = [p for p in block.parameters() if p.requires_grad]
        buffers = [(buffer, buffer.clone()) for buffer in block.buffers()]

        def forward() -> list[Tensor]:
            outputs, aux, _ = block(tuple(inputs), input_ids, context)
            return [*outputs, *aux.values()]

        device = streams[0].device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            found = measure_sensitivity(
                forward,
                inputs=[*inputs, *trained],
                may_round=tensors.may_round,
                random=self.memory.random,
            )
        for buffer, value in buffers:
            buffer.copy_(value)
        for position, (tensor, sensitivity) in found.items():
            name = f"{layer}.{position}"
            sizes = {"elements": tensor.numel(), "element_size": tensor.element_size()}
            self._costs.append(SlotCost(name=name, sensitivity=sensitivity, **sizes))
        self._fixed_bytes += tensors.fixed_bytes
        if "compress" not in self.memory.plans[layer + 1 :]:
            budget = self._budget_bytes - self._fixed_bytes
            self.memory.book.assign(allocate(self._costs, budget_bytes=budget))


def _inside(value: Any) -> Iterator[Tensor]:
    """All tensors in a value made of containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _inside(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _inside(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _inside(tuple(getattr(value, f.name) for f in fields(value)))


def _weight_forms(block: Block, tensor: Tensor) -> Iterator[Tensor]:
    """What a saved tensor would be equal to if it were a weight: cast, ternary, joined.

    Layers make such copies for one forward; they are of the weights' size, not of the batch's.
    """
    candidates: list[tuple[Tensor, int]] = [(p, 0) for p in block.parameters() if p.dim() > 1]
    for module in block.modules():
        if isinstance(module, BitLinear):
            candidates.append((module.weight, module.group_size))
        elif isinstance(module, MLA):
            layers = (module.q_content, module.q_rope, module.kv_down, module.k_rope_up)
            joined = torch.cat([layer.weight.detach() for layer in layers])
            candidates.append((joined, layers[0].group_size))
    for weight, group_size in candidates:
        if weight.numel() != tensor.numel() or weight.shape[-1] != tensor.shape[-1]:
            continue
        weight = weight.detach()
        codes, scale = ternarize(weight, group_size)
        for form in (weight, codes, codes * expand_scale(scale, weight.shape[-1], group_size)):
            yield form.to(tensor.dtype).view(tensor.shape)
