"""SigmaLLM: a causal language model of Mamba and latent-attention blocks with experts.

Embedding in high precision, blocks (model/blocks.py), a final norm, and a head that by default is
the embedding itself. The trunk is a class of its own because transformers wants trunk and head
apart (model/hf.py); here the head is added to it, so parameter names have no prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.bitlinear import BitLinear
from model.blocks import Block, BlockState
from model.config import SigmaModelConfig
from model.cross_entropy import linear_cross_entropy
from model.decode import TokenStep, token_step
from model.engram import Engram
from model.initialization import initialize
from model.mamba import Mamba
from model.mla import MLA
from model.moe import DenseFeedForward, Experts, MoE
from model.norm_rope import RMSNorm
from model.sequence import SequenceContext
from model.ternary_statistics import TernaryStatistics, ternary_parameters
from model.weight_cache import TernaryCache


@dataclass(slots=True)
class SigmaState:
    """Everything needed to continue rows: one state per block and the tokens seen so far."""

    blocks: list[BlockState]
    num_tokens: int = 0

    def reorder(self, index: Tensor) -> SigmaState:
        """Rows picked by index (B',) int64, for beam search."""
        return SigmaState([block.reorder(index) for block in self.blocks], self.num_tokens)


@dataclass(slots=True)
class SigmaOutput:
    """hidden (B, T, D) after the final norm; logits (B, T', V) fp32, loss in mean nats, or None.

    aux: weighted auxiliary losses to add to the loss in training; state: continues the rows.
    """

    hidden: Tensor
    logits: Tensor | None = None
    loss: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)
    state: SigmaState | None = None


BlockResult = tuple[tuple[Tensor, ...], dict[str, Tensor], BlockState | None]
RunBlock = Callable[
    [nn.Module, tuple[Tensor, ...], Tensor | None, SequenceContext, BlockState | None], BlockResult
]


class ActivationMemory(Protocol):
    """Decides what training keeps of the blocks for backward; their values are not its business."""

    def wrap(self, trunk: SigmaTrunk, run_block: RunBlock) -> RunBlock:
        """run_block for one training forward of trunk, called for its blocks in order."""
        ...


