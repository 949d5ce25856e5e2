"""Rounding to bf16 that loses nothing on average.

A running mean moves by a hundredth of the difference to the gradient, which is below the resolution
of bf16 (2^-8): rounding to nearest would undo every such step. Rounding up with the probability of
the rest keeps the expectation. The noise is a function of seed, parameter and step, so that a
resumed run repeats it without any saved generator.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """Generator that depends on the key alone; the parts of the key are integers from 0 on."""
    seed = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64: neighbouring keys give unrelated seeds
        seed = (seed + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        seed = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        seed = ((seed ^ (seed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        seed ^= seed >> 31
    return torch.Generator(device=device).manual_seed(seed >> 1)


def round_stochastically(values: Tensor, *, generator: torch.Generator) -> Tensor:
    """fp32 values -> bf16, up or down with the probabilities that keep the expectation.

    Values that bf16 holds stay; infinities and NaN as well.
    """
    noise = torch.randint(
        1 << _LOW_BITS,
        values.shape,
        dtype=torch.int32,
        device=values.device,
        generator=generator,
    )
    bits = (values.contiguous().view(torch.int32) + noise) & -(1 << _LOW_BITS)
    rounded = torch.where(values.isfinite(), bits.view(torch.float32), values)
    return rounded.to(torch.bfloat16)
