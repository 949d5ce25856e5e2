"""Triton kernels of ternary SwiGLU experts: grouped int8 products and the row work between them.

Rows are token copies sorted by expert. How many each expert got is known to the device only, and
asking for it would stop the host once per layer. So the grid is launched for the largest number of
row blocks that any distribution can need, at most one per expert too many; every program finds its
expert by counting the experts that end before its block, and the surplus ones return at once.
An expert without rows has no blocks, and its weight gradient is a sum over nothing.

Only launched through `ternary_experts.py`, which holds the formulas; the definitions are in
`reference_ops.py`. Sources: MegaBlocks 2211.15841 (blocks of a sorted batch), SwiGLU 2002.05202.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUND = tl.constexpr(12582912.0)  # rounds to even when added and taken away, see triton_kernels


@triton.jit
def grouped_int8_product_kernel(
    a_ptr,
    b_ptr,
    a_scale_ptr,
    b_scale_ptr,
    out_ptr,
    source_ptr,
    row_ends_ptr,
    block_ends_ptr,
    num_experts,
    num_outputs,
    depth,
    HAS_SOURCE: tl.constexpr,
    HAS_B_SCALE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[m, n] = sa[m'] sb[e, n] sum_k a[m', k] b[e, n, k], e the expert of row m.

    m' is source[m], or m itself; everything is contiguous.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks_n = tl.cdiv(num_outputs, BLOCK_N)
    total = tl.load(block_ends_ptr + num_experts - 1)
    if program >= total * blocks_n:
        return
    first_m = (program // (GROUP_M * blocks_n)) * GROUP_M
    group = tl.minimum(total - first_m, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    block = first_m + within % group
    e = tl.arange(0, BLOCK_E)
    ends = tl.load(block_ends_ptr + e, mask=e < num_experts, other=2147483647)
    expert = tl.sum((ends <= block).to(tl.int64), axis=0)
    blocks_before = tl.max(tl.where(ends <= block, ends, 0), axis=0)
    first = tl.load(row_ends_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(row_ends_ptr + expert)

    m = first + (block - blocks_before) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // group) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row_inside = m < last
    source = m
    if HAS_SOURCE:
        source = tl.load(source_ptr + m, mask=row_inside, other=0)
    b_ptr += expert * num_outputs * depth
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, depth, BLOCK_K):
        k_inside = start + k < depth
        a_at = source[:, None] * depth + start + k[None, :]
        b_at = n[None, :] * depth + start + k[:, None]
        a = tl.load(a_ptr + a_at, mask=row_inside[:, None] & k_inside[None, :], other=0)
        b = tl.load(b_ptr + b_at, mask=(n < num_outputs)[None, :] & k_inside[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
    out = sums.to(tl.float32)
    out *= tl.load(a_scale_ptr + source, mask=row_inside, other=0.0)[:, None]
    if HAS_B_SCALE:
        b_scale_at = b_scale_ptr + expert * num_outputs + n
        out *= tl.load(b_scale_at, mask=n < num_outputs, other=0.0)[None, :]
    inside = row_inside[:, None] & (n < num_outputs)[None, :]
    out_at = out_ptr + m[:, None] * num_outputs + n[None, :]
    tl.store(out_at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grouped_weight_gradient_kernel(
    grad_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    grad_source_ptr,
    codes_source_ptr,
    row_ends_ptr,
    num_outputs,
    num_inputs,
    HAS_GRAD_SOURCE: tl.constexpr,
    HAS_CODES_SOURCE: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e, n, k] = sum over rows m of expert e of scale[m] grad[m', n] codes[m", k].

    m' and m" are the rows' sources, or m itself; everything is contiguous.
    """
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    expert = tl.program_id(2).to(tl.int64)
    first = tl.load(row_ends_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(row_ends_ptr + expert)
    sums = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        row_inside = m < last
        grad_row = m
        if HAS_GRAD_SOURCE:
            grad_row = tl.load(grad_source_ptr + m, mask=row_inside, other=0)
        codes_row = m
        if HAS_CODES_SOURCE:
            codes_row = tl.load(codes_source_ptr + m, mask=row_inside, other=0)
        grad = tl.load(
            grad_ptr + grad_row[None, :] * num_outputs + n[:, None],
            mask=row_inside[None, :] & (n < num_outputs)[:, None],
            other=0.0,
        ).to(tl.float32)  # (BLOCK_N, BLOCK_M)
        grad *= tl.load(scale_ptr + m, mask=row_inside, other=0.0)[None, :]
        codes = tl.load(
            codes_ptr + codes_row[:, None] * num_inputs + k[None, :],
            mask=row_inside[:, None] & (k < num_inputs)[None, :],
            other=0,
        )  # (BLOCK_M, BLOCK_K)
        if DOT_IN_BF16:
            sums = tl.dot(grad.to(tl.bfloat16), codes.to(tl.bfloat16), sums)
        else:
            sums = tl.dot(grad, codes.to(tl.float32), sums, input_precision="tf32x3")
    offsets = (expert * num_outputs + n[:, None]) * num_inputs + k[None, :]
    inside = (n < num_outputs)[:, None] & (k < num_inputs)[None, :]
    tl.store(out_ptr + offsets, sums, mask=inside)


@triton.jit
def _swiglu_block(gate_up_ptr, rows, columns, inside, width):
    """gate, up and sigmoid(gate) of a block of rows and columns in fp32; 0 outside."""
    at = gate_up_ptr + rows[:, None] * 2 * width + columns[None, :]
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=inside, other=0.0).to(tl.float32)
    return gate, up, 1.0 / (1.0 + tl.exp(-gate))


