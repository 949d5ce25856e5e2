"""Triton source of the chunked Mamba-3 scan, forward; `sigma_kernels.py` launches it.

Rows are cut into chunks of CHUNK steps. With cum the sum of log2 decays since the chunk's start,
w the weight with which a step enters the state (its own term and the trapezoid's share of the next
step's, see ssd.py), gamma the part of w that the step itself sees, X_r = x o rank_in_r and
open(t, s) = same document:
    G[rt, qs]  = C_r[t] . B_q[s]                                   once for all heads
    S_k        = sum_s 2^(cum_end - cum_s) w_s open B[s] X[s]^T    what a chunk adds to the state
    V_{k+1}    = 2^cum_end open V_k + S_k                          the state entering each chunk
    y_r[t]     = 2^cum_t open C_r[t] V_k + sum_{s<t} 2^(cum_t - cum_s) open G[rt, qs] w_s X_q[s]
                 + gamma_t G[rt, qt] X_q[t] + skip X_r[t]          summed over q
Within a chunk tiles of BLOCK_T steps meet, one rank against one rank: a tile of decays serves all
ranks, and nothing of size T x T exists. The weights w stay outside the rounded factor 2^(..) G, so
that forward and backward round the very same numbers and their sums cancel where they must.

Rotation, the trapezoid's weights and the logarithms stay in torch: they touch R N and H numbers a
token, once for all heads, where the scan touches H R P. Decays are clamped to 2^-160 a step, which
is zero in fp32, so that one closed gate does not cost the digits of the chunk's later steps.

Sources: Mamba-2 2405.21060 section 6 (chunks), Mamba-3 2603.15569 (trapezoid, rank R).
"""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_CLOSED = tl.constexpr(-160.0)
_SHORT = tl.constexpr(tl.bfloat16)  # 16-bit operands; a test without bf16 puts float16 here


@triton.jit
def multiply_add(a, b, sums, DOT_IN_BF16: tl.constexpr):
    """sums + a b on tensor cores: bf16 operands, or fp32 ones as three TF32 products."""
    if DOT_IN_BF16:
        return tl.dot(a.to(_SHORT), b.to(_SHORT), sums)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32x3")


@triton.jit
def decay_between(later, earlier, allowed):
    """2^(later - earlier) where allowed, else 0; the exponent is never positive there."""
    return tl.exp2(tl.where(allowed, later - earlier, float("-inf")))


@triton.jit
def segment_before(segments_ptr, batch, chunk, num_steps, CHUNK: tl.constexpr):
    """Document number at the end of the chunk before, 0 before the row: the state's document."""
    last = tl.maximum(chunk * CHUNK - 1, 0)
    found = tl.load(segments_ptr + batch * num_steps + last)
    return tl.where(chunk > 0, found, 0)


