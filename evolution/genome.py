"""The fractal genome: a few letters that expand into a whole network, and what it costs.

    f_1 = base block        f_{C+1} = join(f_C o f_C, base)

A genome is one letter per scale. Each scale repeats everything below it and closes it with a block
of its own letter, so C letters make 2^C - 1 blocks and one changed letter changes every block that
it has made. The join is the residual stream, which adds up what all paths through the blocks say.
A letter is a mixer (mamba or attention) with multiples of the widths that the flags give: hidden
width of the feed-forward network, experts, heads of the mixer, MIMO rank.

Costs are counted, not timed, because decisions must not depend on the machine.

Sources: FractalNet 1605.07648. "Fractal NAS" is no established term; this is its definition here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from model.config import LAYER_KINDS, LayerShape, SigmaModelConfig

MULTIPLES = (1, 2, 4)
MAX_SCALES = 3
MULTIPLE_TEXTS = {f"x{multiple}" for multiple in MULTIPLES}
WIDENINGS = ("width", "experts", "heads", "rank")
DEEPEN = "scale"
KEEP = "none"


@dataclass(slots=True, kw_only=True, frozen=True)
class Letter:
    """A block: its mixer, and multiples of what the flags give for every block."""

    kind: str
    width: int = 1
    experts: int = 1  # of the routed experts, and of those a token uses
    heads: int = 1
    rank: int = 1

    def shape(self, base: SigmaModelConfig) -> LayerShape:
        """The block's sizes; an expert is as wide as `width` says, however many there are."""
        mamba = self.kind == "mamba"
        routed = base.n_routed_experts * self.experts
        top_k = base.moe_top_k * (self.experts if routed else 1)
        d_ff = base.d_ff * self.width
        if routed:
            d_ff = base.d_expert * self.width * (base.n_shared_experts + top_k)
        return LayerShape(
            kind=self.kind,
            n_heads=base.n_heads * (1 if mamba else self.heads),
            mamba_expand=base.mamba_expand * (self.heads if mamba else 1),
            mimo_rank=base.mimo_rank * (self.rank if mamba else 1),
            d_ff=d_ff,
            n_routed_experts=routed,
            moe_top_k=top_k,
        )


@dataclass(slots=True, kw_only=True, frozen=True)
class Mutation:
    """One change of a genome: a multiple of one letter doubled, a scale added, or nothing."""

    what: str  # one of WIDENINGS, DEEPEN, KEEP
    scale: int = 0  # of the letter that changes, or of the new one
    kind: str = ""  # mixer of a new scale's letter


@dataclass(slots=True, kw_only=True, frozen=True)
class Genome:
    """Letters from the innermost scale to the outermost."""

    scales: tuple[Letter, ...]

    def word(self) -> tuple[Letter, ...]:
        """The blocks from the first to the last."""
        blocks: tuple[Letter, ...] = ()
        for letter in self.scales:
            blocks = (*blocks, *blocks, letter)
        return blocks

    def places(self, scale: int) -> list[int]:
        """Numbers of the blocks that a scale's letter has made."""
        made: list[int] = []
        for number in range(len(self.scales)):
            made = [*made, *made, number]
        return [block for block, number in enumerate(made) if number == scale]

    def network(self, base: SigmaModelConfig) -> SigmaModelConfig:
        """The network of this genome; an n-gram memory, if there is one, is read by its first
        block, which every genome has."""
        shapes = tuple(letter.shape(base) for letter in self.word())
        config = replace(
            base,
            n_layers=len(shapes),
            layers=shapes,
            head_dim=base.d_head,
            engram_layers=(0,) if base.engram_enabled else base.engram_layers,
        )
        return config.validate()

    def mutated(self, mutation: Mutation) -> Genome:
        """The genome after a change."""
        if mutation.what == KEEP:
            return self
        if mutation.what == DEEPEN:
            return Genome(scales=(*self.scales, Letter(kind=mutation.kind)))
        letters = list(self.scales)
        old = letters[mutation.scale]
        letters[mutation.scale] = replace(old, **{mutation.what: 2 * getattr(old, mutation.what)})
        return Genome(scales=tuple(letters))

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, innermost scale first."""
        return [asdict(letter) for letter in self.scales]

    @classmethod
    def from_list(cls, letters: Sequence[dict[str, Any]]) -> Genome:
        """The genome that `to_list` wrote; TypeError for letters with other fields."""
        return cls(scales=tuple(Letter(**letter) for letter in letters))

    @classmethod
    def parse(cls, text: str) -> Genome:
        """The genome that `str` shows so; ValueError for another text."""
        letters = []
        for word in text.split("|"):
            kind, *rest = word.split() or [""]
            multiples = dict(zip(rest[::2], rest[1::2]))
            known = kind in LAYER_KINDS and multiples.keys() <= set(WIDENINGS)
            if not known or len(rest) % 2 or not set(multiples.values()) <= MULTIPLE_TEXTS:
                raise ValueError(
                    f"no genome: {word.strip()!r} in {text!r}; letters look like "
                    "'mamba width x2 | attention heads x4'"
                )
            letters.append(Letter(kind=kind, **{n: int(x[1:]) for n, x in multiples.items()}))
        return cls(scales=tuple(letters))

    def __str__(self) -> str:
        return " | ".join(
            letter.kind
            + "".join(
                f" {name} x{getattr(letter, name)}"
                for name in WIDENINGS
                if getattr(letter, name) > 1
            )
            for letter in self.scales
        )


def mixers(base: SigmaModelConfig) -> tuple[str, ...]:
    """The mixers that the flags' ratios allow."""
    ratios = {"mamba": base.mamba_ratio, "attention": base.attention_ratio}
    return tuple(kind for kind, ratio in ratios.items() if ratio)


