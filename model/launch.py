"""What launchers of Triton kernels share: tiles, facts about the device, one typed way to launch.

Facts about a device are asked once per device: the driver takes microseconds to answer, and a
training step launches hundreds of kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The interpreter has no multiprocessors; several make it split sums as a device would.
INTERPRETED_PROCESSORS = 8
INTERPRETED_CAPABILITY = 80


class Tiles(NamedTuple):
    """Launch settings of a product: rows, columns, depth of a tile, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def cdiv(value: int, size: int) -> int:
    """value / size, rounded up."""
    return -(-value // size)


def power_of_two(value: int) -> int:
    """The least power of two that is not below value >= 1."""
    return 1 << (value - 1).bit_length()


@cache
def _cuda_facts(index: int) -> tuple[int, int]:
    facts = torch.cuda.get_device_properties(index)
    return 10 * facts.major + facts.minor, facts.multi_processor_count


def _facts(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda":
        return INTERPRETED_CAPABILITY, INTERPRETED_PROCESSORS
    return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)


def device_capability(x: Tensor) -> int:
    """Compute capability of x's device (major * 10 + minor); 80 for the interpreter."""
    return _facts(x.device)[0]


def processor_count(device: torch.device) -> int:
    """Multiprocessors of a CUDA device."""
    return _facts(device)[1]


def launcher(
    kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 3
) -> Callable[..., Any]:
    """The function that launches `kernel` on `grid` with its arguments and constants."""
    return partial(kernel[grid], num_warps=warps, num_stages=stages)
