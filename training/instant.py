"""INSTANT: what training keeps of activations, while the forward stays as it is to the bit.

Two ways, chosen per block. Reversed blocks (two residual streams) keep half a byte per number and
coupling and find their inputs again in backward, exactly (activation/reversible.py). Compressed
blocks keep the tensors that autograd saves as 4- or 8-bit codes (activation/slots.py). Nothing is
rounded in the forward itself: a round trip in line would keep the full tensors all the same.

`apply_instant` is the patch without which a SigmaLLM refuses to train. Sources are named in the
modules of activation/.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.blocks import Block
from model.sequence import SequenceContext
from model.sigma_llm import RunBlock, SigmaTrunk
from training.activation.forward import InstantForward
from training.activation.reversible import measure_inversion
from training.activation.slots import CodingRules, SlotBook

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

    original_bytes, stored_bytes: kept by autograd without and with INSTANT; compressed_bytes: the
    part of stored_bytes that compressed blocks keep. acted: bytes were
    saved and backward used what was found or decoded. error: relative, of compressed tensors.
    bits: per number of them. passes, residual: of the inversion; residual is relative, on a sample.
    """

    original_bytes: int = 0
    stored_bytes: int = 0
    compressed_bytes: int = 0
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
        self._forwards: deque[InstantForward] = deque(maxlen=_KEPT_FORWARDS)
        self.random = Random(settings.seed)
        self._begun: tuple[int, dict[str, Any]] | None = None

    def wrap(self, trunk: SigmaTrunk, run_block: RunBlock) -> RunBlock:
        """run_block for one training forward of trunk; see model.sigma_llm.ActivationMemory."""
        if all(plan == "keep" for plan in self.plans):
            return run_block
        due = self.num_forwards % BUDGET_INTERVAL == 0
        budget = self.settings.byte_budget_mb * 2**20 if due else 0
        owned = {t.untyped_storage().data_ptr() for t in (*trunk.parameters(), *trunk.buffers())}
        self._forwards.append(InstantForward(self, run_block, owned=owned, budget_bytes=budget))
        self.num_forwards += 1
        return self._forwards[-1]

    def begin_step(self, step: int, *, seed: int) -> None:
        """Start a step with random numbers of its own; one that is begun again starts as before."""
        self.random = Random(seed)
        self._forwards.clear()
        if self._begun is not None and self._begun[0] == step:
            self._take_over(self._begun[1])
        else:
            self._begun = (step, self.state_dict())

    @property
    def max_passes(self) -> int:
        return self.settings.reversible_iters

    def patched(self) -> PatchedBlocks:
        """By the present plan: no blocks while it keeps everything."""
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
        report.compressed_bytes = report.stored_bytes
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
            if not math.isfinite(residual):  # the step itself was not finite
                continue
            report.residual = max(report.residual, residual)
            if residual > RUN_LIMIT:
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
            "settings": self._settings(),
            "plans": list(self.plans),
            "slots": self.book.state_dict(),
            "num_forwards": self.num_forwards,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with what was learned; under other settings that is worth nothing."""
        if state["settings"] != self._settings():
            return
        self._begun = None
        self._take_over(state)

    def _settings(self) -> dict[str, Any]:
        values = asdict(self.settings) | {"blocks": len(self.plans)}
        del values["seed"]
        return values

    def _take_over(self, state: dict[str, Any]) -> None:
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


def apply_instant(model: nn.Module, settings: InstantSettings | None = None) -> PatchedBlocks:
    """Patch a SigmaLLM (again): it trains from now on, keeping what `settings` say (default: off).

    Returns how many blocks keep less than before. `instant_memory` gives the patch itself.
    """
    if not isinstance(model, SigmaTrunk):
        raise TypeError(f"INSTANT patches a SigmaLLM, not a {type(model).__name__}")
    memory = InstantMemory(model, settings or InstantSettings())
    model.activation_memory = memory
    return memory.patched()


def instant_memory(model: nn.Module) -> InstantMemory:
    """The patch of a model; RuntimeError if it has none."""
    memory = getattr(model, "activation_memory", None)
    if not isinstance(memory, InstantMemory):
        raise RuntimeError("INSTANT was not applied to this model: call apply_instant first")
    return memory


def check_inversion(model: nn.Module, *, seed: int = 0, length: int = 64) -> float:
    """Relative error of the worst reversed block on random tokens; RuntimeError above START_LIMIT.

    Run once before training: it finds kernels that do not repeat themselves.
    """
    memory = instant_memory(model)
    if not isinstance(model, SigmaTrunk) or "reverse" not in memory.plans:
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


def _blocks(model: SigmaTrunk) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]