@triton.jit
def load_tile(ptr, rows, columns, row_inside, column_inside):
    """Entries rows[i] + columns[j] behind ptr, 0 outside; rows and columns are offsets."""
    inside = row_inside[:, None] & column_inside[None, :]
    return tl.load(ptr + rows[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def scale_rank(value, rank_in_ptr, rank, p, WIDTH: tl.constexpr, HAS_RANK_IN: tl.constexpr):
    """X_rank of the rows of value (.., P); rank_in_ptr stands at the head."""
    if HAS_RANK_IN:
        return value * tl.load(rank_in_ptr + rank * WIDTH + p, mask=p < WIDTH, other=0.0)[None, :]
    else:
        return value


@triton.jit
def chunk_controls_kernel(
    log_decay_ptr, weight_ptr, gamma_ptr, cum_ptr, weight_out_ptr, gamma_out_ptr, num_steps,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(B, T, H) log decay, weight, gamma -> (B, H, T) cum, weight, gamma: head-major from here."""
    chunks = tl.cdiv(num_steps, CHUNK)
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    t = chunk * CHUNK + tl.arange(0, BLOCK_L)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    stop = tl.minimum((chunk + 1) * CHUNK, num_steps)
    inside = (t < stop)[:, None] & (h < HEADS)[None, :]
    source = (batch * num_steps + t[:, None]) * HEADS + h[None, :]
    target = (batch * HEADS + h[None, :]) * num_steps + t[:, None]
    step = tl.load(log_decay_ptr + source, mask=inside, other=0.0)
    cum = tl.cumsum(tl.maximum(step * _LOG2_E, _CLOSED), axis=0)
    tl.store(cum_ptr + target, cum, mask=inside)
    weight = tl.load(weight_ptr + source, mask=inside, other=0.0)
    tl.store(weight_out_ptr + target, weight, mask=inside)
    gamma = tl.load(gamma_ptr + source, mask=inside, other=0.0)
    tl.store(gamma_out_ptr + target, gamma, mask=inside)


@triton.jit
def chunk_scores_kernel(
    b_ptr, c_ptr, scores_ptr, num_steps,
    RANK: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """G[rt, qs] = C_r[t] . B_q[s] of one pair of tiles; b, c (B, T, R, N), G (B, K, R, L, R, L)."""
    tiles: tl.constexpr = (CHUNK + BLOCK_T - 1) // BLOCK_T
    chunks = tl.cdiv(num_steps, CHUNK)
    block = tl.program_id(0)
    target, block = block % RANK, block // RANK
    source, block = block % RANK, block // RANK
    later, block = block % tiles, block // tiles
    earlier, block = block % tiles, (block // tiles).to(tl.int64)
    batch, chunk = block // chunks, block % chunks
    if earlier > later:
        return
    i = later * BLOCK_T + tl.arange(0, BLOCK_T)
    j = earlier * BLOCK_T + tl.arange(0, BLOCK_T)
    t, s = chunk * CHUNK + i, chunk * CHUNK + j
    t_inside, s_inside = (i < CHUNK) & (t < num_steps), (j < CHUNK) & (s < num_steps)
    c_rows = ((batch * num_steps + t) * RANK + target) * SIZE
    b_rows = ((batch * num_steps + s) * RANK + source) * SIZE
    sums = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        c = load_tile(c_ptr, c_rows, n, t_inside, n < SIZE)
        b = load_tile(b_ptr, n, b_rows, n < SIZE, s_inside)
        sums = multiply_add(c, b, sums, DOT_IN_BF16)
    row = (block * RANK + target) * CHUNK + i
    offsets = (row[:, None] * RANK + source) * CHUNK + j[None, :]
    inside = (i < CHUNK)[:, None] & (j < CHUNK)[None, :]
    tl.store(scores_ptr + offsets, sums.to(scores_ptr.dtype.element_ty), mask=inside)


@triton.jit
def chunk_states_kernel(
    value_ptr, rank_in_ptr, shared_ptr, cum_ptr, weight_ptr, segments_ptr, states_ptr, num_steps,
    value_batch_stride, value_step_stride, value_head_stride,
    OF_OUTPUTS: tl.constexpr, HAS_RANK_IN: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """S = sum over steps and ranks of B X^T to the chunk's end, (B, H, K, N, P).

    OF_OUTPUTS: the gradient of the entering state instead, sum of 2^cum C g^T from its start;
    value is then g (B, T, H, R, P), contiguous.
    """
    blocks_n: tl.constexpr = (SIZE + BLOCK_N - 1) // BLOCK_N
    chunks = tl.cdiv(num_steps, CHUNK)
    block_n = tl.program_id(0) % blocks_n
    place = (tl.program_id(0) // blocks_n).to(tl.int64)  # (b H + h) K + k
    chunk, lane = place % chunks, place // chunks
    batch, head = lane // HEADS, lane % HEADS
    stop = tl.minimum((chunk + 1) * CHUNK, num_steps)
    n, p = block_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    value_ptr += batch * value_batch_stride + head * value_head_stride
    rank_in_ptr += head * RANK * WIDTH
    total = tl.load(cum_ptr + lane * num_steps + stop - 1)
    if HAS_RESETS:
        if OF_OUTPUTS:
            document = segment_before(segments_ptr, batch, chunk, num_steps, CHUNK)
        else:
            document = tl.load(segments_ptr + batch * num_steps + stop - 1)
    sums = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for start in range(chunk * CHUNK, stop, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = t < stop
        cum = tl.load(cum_ptr + lane * num_steps + t, mask=inside, other=0.0)
        allowed = inside
        if HAS_RESETS:
            at = tl.load(segments_ptr + batch * num_steps + t, mask=inside, other=-1)
            allowed = inside & (at == document)
        if OF_OUTPUTS:
            factor = decay_between(cum, 0.0, allowed)
        else:
            factor = decay_between(total, cum, allowed)
            factor *= tl.load(weight_ptr + lane * num_steps + t, mask=inside, other=0.0)
        rows = t * value_step_stride
        if not OF_OUTPUTS:
            x = load_tile(value_ptr, rows, p, inside, p < WIDTH).to(tl.float32) * factor[:, None]
        for r in range(RANK):
            if OF_OUTPUTS:
                value = load_tile(value_ptr + r * WIDTH, rows, p, inside, p < WIDTH)
                value = value * factor[:, None]
            else:
                value = scale_rank(x, rank_in_ptr, r, p, WIDTH, HAS_RANK_IN)
            steps = ((batch * num_steps + t) * RANK + r) * SIZE
            shared = load_tile(shared_ptr, n, steps, n < SIZE, inside)
            sums = multiply_add(shared, value, sums, DOT_IN_BF16)
    offsets = (place * SIZE + n[:, None]) * WIDTH + p[None, :]
    tl.store(states_ptr + offsets, sums, mask=(n < SIZE)[:, None] & (p < WIDTH)[None, :])


@triton.jit
def pass_states_kernel(
    states_ptr, start_ptr, final_ptr, cum_ptr, segments_ptr, num_steps,
    HAS_START: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, CELLS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S_k of every chunk is replaced by V_k, the state that enters it; the last one is `final`."""
    blocks: tl.constexpr = (CELLS + BLOCK - 1) // BLOCK
    chunks = tl.cdiv(num_steps, CHUNK)
    lane = (tl.program_id(0) // blocks).to(tl.int64)  # b H + h
    cell = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < CELLS
    batch = lane // HEADS
    state = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_START:
        state = tl.load(start_ptr + lane * CELLS + cell, mask=inside, other=0.0)
    for chunk in range(0, chunks):
        at = states_ptr + (lane * chunks + chunk) * CELLS + cell
        added = tl.load(at, mask=inside, other=0.0)
        tl.store(at, state, mask=inside)
        last = tl.minimum((chunk + 1) * CHUNK, num_steps) - 1
        decay = tl.exp2(tl.load(cum_ptr + lane * num_steps + last))
        if HAS_RESETS:
            document = segment_before(segments_ptr, batch, chunk, num_steps, CHUNK)
            same = tl.load(segments_ptr + batch * num_steps + last) == document
            decay = tl.where(same, decay, 0.0)
        state = state * decay + added
    tl.store(final_ptr + lane * CELLS + cell, state, mask=inside)


@triton.jit
def add_own_step(
    sums, x_ptr, rank_in_ptr, scores_ptr, gamma, skip, rank, i, rows, p, inside,
    HAS_RANK_IN: tl.constexpr, RANK: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """sums + sum over q of gamma_t G[rt, qt] X_q[t] + skip X_r[t], one tile; not rounded."""
    x = load_tile(x_ptr, rows, p, inside, p < WIDTH).to(tl.float32)
    for q in range(RANK):
        at = i * RANK * CHUNK + q * CHUNK + i
        own = gamma * tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)
        own += tl.where(q == rank, skip, 0.0)
        sums += own[:, None] * scale_rank(x, rank_in_ptr, q, p, WIDTH, HAS_RANK_IN)
    return sums


@triton.jit
def scan_outputs_kernel(
    x_ptr, rank_in_ptr, c_ptr, scores_ptr, states_ptr, cum_ptr, weight_ptr, gamma_ptr, skip_ptr,
    segments_ptr, y_ptr, num_steps, x_batch_stride, x_step_stride, x_head_stride,
    HAS_RANK_IN: tl.constexpr, HAS_RESETS: tl.constexpr,
    HEADS: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    DOT_IN_BF16: tl.constexpr,
):  # fmt: skip
    """y_r of one tile of steps of one head and rank; y (B, T, H, R, P) fp32."""
    tiles: tl.constexpr = (CHUNK + BLOCK_T - 1) // BLOCK_T
    chunks = tl.cdiv(num_steps, CHUNK)
    rank, block = tl.program_id(0) % RANK, tl.program_id(0) // RANK
    tile, place = block % tiles, (block // tiles).to(tl.int64)  # place: (b H + h) K + k
    chunk, lane = place % chunks, place // chunks
    batch, head = lane // HEADS, lane % HEADS
    first, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, num_steps)
    i, p, n = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    t, inside, by_step, by_head = first + i, first + i < stop, batch * num_steps, lane * num_steps
    cum_t = tl.load(cum_ptr + by_head + t, mask=inside, other=0.0)
    allowed, segment_t = inside, i
    if HAS_RESETS:
        segment_t = tl.load(segments_ptr + by_step + t, mask=inside, other=-1)
        allowed &= segment_t == segment_before(segments_ptr, batch, chunk, num_steps, CHUNK)
    x_ptr += batch * x_batch_stride + head * x_head_stride
    rank_in_ptr += head * RANK * WIDTH
    scores_ptr += ((batch * chunks + chunk) * RANK + rank) * CHUNK * RANK * CHUNK

    sums = tl.zeros((BLOCK_T, BLOCK_P), dtype=tl.float32)
    for start in range(0, SIZE, BLOCK_N):
        n_inside = start + n < SIZE
        rows = ((by_step + t) * RANK + rank) * SIZE + start
        c = load_tile(c_ptr, rows, n, inside, n_inside)
        v = load_tile(states_ptr, (place * SIZE + start + n) * WIDTH, p, n_inside, p < WIDTH)
        sums = multiply_add(c, v, sums, DOT_IN_BF16)
    sums *= decay_between(cum_t, 0.0, allowed)[:, None]
    gamma = tl.load(gamma_ptr + by_head + t, mask=inside, other=0.0)
    sums = add_own_step(
        sums, x_ptr, rank_in_ptr, scores_ptr, gamma, tl.load(skip_ptr + head),
        rank, i, t * x_step_stride, p, inside, HAS_RANK_IN, RANK, WIDTH, CHUNK,
    )  # fmt: skip
    for start in range(0, (tile + 1) * BLOCK_T, BLOCK_T):
        j = start + tl.arange(0, BLOCK_T)
        s, s_inside = first + j, first + j < stop
        cum_s = tl.load(cum_ptr + by_head + s, mask=s_inside, other=0.0)
        pair = (j[None, :] < i[:, None]) & inside[:, None] & s_inside[None, :]
        if HAS_RESETS:
            segment_s = tl.load(segments_ptr + by_step + s, mask=s_inside, other=-1)
            pair &= segment_t[:, None] == segment_s[None, :]
        decay = decay_between(cum_t[:, None], cum_s[None, :], pair)
        x = load_tile(x_ptr, s * x_step_stride, p, s_inside, p < WIDTH).to(tl.float32)
        x *= tl.load(weight_ptr + by_head + s, mask=s_inside, other=0.0)[:, None]
        for q in range(RANK):
            scores = load_tile(scores_ptr, i * RANK * CHUNK, q * CHUNK + j, inside, s_inside)
            value = scale_rank(x, rank_in_ptr, q, p, WIDTH, HAS_RANK_IN)
            sums = multiply_add(decay * scores.to(tl.float32), value, sums, DOT_IN_BF16)
    rows = (((by_step + t) * HEADS + head) * RANK + rank) * WIDTH
    at = rows[:, None] + p[None, :]
    tl.store(y_ptr + at, sums, mask=inside[:, None] & (p < WIDTH)[None, :])
