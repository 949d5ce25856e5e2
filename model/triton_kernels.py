"""Triton kernels of the ternary linear layer: rounding, int8 products, the weight gradient.

A ternary weight is exact in 8 bits, so forward and input gradient run as int8 x int8 -> int32 on
tensor cores, where the peak is twice to four times that of bf16; only activations and output
gradients are rounded. Weights are read as one byte instead of four. Scales belong to rows and
leave the sum, so they are applied once, after it.

Only launched through `ternary_linear.py`, which holds the formulas; the plain definitions are in
`reference_ops.py`. Offsets are 64-bit, since a logits-sized operand passes 2^31 elements; every
dimension is masked.

Rounding to nearest even is done by adding and subtracting 1.5 * 2^23: exact for |v| < 2^22, and
the same in the interpreter as on the device, where a library call is not available to both.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    column_scale_ptr,
    codes_ptr,
    scale_ptr,
    source_ptr,
    expert_ptr,
    num_rows,
    num_columns,
    x_stride,
    HAS_COLUMN_SCALE: tl.constexpr,
    HAS_SOURCE: tl.constexpr,
    HAS_EXPERT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows: codes = round(v * 127 / max|v|), scale = max|v| / 127, with v = x * column_scale.

    x is read in row source[row], and the scales of expert[row], where those are given.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < num_rows
    x_rows = rows
    if HAS_SOURCE:
        x_rows = tl.load(source_ptr + rows, mask=row_inside, other=0).to(tl.int64)
    scale_at = tl.zeros((BLOCK_ROWS,), dtype=tl.int64)
    if HAS_EXPERT:
        scale_at = tl.load(expert_ptr + rows, mask=row_inside, other=0).to(tl.int64) * num_columns
    peak = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < num_columns)[None, :]
        v = tl.load(x_ptr + x_rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        v = v.to(tl.float32)
        if HAS_COLUMN_SCALE:
            at = column_scale_ptr + scale_at[:, None] + columns[None, :]
            v *= tl.load(at, mask=inside, other=0.0)
        peak = tl.maximum(peak, tl.abs(v))
    largest = tl.maximum(tl.max(peak, axis=1), 1e-30)
    # As torch evaluates 127 / tensor.
    factor = tl.div_rn(tl.full((BLOCK_ROWS,), 1.0, dtype=tl.float32), largest) * 127.0
    step = tl.div_rn(largest, tl.full((BLOCK_ROWS,), 127.0, dtype=tl.float32))
    tl.store(scale_ptr + rows, step, mask=row_inside)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < num_columns)[None, :]
        v = tl.load(x_ptr + x_rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0)
        v = v.to(tl.float32)
        if HAS_COLUMN_SCALE:
            at = column_scale_ptr + scale_at[:, None] + columns[None, :]
            v *= tl.load(at, mask=inside, other=0.0)
        codes = (v * factor[:, None] + _ROUND) - _ROUND
        codes_at = codes_ptr + rows[:, None] * num_columns + columns[None, :]
        tl.store(codes_at, codes.to(tl.int8), mask=inside)


@triton.jit
def ternarize_kernel(
    weight_ptr,
    codes_ptr,
    codes_t_ptr,
    scale_ptr,
    num_rows,
    num_columns,
    weight_stride,
    rows_per_matrix,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """A block of rows of W: ternary codes in both layouts and the least-squares scale per row.

    W is one matrix or a stack of them; the second layout transposes each by itself.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < num_rows
    total = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        inside = row_inside[:, None] & (columns < num_columns)[None, :]
        offsets = rows[:, None] * weight_stride + columns[None, :]
        w = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tl.abs(w), axis=1)
    width = tl.full((BLOCK_ROWS,), 1.0, dtype=tl.float32) * num_columns
    gamma = tl.div_rn(total, width) + 1e-12
    weighted = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    count = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_inside = columns < num_columns
        inside = row_inside[:, None] & column_inside[None, :]
        offsets = rows[:, None] * weight_stride + columns[None, :]
        w = tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        # |w| / gamma > 1/2 is what rounding does: ties go to the even code, which is 0.
        nonzero = tl.abs(w) > 0.5 * gamma[:, None]
        q = tl.where(nonzero, tl.where(w > 0, 1.0, -1.0), 0.0)
        weighted += tl.sum(w * q, axis=1)
        count += tl.sum(tl.abs(q), axis=1)
        codes = q.to(tl.int8)
        tl.store(codes_ptr + rows[:, None] * num_columns + columns[None, :], codes, mask=inside)
        start_of_matrix = (rows // rows_per_matrix) * rows_per_matrix * num_columns
        turned = columns[None, :].to(tl.int64) * rows_per_matrix
        turned += (start_of_matrix + rows % rows_per_matrix)[:, None]
        tl.store(codes_t_ptr + turned, codes, mask=inside)
    tl.store(scale_ptr + rows, tl.div_rn(weighted, tl.maximum(count, 1.0)), mask=row_inside)


@triton.jit
def int8_product_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    num_rows,
    num_outputs,
    depth,
    out_stride,
    HAS_B_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[m, n] = a_scale[m] * b_scale[n] * sum_k a[m, k] b[n, k]; a and b int8 and contiguous."""
    # Neighbouring programs share rows of b in the cache: GROUP_M row blocks before the next column.
    program = tl.program_id(0)
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    blocks_n = tl.cdiv(num_outputs, BLOCK_N)
    per_group = GROUP_M * blocks_n
    first_m = (program // per_group) * GROUP_M
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + (program % per_group) % group
    block_n = (program % per_group) // group

    m = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, depth, BLOCK_K):
        k_inside = start + k < depth
        a_at = m[:, None] * depth + start + k[None, :]
        b_at = n[None, :] * depth + start + k[:, None]
        a = tl.load(a_ptr + a_at, mask=(m < num_rows)[:, None] & k_inside[None, :], other=0)
        b = tl.load(b_ptr + b_at, mask=(n < num_outputs)[None, :] & k_inside[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    out = sums.to(tl.float32)
    out *= tl.load(a_scale_ptr + m, mask=m < num_rows, other=0.0)[:, None]
    if HAS_B_SCALE:
        out *= tl.load(b_scale_ptr + n, mask=n < num_outputs, other=0.0)[None, :]
    inside = (m < num_rows)[:, None] & (n < num_outputs)[None, :]
    tl.store(
        out_ptr + m[:, None] * out_stride + n[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def weight_gradient_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    partial_ptr,
    num_rows,
    num_outputs,
    num_inputs,
    grad_stride,
    rows_per_split,
    DOT_IN_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """partial[s, n, k] = sum over split s of rows m of grad[m, n] * scale[m] * codes[m, k].

    A small weight has too few tiles to fill the device, so the rows are split; the caller adds the
    parts in a fixed order (atomic adds would make the result depend on timing).

    fp32 gradients are split into two tf32 numbers: 22 bits of them, and codes are exact. Asking
    for "ieee" would give a single tf32 product, 11 bits, on sm_100: there Triton sees through the
    conversion of the codes (triton-lang/triton issue 10176).
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(2).to(tl.int64)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, num_rows)
    sums = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row_inside = m < last
        grad = tl.load(
            grad_ptr + m[None, :] * grad_stride + n[:, None],
            mask=row_inside[None, :] & (n < num_outputs)[:, None],
            other=0.0,
        ).to(tl.float32)  # (BLOCK_N, BLOCK_M)
        grad *= tl.load(scale_ptr + m, mask=row_inside, other=0.0)[None, :]
        codes = tl.load(
            codes_ptr + m[:, None] * num_inputs + k[None, :],
            mask=row_inside[:, None] & (k < num_inputs)[None, :],
            other=0,
        )  # (BLOCK_M, BLOCK_K)
        if DOT_IN_BF16:
            sums = tl.dot(grad.to(tl.bfloat16), codes.to(tl.bfloat16), sums)
        else:
            sums = tl.dot(grad, codes.to(tl.float32), sums, input_precision="tf32x3")
    offsets = (split * num_outputs + n[:, None]) * num_inputs + k[None, :]
    inside = (n < num_outputs)[:, None] & (k < num_inputs)[None, :]
    tl.store(partial_ptr + offsets, sums, mask=inside)
