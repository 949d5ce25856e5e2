"""Triton source of attention on the shared latent, with one map or the difference of two;
`attention_kernels.py` launches it.

    S_p[t, s] = scale (qC_p[t] . kC[s] + qR_p[t] . kR[s])     kR is one for all heads
    A_p = softmax(S_p) over what t may see        out = A1 v - lambda A2 v
Both maps of a head meet every tile of keys and values while it is on the chip: keys and values are
read once, not twice. Content and rotary parts stay apart, so that neither queries nor keys are
concatenated and the shared rotary key is never repeated for the heads.
Backward, with g the gradient of out, dA = g v^T and d_p = g . (A_p v):
    dS1 = A1 (dA - d1)    dS2 = -lambda A2 (dA - d2)    dlambda = -d2    dv = (A1 - lambda A2)^T g
and d1 = g . out + lambda d2, so that only A2 v is kept beside the output. Logarithms of the sums
are kept in powers of two.

Sources: FlashAttention-2 2307.08691; differential attention 2410.05258 and its V2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.sigma_kernel_src import load_tile, multiply_add

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_documents(documents_ptr, positions, inside, HAS_DOCUMENTS: tl.constexpr):
    """Document of each position, -1 for padding; the pointer stands at the row."""
    if HAS_DOCUMENTS:
        return tl.load(documents_ptr + positions, mask=inside, other=-1)
    else:
        return positions


@triton.jit
def open_pairs(document_t, document_s, t, s, t_inside, s_inside, HAS_DOCUMENTS: tl.constexpr):
    """Which keys s the queries t may see; a query outside sees all, which keeps it finite."""
    seen = s[None, :] <= t[:, None]
    if HAS_DOCUMENTS:
        same = (document_t[:, None] == document_s[None, :]) & (document_s >= 0)[None, :]
        seen &= same | (s[None, :] == t[:, None])
    return (seen | (t_inside == 0)[:, None]) & s_inside[None, :]


@triton.jit
def map_scores(q, q_rope, k, k_rope, scale, seen, DOT_IN_BF16: tl.constexpr):
    """Scores of one map in powers of two, -inf where nothing may be seen."""
    scores = multiply_add(q, tl.trans(k), tl.zeros(seen.shape, tl.float32), DOT_IN_BF16)
    scores = multiply_add(q_rope, tl.trans(k_rope), scores, DOT_IN_BF16)
    return tl.where(seen, scores * (scale * _LOG2_E), float("-inf"))


@triton.jit
def absorb(peak, total, sums, scores, v, DOT_IN_BF16: tl.constexpr):
    """Running maximum, sum of powers and weighted values after one more tile of keys."""
    highest = tl.maximum(peak, tl.max(scores, axis=1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    powers = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(peak - base)
    total = total * shrink + tl.sum(powers, axis=1)
    return highest, total, multiply_add(powers, v, sums * shrink[:, None], DOT_IN_BF16)


@triton.jit
def map_gradient(
    q, q_rope, k, k_rope, scale, seen, log_sum, delta, grad_map, DOT_IN_BF16: tl.constexpr
):
    """A and A (dA - delta) of one map."""
    scores = map_scores(q, q_rope, k, k_rope, scale, seen, DOT_IN_BF16)
    share = tl.exp2(scores - log_sum[:, None])
    return share, share * (grad_map - delta[:, None])


@triton.jit
def attention_kernel(
    q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, lam_ptr, documents_ptr, out_ptr, second_ptr,
    log_sum_ptr, num_queries, num_keys, scale, q_stride, q_rope_stride, k_stride, k_rope_stride,
    v_stride, HAS_DOCUMENTS: tl.constexpr, MAPS: tl.constexpr, HEADS: tl.constexpr,
    CONTENT: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """out and A2 v (B, T, H, W) and the sums' logarithms (B, H, maps, T) of a tile of queries."""
    tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows first
    lane = (tl.program_id(0) // tiles).to(tl.int64)  # b H + h
    batch, head = lane // HEADS, lane % HEADS
    i, c, r = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    w, inside, t = tl.arange(0, BLOCK_W), i < num_queries, i + (num_keys - num_queries)
    row, first = batch * num_queries + i, head * MAPS
    document = load_documents(documents_ptr + batch * num_keys, t, inside, HAS_DOCUMENTS)
    q1 = load_tile(q_ptr + first * CONTENT, row * q_stride, c, inside, c < CONTENT)
    q1_rope = load_tile(q_rope_ptr + first * ROPE, row * q_rope_stride, r, inside, r < ROPE)
    if MAPS == 2:
        q2 = load_tile(q_ptr + (first + 1) * CONTENT, row * q_stride, c, inside, c < CONTENT)
        at = q_rope_ptr + (first + 1) * ROPE
        q2_rope = load_tile(at, row * q_rope_stride, r, inside, r < ROPE)
        peak2, total2 = (
            tl.full((BLOCK_M,), float("-inf"), tl.float32),
            tl.zeros_like(t).to(tl.float32),
        )
        sums2 = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    peak1, total1 = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    sums1 = tl.zeros((BLOCK_M, BLOCK_W), tl.float32)
    for start in range(0, tl.minimum(num_keys, tl.max(t, axis=0) + 1), BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        key, s_inside = batch * num_keys + s, s < num_keys
        k = load_tile(k_ptr + head * CONTENT, key * k_stride, c, s_inside, c < CONTENT)
        k_rope = load_tile(k_rope_ptr, key * k_rope_stride, r, s_inside, r < ROPE)
        v = load_tile(v_ptr + head * WIDTH, key * v_stride, w, s_inside, w < WIDTH)
        document_s = load_documents(documents_ptr + batch * num_keys, s, s_inside, HAS_DOCUMENTS)
        seen = open_pairs(document, document_s, t, s, inside, s_inside, HAS_DOCUMENTS)
        scores = map_scores(q1, q1_rope, k, k_rope, scale, seen, DOT_IN_BF16)
        peak1, total1, sums1 = absorb(peak1, total1, sums1, scores, v, DOT_IN_BF16)
        if MAPS == 2:
            scores = map_scores(q2, q2_rope, k, k_rope, scale, seen, DOT_IN_BF16)
            peak2, total2, sums2 = absorb(peak2, total2, sums2, scores, v, DOT_IN_BF16)
    out = sums1 / total1[:, None]
    log_sum_ptr += lane * MAPS * num_queries + i
    tl.store(log_sum_ptr, peak1 + tl.log2(total1), mask=inside)
    at = ((row * HEADS + head) * WIDTH)[:, None] + w[None, :]
    mask = inside[:, None] & (w < WIDTH)[None, :]
    if MAPS == 2:
        second = sums2 / total2[:, None]
        out -= tl.load(lam_ptr + lane * num_queries + i, mask=inside, other=0.0)[:, None] * second
        tl.store(log_sum_ptr + num_queries, peak2 + tl.log2(total2), mask=inside)
        tl.store(second_ptr + at, second.to(second_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def delta_kernel(
    grad_ptr, out_ptr, second_ptr, lam_ptr, delta_ptr, num_queries,
    MAPS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """d1 and d2 (B, H, maps, T): how much each map's output went along with g."""
    tiles = tl.cdiv(num_queries, BLOCK_M)
    lane = (tl.program_id(0) // tiles).to(tl.int64)
    i, w = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_W)
    inside = i < num_queries
    rows = (((lane // HEADS) * num_queries + i) * HEADS + lane % HEADS) * WIDTH
    g = load_tile(grad_ptr, rows, w, inside, w < WIDTH).to(tl.float32)
    delta = tl.sum(g * load_tile(out_ptr, rows, w, inside, w < WIDTH).to(tl.float32), axis=1)
    delta_ptr += lane * MAPS * num_queries + i
    if MAPS == 2:
        second = load_tile(second_ptr, rows, w, inside, w < WIDTH).to(tl.float32)
        delta2 = tl.sum(g * second, axis=1)
        delta += delta2 * tl.load(lam_ptr + lane * num_queries + i, mask=inside, other=0.0)
        tl.store(delta_ptr + num_queries, delta2, mask=inside)
    tl.store(delta_ptr, delta, mask=inside)


@triton.jit
def query_gradient_kernel(
    grad_ptr, q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, lam_ptr, documents_ptr, log_sum_ptr,
    delta_ptr, grad_q_ptr, grad_q_rope_ptr, num_queries, num_keys, scale, q_stride,
    q_rope_stride, k_stride, k_rope_stride, v_stride,
    HAS_DOCUMENTS: tl.constexpr, MAPS: tl.constexpr, HEADS: tl.constexpr,
    CONTENT: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """dqC (B, T, H, maps, C) and dqR (B, T, H, maps, R) of a tile of queries."""
    tiles = tl.cdiv(num_queries, BLOCK_M)
    tile = tiles - 1 - tl.program_id(0) % tiles  # the longest rows first
    lane = (tl.program_id(0) // tiles).to(tl.int64)  # b H + h
    batch, head = lane // HEADS, lane % HEADS
    i, c, r = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    w, inside, t = tl.arange(0, BLOCK_W), i < num_queries, i + (num_keys - num_queries)
    row, first = batch * num_queries + i, head * MAPS
    document = load_documents(documents_ptr + batch * num_keys, t, inside, HAS_DOCUMENTS)
    q1 = load_tile(q_ptr + first * CONTENT, row * q_stride, c, inside, c < CONTENT)
    q1_rope = load_tile(q_rope_ptr + first * ROPE, row * q_rope_stride, r, inside, r < ROPE)
    if MAPS == 2:
        q2 = load_tile(q_ptr + (first + 1) * CONTENT, row * q_stride, c, inside, c < CONTENT)
        at = q_rope_ptr + (first + 1) * ROPE
        q2_rope = load_tile(at, row * q_rope_stride, r, inside, r < ROPE)
        delta2 = tl.load(delta_ptr + (lane * 2 + 1) * num_queries + i, mask=inside, other=0.0)
        sum2 = tl.load(log_sum_ptr + (lane * 2 + 1) * num_queries + i, mask=inside, other=0.0)
        grad2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        grad2_rope = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    delta1 = tl.load(delta_ptr + lane * MAPS * num_queries + i, mask=inside, other=0.0)
    sum1 = tl.load(log_sum_ptr + lane * MAPS * num_queries + i, mask=inside, other=0.0)
    grad1 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    grad1_rope = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    g = load_tile(grad_ptr, (row * HEADS + head) * WIDTH, w, inside, w < WIDTH)
    for start in range(0, tl.minimum(num_keys, tl.max(t, axis=0) + 1), BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        key, s_inside = batch * num_keys + s, s < num_keys
        k = load_tile(k_ptr + head * CONTENT, key * k_stride, c, s_inside, c < CONTENT)
        k_rope = load_tile(k_rope_ptr, key * k_rope_stride, r, s_inside, r < ROPE)
        v = load_tile(v_ptr + head * WIDTH, key * v_stride, w, s_inside, w < WIDTH)
        document_s = load_documents(documents_ptr + batch * num_keys, s, s_inside, HAS_DOCUMENTS)
        seen = open_pairs(document, document_s, t, s, inside, s_inside, HAS_DOCUMENTS)
        grad_map = multiply_add(g, tl.trans(v), tl.zeros(seen.shape, tl.float32), DOT_IN_BF16)
        _, slope = map_gradient(
            q1, q1_rope, k, k_rope, scale, seen, sum1, delta1, grad_map, DOT_IN_BF16
        )
        grad1 = multiply_add(slope, k, grad1, DOT_IN_BF16)
        grad1_rope = multiply_add(slope, k_rope, grad1_rope, DOT_IN_BF16)
        if MAPS == 2:
            _, slope = map_gradient(
                q2, q2_rope, k, k_rope, scale, seen, sum2, delta2, grad_map, DOT_IN_BF16
            )
            grad2 = multiply_add(slope, k, grad2, DOT_IN_BF16)
            grad2_rope = multiply_add(slope, k_rope, grad2_rope, DOT_IN_BF16)
    at = (row * HEADS + head) * MAPS
    store_rows(grad_q_ptr, grad1 * scale, at * CONTENT, c, inside, c < CONTENT)
    store_rows(grad_q_rope_ptr, grad1_rope * scale, at * ROPE, r, inside, r < ROPE)
    if MAPS == 2:
        lam = tl.load(lam_ptr + lane * num_queries + i, mask=inside, other=0.0)[:, None] * -scale
        store_rows(grad_q_ptr, grad2 * lam, (at + 1) * CONTENT, c, inside, c < CONTENT)
        store_rows(grad_q_rope_ptr, grad2_rope * lam, (at + 1) * ROPE, r, inside, r < ROPE)


@triton.jit
def store_rows(ptr, value, rows, columns, row_inside, column_inside):
    """The opposite of load_tile, in the pointer's type."""
    mask = row_inside[:, None] & column_inside[None, :]
    tl.store(ptr + rows[:, None] + columns[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def key_gradient_kernel(
    grad_ptr, q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, lam_ptr, documents_ptr, log_sum_ptr,
    delta_ptr, grad_k_ptr, grad_k_rope_ptr, grad_v_ptr, num_queries, num_keys, scale, q_stride,
    q_rope_stride, k_stride, k_rope_stride, v_stride,
    HAS_DOCUMENTS: tl.constexpr, MAPS: tl.constexpr, HEADS: tl.constexpr,
    CONTENT: tl.constexpr, ROPE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """dkC (B, S, H, C), a head's part of dkR (B, S, H, R) and dv (B, S, H, W) of a tile of keys."""
    tiles = tl.cdiv(num_keys, BLOCK_N)
    tile, lane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = lane // HEADS, lane % HEADS
    s, c, r = tile * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R)
    w, s_inside, key = tl.arange(0, BLOCK_W), s < num_keys, batch * num_keys + s
    documents_ptr += batch * num_keys
    document_s = load_documents(documents_ptr, s, s_inside, HAS_DOCUMENTS)
    k = load_tile(k_ptr + head * CONTENT, key * k_stride, c, s_inside, c < CONTENT)
    k_rope = load_tile(k_rope_ptr, key * k_rope_stride, r, s_inside, r < ROPE)
    v = load_tile(v_ptr + head * WIDTH, key * v_stride, w, s_inside, w < WIDTH)
    grad_k, grad_v = (
        tl.zeros((BLOCK_N, BLOCK_C), tl.float32),
        tl.zeros((BLOCK_N, BLOCK_W), tl.float32),
    )
    grad_k_rope = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    offset = num_keys - num_queries
    for start in range(
        tl.maximum(tile * BLOCK_N - offset, 0) // BLOCK_M * BLOCK_M, num_queries, BLOCK_M
    ):
        i = start + tl.arange(0, BLOCK_M)
        row, inside = batch * num_queries + i, i < num_queries
        document = load_documents(documents_ptr, i + offset, inside, HAS_DOCUMENTS)
        seen = open_pairs(document, document_s, i + offset, s, inside, s_inside, HAS_DOCUMENTS)
        g = load_tile(grad_ptr, (row * HEADS + head) * WIDTH, w, inside, w < WIDTH)
        grad_map = multiply_add(g, tl.trans(v), tl.zeros(seen.shape, tl.float32), DOT_IN_BF16)
        for map in tl.static_range(MAPS):
            own = head * MAPS + map
            q = load_tile(q_ptr + own * CONTENT, row * q_stride, c, inside, c < CONTENT)
            q_rope = load_tile(q_rope_ptr + own * ROPE, row * q_rope_stride, r, inside, r < ROPE)
            at = (lane * MAPS + map) * num_queries + i
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
            log_sum = tl.load(log_sum_ptr + at, mask=inside, other=0.0)
            share, slope = map_gradient(
                q, q_rope, k, k_rope, scale, seen, log_sum, delta, grad_map, DOT_IN_BF16
            )
            if map == 1:
                lam = tl.load(lam_ptr + lane * num_queries + i, mask=inside, other=0.0)
                share, slope = share * -lam[:, None], slope * -lam[:, None]
            grad_v = multiply_add(tl.trans(share), g, grad_v, DOT_IN_BF16)
            grad_k = multiply_add(tl.trans(slope), q, grad_k, DOT_IN_BF16)
            grad_k_rope = multiply_add(tl.trans(slope), q_rope, grad_k_rope, DOT_IN_BF16)
    at = key * HEADS + head
    store_rows(grad_k_ptr, grad_k * scale, at * CONTENT, c, s_inside, c < CONTENT)
    store_rows(grad_k_rope_ptr, grad_k_rope * scale, at * ROPE, r, s_inside, r < ROPE)
    store_rows(grad_v_ptr, grad_v, at * WIDTH, w, s_inside, w < WIDTH)
