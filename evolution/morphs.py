"""Changes of a trained SigmaLLM that leave its function as it is, with optimizer and average.

A child begins with its parent's logits, so a short training shows what the change is worth, not
how well new weights were drawn (Net2Net 1511.05641). Tensors are found by parameter name, and one
`Carry` says for each tensor of the child where its weights, their average and their moments come
from.

Widening doubles whole: all hidden units, heads, experts or ranks, the first copies followed by the
second. Nothing less is exact here. An RMSNorm over the doubled values has the mean it had, int8
rounding finds the largest value it had, and a ternary row whose inputs are all doubled keeps
mean |W|, hence its codes; only its scale is halved. Doubling some units would change all three.
Experts keep their gates in sum: a token takes twice as many, the copies in pairs, and gates are
normalised. Deepening appends blocks whose output matrices are zero.

Copies that stay equal learn nothing new. In ternary layers the second copy's weights with code 0
take random signs: mean, codes and scale stay as they were to the bit, while its codes will change
at other moments. In high precision the outgoing weights are divided unevenly.

What a change cannot keep: the mixer of an existing block, half of a layer's units, a head or an
expert cut in two (its norm and its int8 step would see half of the values), a second expert beside
a single one (`genome.why_inexact`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evolution.genome import DEEPEN, KEEP, Genome, Mutation
from model.config import SigmaModelConfig

ENDS_BRANCH = ("mixer.out_proj.weight", "ffn.down.weight", "shared.down.weight", "experts.down")
# Moments element by element, and the power of the gradient that they follow.
GRADIENT_POWERS = {"exp_avg": 1, "momentum": 1, "exp_avg_sq": 2}
SMALLEST_SHARE = 0.25


@dataclass(slots=True, kw_only=True)
class Carry:
    """Where a child's tensor comes from.

    source: name in the parent, "" for the child's own initial values. picks: by axis, which
    entries of the source. value, gradient: factors on the weights and on their gradient, broadcast
    to the child's tensor. copies: axis, and which entries on it are second copies of inputs' rows.
    moments: whether the optimizer's state comes along.
    """

    source: str
    picks: dict[int, Tensor] = field(default_factory=dict)
    value: Tensor | float = 1.0
    gradient: Tensor | float = 1.0
    copies: tuple[int, Tensor] | None = None
    moments: bool = True

    def picked(self, tensor: Tensor) -> Tensor:
        """The source's entries in the child's order, in memory of their own."""
        for axis, index in self.picks.items():
            tensor = tensor.index_select(axis, index.to(tensor.device))
        return tensor.clone() if not self.picks else tensor

    def weights(self, tensor: Tensor) -> Tensor:
        """The child's tensor from the parent's, `value` included; the parent's stays as it is."""
        return _times(self.picked(tensor), self.value)


Carries = dict[str, Carry]


def _times(tensor: Tensor, factor: Tensor | float) -> Tensor:
    if isinstance(factor, Tensor):
        return tensor * factor.to(tensor)
    return tensor if factor == 1.0 else tensor * factor


@dataclass(slots=True, kw_only=True)
class _Halves:
    """Doubling of `count` equal parts of `size` entries: order, shares of the two copies."""

    count: int
    size: int
    shares: Tensor  # (count,)

    @property
    def index(self) -> Tensor:
        return torch.arange(self.count * self.size).repeat(2)

    @property
    def is_copy(self) -> Tensor:
        return torch.arange(2 * self.count * self.size) >= self.count * self.size

    @property
    def factors(self) -> Tensor:
        """Share of each entry of the doubled axis; the two of a pair add up to 1."""
        part = self.shares.repeat_interleave(self.size)
        return torch.cat((part, 1.0 - part))


class _Doubling:
    """Collects the carries of one doubled block; names are those inside the block."""

    def __init__(self, prefix: str, *, equal: bool, generator: torch.Generator) -> None:
        self.prefix = prefix
        self.carries: Carries = {}
        self._equal = equal
        self._generator = generator

    def halves(self, count: int, size: int = 1, *, equal: bool = False) -> _Halves:
        """Even shares where weights are ternary: one scale serves both copies."""
        shares = torch.full((count,), 0.5)
        if not (equal or self._equal):
            span = 1.0 - 2.0 * SMALLEST_SHARE
            shares = SMALLEST_SHARE + span * torch.rand(count, generator=self._generator)
        return _Halves(count=count, size=size, shares=shares)

    def add(self, name: str, **settings: Any) -> None:
        name = self.prefix + name
        self.carries[name] = Carry(source=name, **settings)

    def rows(self, name: str, parts: Iterable[_Halves | int], *, axis: int = 0, dims: int) -> None:
        """Rows of `axis`, part after part: doubled, or as many kept as the number says."""
        index, copies, gradient, start = [], [], [], 0
        for part in parts:
            if isinstance(part, int):
                index.append(torch.arange(part) + start)
                copies.append(torch.zeros(part, dtype=torch.bool))
                gradient.append(torch.ones(part))
                start += part
            else:
                index.append(part.index + start)
                copies.append(part.is_copy)
                gradient.append(part.factors)
                start += part.count * part.size
        self.add(
            name,
            picks={axis: torch.cat(index)},
            gradient=_along(torch.cat(gradient), axis, dims),
            copies=(axis, torch.cat(copies)),
        )

    def columns(self, name: str, part: _Halves, *, axis: int, dims: int) -> None:
        """What reads the doubled values: each copy gets its share."""
        self.add(name, picks={axis: part.index}, value=_along(part.factors, axis, dims))


