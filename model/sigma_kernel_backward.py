"""Triton source of the chunked Mamba-3 scan, backward; the formulas' names are those of
`sigma_kernel_src.py`, whose forward these kernels invert.

With g the gradient of y, and a_k that of V_k:
    a_k    = 2^cum_end open a_{k+1} + sum_t 2^cum_t open C[t] g[t]^T         from the last chunk on
    Z_q[s] = sum_{t>s} 2^(cum_t - cum_s) open G[rt, qs] g_r[t]
             + 2^(cum_end - cum_s) open B_q[s] a_{k+1}
    D_q[s] = sum_r G[rs, qs] g_r[s]
    dX_q   = w Z_q + gamma D_q + skip g_q      dw = sum_q X_q . Z_q      dgamma = sum_q X_q . D_q
    dG     = sum over heads of (2^(cum_t - cum_s) open w_s, on the diagonal gamma) (g_r[t] . X_q[s])
    dC     = dG B + sum over heads of 2^cum_t open V_k g           and dB likewise
Every term of y[t] grows with 2^cum_t and every term of dX[s] falls with 2^cum_s, so the gradient of
cum at t is g . y - X . dX: no pair of steps is walked for it, and what carries no decay (diagonal,
skip) cancels. The end of the chunk gets <a_{k+1}, V_{k+1}>.

Sums over heads and ranks have one owner and one order; there is no atomic addition, so a gradient
does not depend on timing. Source: Mamba-2 2405.21060 section 6.
"""

from __future__ import annotations

import triton
import triton.language as tl

from model.sigma_kernel_src import (
    decay_between,
    load_tile,
    multiply_add,
    scale_rank,
    segment_before,
)


