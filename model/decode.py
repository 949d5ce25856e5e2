"""One more token per row, without the generality that the blocks have.

A forward of one token is bound by the number of operations: a block asks about documents, padding,
kinds of dispatch and gradients, sorts two token copies by expert and rounds the same input several
times. Here all that does not depend on the token is settled once, for weights that cannot change
(inside `TernaryCache.held`): codes in bytes and both layouts, joined projections, rotary tables.
What remains is the blocks' arithmetic in the blocks' order, so values are theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import blocked_pairs
from model.bitlinear import BitLinear, ternarize
from model.blocks import Block, BlockState
from model.byte_product import code_dtype, held_as, row_codes, times_transposed
from model.latent_cache import LatentCache
from model.mamba import Mamba
from model.mla import MLA
from model.moe import DenseFeedForward, MoE
from model.norm_rope import RMSNorm, normalize, rope_table, rotate
from model.sequence import SequenceContext
from model.ssd import MambaState
from model.swiglu import SwigluSettings, activate
from model.weight_cache import active_cache, cached, version_of

_FIRST_POSITIONS = 256


class TokenStep:
    """Blocks of a model in eval mode as a function of one token per row."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self._weights = list(blocks.parameters())
        self._versions: list[int] = []
        self._blocks: list[_BlockStep] = []

    def settle(self, blocks: Sequence[Any]) -> TokenStep:
        """Itself, made anew if a weight was written to since."""
        versions = [version_of(weight) for weight in self._weights]
        if versions != self._versions:
            self._blocks = [_BlockStep(block) for block in blocks]
            self._versions = versions
        return self

    def __call__(
        self, x: Tensor, input_ids: Tensor | None, states: Sequence[BlockState], *, position: int
    ) -> tuple[tuple[Tensor, Tensor], list[BlockState]]:
        """Embedding x (B, D) and ids (B, 1) at `position` of their rows -> the last block's streams
        (B, D), twice the same in the standard layout, and the next states.
        """
        positions = torch.full((x.shape[0], 1), position)
        context = SequenceContext(positions=positions, use_cache=True)
        write = read = x
        after = []
        for block, state in zip(self._blocks, states, strict=True):
            write, read, new_state = block(write, read, input_ids, context, state, position)
            after.append(new_state)
        return (write, read), after


def token_step(blocks: nn.ModuleList, x: Tensor, states: Sequence[BlockState]) -> TokenStep | None:
    """The step for x (B, 1, D), or None where the blocks must be run themselves.

    It needs weights that are held, no gradients, a CPU in fp32 and rows that have begun.
    """
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    own: Any = blocks  # a list of Block, which nn.ModuleList cannot say
    first = own[0]
    if first.training or first.mixer.backend != "torch" or torch.is_autocast_enabled("cpu"):
        return None
    if active_cache() is None or any(state.mixer is None for state in states):
        return None
    # Two of them name the model; `settle` looks at all.
    weights = (first.mixer_norm.weight, own[-1].ffn_norm.weight)
    return cached("token step", weights, 0, lambda: TokenStep(blocks)).settle(own)


class _Product:
    """Product with a weight (out, in), or with its codes and then its scales (out,)."""

    def __init__(self, weight: Tensor, row_scale: Tensor | None) -> None:
        self.weight, self.row_scale = weight, row_scale

    @classmethod
    def of_layers(cls, *layers: BitLinear) -> _Product:
        """The layers' products in one go; they share their input."""
        if not layers[0].ternary:
            return cls(_joined([layer.weight.detach() for layer in layers]), None)
        codes, scales = zip(*(_held_codes(layer.weight) for layer in layers), strict=True)
        return cls(_joined(codes), _joined(scales))

    @classmethod
    def of_stack(cls, weight: Tensor, *, ternary: bool) -> list[_Product]:
        """One product for each matrix of weight (E, out, in)."""
        if not ternary:
            return [cls(matrix, None) for matrix in weight.detach().unbind()]
        pairs = zip(*(part.unbind() for part in _held_codes(weight)), strict=True)
        return [cls(codes, scale) for codes, scale in pairs]

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, in) -> (B, out)."""
        if self.row_scale is None:
            return F.linear(x, self.weight)
        codes, step = row_codes(x)
        return self.of_codes(codes.to(self.weight.dtype)).mul(step).mul_(self.row_scale)

    def of_codes(self, codes: Tensor) -> Tensor:
        """Product of codes (B, in), or of x itself if the weights are not ternary; no scales."""
        return times_transposed(codes, self.weight)


def _held_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., out, in) in the type of their products, and scales (..., out)."""
    codes, scale = ternarize(weight)
    return held_as(codes, weight, code_dtype(codes)), scale.squeeze(-1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


class _BlockStep:
    def __init__(self, block: Block) -> None:
        self.two_stream = block.two_stream
        self.engram = block.engram
        self.norms = (_Norm(block.mixer_norm), _Norm(block.ffn_norm))
        self.mix = _mixer_step(block.mixer)
        self.feed = _feed_step(block.ffn)

    def __call__(
        self,
        write: Tensor,
        read: Tensor,
        input_ids: Tensor | None,
        context: SequenceContext,
        state: BlockState,
        position: int,
    ) -> tuple[Tensor, Tensor, BlockState]:
        memory_state = None
        if self.engram is not None:
            if input_ids is None:
                raise ValueError("an Engram model needs input_ids; inputs_embeds is not enough")
            memory, memory_state = self.engram(
                write.unsqueeze(1), input_ids, context, state=state.engram
            )
            read = read + memory.squeeze(1)
            write = write if self.two_stream else read
        mixed, mixer_state = self.mix(self.norms[0](read), context, state.mixer, position)
        write = write + mixed
        fed = self.feed(self.norms[1](write), context)
        new_state = BlockState(mixer_state, memory_state)
        if self.two_stream:
            return write, read + fed, new_state
        write = write + fed
        return write, write, new_state


class _Norm:
    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, eps=self.eps)[0]


