"""INSTANT: what training keeps of activations, while the forward stays as it is to the bit.

Two ways, chosen per block. Reversed blocks (two residual streams) keep one byte per number and
coupling and find their inputs again in backward, exactly (activation/reversible.py). Compressed
blocks keep the tensors that autograd saves as 4- or 8-bit codes (activation/slots.py). Nothing is
rounded in the forward itself: a round trip in line would keep the full tensors all the same.

`apply_instant` is the patch without which a SigmaLLM refuses to train. Sources are named in the
modules of activation/; the mechanism's name and its test of usefulness are MECHANISMS 3.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.bitlinear import BitLinear, expand_scale, ternarize
from model.blocks import Block, BlockState
from model.mla import MLA
from model.sequence import SequenceContext
from model.sigma_llm import BlockResult, RunBlock, SigmaTrunk
from model.weight_cache import is_held
from training.activation.budget import SlotCost, allocate, measure_sensitivity
from training.activation.meter import SavedMeter
from training.activation.reversible import BlockRun, SegmentRun, measure_inversion
from training.activation.slots import BlockTensors, CodingRules, SlotBook, Tally

MODES = ("auto", "reversible", "compress", "off")
START_LIMIT = 0.05
RUN_LIMIT = 3e-3
BUDGET_INTERVAL = 1024  # forwards between measurements of sensitivity
_KEPT_FORWARDS = 256


@dataclass(slots=True, kw_only=True, frozen=True)
class InstantSettings:
    """mode: auto (reverse Mamba blocks, compress attention blocks; compress all of a network with
    one residual stream), reversible, compress, off. comp_dim: rank of the low-rank coding, 0 =
    none. error_threshold: relative error above which a tensor takes 8 bits. reversible_iters:
    passes that correct an inverse; 1 may leave last bits wrong, 2 or more are exact.
    byte_budget_mb: MiB per micro-batch of the compressed blocks' tensors, 0 = by threshold."""

    mode: str = "off"
    comp_dim: int = 64
    error_threshold: float = 0.01
    reversible_iters: int = 8
    byte_budget_mb: int = 0
    seed: int = 0


class PatchedBlocks(NamedTuple):
    """How many blocks of either kind keep less than autograd would."""

    mamba: int
    mla: int


@dataclass(slots=True, kw_only=True)
class StepReport:
    """Figures of one optimizer step, its micro-batches together.

    original_bytes, stored_bytes: kept by autograd without and with INSTANT. acted: bytes were
    saved and backward used what was found or decoded. error: relative, of compressed tensors.
    bits: per number of them. passes, residual: of the inversion; residual is relative, on a sample.
    """

    original_bytes: int = 0
    stored_bytes: int = 0
    acted: bool = False
    error: float = 0.0
    bits: float = 0.0
    passes: int = 0
    residual: float = 0.0

    @property
    def bytes_saved(self) -> int:
        return self.original_bytes - self.stored_bytes

    @property
    def ratio(self) -> float:
        return self.original_bytes / self.stored_bytes if self.stored_bytes else 1.0


class InstantMemory:
    """The patch of one model: a plan per block, what was learned of tensors, a step's figures."""

    def __init__(self, model: SigmaTrunk, settings: InstantSettings) -> None:
        self.settings = settings
        self.kinds = [block.kind for block in _blocks(model)]
        self.plans = plan_blocks(self.kinds, mode=settings.mode, two_stream=model.two_stream)
        self.book = SlotBook(
            CodingRules(
                error_threshold=settings.error_threshold,
                rank=settings.comp_dim,
                budgeted=settings.byte_budget_mb > 0,
            )
        )
        self.num_forwards = 0
        self._model_tensors: Callable[[], Iterator[Tensor]] = lambda: _tensors(model)
        self._forwards: deque[_Forward] = deque(maxlen=_KEPT_FORWARDS)
        self._generators: dict[torch.device, torch.Generator] = {}
        self._seed = settings.seed

    def wrap(self, run_block: RunBlock) -> RunBlock:
        """run_block for one training forward; see model.sigma_llm.ActivationMemory."""
        if all(plan == "keep" for plan in self.plans):
            return run_block
        self._forwards.append(_Forward(self, run_block))
        self.num_forwards += 1
        return self._forwards[-1]

    def reseed(self, seed: int) -> None:
        """Start the rounding's random numbers anew, so that a step can be repeated."""
        self._seed = seed
        self._generators.clear()

    def generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def storages(self) -> set[int]:
        """Memory of parameters and buffers."""
        return {tensor.untyped_storage().data_ptr() for tensor in self._model_tensors()}

    def patched(self) -> PatchedBlocks:
        kinds = [k for k, plan in zip(self.kinds, self.plans, strict=True) if plan != "keep"]
        return PatchedBlocks(kinds.count("mamba"), kinds.count("attention"))

    def finish_step(self) -> StepReport:
        """Figures of the forwards since the last call; reads the device. Call after backward.

        Segments whose inverse was off by more than RUN_LIMIT are compressed from now on.
        """
        report, tallies = StepReport(), [f.tally for f in self._forwards]
        segments = [pair for f in self._forwards for pair in f.segments]
        self._forwards.clear()
        for tally in tallies:
            report.original_bytes += tally.original
            report.stored_bytes += tally.stored
        elements = sum(tally.elements for tally in tallies)
        if elements:
            error = sum(tally.squared_error for tally in tallies) / elements
            report.error, report.bits = error**0.5, sum(t.bits for t in tallies) / elements
        decoded = any(tally.decoded for tally in tallies)
        for layers, segment in segments:
            report.original_bytes += segment.original_bytes
            report.stored_bytes += segment.stored_bytes
            report.passes = max(report.passes, segment.passes)
            if segment.mismatch is None:
                continue
            decoded = True
            residual = float(segment.mismatch)
            report.residual = max(report.residual, residual)
            if not residual <= RUN_LIMIT:
                self._give_up(layers, residual)
        report.acted = decoded and report.bytes_saved > 0
        return report

    def _give_up(self, layers: list[int], residual: float) -> None:
        for layer in layers:
            self.plans[layer] = "compress"
        warnings.warn(
            f"blocks {layers[0]} to {layers[-1]}: the inverse is off by {residual:.1e}; they are "
            "compressed from now on instead of reversed",
            stacklevel=3,
        )

    def state_dict(self) -> dict[str, Any]:
        """What decides the coding of the next steps."""
        return {
            "plans": list(self.plans),
            "slots": self.book.state_dict(),
            "num_forwards": self.num_forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["plans"]) != len(self.plans):
            raise ValueError("the INSTANT state belongs to a network of another depth")
        self.plans = list(state["plans"])
        self.book.load_state_dict(state["slots"])
        self.num_forwards = state["num_forwards"]


