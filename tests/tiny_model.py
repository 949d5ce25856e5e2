"""The smallest network that has every part: Mamba and attention blocks, experts, n-gram memory."""

from __future__ import annotations

from typing import Any

from model.config import SigmaModelConfig

VOCAB = 53


def tiny_config(**changes: Any) -> SigmaModelConfig:
    """Its settings; without rounding, because int8 activations turn a last-bit difference between
    two orders of one computation into a visible one."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_layers": 3,
        "n_heads": 2,
        "mamba_ratio": 2,
        "d_ff": 48,
        "n_routed_experts": 4,
        "mamba_head_dim": 16,
        "mamba_d_state": 16,
        "mimo_rank": 2,
        "kv_latent_dim": 16,
        "rope_dim": 8,
        "engram_enabled": True,
        "engram_buckets": 61,
        "engram_dim": 8,
        "quant_mode": "none",
    }
    return SigmaModelConfig(**(values | changes)).validate()