def _along(values: Tensor, axis: int, dims: int) -> Tensor:
    return values.view([-1 if at == axis else 1 for at in range(dims)])


def _double_swiglu(doubling: _Doubling, names: tuple[str, str], width: int, *, dims: int) -> None:
    part = doubling.halves(width)
    doubling.rows(names[0], (part, part), axis=dims - 2, dims=dims)
    doubling.columns(names[1], part, axis=dims - 1, dims=dims)


def _double_width(doubling: _Doubling, config: SigmaModelConfig) -> None:
    if not config.n_routed_experts:
        _double_swiglu(doubling, ("ffn.gate_up.weight", "ffn.down.weight"), config.d_ff, dims=2)
        return
    width = config.d_expert
    _double_swiglu(doubling, ("ffn.experts.gate_up", "ffn.experts.down"), width, dims=3)
    if config.n_shared_experts:
        names = ("ffn.shared.gate_up.weight", "ffn.shared.down.weight")
        _double_swiglu(doubling, names, config.n_shared_experts * width, dims=2)


def _double_experts(doubling: _Doubling, config: SigmaModelConfig) -> None:
    part = doubling.halves(config.n_routed_experts, equal=True)
    for name, dims in (("ffn.experts.gate_up", 3), ("ffn.experts.down", 3)):
        doubling.rows(name, (part,), dims=dims)
    for name in ("ffn.router.weight", "ffn.balance_bias"):
        doubling.add(name, picks={0: part.index}, gradient=0.5)


def _double_attention_heads(doubling: _Doubling, config: SigmaModelConfig) -> None:
    heads, maps = config.n_heads, 2 if config.diff_attention_enabled else 1
    single = doubling.halves(heads)
    sizes = {"q_content": maps * config.d_head, "q_rope": maps * config.rope_dim}
    sizes |= {"k_content_up": config.d_head, "v_up": config.d_head}
    for name, size in sizes.items():
        part = _Halves(count=heads, size=size, shares=single.shares)
        doubling.rows(f"mixer.{name}.weight", (part,), dims=2)
    whole = _Halves(count=heads, size=config.d_head, shares=single.shares)
    doubling.columns("mixer.out_proj.weight", whole, axis=1, dims=2)
    if config.sub_norm:
        doubling.add("mixer.sub_norm.weight", picks={0: whole.index}, gradient=whole.factors)
    if config.diff_attention_enabled:
        gate = {"picks": {0: single.index}}
        doubling.add("mixer.gate_lambda.weight", gradient=_along(single.factors, 0, 2), **gate)
        doubling.add("mixer.gate_lambda.bias", gradient=single.factors, **gate)


def _double_mamba_heads(doubling: _Doubling, config: SigmaModelConfig) -> None:
    heads, width = config.mamba_heads, config.mamba_head_dim
    single = doubling.halves(heads)
    whole = _Halves(count=heads, size=width, shares=single.shares)
    state = 2 * config.mimo_rank * config.mamba_d_state
    doubling.rows("mixer.in_proj.weight", (whole, whole, state), dims=2)
    doubling.columns("mixer.out_proj.weight", whole, axis=1, dims=2)
    angles = int(config.mamba_d_state * config.mamba_rope_fraction) // 2
    controls = (single,) * (2 + config.mamba_trapezoid) + (angles,)
    for name, dims in (("weight", 2), ("bias", 1)):
        doubling.rows(f"mixer.control_proj.{name}", controls, dims=dims)
        doubling.carries[f"{doubling.prefix}mixer.control_proj.{name}"].copies = None
    names = {"skip": 1, "rank_out": 3}
    if config.mimo_rank > 1:
        names |= {"rank_in": 3, "rank_gate": 3}
    for name, dims in names.items():
        gradient = _along(single.factors, 0, dims)
        doubling.add(f"mixer.{name}", picks={0: single.index}, gradient=gradient)


def _double_rank(doubling: _Doubling, config: SigmaModelConfig) -> None:
    """Both copies write half into the state they share, and read all of it; `skip` makes up for
    the halved input. A first rank has no factors of its input and gate: they begin as the child's
    initial values, a half and one."""
    rank, state = config.mimo_rank, config.mamba_d_state
    reads = doubling.halves(rank)
    writes = doubling.halves(rank, equal=True)
    parts = [_Halves(count=rank, size=state, shares=p.shares) for p in (writes, reads)]
    doubling.rows("mixer.in_proj.weight", (2 * config.d_inner, *parts), dims=2)
    bias = torch.stack((writes.factors, reads.factors)).unsqueeze(-1)
    doubling.add("mixer.bc_bias", picks={1: reads.index}, gradient=bias)
    doubling.columns("mixer.rank_out", reads, axis=1, dims=3)
    doubling.add("mixer.skip", value=2.0, gradient=0.5)
    if rank > 1:
        doubling.columns("mixer.rank_in", writes, axis=1, dims=3)
        gradient = _along(reads.factors, 1, 3)
        doubling.add("mixer.rank_gate", picks={1: reads.index}, gradient=gradient)
    else:
        for name in ("rank_in", "rank_gate"):
            doubling.carries[f"{doubling.prefix}mixer.{name}"] = Carry(source="")


