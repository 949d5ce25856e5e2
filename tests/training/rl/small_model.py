"""A model of every kind of block, small enough to be sampled from thousands of times."""

from __future__ import annotations

import random

import torch

from model.sigma_llm import SigmaLLM
from tests.tiny_model import tiny_config

VOCAB = 23
STOPS = (5, 7)
PAD = 0


def small_model(*, spread: float = 3.0, seed: int = 3, **changes) -> SigmaLLM:
    """spread: factor on every matrix, so that a fresh model already prefers some tokens."""
    values = {"vocab_size": VOCAB, "mamba_chunk_len": 8}
    model = SigmaLLM(tiny_config(**(values | changes)), seed=seed)
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
