"""A model of every kind of block, small enough to be sampled from thousands of times."""

from __future__ import annotations

import random

import torch

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM

VOCAB = 23
STOPS = (5, 7)
PAD = 0


def small_model(*, spread: float = 3.0, seed: int = 3, **changes) -> SigmaLLM:
    """spread: factor on every matrix, so that a fresh model already prefers some tokens."""
    values = {
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
        "mamba_chunk_len": 8,
        "kv_latent_dim": 16,
        "rope_dim": 8,
        "engram_enabled": True,
        "engram_buckets": 61,
        "engram_dim": 8,
        # int8 rounding turns a last-bit difference between prefill and decode into a visible one
        "quant_mode": "none",
    }
    model = SigmaLLM(SigmaModelConfig(**(values | changes)).validate(), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(spread)
    return model


def random_prompts(number: int, *, seed: int = 0, longest: int = 11) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, longest) for _ in range(number)]
    return [[rng.randrange(VOCAB) for _ in range(size)] for size in sizes]
