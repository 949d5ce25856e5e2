"""Exact products of integer codes in bytes, on CPUs that multiply bytes.

int8 activation codes times ternary codes have sums below 2^24, which fp32 adds without rounding;
int32 does so anyway. Both give the same numbers, and a CPU with byte products (AVX-512 VNNI) needs
a fifth of the time. Elsewhere torch's int8 product is a plain loop a hundred times slower than
fp32, so there, and for every other type, the fp32 product stands: it is the definition.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from model.weight_cache import cached

_TINY = 1e-30


@functools.cache
def multiplies_bytes() -> bool:
    """Whether this CPU has byte products and torch was built to use them."""
    # torch has no public question for this yet; where it has not even this one, the answer is no.
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(torch.backends.mkldnn.is_available() and supported is not None and supported())


def code_dtype(values: Tensor) -> torch.dtype:
    """Type in which products of the codes of `values` are best held: int8 or their own."""
    if torch.compiler.is_compiling():  # the question to the CPU cannot be traced
        return values.dtype
    on_cpu = values.device.type == "cpu" and values.dtype == torch.float32
    return torch.int8 if on_cpu and multiplies_bytes() else values.dtype


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of x (..., D), in x's type, and the step (..., 1) with x ~ codes * step."""
    peak = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_min_(_TINY)
    return (x * (127.0 / peak)).round_(), peak / 127.0


def row_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """`token_codes` of few rows: fewer operations, each slower on many."""
    peak = torch.linalg.vector_norm(x, torch.inf, -1, True).clamp_min_(_TINY)
    return (x * (127.0 / peak)).round_(), peak / 127.0


def held_as(weight_codes: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The codes of `weight` in another type; bytes are kept as long as the codes are."""
    if dtype != torch.int8:
        return weight_codes.to(dtype)
    held = cached("bytes", (weight,), 0, lambda: weight_codes.to(dtype))
    return held.view_as(weight_codes)


def times_transposed(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """codes (n, in) times weight_codes (out, in) transposed: int32 for int8 operands."""
    if codes.dtype == torch.int8:
        return torch.ops.aten._int_mm(codes, weight_codes.mT)
    return codes @ weight_codes.mT


def code_product(codes: Tensor, weight_codes: Tensor, weight: Tensor) -> Tensor:
    """codes (..., in) times weight_codes (out, in) transposed; like matmul where those are stacked.

    Codes are integers in any type; weight is what weight_codes are the codes of, whose bytes are
    kept as long as they. Returns int32 in place of codes' type where bytes are multiplied.
    """
    dtype = code_dtype(codes)
    if dtype != torch.int8 or weight_codes.dim() != 2:
        return torch.matmul(codes, weight_codes.mT)
    held = held_as(weight_codes, weight, dtype)
    rows = codes.to(dtype).reshape(-1, codes.shape[-1])
    return times_transposed(rows, held).view(*codes.shape[:-1], held.shape[0])