def _double_heads(doubling: _Doubling, config: SigmaModelConfig) -> None:
    mamba = config.layer_kinds()[0] == "mamba"
    (_double_mamba_heads if mamba else _double_attention_heads)(doubling, config)


DOUBLINGS: dict[str, Callable[[_Doubling, SigmaModelConfig], None]] = {
    "width": _double_width,
    "experts": _double_experts,
    "heads": _double_heads,
    "rank": _double_rank,
}


def plan_morph(
    genome: Genome,
    mutation: Mutation,
    base: SigmaModelConfig,
    *,
    names: Iterable[str],
    generator: torch.Generator,
) -> Carries:
    """How every tensor of the child, by name, comes from the network of `genome`."""
    names = list(names)
    carries = {name: Carry(source=name) for name in names}
    if mutation.what == KEEP:
        return carries
    if mutation.what == DEEPEN:
        return carries | _append_blocks(len(genome.word()), names)
    parent = genome.network(base)
    for block in genome.places(mutation.scale):
        doubling = _Doubling(
            f"blocks.{block}.", equal=base.quant_mode != "none", generator=generator
        )
        DOUBLINGS[mutation.what](doubling, parent.at_layer(block))
        carries |= doubling.carries
    return carries


def _append_blocks(depth: int, names: Iterable[str]) -> Carries:
    """The parent's blocks once more and one new block, all of them silent."""
    carries: Carries = {}
    for name in names:
        parts = name.split(".", 2)
        if parts[0] != "blocks" or int(parts[1]) < depth:
            continue
        original = int(parts[1]) - depth
        again = original < depth and not parts[2].startswith("engram")
        carries[name] = Carry(
            source=f"blocks.{original}.{parts[2]}" if again else "",
            value=0.0 if parts[2].endswith(ENDS_BRANCH) else 1.0,
            moments=False,
        )
    return carries


def grow_weights(
    carries: Carries, parent: Mapping[str, Tensor], fresh: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The child's tensors. `parent`, `fresh`: state of the parent and of a new child, by name."""
    return {
        name: carry.weights(parent[carry.source] if carry.source else fresh[name])
        for name, carry in carries.items()
    }


def grow_average(
    carries: Carries, parent: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """An average of weights for the child; it begins at the child's weights where blocks are new,
    because an average of silent weights is silence too."""
    return {
        name: carry.weights(parent[carry.source])
        if carry.source and carry.moments
        else weights[name].clone()
        for name, carry in carries.items()
        if not carry.source or carry.source in parent
    }


def grow_moments(
    carries: Carries, state: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, torch.Size]
) -> dict[str, dict[str, Any]]:
    """The optimizer's state for the child's parameters.

    state: by the parent's parameter names; shapes: of its parameters. Moments follow the gradient.
    A widened parameter with any other tensor (a basis, a projection, a row's square) begins anew
    as a whole, because its parts belong together.
    """
    grown: dict[str, dict[str, Any]] = {}
    for name, carry in carries.items():
        if carry.source and carry.source not in state:
            continue  # a buffer
        own = state[carry.source] if carry.source and carry.moments else {}
        shape = shapes[carry.source] if carry.source else None
        changed = bool(carry.picks) or not isinstance(carry.gradient, float) or carry.gradient != 1
        if changed and not all(_follows(*item, shape) for item in own.items()):
            own = {}
        grown[name] = {key: _grown(key, value, carry) for key, value in own.items()}
    return grown


def _follows(key: str, value: Any, shape: torch.Size | None) -> bool:
    if not isinstance(value, Tensor) or value.dim() == 0:
        return True
    return key in GRADIENT_POWERS and value.shape == shape


def _grown(key: str, value: Any, carry: Carry) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0 or key not in GRADIENT_POWERS:
        return value.clone()
    factor = carry.gradient
    for _ in range(GRADIENT_POWERS[key] - 1):
        factor = factor * carry.gradient
    return _times(carry.picked(value), factor)


def part_copies(
    carries: Carries,
    weights: dict[str, Tensor],
    *,
    ternary: Iterable[str],
    codes_of: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> None:
    """Random signs for those weights of second copies that round to 0, in place.

    ternary: names of the ternary weights; codes_of: their codes.
    """
    for name in ternary:
        copies = carries[name].copies
        if copies is None:
            continue
        weight, (axis, mask) = weights[name], copies
        signs = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2.0 - 1.0
        silent = (codes_of(weight) == 0) & _along(mask, axis, weight.dim()).to(weight.device)
        weights[name] = torch.where(silent, weight * signs.to(weight.device), weight)