class SigmaTrunk(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: SigmaModelConfig, *, seed: int = 0) -> None:
        super().__init__()
        config.validate()
        self.config = config
        self.two_stream = config.residual_layout == "two-stream"
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, layer=layer, seed=seed) for layer in range(config.n_layers)
        )
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.gradient_checkpointing = False  # True: recompute blocks in backward
        self.activation_memory: ActivationMemory | None = None  # see training/instant.py

    def initial_state(self, batch_size: int) -> SigmaState:
        """State of rows that have not started."""
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        return SigmaState([BlockState() for _ in self.blocks])

    def run(
        self,
        input_ids: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        reset_mask: Tensor | None = None,
        valid_mask: Tensor | None = None,
        state: SigmaState | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], SigmaState | None]:
        """Hidden values (B, T, D) after the final norm, aux losses and the new state.

        input_ids (B, T) int64, or inputs_embeds (B, T, D) in their place; masks (B, T) bool as in
        SequenceContext. With a state the tokens continue its rows.
        """
        if inputs_embeds is None:
            if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] == 0:
                raise ValueError("input_ids must be a (batch, length) tensor with length >= 1")
            x: Tensor = self.embed(input_ids)
        else:
            x = inputs_embeds
        batch, length = x.shape[:2]
        start = 0 if state is None else state.num_tokens
        if state is not None and length == 1 and reset_mask is None and valid_mask is None:
            step = token_step(self.blocks, x, state.blocks)
            if step is not None:
                return self._run_step(step, x, input_ids, state)
        context = SequenceContext.create(
            batch,
            length,
            device=x.device,
            start=start,
            reset_mask=reset_mask,
            valid_mask=valid_mask,
            use_cache=use_cache or state is not None,
        )
        x = F.dropout(x, self.config.dropout, self.training)
        streams: tuple[Tensor, ...] = (x, x) if self.two_stream else (x,)
        aux: dict[str, Tensor] = {}
        block_states: list[BlockState] = []
        run_block: RunBlock = self._run_block
        differentiates = self.training and torch.is_grad_enabled() and not context.use_cache
        if self.activation_memory is not None and differentiates:
            run_block = self.activation_memory.wrap(self, run_block)
        for layer, block in enumerate(self.blocks):
            before = None if state is None else state.blocks[layer]
            streams, losses, after = run_block(block, streams, input_ids, context, before)
            for name, value in losses.items():
                aux[name] = aux[name] + value if name in aux else value
            if after is not None:
                block_states.append(after)
        new_state = SigmaState(block_states, start + length) if context.use_cache else None
        return self._finished(streams), aux, new_state

    def _finished(self, streams: tuple[Tensor, ...]) -> Tensor:
        x = (streams[0] + streams[-1]) / 2 if self.two_stream else streams[0]
        return self.final_norm(x)

    def _run_step(
        self, step: TokenStep, x: Tensor, input_ids: Tensor | None, state: SigmaState
    ) -> tuple[Tensor, dict[str, Tensor], SigmaState]:
        """`run` for one more token x (B, 1, D) per row."""
        streams, blocks = step(x[:, 0], input_ids, state.blocks, position=state.num_tokens)
        hidden = self._finished(streams).unsqueeze(1)
        return hidden, {}, SigmaState(blocks, state.num_tokens + 1)

    def _run_block(
        self,
        block: nn.Module,
        streams: tuple[Tensor, ...],
        input_ids: Tensor | None,
        context: SequenceContext,
        state: BlockState | None,
    ) -> BlockResult:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, streams, input_ids, context, state=state, use_reentrant=False)
        return block(streams, input_ids, context, state=state)

    def after_optimizer_step(self) -> None:
        """Move the routers' balance; call once per optimizer step, after it."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.apply_balance_update()

    def discard_step(self) -> None:
        """Forget the routing statistics of a step whose update is not applied."""
        for module in self.modules():
            if isinstance(module, MoE):
                module.reset_statistics()

    def differential_attention_acted(self) -> Tensor:
        """0-d bool, unread: whether every differential layer subtracted and got lambda gradient.

        For use between backward and zero_grad.
        """
        active = [m.differential_active() for m in self.modules() if isinstance(m, MLA)]
        return torch.stack(active).all() if active else torch.zeros((), dtype=torch.bool)


class SigmaLLM(SigmaTrunk):
    """Trunk plus head. `seed` fixes every initial weight and the routers' noise.

    Construction leaves torch's global random state as it found it.
    """

    def __init__(self, config: SigmaModelConfig, *, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # modules may draw what initialize does not overwrite
            super().__init__(config, seed=seed)
            self.lm_head: nn.Linear | None = None
            if not config.tie_embeddings:
                self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize(self, config, seed=seed)
        self.kernel_backend = "torch"
        self.ternary_statistics = TernaryStatistics()
        self.cache_counts = [0, 0]  # a list: what a step leaves behind, not a part of its path

    @property
    def head_weight(self) -> Tensor:
        """(V, D) weight of the output layer."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        *,
        reset_mask: Tensor | None = None,
        valid_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: SigmaState | None = None,
        use_cache: bool = False,
        num_logits_to_keep: int = 0,
    ) -> SigmaOutput:
        """input_ids (B, T) int64 -> SigmaOutput.

        labels (B, T) are already shifted (labels[t] is the target of input t, -100 ignored) and
        give `loss`. Logits are formed without labels, or for the last `num_logits_to_keep`
        positions when that is positive; 0 means all of them. A training forward with gradients
        is a RuntimeError until it is settled what backward keeps (INSTANT, in any mode).
        """
        if self.activation_memory is None and self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "a training forward needs the INSTANT patch: call training.instant.apply_instant "
                "(model) first (mode off changes nothing), or model.eval()"
            )
        hidden, aux, new_state = self.run(
            input_ids,
            reset_mask=reset_mask,
            valid_mask=valid_mask,
            state=state,
            use_cache=use_cache,
        )
        loss = logits = None
        if labels is not None:
            rows = hidden.flatten(0, 1)
            loss = linear_cross_entropy(
                rows, self.head_weight, labels.flatten(), backend=self.kernel_backend
            )
        if labels is None or num_logits_to_keep > 0:
            kept = hidden[:, -num_logits_to_keep:]
            logits = F.linear(kept, self.head_weight).float()
        return SigmaOutput(hidden=hidden, logits=logits, loss=loss, aux=aux, state=new_state)

    def num_parameters(self) -> dict[str, int]:
        """Counts: "total", "active" per token, and "embedding" (input table and untied head).

        Active leaves out the routed experts that a token does not use and the memory rows it does
        not read; the embedding counts whole.
        """
        total = sum(p.numel() for p in self.parameters())
        idle = 0
        for module in self.modules():
            if isinstance(module, MoE):
                weights = module.experts.gate_up.numel() + module.experts.down.numel()
                number = module.config.n_routed_experts
                idle += weights // number * (number - module.config.moe_top_k)
            elif isinstance(module, Engram):
                idle += module.num_idle_parameters
        embedding = self.embed.weight.numel()
        if self.lm_head is not None:
            embedding += self.lm_head.weight.numel()
        return {"total": total, "active": total - idle, "embedding": embedding}

    def ternary_weights(self) -> dict[str, tuple[Tensor, int]]:
        """Latent weight and group size of every ternary matrix, experts included, by name."""
        weights = ternary_parameters(self.named_modules())
        if self.config.quant_mode != "none":
            for name, module in self.named_modules():
                if isinstance(module, Experts):
                    group = self.config.bitlinear_group_size
                    weights[f"{name}.gate_up"] = (module.gate_up, group)
                    weights[f"{name}.down"] = (module.down, group)
        return weights

    def use_kernels(self, backend: str, *, scan_blocks: tuple[int, int] = (0, 0)) -> None:
        """Compute products, scans, attention and the loss with `torch` or `triton`.

        scan_blocks: steps and state entries of a tile of the Triton scan, 0 = by device and shape.
        """
        self.kernel_backend = backend
        for module in self.modules():
            if isinstance(module, Mamba):
                module.blocks = scan_blocks
            if isinstance(module, BitLinear | Mamba | MLA):
                module.backend = backend
            elif isinstance(module, DenseFeedForward | MoE):
                module.settings = replace(module.settings, backend=backend)

    @contextmanager
    def weights_held(self) -> Iterator[TernaryCache]:
        """A block in which weights do not change, such as the micro-batches of one step: codes of
        ternary weights are computed once in it. Metrics count the reuses of the last block."""
        cache = TernaryCache()
        with cache.held():
            yield cache
        self.cache_counts = [cache.hits, cache.invalidations]

    def metrics(self) -> dict[str, float]:
        """Figures of the bitlinear, mla, diff_attn, mamba, moe and eng families. Synchronises.

        A figure that several layers report is their mean; names ending in _min or _max, and
        moe_max_vio, are the extreme over layers.
        """
        rows = []
        for module in self.modules():
            measure = getattr(module, "metrics", None)
            if module is not self and callable(measure):
                rows.append(measure())
        result = self.ternary_statistics.measure(self.ternary_weights())
        result["bitlinear_cache_hits"] = float(self.cache_counts[0])
        result["bitlinear_cache_invalidations"] = float(self.cache_counts[1])
        return result | _merge_metrics(rows)

    def metrics_state(self) -> dict[str, Tensor]:
        """What `metrics` compares the next values with; a resumed run needs it to log the same."""
        return self.ternary_statistics.state_dict()

    def load_metrics_state(self, state: dict[str, Tensor]) -> None:
        """Take over a `metrics_state`; weights and outputs stay as they are."""
        self.ternary_statistics.load_state_dict(state)


def _merge_metrics(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    collected: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            collected.setdefault(name, []).append(value)
    merged = {}
    for name, values in collected.items():
        if name.endswith("_max") or name == "moe_max_vio":
            merged[name] = max(values)
        elif name.endswith("_min"):
            merged[name] = min(values)
        else:
            merged[name] = sum(values) / len(values)
    return merged
