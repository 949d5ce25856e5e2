"""Triton kernels of the linear head's cross entropy: statistics, gradient of logits, products.

Logits z = h W^T live in registers only. The forward pass reduces each tile to a row's logsumexp and
its label's logit; backward forms the tile again and keeps (softmax - one hot) of a bounded number
of rows, from which two ordinary products make the gradients. Forming the tile twice costs
2 N V d FLOP and saves writing and reading fp32 logits, 14 bytes for each of them.

Cut cross entropy adds its partial products into memory behind locks, in an order that timing
decides. Here every sum has a fixed order, so that a resumed run repeats to the bit.

Only launched through `fused_cross_entropy.py`; the definition is in `reference_ops.py`. Sources:
2411.09009 (recomputing tiles), 2410.10989 (blocks of rows), 1805.02867 (online softmax).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits_tile(
    hidden_ptr,
    weight_ptr,
    m,
    v,
    num_rows,
    vocabulary,
    depth,
    hidden_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits (BLOCK_M, BLOCK_V) of rows m and entries v in fp32; 0 outside."""
    k = tl.arange(0, BLOCK_K)
    logits = tl.zeros((BLOCK_M, BLOCK_V), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k_inside = start + k < depth
        hidden_at = m[:, None] * hidden_stride + start + k[None, :]
        weight_at = v[None, :] * weight_stride + start + k[:, None]
        hidden = tl.load(
            hidden_ptr + hidden_at, mask=(m < num_rows)[:, None] & k_inside[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptr + weight_at, mask=(v < vocabulary)[None, :] & k_inside[:, None], other=0.0
        )
        logits = tl.dot(hidden, weight, logits, input_precision="ieee")
    return logits


@triton.jit
def logit_statistics_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    normaliser_ptr,
    picked_ptr,
    num_rows,
    vocabulary,
    depth,
    hidden_stride,
    weight_stride,
    blocks_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """normaliser[s, m] = log sum exp(z[m, v]) and picked[s, m] = z[m, label] over split s of v.

    A row's vocabulary is split among programs until they fill the device; picked is 0 in the
    splits that do not hold the label.
    """
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1).to(tl.int64)
    label = tl.load(labels_ptr + m, mask=m < num_rows, other=-1)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    picked = tl.zeros((BLOCK_M,), dtype=tl.float32)
    first = split * blocks_per_split * BLOCK_V
    last = tl.minimum(first + blocks_per_split * BLOCK_V, vocabulary)
    for start in range(first, last, BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logits = _logits_tile(
            *(hidden_ptr, weight_ptr, m, v, num_rows, vocabulary, depth),
            *(hidden_stride, weight_stride, BLOCK_M, BLOCK_V, BLOCK_K),
        )
        logits = tl.where((v < vocabulary)[None, :], logits, float("-inf"))
        picked += tl.sum(tl.where(v[None, :] == label[:, None], logits, 0.0), axis=1)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher
    tl.store(normaliser_ptr + split * num_rows + m, peak + tl.log(total), mask=m < num_rows)
    tl.store(picked_ptr + split * num_rows + m, picked, mask=m < num_rows)


@triton.jit
def logit_gradient_kernel(
    hidden_ptr,
    weight_ptr,
    labels_ptr,
    normaliser_ptr,
    grad_ptr,
    num_rows,
    vocabulary,
    depth,
    hidden_stride,
    weight_stride,
    grad_stride,
    IGNORED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad[m, v] = exp(z[m, v] - normaliser[m]) - (v is the label), 0 in ignored rows.

    Without the factor of the mean: it is one number for all rows, and in fp16 it would push small
    probabilities below what the type can hold.
    """
    program = tl.program_id(0)
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    blocks_v = tl.cdiv(vocabulary, BLOCK_V)
    first_m = (program // (GROUP_M * blocks_v)) * GROUP_M
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    within = program % (GROUP_M * blocks_v)
    m = (first_m + within % group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    v = (within // group).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = _logits_tile(
        *(hidden_ptr, weight_ptr, m, v, num_rows, vocabulary, depth),
        *(hidden_stride, weight_stride, BLOCK_M, BLOCK_V, BLOCK_K),
    )
    label = tl.load(labels_ptr + m, mask=m < num_rows, other=IGNORED)
    normaliser = tl.load(normaliser_ptr + m, mask=m < num_rows, other=0.0)
    grad = tl.exp(logits - normaliser[:, None])
    grad -= tl.where(v[None, :] == label[:, None], 1.0, 0.0)
    grad = tl.where((label != IGNORED)[:, None], grad, 0.0)
    inside = (m < num_rows)[:, None] & (v < vocabulary)[None, :]
    grad_at = m[:, None] * grad_stride + v[None, :]
    tl.store(grad_ptr + grad_at, grad.to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scaled_product_kernel(
    a_ptr,
    b_ptr,
    scale_ptr,
    out_ptr,
    num_rows,
    num_columns,
    depth,
    a_row_stride,
    a_depth_stride,
    b_stride,
    out_stride,
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """out[m, n] = scale * sum_k a[m, k] b[k, n], added to what out holds if ADD.

    The strides of `a` make it a matrix or the transpose of one; scale is one fp32 number that
    never leaves the device.
    """
    program = tl.program_id(0)
    blocks_m = tl.cdiv(num_rows, BLOCK_M)
    blocks_n = tl.cdiv(num_columns, BLOCK_N)
    first_m = (program // (GROUP_M * blocks_n)) * GROUP_M
    group = tl.minimum(blocks_m - first_m, GROUP_M)
    within = program % (GROUP_M * blocks_n)
    m = (first_m + within % group).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // group).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, depth, BLOCK_K):
        k_inside = start + k < depth
        a_at = m[:, None] * a_row_stride + (start + k)[None, :] * a_depth_stride
        b_at = (start + k)[:, None] * b_stride + n[None, :]
        a = tl.load(a_ptr + a_at, mask=(m < num_rows)[:, None] & k_inside[None, :], other=0.0)
        b = tl.load(b_ptr + b_at, mask=(n < num_columns)[None, :] & k_inside[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="ieee")
    sums *= tl.load(scale_ptr)
    inside = (m < num_rows)[:, None] & (n < num_columns)[None, :]
    out_at = out_ptr + m[:, None] * out_stride + n[None, :]
    if ADD:
        sums += tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=inside)