def why_inexact(genome: Genome, mutation: Mutation, base: SigmaModelConfig) -> str:
    """Why a change cannot keep the function, in words; "" when it can.

    Doubling keeps a ternary row's codes because every input of the row is doubled: mean |W| stays
    as it is. Where scales belong to groups of inputs, the groups must fall on the same weights.
    """
    if mutation.what in (DEEPEN, KEEP):
        return ""
    letter = genome.scales[mutation.scale]
    shape, config = letter.shape(base), replace(base, head_dim=base.d_head)
    if mutation.what == "experts" and shape.moe_top_k == 1:
        return "one expert's gate is its affinity, those of two are normalised to 1"
    config = replace(
        config, mamba_expand=shape.mamba_expand, n_heads=shape.n_heads, d_ff=shape.d_ff,
        n_routed_experts=shape.n_routed_experts, moe_top_k=shape.moe_top_k,
    )  # fmt: skip
    joined: list[int] = []
    if mutation.what == "width" and shape.n_routed_experts:
        joined = [config.d_expert]
        joined += [config.n_shared_experts * config.d_expert] * bool(config.n_shared_experts)
    elif mutation.what == "width":
        joined = [config.d_ff]
    elif mutation.what == "heads":
        mamba = letter.kind == "mamba"
        joined = [config.d_inner if mamba else config.n_heads * config.d_head]
    group = base.bitlinear_group_size if base.quant_mode != "none" else 0
    if group and any(2 * width > group and width % group for width in joined):
        return f"groups of {group} weights would mix inputs that have groups of their own now"
    return ""


def mutations(genome: Genome, base: SigmaModelConfig) -> list[Mutation]:
    """Every single change that keeps the function and stays inside the search space."""
    found = []
    if len(genome.scales) < MAX_SCALES:
        for kind in mixers(base):
            found.append(Mutation(what=DEEPEN, scale=len(genome.scales), kind=kind))
    for scale, letter in enumerate(genome.scales):
        for what in WIDENINGS:
            if what == "experts" and not base.n_routed_experts:
                continue
            if what == "rank" and letter.kind != "mamba":
                continue
            mutation = Mutation(what=what, scale=scale)
            inside = 2 * getattr(letter, what) in MULTIPLES
            if inside and not why_inexact(genome, mutation, base):
                found.append(mutation)
    return found


def plain_genomes(base: SigmaModelConfig) -> list[Genome]:
    """All genomes of one and two scales without any multiple: where a search begins."""
    letters = [Letter(kind=kind) for kind in mixers(base)]
    singles = [Genome(scales=(letter,)) for letter in letters]
    return singles + [Genome(scales=(a, b)) for a in letters for b in letters]


def sample_genome(base: SigmaModelConfig, rng: random.Random) -> Genome:
    """Any genome of the space that `mutations` reaches, scales and letters drawn evenly."""
    letters = []
    for _ in range(rng.randint(1, MAX_SCALES)):
        kind = rng.choice(mixers(base))
        moe = base.n_routed_experts and base.moe_top_k > 1
        letters.append(
            Letter(
                kind=kind,
                width=rng.choice(MULTIPLES),
                experts=rng.choice(MULTIPLES) if moe else 1,
                heads=rng.choice(MULTIPLES),
                rank=rng.choice(MULTIPLES) if kind == "mamba" else 1,
            )
        )
    return Genome(scales=tuple(letters))


def forward_flops(config: SigmaModelConfig, *, seq_len: int) -> int:
    """Floating-point operations per token of a forward pass: 2 per multiplication of a product.

    Attention counts half of `seq_len` as its mean context.
    """
    total = config.d_model * config.vocab_size
    for layer, kind in enumerate(config.layer_kinds()):
        own = config.at_layer(layer)
        total += _mamba_products(own) if kind == "mamba" else _attention_products(own, seq_len)
        total += _feed_forward_products(own)
    return 2 * total


def _mamba_products(config: SigmaModelConfig) -> int:
    inner, state, rank = config.d_inner, config.mamba_d_state, config.mimo_rank
    angles = int(state * config.mamba_rope_fraction) // 2
    controls = (2 + config.mamba_trapezoid) * config.mamba_heads + angles
    projections = config.d_model * (3 * inner + 2 * rank * state + controls)
    return projections + inner * state * (2 * rank + 1)


def _attention_products(config: SigmaModelConfig, seq_len: int) -> int:
    maps = 2 if config.diff_attention_enabled else 1
    latent, rope, heads = config.kv_latent_dim, config.rope_dim, config.n_heads
    width = heads * config.d_head
    gate = heads if config.diff_attention_enabled else 0
    inputs = maps * (width + heads * rope) + latent + rope + gate
    scores = maps * (2 * width + heads * rope) * seq_len // 2
    return config.d_model * (inputs + width) + 2 * latent * width + scores


def _feed_forward_products(config: SigmaModelConfig) -> int:
    router = config.d_model * config.n_routed_experts
    return 3 * config.d_model * config.d_ff + router
