"""Triton kernels of RMSNorm in front of a ternary product: normalise and round in one reading.

The normalised values are needed as int8 codes and in no other form, so they are never written:
x is read once, its codes and two numbers per row come out. A program owns whole rows and holds
them in registers. Only launched through `norm_linear.py`; the definition is in `reference_ops.py`.

Sources: RMSNorm 1910.07467; rounding inside the norm as in b1.58 2B4T 2504.12285.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # rounds to even when added and taken away, see triton_kernels


@triton.jit
def norm_quantize_kernel(
    x_ptr,
    gain_ptr,
    codes_ptr,
    step_ptr,
    rate_ptr,
    num_rows,
    width,
    x_stride,
    HAS_GAIN: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows: n = x rate gain, rate = 1 / sqrt(mean(x^2) + eps); codes and step of n, and rate."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK)
    row_inside = rows < num_rows
    inside = row_inside[:, None] & (columns < width)[None, :]
    ones = tl.full((BLOCK_ROWS,), 1.0, dtype=tl.float32)
    x_at = x_ptr + rows[:, None] * x_stride + columns[None, :]
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.div_rn(tl.sum(x * x, axis=1), ones * width)
    rate = tl.div_rn(ones, tl.sqrt_rn(mean + EPS))
    n = x * rate[:, None]
    if HAS_GAIN:
        gain = tl.load(gain_ptr + columns, mask=columns < width, other=0.0)
        n *= gain.to(tl.float32)[None, :]
    largest = tl.maximum(tl.max(tl.abs(n), axis=1), 1e-30)
    factor = tl.div_rn(ones, largest) * 127.0  # as torch evaluates 127 / tensor
    codes = (n * factor[:, None] + _ROUND) - _ROUND
    codes_at = codes_ptr + rows[:, None] * width + columns[None, :]
    tl.store(codes_at, codes.to(tl.int8), mask=inside)
    tl.store(step_ptr + rows, tl.div_rn(largest, ones * 127.0), mask=row_inside)
    tl.store(rate_ptr + rows, rate, mask=row_inside)


@triton.jit
def norm_gradient_kernel(
    grad_ptr,
    x_ptr,
    gain_ptr,
    rate_ptr,
    out_ptr,
    partial_ptr,
    num_rows,
    width,
    grad_stride,
    x_stride,
    rows_per_program,
    HAS_GAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With a = g gain and u = x rate: dx = rate (a - u mean(a u)), and dgain = sum of g u.

    A program adds the gain's gradient over its own rows; the caller adds the parts in order.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    column_inside = columns < width
    gain = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if HAS_GAIN:
        gain = tl.load(gain_ptr + columns, mask=column_inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    first = program * rows_per_program
    last = tl.minimum(first + rows_per_program, num_rows)
    for start in range(first, last, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        row_inside = rows < last
        inside = row_inside[:, None] & column_inside[None, :]
        grad_at = grad_ptr + rows[:, None] * grad_stride + columns[None, :]
        grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        x_at = x_ptr + rows[:, None] * x_stride + columns[None, :]
        rate = tl.load(rate_ptr + rows, mask=row_inside, other=0.0)[:, None]
        u = tl.load(x_at, mask=inside, other=0.0).to(tl.float32) * rate
        sums += grad * u
        grad *= gain[None, :]
        mean = tl.sum(grad * u, axis=1) / width
        grad = rate * (grad - u * mean[:, None])
        out_at = out_ptr + rows[:, None] * width + columns[None, :]
        tl.store(out_at, grad.to(out_ptr.dtype.element_ty), mask=inside)
    if HAS_GAIN:
        part = tl.sum(sums, axis=0)
        tl.store(partial_ptr + program * width + columns, part, mask=column_inside)