def _mixer_step(mixer: Mamba | MLA) -> Any:
    if isinstance(mixer, Mamba) and _is_whole(mixer.in_proj):
        return _MambaStep(mixer)
    if isinstance(mixer, MLA) and _is_whole(mixer.q_content) and mixer.absorption_pays(1):
        return _AttentionStep(mixer)
    return _ModuleStep(mixer)


def _is_whole(layer: BitLinear) -> bool:
    """Whether every row has one scale, or none."""
    return not (layer.ternary and layer.group_size)


class _ModuleStep:
    """A mixer that has no step of its own."""

    def __init__(self, mixer: nn.Module) -> None:
        self.mixer = mixer

    def __call__(
        self, x: Tensor, context: SequenceContext, state: Any, position: int
    ) -> tuple[Tensor, Any]:
        y, new_state = self.mixer(x.unsqueeze(1), context, state=state)
        return y.squeeze(1), new_state


class _MambaStep:
    def __init__(self, mixer: Mamba) -> None:
        self.mixer = mixer
        self.in_proj = _Product.of_layers(mixer.in_proj)
        self.out_proj = _Product.of_layers(mixer.out_proj)
        self.step_scale = mixer.step_scale
        self.control = (mixer.control_proj.weight, mixer.control_proj.bias)

    def __call__(
        self, x: Tensor, context: SequenceContext, state: MambaState, position: int
    ) -> tuple[Tensor, MambaState]:
        control = F.linear(x, *self.control).unsqueeze(1)
        mixed, new_state = self.mixer.step_mixed(control, self.in_proj(x).unsqueeze(1), state)
        return self.out_proj(mixed).mul_(self.step_scale), new_state


class _AttentionStep:
    def __init__(self, mixer: MLA) -> None:
        self.mixer = mixer
        self.layers = [layer for layer in mixer.children() if isinstance(layer, BitLinear)]
        layers = (mixer.q_content, mixer.kv_down, mixer.q_rope, mixer.k_rope_up)
        self.project = _Product.of_layers(*layers)
        self.widths = [layers[0].out_features, layers[1].out_features]
        self.widths.append(layers[2].out_features + layers[3].out_features)
        self.latent_norm = _Norm(mixer.latent_norm)
        self.sub_norm = None if mixer.sub_norm is None else _Norm(mixer.sub_norm)
        self.out_proj = _Product.of_layers(mixer.out_proj)
        self.up: tuple[Tensor, Tensor] | None = None
        self.table = rope_table(torch.arange(0), mixer.d_rope, theta=mixer.rope_theta)

    def __call__(
        self, x: Tensor, context: SequenceContext, state: LatentCache, position: int
    ) -> tuple[Tensor, LatentCache]:
        mixer, batch = self.mixer, x.shape[0]
        if any(layer.adapter is not None for layer in self.layers):
            return _ModuleStep(mixer)(x, context, state, position)
        if self.up is None:  # not before: they would hold what an adapter adds
            self.up = mixer.absorbed_weights(torch.float32)
        content, latent, rotary = self.project(x).split(self.widths, dim=-1)
        cos, sin = self._angle(position)
        rotary = rotate(rotary.view(batch, 1, -1, mixer.d_rope), cos, sin)
        heads = (batch, 1, mixer.heads, mixer.maps)
        order = (0, 3, 2, 1, 4)
        q_content = content.view(*heads, mixer.d_head).permute(order)
        q_rope = rotary[:, :, :-1].view(*heads, mixer.d_rope).permute(order)
        latent = self.latent_norm(latent).unsqueeze(1)
        state = state.append(latent, rotary[:, :, -1], None)
        held = slice(0, state.length)
        blocked = None
        if state.documents is not None:
            blocked = blocked_pairs(state.documents[:, held], 1)
        y = mixer.attend_absorbed(
            *(q_content, q_rope, state.latent[:, held], state.rotary_key[:, held]),
            *(mixer.gate(x.unsqueeze(1)) if mixer.differential else None, blocked, self.up),
        ).squeeze(1)
        return self.out_proj(y if self.sub_norm is None else self.sub_norm(y)), state

    def _angle(self, position: int) -> tuple[Tensor, Tensor]:
        """cos and sin (d_R / 2,) of one position; the table doubles when it ends."""
        if position >= len(self.table[0]):
            positions = torch.arange(max(_FIRST_POSITIONS, 2 * position))
            self.table = rope_table(positions, self.mixer.d_rope, theta=self.mixer.rope_theta)
        return self.table[0][position], self.table[1][position]


