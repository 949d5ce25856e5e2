"""One block of SigmaLLM: optional n-gram memory, a sequence mixer and a feed-forward network.

Two residual layouts. Standard is pre-norm: every branch adds to one stream. Two-stream keeps two
streams x1, x2, each updated by a function of the other alone, so that a block's inputs follow from
its outputs by subtraction and need not be kept for backward:

    x2 <- x2 + Engram(x1);  y1 = x1 + Mixer(norm(x2));  y2 = x2 + FFN(norm(y1))

Source: reversible residual networks 1707.04585, Reformer 2001.04451.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import SigmaModelConfig
from model.engram import Engram, EngramState
from model.mamba import Mamba
from model.mla import MLA
from model.moe import DenseFeedForward, MoE
from model.norm_rope import RMSNorm
from model.sequence import SequenceContext


@dataclass(slots=True)
class BlockState:
    """What one block keeps of a row to continue it: its mixer's and its memory's state."""

    mixer: Any = None
    engram: EngramState | None = None

    def reorder(self, index: Tensor) -> BlockState:
        """Rows picked by index (B',) int64."""
        return BlockState(
            None if self.mixer is None else self.mixer.reorder(index),
            None if self.engram is None else self.engram.reorder(index),
        )


class Block(nn.Module):
    """Norm, mixer, norm, feed-forward. `kind` is "mamba" or "attention"."""

    def __init__(self, config: SigmaModelConfig, *, layer: int, seed: int = 0) -> None:
        super().__init__()
        self.kind = config.layer_kinds()[layer]
        config = config.at_layer(layer)
        self.dropout = config.dropout
        self.two_stream = config.residual_layout == "two-stream"
        self.engram: Engram | None = None
        if config.engram_enabled and layer in config.engram_layers:
            self.engram = Engram(config, layer=layer)
        self.mixer_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mixer = Mamba(config) if self.kind == "mamba" else MLA(config)
        self.ffn_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn: DenseFeedForward | MoE
        if config.n_routed_experts:
            self.ffn = MoE(config, layer=layer, seed=seed)
        else:
            self.ffn = DenseFeedForward(config, width=config.d_ff)

    def forward(
        self,
        streams: tuple[Tensor, ...],
        input_ids: Tensor | None,
        context: SequenceContext,
        *,
        state: BlockState | None = None,
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor], BlockState | None]:
        """One (standard) or two (two-stream) streams (B, T, D) -> the same, aux losses, state."""
        state = state or BlockState()
        read, write = (streams[-1], streams[0]) if self.two_stream else (streams[0], streams[0])
        memory_state = None
        if self.engram is not None:
            memory, memory_state = self.recall(write, input_ids, context, state=state)
            read = read + memory
            write = write if self.two_stream else read
        mixed, mixer_state = self.mix(read, context, state=state)
        write = write + mixed
        fed, aux = self.feed(write, context)
        streams = (write, read + fed) if self.two_stream else (write + fed,)
        new_state = BlockState(mixer_state, memory_state) if context.use_cache else None
        return streams, aux, new_state

    def recall(
        self, x: Tensor, input_ids: Tensor | None, context: SequenceContext, *, state: BlockState
    ) -> tuple[Tensor, EngramState | None]:
        """What the n-gram memory adds to the stream that the mixer reads, and its new state."""
        if input_ids is None:
            raise ValueError("an Engram model needs input_ids; inputs_embeds is not enough")
        assert self.engram is not None
        memory, new_state = self.engram(x, input_ids, context, state=state.engram)
        return self._drop(memory), new_state

    def mix(self, x: Tensor, context: SequenceContext, *, state: BlockState) -> tuple[Tensor, Any]:
        """What the mixer, reading x (B, T, D), adds to a stream, and its new state."""
        mixed, new_state = self.mixer(self.mixer_norm(x), context, state=state.mixer)
        return self._drop(mixed), new_state

    def feed(self, x: Tensor, context: SequenceContext) -> tuple[Tensor, dict[str, Tensor]]:
        """What the feed-forward network, reading x (B, T, D), adds to a stream; aux losses."""
        fed, aux = self.ffn(self.ffn_norm(x), context)
        return self._drop(fed), aux

    def _drop(self, branch: Tensor) -> Tensor:
        return F.dropout(branch, self.dropout, self.training) if self.dropout else branch