@triton.jit
def activate_rows_kernel(
    gate_up_ptr,
    codes_ptr,
    step_ptr,
    rate_ptr,
    num_rows,
    width,
    SUB_NORM: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Codes and step of rows n = rate * silu(gate) * up, rate = 1 / rms, in two readings."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < num_rows
    ones = tl.full((BLOCK_ROWS,), 1.0, dtype=tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    peak = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < width)[None, :]
        gate, up, share = _swiglu_block(gate_up_ptr, rows, columns, inside, width)
        hidden = gate * share * up
        squares += hidden * hidden
        peak = tl.maximum(peak, tl.abs(hidden))
    rate = ones
    if SUB_NORM:
        rate = tl.div_rn(ones, tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=1), ones * width) + EPS))
    # Multiplying by the rate keeps the order, so the peak of n is the peak times the rate.
    largest = tl.maximum(tl.max(peak, axis=1) * rate, 1e-30)
    factor = tl.div_rn(ones * 127.0, largest)
    tl.store(step_ptr + rows, tl.div_rn(largest, ones * 127.0), mask=row_inside)
    tl.store(rate_ptr + rows, rate, mask=row_inside)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < width)[None, :]
        gate, up, share = _swiglu_block(gate_up_ptr, rows, columns, inside, width)
        n = gate * share * up * rate[:, None]
        codes = (n * factor[:, None] + _ROUND) - _ROUND
        codes_at = codes_ptr + rows[:, None] * width + columns[None, :]
        tl.store(codes_at, codes.to(tl.int8), mask=inside)


@triton.jit
def activation_gradient_kernel(
    grad_ptr,
    gate_up_ptr,
    codes_ptr,
    step_ptr,
    rate_ptr,
    gates_ptr,
    out_ptr,
    grad_gates_ptr,
    num_rows,
    width,
    SUB_NORM: tl.constexpr,
    HAS_GATES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows, g the gradient of the rounded n before the row's gate w (1 without gates).

    grad_gate = <g, codes step>; a = w rate (g - n mean(g n)), or w g without the norm; the
    gradient of [gate, up] is [a up silu'(gate), a silu(gate)].
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_inside = rows < num_rows
    rate = tl.load(rate_ptr + rows, mask=row_inside, other=0.0)
    rounded = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    exact = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < width)[None, :]
        at = rows[:, None] * width + columns[None, :]
        gate, up, share = _swiglu_block(gate_up_ptr, rows, columns, inside, width)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        codes = tl.load(codes_ptr + at, mask=inside, other=0)
        rounded += grad * codes.to(tl.float32)
        exact += grad * (gate * share * up * rate[:, None])
    weight = tl.full((BLOCK_ROWS,), 1.0, dtype=tl.float32)
    if HAS_GATES:
        weight = tl.load(gates_ptr + rows, mask=row_inside, other=0.0).to(tl.float32)
        step = tl.load(step_ptr + rows, mask=row_inside, other=0.0)
        tl.store(grad_gates_ptr + rows, tl.sum(rounded, axis=1) * step, mask=row_inside)
    mean = tl.sum(exact, axis=1) / width
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = row_inside[:, None] & (columns < width)[None, :]
        gate, up, share = _swiglu_block(  # pyright: ignore[reportGeneralTypeIssues]
            gate_up_ptr, rows, columns, inside, width
        )
        grad_at = grad_ptr + rows[:, None] * width + columns[None, :]
        grad = tl.load(grad_at, mask=inside, other=0.0).to(tl.float32)
        if SUB_NORM:
            grad = rate[:, None] * (grad - gate * share * up * (rate * mean)[:, None])
        grad *= weight[:, None]
        out_at = out_ptr + rows[:, None] * 2 * width + columns[None, :]
        grad_gate = grad * up * share * (1.0 + gate * (1.0 - share))
        tl.store(out_at, grad_gate.to(out_ptr.dtype.element_ty), mask=inside)
        grad_up = grad * gate * share
        tl.store(out_at + width, grad_up.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def combine_rows_kernel(
    rows_ptr,
    row_of_slot_ptr,
    gates_ptr,
    out_ptr,
    num_tokens,
    width,
    TOP_K: tl.constexpr,
    HAS_GATES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = sum over slots s of gates[t, s] * rows[row_of_slot[t, s]], in the order of slots."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token_inside = tokens < num_tokens
    inside = token_inside[:, None] & (columns < width)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK), dtype=tl.float32)
    for slot in range(TOP_K):
        slots = tokens * TOP_K + slot
        rows = tl.load(row_of_slot_ptr + slots, mask=token_inside, other=0).to(tl.int64)
        values_at = rows_ptr + rows[:, None] * width + columns[None, :]
        values = tl.load(values_at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATES:
            gates = tl.load(gates_ptr + slots, mask=token_inside, other=0.0)
            values *= gates.to(tl.float32)[:, None]
        total += values
    out_at = out_ptr + tokens[:, None] * width + columns[None, :]
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask=inside)