def plan_blocks(kinds: list[str], *, mode: str, two_stream: bool) -> list[str]:
    """ "reverse", "compress" or "keep" for every block."""
    if mode not in MODES:
        raise ValueError(f"--instant-mode is {mode!r}; choose from {', '.join(MODES)}")
    if mode == "reversible" and not two_stream:
        raise ValueError("--instant-mode reversible needs --residual-layout two-stream")
    if mode == "auto" and two_stream:
        return ["reverse" if kind == "mamba" else "compress" for kind in kinds]
    plan = {"auto": "compress", "reversible": "reverse", "compress": "compress", "off": "keep"}
    return [plan[mode]] * len(kinds)


def apply_instant(model: SigmaTrunk, settings: InstantSettings | None = None) -> PatchedBlocks:
    """Patch the model (again): from now on it trains, keeping what `settings` say (default: off).

    The patch itself is `model.activation_memory`, an InstantMemory.
    """
    memory = InstantMemory(model, settings or InstantSettings())
    model.activation_memory = memory
    return memory.patched()


def check_inversion(model: SigmaTrunk, *, seed: int = 0, length: int = 64) -> float:
    """Relative error of the worst reversed block on random tokens; RuntimeError above START_LIMIT.

    Run once before training: it finds kernels that do not repeat themselves.
    """
    memory = model.activation_memory
    if not isinstance(memory, InstantMemory) or "reverse" not in memory.plans:
        return 0.0
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(device)
    context = SequenceContext.create(1, length, device=device)
    worst = 0.0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        streams: tuple[Tensor, ...] = (model.embed(ids),) * (2 if model.two_stream else 1)
        for layer, block in enumerate(_blocks(model)):
            if memory.plans[layer] == "reverse":
                error = measure_inversion(
                    block, streams, ids, context, max_passes=memory.settings.reversible_iters
                )
                if not error <= START_LIMIT:
                    raise RuntimeError(
                        f"block {layer} cannot be reversed: relative error {error:.3g}; use "
                        "--instant-mode compress"
                    )
                worst = max(worst, error)
            streams = block(streams, ids, context)[0]
    return worst


class _Forward:
    """run_block of one training forward: sends each block the way its plan says."""

    def __init__(self, memory: InstantMemory, run_block: RunBlock) -> None:
        self.memory, self.run_block = memory, run_block
        self.layer = 0
        self.tally = Tally()
        self.segments: list[tuple[list[int], SegmentRun]] = []
        self._owned = memory.storages()
        self._tables: tuple[int, set[int]] = (-1, set())
        self._costs: list[SlotCost] = []
        self._fixed_bytes = 0
        budget = memory.settings.byte_budget_mb
        self._measures = bool(budget) and memory.num_forwards % BUDGET_INTERVAL == 0

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
            passes = self.memory.settings.reversible_iters
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
        if self._measures:
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
            generator=self.memory.generator(streams[0].device),
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
                generator=self.memory.generator(device),
            )
        for buffer, value in buffers:
            buffer.copy_(value)
        for position, (tensor, sensitivity) in found.items():
            name = f"{layer}.{position}"
            sizes = {"elements": tensor.numel(), "element_size": tensor.element_size()}
            self._costs.append(SlotCost(name=name, sensitivity=sensitivity, **sizes))
        self._fixed_bytes += tensors.fixed_bytes
        if "compress" not in self.memory.plans[layer + 1 :]:
            budget = self.memory.settings.byte_budget_mb * 2**20 - self._fixed_bytes
            self.memory.book.assign(allocate(self._costs, budget_bytes=budget))


def _blocks(model: SigmaTrunk) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


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
    candidates = [(p, 0) for p in block.parameters() if p.dim() > 1]
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