@triton.jit
def pass_states_backward_kernel(
    grad_ptr, states_ptr, final_ptr, grad_final_ptr, grad_start_ptr, inner_ptr, cum_ptr,
    segments_ptr, num_steps,
    HAS_GRAD_FINAL: tl.constexpr, HAS_START: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, CELLS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What outputs give V_k is replaced by a_{k+1}, the gradient of S_k; inner: <a_{k+1}, V_{k+1}>.

    inner (B, H, K, blocks) holds one part per block of cells.
    """
    blocks: tl.constexpr = (CELLS + BLOCK - 1) // BLOCK
    chunks = tl.cdiv(num_steps, CHUNK)
    block = tl.program_id(0) % blocks
    lane = (tl.program_id(0) // blocks).to(tl.int64)  # b H + h
    cell = block * BLOCK + tl.arange(0, BLOCK)
    inside = cell < CELLS
    batch = lane // HEADS
    grad = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_GRAD_FINAL:
        grad = tl.load(grad_final_ptr + lane * CELLS + cell, mask=inside, other=0.0)
    state = tl.load(final_ptr + lane * CELLS + cell, mask=inside, other=0.0)
    for step in range(0, chunks):
        chunk = chunks - 1 - step
        place = lane * chunks + chunk
        from_outputs = tl.load(grad_ptr + place * CELLS + cell, mask=inside, other=0.0)
        tl.store(grad_ptr + place * CELLS + cell, grad, mask=inside)
        tl.store(inner_ptr + place * blocks + block, tl.sum(grad * state, axis=0))
        state = tl.load(states_ptr + place * CELLS + cell, mask=inside, other=0.0)
        last = tl.minimum((chunk + 1) * CHUNK, num_steps) - 1
        decay = tl.exp2(tl.load(cum_ptr + lane * num_steps + last))
        if HAS_RESETS:
            document = segment_before(segments_ptr, batch, chunk, num_steps, CHUNK)
            same = tl.load(segments_ptr + batch * num_steps + last) == document
            decay = tl.where(same, decay, 0.0)
        grad = grad * decay + from_outputs
    if HAS_START:
        tl.store(grad_start_ptr + lane * CELLS + cell, grad, mask=inside)


@triton.jit
def source_gradients(
    grad_ptr, scores_ptr, b_ptr, grad_state_ptr, cum_ptr, segments_ptr, to_end, cum_s, segment_s,
    first, stop, tile, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """Z_q and D_q of a tile, (BLOCK_T, BLOCK_P); pointers stand at row, head, chunk and rank q.

    D is not rounded, as the step's own term is not in forward.
    """
    j, p, n = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    s, inside = first + j, first + j < stop
    z = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK_N):
        n_inside = start + n < SIZE
        b = load_tile(b_ptr, s * RANK * SIZE + start, n, inside, n_inside)
        state = load_tile(grad_state_ptr, (start + n) * WIDTH, p, n_inside, p < WIDTH)
        z = multiply_add(b, state, z, DOT_IN_BF16)
    z *= to_end[:, None]
    for start in range(tile * BLOCK_T, stop - first, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        t, t_inside = first + i, first + i < stop
        cum_t = tl.load(cum_ptr + t, mask=t_inside, other=0.0)
        pair = (j[:, None] < i[None, :]) & inside[:, None] & t_inside[None, :]
        if HAS_RESETS:
            segment_t = tl.load(segments_ptr + t, mask=t_inside, other=-1)
            pair &= segment_s[:, None] == segment_t[None, :]
        decay = decay_between(cum_t[None, :], cum_s[:, None], pair)
        for r in range(RANK):
            score = load_tile(scores_ptr, j, (r * CHUNK + i) * RANK * CHUNK, inside, t_inside)
            rows = (t * HEADS * RANK + r) * WIDTH
            grad = load_tile(grad_ptr, rows, p, t_inside, p < WIDTH)
            z = multiply_add(decay * score.to(tl.float32), grad, z, DOT_IN_BF16)
    d = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    for r in range(RANK):
        at = (r * CHUNK + j) * RANK * CHUNK + j
        score = tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rows = (s * HEADS * RANK + r) * WIDTH
        d += score[:, None] * load_tile(grad_ptr, rows, p, inside, p < WIDTH)
    return z, d


@triton.jit
def store_input_gradients(
    grad_x_ptr, grad_steps_ptr, grad_skip_ptr, steps_size, grad_x, of_cum, of_weight, of_gamma,
    of_skip, rows, s, p, inside, WIDTH: tl.constexpr,
):  # fmt: skip
    """What `input_gradient_kernel` found; pointers stand at the row and head."""
    mask = inside[:, None] & (p < WIDTH)[None, :]
    tl.store(grad_x_ptr + rows[:, None] + p[None, :], grad_x, mask=mask)
    tl.store(grad_steps_ptr + s, of_cum, mask=inside)
    tl.store(grad_steps_ptr + steps_size + s, of_weight, mask=inside)
    tl.store(grad_steps_ptr + 2 * steps_size + s, of_gamma, mask=inside)
    tl.store(grad_skip_ptr, tl.sum(of_skip, axis=0))


@triton.jit
def input_gradient_kernel(
    grad_y_ptr, y_ptr, x_ptr, rank_in_ptr, b_ptr, scores_ptr, grad_states_ptr, cum_ptr, weight_ptr,
    gamma_ptr, skip_ptr, segments_ptr, grad_x_ptr, grad_rank_ptr, grad_steps_ptr, grad_skip_ptr,
    num_steps, x_batch_stride, x_step_stride, x_head_stride, steps_size,
    HAS_RANK_IN: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """Of a tile of steps s of one head: grad_x (B, T, H, P); grad_steps (3, B, H, T), steps_size
    apart, of cum, w, gamma; a part per program of grad_rank (B, K, tiles, H, R, P) and grad_skip.
    """
    tiles: tl.constexpr = (CHUNK + BLOCK_T - 1) // BLOCK_T
    chunks = tl.cdiv(num_steps, CHUNK)
    tile, place = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    chunk, lane = place % chunks, place // chunks
    batch, head = lane // HEADS, lane % HEADS
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_steps)
    j, p = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_P)
    s, inside, by_step, by_head = first + j, first + j < stop, batch * num_steps, lane * num_steps
    cum = tl.load(cum_ptr + by_head + s, mask=inside, other=0.0)
    allowed, segment = inside, j
    if HAS_RESETS:
        segment = tl.load(segments_ptr + by_step + s, mask=inside, other=-1)
        allowed &= segment == tl.load(segments_ptr + by_step + stop - 1)
    to_end = decay_between(tl.load(cum_ptr + by_head + stop - 1), cum, allowed)
    weight = tl.load(weight_ptr + by_head + s, mask=inside, other=0.0)[:, None]
    gamma = tl.load(gamma_ptr + by_head + s, mask=inside, other=0.0)[:, None]
    x_rows = batch * x_batch_stride + head * x_head_stride + s * x_step_stride
    x = load_tile(x_ptr, x_rows, p, inside, p < WIDTH).to(tl.float32)
    part = ((batch * chunks + chunk) * tiles + tile) * HEADS + head
    scores_ptr += (batch * chunks + chunk) * RANK * CHUNK * RANK * CHUNK
    grad_x = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    of_cum, of_weight = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    of_gamma, of_skip = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for q in range(RANK):
        z, d = source_gradients(
            grad_y_ptr + (by_step * HEADS + head) * RANK * WIDTH, scores_ptr + q * CHUNK,
            b_ptr + (by_step * RANK + q) * SIZE, grad_states_ptr + place * SIZE * WIDTH,
            cum_ptr + by_head, segments_ptr + by_step, to_end, cum, segment, first, stop, tile,
            HAS_RESETS, HEADS, RANK, SIZE, WIDTH, CHUNK, BLOCK_T, BLOCK_N, BLOCK_P, DOT_IN_BF16,
        )  # fmt: skip
        rows = (((by_step + s) * HEADS + head) * RANK + q) * WIDTH
        g = load_tile(grad_y_ptr, rows, p, inside, p < WIDTH)
        grad = z * weight + d * gamma + g * tl.load(skip_ptr + head)
        rank_ptr = rank_in_ptr + head * RANK * WIDTH
        value = scale_rank(x, rank_ptr, q, p, WIDTH, HAS_RANK_IN)
        of_cum += tl.sum(g * load_tile(y_ptr, rows, p, inside, p < WIDTH) - value * grad, axis=1)
        of_weight += tl.sum(value * z, axis=1)
        of_gamma += tl.sum(value * d, axis=1)
        of_skip += tl.sum(value * g, axis=1)
        grad_x += scale_rank(grad, rank_ptr, q, p, WIDTH, HAS_RANK_IN)
        if HAS_RANK_IN:
            at = grad_rank_ptr + (part * RANK + q) * WIDTH + p
            tl.store(at, tl.sum(grad * x, axis=0), mask=p < WIDTH)
    store_input_gradients(
        grad_x_ptr, grad_steps_ptr + by_head, grad_skip_ptr + part, steps_size, grad_x, of_cum,
        of_weight, of_gamma, of_skip, ((by_step + s) * HEADS + head) * WIDTH, s, p, inside, WIDTH,
    )  # fmt: skip


@triton.jit
def score_gradient_kernel(
    grad_y_ptr, x_ptr, rank_in_ptr, cum_ptr, weight_ptr, gamma_ptr, segments_ptr, grad_scores_ptr,
    num_steps, x_batch_stride, x_step_stride, x_head_stride,
    HAS_RANK_IN: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """dG[rt, qs] of one pair of tiles, summed over heads in their order."""
    tiles: tl.constexpr = (CHUNK + BLOCK_T - 1) // BLOCK_T
    chunks = tl.cdiv(num_steps, CHUNK)
    block = tl.program_id(0)
    r, block = block % RANK, block // RANK
    q, block = block % RANK, block // RANK
    later, block = block % tiles, block // tiles
    earlier, block = block % tiles, (block // tiles).to(tl.int64)
    batch, chunk = block // chunks, block % chunks
    if earlier > later:
        return
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_steps)
    i, j = later * BLOCK_T + tl.arange(0, BLOCK_T), earlier * BLOCK_T + tl.arange(0, BLOCK_T)
    t, s, p = first + i, first + j, tl.arange(0, BLOCK_P)
    t_inside, s_inside, by_step = t < stop, s < stop, batch * num_steps
    within = t_inside[:, None] & s_inside[None, :]
    pair = (j[None, :] < i[:, None]) & within
    if HAS_RESETS:
        segment_t = tl.load(segments_ptr + by_step + t, mask=t_inside, other=-1)
        segment_s = tl.load(segments_ptr + by_step + s, mask=s_inside, other=-1)
        pair &= segment_t[:, None] == segment_s[None, :]
    own = (j[None, :] == i[:, None]) & within
    x_ptr += batch * x_batch_stride
    sums = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for head in range(HEADS):
        by_head = (batch * HEADS + head) * num_steps
        cum_t = tl.load(cum_ptr + by_head + t, mask=t_inside, other=0.0)
        cum_s = tl.load(cum_ptr + by_head + s, mask=s_inside, other=0.0)
        weight = tl.load(weight_ptr + by_head + s, mask=s_inside, other=0.0)
        gamma = tl.load(gamma_ptr + by_head + s, mask=s_inside, other=0.0)
        factor = decay_between(cum_t[:, None], cum_s[None, :], pair) * weight[None, :]
        factor = tl.where(own, gamma[None, :], factor)
        rows = (((by_step + t) * HEADS + head) * RANK + r) * WIDTH
        g = load_tile(grad_y_ptr, rows, p, t_inside, p < WIDTH)
        x = load_tile(x_ptr + head * x_head_stride, s * x_step_stride, p, s_inside, p < WIDTH)
        at = rank_in_ptr + head * RANK * WIDTH
        x = scale_rank(x.to(tl.float32), at, q, p, WIDTH, HAS_RANK_IN)
        empty = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
        sums += factor * multiply_add(g, tl.trans(x), empty, DOT_IN_BF16)
    offsets = ((block * RANK + r) * CHUNK + i[:, None]) * RANK * CHUNK + q * CHUNK + j[None, :]
    inside = (i < CHUNK)[:, None] & (j < CHUNK)[None, :]
    tl.store(grad_scores_ptr + offsets, sums.to(grad_scores_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_score_products(
    sums, shared_ptr, scores_ptr, first, stop, tile, n, n_inside,
    OF_C: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """sums + dG B of the tile's row (OF_C), or + dG^T C; pointers stand at row, chunk and rank."""
    own = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    begin = 0 if OF_C else tile * BLOCK_T
    end = tl.minimum((tile + 1) * BLOCK_T, stop - first) if OF_C else stop - first
    for start in range(begin, end, BLOCK_T):
        other = start + tl.arange(0, BLOCK_T)
        own_inside, other_inside = first + own < stop, first + other < stop
        for q in range(RANK):
            if OF_C:
                rows, columns = own * RANK * CHUNK, q * CHUNK + other
            else:
                rows, columns = own, (q * CHUNK + other) * RANK * CHUNK
            pair = load_tile(scores_ptr, rows, columns, own_inside, other_inside)
            rows = ((first + other) * RANK + q) * SIZE
            shared = load_tile(shared_ptr, rows, n, other_inside, n_inside)
            sums = multiply_add(pair.to(tl.float32), shared, sums, DOT_IN_BF16)
    return sums


@triton.jit
def shared_gradient_kernel(
    value_ptr, rank_in_ptr, other_ptr, grad_scores_ptr, states_ptr, cum_ptr, weight_ptr,
    segments_ptr, grad_ptr, num_steps, value_batch_stride, value_step_stride, value_head_stride,
    OF_C: tl.constexpr, HAS_RANK_IN: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """Gradient of C (OF_C: value is g, states V, other b) or of B (value x, states a, other c).

    (B, T, R, N) fp32; a program owns one tile of steps, one rank and one block of N.
    """
    tiles: tl.constexpr = (CHUNK + BLOCK_T - 1) // BLOCK_T
    blocks_n: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    chunks = tl.cdiv(num_steps, CHUNK)
    block_n, block = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    rank, block = block % RANK, block // RANK
    tile, block = block % tiles, (block // tiles).to(tl.int64)
    batch, chunk = block // chunks, block % chunks
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_steps)
    p, n = tl.arange(0, BLOCK_P), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside, by_step = t < stop, batch * num_steps
    allowed = inside
    if HAS_RESETS:
        segment = tl.load(segments_ptr + by_step + t, mask=inside, other=-1)
        if OF_C:
            allowed &= segment == segment_before(segments_ptr, batch, chunk, num_steps, CHUNK)
        else:
            allowed &= segment == tl.load(segments_ptr + by_step + stop - 1)
    value_ptr += batch * value_batch_stride
    sums = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for head in range(HEADS):
        lane = batch * HEADS + head
        cum = tl.load(cum_ptr + lane * num_steps + t, mask=inside, other=0.0)
        if OF_C:
            factor = decay_between(cum, 0.0, allowed)
        else:
            total = tl.load(cum_ptr + lane * num_steps + stop - 1)
            factor = decay_between(total, cum, allowed)
            factor *= tl.load(weight_ptr + lane * num_steps + t, mask=inside, other=0.0)
        at = value_ptr + head * value_head_stride + (rank * WIDTH if OF_C else 0)
        value = load_tile(at, t * value_step_stride, p, inside, p < WIDTH).to(tl.float32)
        if not OF_C:
            at = rank_in_ptr + head * RANK * WIDTH
            value = scale_rank(value, at, rank, p, WIDTH, HAS_RANK_IN)
        state_rows = ((lane * chunks + chunk) * SIZE + n) * WIDTH
        state = load_tile(states_ptr, p, state_rows, p < WIDTH, n < SIZE)
        sums = multiply_add(value * factor[:, None], state, sums, DOT_IN_BF16)
    at = block * RANK * CHUNK * RANK * CHUNK + rank * CHUNK * (RANK * CHUNK if OF_C else 1)
    sums = add_score_products(
        sums, other_ptr + by_step * RANK * SIZE, grad_scores_ptr + at, first, stop, tile, n,
        n < SIZE, OF_C, RANK, SIZE, CHUNK, BLOCK_T, DOT_IN_BF16,
    )  # fmt: skip
    rows = ((by_step + t) * RANK + rank) * SIZE
    at = rows[:, None] + n[None, :]
    tl.store(grad_ptr + at, sums, mask=inside[:, None] & (n < SIZE)[None, :])


@triton.jit
def control_gradients_kernel(
    grad_steps_ptr, inner_ptr, grad_decay_ptr, grad_weight_ptr, grad_gamma_ptr, num_steps,
    steps_size, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """(3, B, H, T) of cum, w, gamma -> (B, T, H) of log decay, w, gamma.

    A decay moves cum of its own step, of the chunk's later ones and of the chunk's end.
    """
    chunks = tl.cdiv(num_steps, CHUNK)
    place = tl.program_id(0).to(tl.int64)  # (b H + h) K + k
    chunk, lane = place % chunks, place // chunks
    parts = tl.arange(0, BLOCK_PARTS)
    inner = tl.load(inner_ptr + place * PARTS + parts, mask=parts < PARTS, other=0.0)
    t = chunk * CHUNK + tl.arange(0, BLOCK_L)
    inside = t < tl.minimum((chunk + 1) * CHUNK, num_steps)
    source = grad_steps_ptr + lane * num_steps + t
    target = ((lane // HEADS) * num_steps + t) * HEADS + lane % HEADS
    of_cum = tl.load(source, mask=inside, other=0.0)
    later = tl.cumsum(of_cum, axis=0, reverse=True) + tl.sum(inner, axis=0)
    tl.store(grad_decay_ptr + target, later, mask=inside)
    of_weight = tl.load(source + steps_size, mask=inside, other=0.0)
    tl.store(grad_weight_ptr + target, of_weight, mask=inside)
    of_gamma = tl.load(source + 2 * steps_size, mask=inside, other=0.0)
    tl.store(grad_gamma_ptr + target, of_gamma, mask=inside)
