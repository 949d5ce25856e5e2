"""Shape and mechanism settings of a SigmaLLM, as plain values.

Kept apart from the command line so that a checkpoint, a transformers config and the architecture
search can describe a network without the training program.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

QUANT_MODES = ("bitnet_1_58", "none")
RESIDUAL_LAYOUTS = ("standard", "two-stream")
DISPATCH_MODES = ("legacy", "packed", "grouped")
GATE_PRECISIONS = ("bf16", "int8")
LAYER_KINDS = ("mamba", "attention")
SHOWN_WHERE_USED = ("head_dim", "layers", "engram_canonical")


@dataclass(slots=True, kw_only=True, frozen=True)
class LayerShape:
    """What one block may have of its own; names as in SigmaModelConfig, `kind` is its mixer."""

    kind: str
    n_heads: int
    mamba_expand: int
    mimo_rank: int
    d_ff: int
    n_routed_experts: int
    moe_top_k: int


@dataclass(slots=True, kw_only=True)
class SigmaModelConfig:
    """All settings that change a SigmaLLM's parameters or its function.

    Field names equal the command-line flags. `n_routed_experts = 0` replaces the mixture by one
    dense SwiGLU of width `d_ff`; `mamba_ratio = 0` or `attention_ratio = 0` removes that mixer.
    `layers`, if given, says block by block what the ratios and single numbers say for all; it has
    no flag and comes from the architecture search. `head_dim = 0` is d_model / n_heads.
    """

    vocab_size: int = 32768
    d_model: int = 768
    n_layers: int = 18
    n_heads: int = 12
    mamba_ratio: int = 5
    attention_ratio: int = 1
    residual_layout: str = "two-stream"
    dropout: float = 0.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    init_std: float = 0.02

    quant_mode: str = "bitnet_1_58"
    bitlinear_group_size: int = 0
    sub_norm: bool = True

    kv_latent_dim: int = 128
    rope_dim: int = 32
    rope_theta: float = 10000.0
    diff_attention_enabled: bool = True
    diff_attention_lambda_init: float = 0.35
    diff_attention_lambda_min: float = 0.05
    diff_attention_lambda_max: float = 1.20

    mamba_expand: int = 2
    mamba_head_dim: int = 64
    mamba_d_state: int = 128
    mimo_rank: int = 4
    mamba_chunk_len: int = 128
    mamba_rope_fraction: float = 0.5
    mamba_trapezoid: bool = True
    mamba_step_scale: float = 0.05

    d_ff: int = 3072
    n_shared_experts: int = 1
    n_routed_experts: int = 8
    moe_top_k: int = 2
    moe_dispatch_mode: str = "grouped"
    router_jitter_noise: float = 0.01
    router_balance_lr: float = 1e-3
    moe_z_loss_weight: float = 1e-3
    moe_gate_precision: str = "bf16"
    rib_router_enabled: bool = False
    rib_info_weight: float = 0.03
    rib_collapse_penalty: float = 0.08
    rib_confidence_weight: float = 0.03
    rib_temp_gain: float = 0.55

    engram_enabled: bool = False
    engram_orders: tuple[int, ...] = (2, 3, 4)
    engram_heads: int = 4
    engram_buckets: int = 3072
    engram_dim: int = 112
    engram_layers: tuple[int, ...] = (1,)
    engram_canonical: bool = False  # `merge_canonical_ids` by who knows the tokens

    head_dim: int = 0
    layers: tuple[LayerShape, ...] = ()

    @property
    def d_head(self) -> int:
        return self.head_dim or self.d_model // self.n_heads

    @property
    def d_inner(self) -> int:
        """Width inside a Mamba block."""
        return self.mamba_expand * self.d_model

    @property
    def mamba_heads(self) -> int:
        return self.d_inner // self.mamba_head_dim

    @property
    def d_expert(self) -> int:
        """Hidden width of one expert: `d_ff` is the active width, shared by all active experts."""
        return self.d_ff // (self.n_shared_experts + self.moe_top_k)

    def layer_kinds(self) -> list[str]:
        """Mixer of each block, "mamba" or "attention": the ratio's pattern repeated over depth."""
        if self.layers:
            return [layer.kind for layer in self.layers]
        period = ["mamba"] * self.mamba_ratio + ["attention"] * self.attention_ratio
        return [period[i % len(period)] for i in range(self.n_layers)]

    def at_layer(self, layer: int) -> SigmaModelConfig:
        """The settings of one block: these, with what `layers` says of it in place."""
        if not self.layers:
            return self
        own = asdict(self.layers[layer])
        kind = own.pop("kind")
        ratios = {"mamba_ratio": kind == "mamba", "attention_ratio": kind == "attention"}
        return replace(self, layers=(), head_dim=self.d_head, **own, **ratios)

    def validate(self) -> SigmaModelConfig:
        """Check every rule between fields; ValueError names the flag and the mend."""
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "kv_latent_dim"):
            _require(getattr(self, name) > 0, name, "must be positive")
        for name, allowed in (
            ("quant_mode", QUANT_MODES),
            ("residual_layout", RESIDUAL_LAYOUTS),
            ("moe_dispatch_mode", DISPATCH_MODES),
            ("moe_gate_precision", GATE_PRECISIONS),
        ):
            value = getattr(self, name)
            _require(value in allowed, name, f"is {value!r}; choose one of {', '.join(allowed)}")
        _require(0.0 <= self.dropout < 1.0, "dropout", "must lie in [0, 1)")
        self._validate_attention()
        self._validate_mamba()
        self._validate_experts()
        self._validate_engram()
        self._validate_layers()
        return self

    def _validate_layers(self) -> None:
        if not self.layers:
            return
        _require(
            len(self.layers) == self.n_layers, "n_layers", "must be the number of `layers` given"
        )
        for layer, shape in enumerate(self.layers):
            if shape.kind not in LAYER_KINDS:
                raise ValueError(f"layers: kind {shape.kind!r}; choose {' or '.join(LAYER_KINDS)}")
            self.at_layer(layer).validate()

    def _validate_attention(self) -> None:
        given = self.head_dim > 0
        _require(
            given or self.d_model % self.n_heads == 0,
            "n_heads",
            f"must divide --d-model, {self.d_model}, "
            f"{_nearest_divisors(self.d_model, self.n_heads)}",
        )
        _require(self.rope_dim > 0 and self.rope_dim % 2 == 0, "rope_dim", "must be even, > 0")
        _require(
            self.diff_attention_lambda_min
            < self.diff_attention_lambda_init
            < self.diff_attention_lambda_max,
            "diff_attention_lambda_init",
            "must lie strictly between --diff-attention-lambda-min and -max",
        )

    def _validate_mamba(self) -> None:
        _require(
            self.mamba_ratio >= 0
            and self.attention_ratio >= 0
            and self.mamba_ratio + self.attention_ratio > 0,
            "mamba_ratio",
            "and --attention-ratio must be >= 0 and not both 0",
        )
        _require(
            self.d_inner % self.mamba_head_dim == 0,
            "mamba_head_dim",
            f"must divide --mamba-expand times --d-model, {self.d_inner}, "
            f"{_nearest_divisors(self.d_inner, self.mamba_head_dim)}",
        )
        _require(
            0.0 <= self.mamba_rope_fraction <= 1.0, "mamba_rope_fraction", "must lie in [0, 1]"
        )
        _require(self.mimo_rank >= 1, "mimo_rank", "must be at least 1")
        _require(self.mamba_chunk_len >= 1, "mamba_chunk_len", "must be at least 1")
        _require(
            self.mamba_d_state > 0 and self.mamba_d_state % 4 == 0,
            "mamba_d_state",
            "must be a positive multiple of 4 (pairs of the rotated half)",
        )

    def _validate_experts(self) -> None:
        if not self.n_routed_experts:
            return
        active = self.n_shared_experts + self.moe_top_k
        _require(
            1 <= self.moe_top_k <= self.n_routed_experts,
            "moe_top_k",
            "must lie between 1 and --n-routed-experts",
        )
        _require(
            self.d_ff % active == 0,
            "d_ff",
            f"must be a multiple of --n-shared-experts + --moe-top-k = {active}",
        )

    def _validate_engram(self) -> None:
        if not self.engram_enabled:
            return
        _require(
            all(0 <= layer < self.n_layers for layer in self.engram_layers),
            "engram_layers",
            "must name blocks between 0 and --n-layers - 1",
        )
        _require(
            len(self.engram_orders) > 0 and min(self.engram_orders) >= 1,
            "engram_orders",
            "must be n-gram orders of at least 1",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; tuples become lists. What earlier checkpoints know nothing
        of is there only where it is used."""
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }
        return {key: value for key, value in values.items() if key not in SHOWN_WHERE_USED or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SigmaModelConfig:
        """Inverse of `to_dict`; an unknown key is a ValueError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model settings: {', '.join(unknown)}")
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        given["layers"] = tuple(LayerShape(**layer) for layer in given.get("layers", ()))
        return cls(**given).validate()


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ValueError(f"--{field.replace('_', '-')} {message}")


def _nearest_divisors(number: int, wanted: int) -> str:
    """ "as 4 and 6 do", the ones below and above `wanted`."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = max(n for n in divisors if n <= max(1, wanted))
    above = min((n for n in divisors if n >= wanted), default=below)
    return f"as {below} and {above} do" if above != below else f"as {below} does"