@dataclass(slots=True)
class _Expert:
    """One SwiGLU network."""

    gate_up: _Product
    down: _Product

    @classmethod
    def of_network(cls, network: DenseFeedForward) -> _Expert:
        return cls(_Product.of_layers(network.gate_up), _Product.of_layers(network.down))


def _run_experts(x: Tensor, experts: Sequence[_Expert], settings: SwigluSettings) -> Tensor:
    """What each of several networks of one width makes of one row x (1, D): (experts, D).

    One network takes any number of rows (B, D) -> (B, D).
    """
    step = None
    if settings.ternary:
        x, step = row_codes(x)
        x = x.to(experts[0].gate_up.weight.dtype)
    gate_up = _each(x, [expert.gate_up for expert in experts], step, one_input=True)
    hidden, _ = activate(gate_up, settings)
    if settings.ternary:
        hidden, step = row_codes(hidden)
        hidden = hidden.to(experts[0].down.weight.dtype)
    return _each(hidden, [expert.down for expert in experts], step, one_input=False)


def _each(
    x: Tensor, products: Sequence[_Product], step: Tensor | None, *, one_input: bool
) -> Tensor:
    if len(products) == 1:
        y = products[0].of_codes(x)
    else:
        rows = [x] * len(products) if one_input else x.split(1)
        y = torch.cat([product.of_codes(row) for product, row in zip(products, rows, strict=True)])
    if step is None:
        return y
    scales = [product.row_scale for product in products if product.row_scale is not None]
    return y.mul(step).mul_(scales[0] if len(scales) == 1 else torch.stack(scales))


class _DenseStep:
    def __init__(self, network: DenseFeedForward) -> None:
        self.experts, self.settings = [_Expert.of_network(network)], network.settings

    def __call__(self, x: Tensor, context: SequenceContext) -> Tensor:
        return _run_experts(x, self.experts, self.settings)


class _MixtureStep:
    """Routed and shared experts; several rows go to the module, which sorts them by expert."""

    def __init__(self, moe: MoE) -> None:
        self.moe, self.settings = moe, moe.settings
        self.router = moe.router_weight()
        ternary = moe.settings.ternary
        stacks = [
            _Product.of_stack(w, ternary=ternary) for w in (moe.experts.gate_up, moe.experts.down)
        ]
        self.experts = list(map(_Expert, *stacks))
        self.shared = None if moe.shared is None else _Expert.of_network(moe.shared)
        self.same_width = moe.config.n_shared_experts == 1

    def __call__(self, x: Tensor, context: SequenceContext) -> Tensor:
        if x.shape[0] > 1:
            return self.moe(x.unsqueeze(1), context)[0].squeeze(1)
        selected, gates = self.moe.select(self.moe.affinity(F.linear(x, self.router)))
        experts = [self.experts[index] for index in selected[0].tolist()]
        together = self.shared is not None and self.same_width
        if together and self.shared is not None:
            experts.append(self.shared)
        rows = _run_experts(x, experts, self.settings)
        y = rows[:1] * gates[:, :1]
        for slot in range(1, selected.shape[1]):
            y.addcmul_(rows[slot : slot + 1], gates[:, slot : slot + 1])
        if together:
            y += rows[-1:]
        elif self.shared is not None:
            y += _run_experts(x, [self.shared], self.settings)
        return y


def _feed_step(network: DenseFeedForward | MoE) -> Any:
    settings = network.settings
    if settings.ternary and settings.group_size:
        return lambda x, context: network(x.unsqueeze(1), context)[0].squeeze(1)
    return _MixtureStep(network) if isinstance(network, MoE) else _DenseStep(network)
