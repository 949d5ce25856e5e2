"""The chunked Mamba-3 scan on Triton kernels: launcher, autograd and the face of the scan.

What is computed is written in `sigma_kernel_src.py` (forward) and `sigma_kernel_backward.py`; the
definition is `reference_mamba.py`, the path without Triton `ssd_core.py`. Products run in bf16 with
fp32 sums, or in fp32 (three TF32 products) when asked; decays, states between chunks, outputs and
gradients are fp32 either way.

Kept for backward: inputs, G, the states that enter chunks, y. The largest beside y is the states,
H N P numbers per chunk; G is R^2 L numbers a step for all heads together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.launch import power_of_two
from model.opaque import apply_opaque
from model.sigma_kernel_backward import (
    control_gradients_kernel,
    input_gradient_kernel,
    pass_states_backward_kernel,
    score_gradient_kernel,
    shared_gradient_kernel,
)
from model.sigma_kernel_src import (
    chunk_controls_kernel,
    chunk_scores_kernel,
    chunk_states_kernel,
    pass_states_kernel,
    scan_outputs_kernel,
)
from model.ternary_linear import device_capability

MAX_WIDTH = 256
SHORT_TYPE = torch.bfloat16
STATE_BLOCK = 1024
HEAD_BLOCK = 8


class ScanTiles(NamedTuple):
    """Launch settings: steps and state entries of a tile, warps, pipeline stages."""

    steps: int
    entries: int
    warps: int
    stages: int


def scan_tiles(
    chunk_len: int, size: int, width: int, capability: int, *, in_bf16: bool
) -> ScanTiles:
    """Tiles of the scan for chunks of `chunk_len` steps and states of `size` times `width`.

    The input gradient holds eight tiles of steps times width in registers: 64 steps fill those of
    eight warps, which only pays where the tensor cores want 64 rows (sm_90, sm_100). fp32 products
    split each operand in two and take twice the registers. No edge is below 16, the least that
    tensor cores take.
    """
    large = in_bf16 and 90 <= capability < 120 and width <= 64
    steps = max(16, min(64 if large else 32, power_of_two(chunk_len)))
    entries = max(16, min(64, power_of_two(size)))
    return ScanTiles(steps, entries, 4 if in_bf16 and steps * width <= 2048 else 8, 2)


def asked_tiles(tiles: ScanTiles, blocks: tuple[int, int]) -> ScanTiles:
    """The tiles with what was asked for, steps and state entries; 0 leaves one as it is."""
    steps, entries = blocks
    return tiles._replace(steps=steps or tiles.steps, entries=entries or tiles.entries)


class ScanShape(NamedTuple):
    """Sizes of one scan, and the constants that its kernels share."""

    batch: int
    length: int
    heads: int
    rank: int
    size: int
    width: int
    chunk_len: int
    tiles: ScanTiles
    has_rank_in: bool
    has_resets: bool
    in_bf16: bool

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk_len)

    @property
    def row_tiles(self) -> int:
        return -(-self.chunk_len // self.tiles.steps)

    @property
    def places(self) -> int:
        """Chunks of all rows and heads."""
        return self.batch * self.heads * self.chunks

    def constants_of(self, kernel: Any, **given: Any) -> dict[str, Any]:
        """Every constant of a kernel: those given, the others as this shape has them."""
        values = {
            "HAS_RANK_IN": self.has_rank_in,
            "HAS_RESETS": self.has_resets,
            "HEADS": self.heads,
            "RANK": self.rank,
            "SIZE": self.size,
            "WIDTH": self.width,
            "CELLS": self.size * self.width,
            "CHUNK": self.chunk_len,
            "BLOCK": STATE_BLOCK,
            "BLOCK_L": power_of_two(self.chunk_len),
            "BLOCK_H": HEAD_BLOCK,
            "BLOCK_T": self.tiles.steps,
            "BLOCK_N": self.tiles.entries,
            "BLOCK_P": max(16, power_of_two(self.width)),
            "PARTS": self.state_blocks,
            "BLOCK_PARTS": power_of_two(self.state_blocks),
            "DOT_IN_BF16": self.in_bf16,
        }
        names = (name for name in kernel.arg_names if name.isupper())
        return {name: given[name] if name in given else values[name] for name in names}

    @property
    def state_blocks(self) -> int:
        return -(-self.size * self.width // STATE_BLOCK)

    def launch(self, kernel: Any, programs: int | tuple[int, int], *args: Any, **more: Any) -> None:
        """Run the kernel with its constants of this shape and those given in `more`."""
        grid = (programs,) if isinstance(programs, int) else programs
        kernel[grid](
            *args,
            **self.constants_of(kernel, **more),
            num_warps=self.tiles.warps,
            num_stages=self.tiles.stages,
        )


class _Controls(NamedTuple):
    """Per step and head, (B, H, T) fp32, and documents (B, T) int32; see sigma_kernel_src.py."""

    cum: Tensor
    weight: Tensor
    gamma: Tensor
    segments: Tensor


def _controls(
    shape: ScanShape, log_decay: Tensor, weight: Tensor, gamma: Tensor, segments: Tensor | None
) -> _Controls:
    by_head = torch.empty(
        3, shape.batch, shape.heads, shape.length, dtype=torch.float32, device=log_decay.device
    )
    shape.launch(
        chunk_controls_kernel,
        (shape.batch * shape.chunks, -(-shape.heads // HEAD_BLOCK)),
        *(value.contiguous() for value in (log_decay, weight, gamma)),
        *by_head,
        shape.length,
    )
    # Without resets the pointer is never read.
    documents = by_head if segments is None else segments.to(torch.int32).contiguous()
    cum, weight, gamma = by_head.unbind()
    return _Controls(cum, weight, gamma, documents)


def _launch_states(
    shape: ScanShape, value: Tensor, rank_in: Tensor, shared: Tensor, controls: _Controls,
    *, of_outputs: bool,
) -> Tensor:  # fmt: skip
    """What every chunk adds to the state, or (of_outputs) to its gradient: (B, H, K, N, P)."""
    sizes = (shape.batch, shape.heads, shape.chunks, shape.size, shape.width)
    states = torch.empty(sizes, dtype=torch.float32, device=value.device)
    shape.launch(
        chunk_states_kernel,
        shape.places * -(-shape.size // shape.tiles.entries),
        *(value, rank_in, shared, controls.cum, controls.weight, controls.segments, states),
        *(shape.length, *value.stride()[:3]),
        OF_OUTPUTS=of_outputs,
    )
    return states


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, rank_in, b, c, log_decay, weight, gamma, skip, start, segments, shape = args
        controls = _controls(shape, log_decay, weight, gamma, segments)
        ranks = skip if rank_in is None else rank_in
        empty = {"dtype": torch.float32, "device": x.device}
        rows = shape.rank * shape.chunk_len
        scores = torch.empty(shape.batch, shape.chunks, rows, rows, dtype=b.dtype, device=x.device)
        pairs = (shape.row_tiles * shape.rank) ** 2
        programs = shape.batch * shape.chunks * pairs
        shape.launch(chunk_scores_kernel, programs, b, c, scores, shape.length)
        states = _launch_states(shape, x, ranks, b, controls, of_outputs=False)
        h = torch.empty(shape.batch, shape.heads, shape.size, shape.width, **empty)
        shape.launch(
            pass_states_kernel,
            shape.batch * shape.heads * shape.state_blocks,
            *(states, h if start is None else start, h, controls.cum, controls.segments),
            shape.length,
            HAS_START=start is not None,
        )
        y = torch.empty(*x.shape[:3], shape.rank, shape.width, **empty)
        shape.launch(
            scan_outputs_kernel,
            shape.places * shape.row_tiles * shape.rank,
            *(x, ranks, c, scores, states, controls.cum, controls.weight, controls.gamma, skip),
            *(controls.segments, y, shape.length, *x.stride()[:3]),
        )
        ctx.save_for_backward(x, rank_in, b, c, skip, start, scores, states, h, y, *controls)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, rank_in, b, c, skip, start, scores, states, h, y, *rest = ctx.saved_tensors
        shape, controls = ctx.shape, _Controls(*rest)
        ranks = skip if rank_in is None else rank_in
        grad_y = torch.zeros_like(y) if grads[0] is None else grads[0].contiguous()
        grad_h = None if grads[1] is None else grads[1].contiguous()
        grad_states = _launch_states(shape, grad_y, ranks, c, controls, of_outputs=True)
        grad_start = None if start is None else torch.empty_like(start)
        inner = torch.empty(shape.places, shape.state_blocks, dtype=torch.float32, device=x.device)
        shape.launch(
            pass_states_backward_kernel,
            shape.batch * shape.heads * shape.state_blocks,
            *(grad_states, states, h, h if grad_h is None else grad_h),
            *(h if grad_start is None else grad_start, inner, controls.cum, controls.segments),
            shape.length,
            HAS_GRAD_FINAL=grad_h is not None,
            HAS_START=start is not None,
        )
        of_inputs = _input_gradients(
            shape, grad_y, y, x, rank_in, b, scores, grad_states, controls, skip
        )
        grad_x, grad_rank, grad_skip, grad_steps = of_inputs
        of_controls = _control_gradients(shape, grad_steps, inner)
        grad_b, grad_c = _shared_gradients(
            shape, grad_y, x, ranks, b, c, scores, states, grad_states, controls
        )
        return (
            *(grad_x.to(x.dtype), grad_rank, grad_b.to(b.dtype), grad_c.to(c.dtype)),
            *(*of_controls, grad_skip, grad_start, None, None),
        )


def _input_gradients(
    shape: ScanShape, grad_y: Tensor, y: Tensor, x: Tensor, rank_in: Tensor | None, b: Tensor,
    scores: Tensor, grad_states: Tensor, controls: _Controls, skip: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, rank_in, skip (H,) and of cum, weight, gamma (3, B, H, T)."""
    empty = {"dtype": torch.float32, "device": x.device}
    parts = shape.batch * shape.chunks * shape.row_tiles
    grad_x = torch.empty(x.shape, **empty)
    grad_steps = torch.empty(3, *controls.cum.shape, **empty)
    grad_skip = torch.empty(parts, shape.heads, **empty)
    grad_rank = grad_skip if rank_in is None else torch.empty(parts, *rank_in.shape, **empty)
    shape.launch(
        input_gradient_kernel,
        shape.places * shape.row_tiles,
        *(grad_y, y, x, skip if rank_in is None else rank_in, b, scores, grad_states),
        *(controls.cum, controls.weight, controls.gamma, skip, controls.segments),
        *(grad_x, grad_rank, grad_steps, grad_skip, shape.length, *x.stride()[:3]),
        controls.cum.numel(),
    )
    of_rank = None if rank_in is None else grad_rank.sum(0)
    return grad_x, of_rank, grad_skip.sum(0), grad_steps


def _control_gradients(shape: ScanShape, grad_steps: Tensor, inner: Tensor) -> tuple[Tensor, ...]:
    """Gradients of log decay, weight and gamma, (B, T, H)."""
    sizes = (3, shape.batch, shape.length, shape.heads)
    found = torch.empty(sizes, dtype=torch.float32, device=grad_steps.device)
    shape.launch(
        control_gradients_kernel,
        shape.places,
        *(grad_steps, inner, *found, shape.length, grad_steps[0].numel()),
    )
    return tuple(found)


def _shared_gradients(
    shape: ScanShape, grad_y: Tensor, x: Tensor, ranks: Tensor, b: Tensor, c: Tensor,
    scores: Tensor, states: Tensor, grad_states: Tensor, controls: _Controls,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of b and c, fp32."""
    grad_scores = torch.empty_like(scores)
    pairs = (shape.row_tiles * shape.rank) ** 2
    shape.launch(
        score_gradient_kernel,
        shape.batch * shape.chunks * pairs,
        *(grad_y, x, ranks, controls.cum, controls.weight, controls.gamma, controls.segments),
        *(grad_scores, shape.length, *x.stride()[:3]),
    )
    results = []
    for value, other, carried, of_c in ((x, c, grad_states, False), (grad_y, b, states, True)):
        grad = torch.empty(b.shape, dtype=torch.float32, device=x.device)
        blocks = -(-shape.size // shape.tiles.entries)
        shape.launch(
            shared_gradient_kernel,
            shape.batch * shape.chunks * shape.row_tiles * shape.rank * blocks,
            *(value, ranks, other, grad_scores, carried, controls.cum, controls.weight),
            *(controls.segments, grad, shape.length, *value.stride()[:3]),
            OF_C=of_c,
        )
        results.append(grad)
    return results[0], results[1]


def scan_chunks(
    x: Tensor, rank_in: Tensor | None, b: Tensor, c: Tensor, log_decay: Tensor, weight: Tensor,
    gamma: Tensor, skip: Tensor, start: Tensor | None = None, segments: Tensor | None = None,
    *, chunk_len: int, in_bf16: bool = False, blocks: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked scan of rotated b, c: y (B, T, H, R, P) and the state after the row, fp32.

    x (B, T, H, P); rank_in (H, R, P), None for R = 1; b, c (B, T, R, N); log_decay <= 0, weight,
    gamma (B, T, H) with weight and gamma 0 where padding; skip (H,); start (B, H, N, P);
    segments (B, T): number of resets so far. in_bf16: products of bf16 operands, else fp32.
    blocks: steps and state entries of a tile, 0 = by device and shape.
    """
    batch, length, heads, width = x.shape
    rank, size = b.shape[2:]
    if width > MAX_WIDTH:
        raise ValueError(
            f"--mamba-head-dim is {width}: the Triton scan takes at most {MAX_WIDTH};"
            " lower it or use --kernel-backend torch"
        )
    if torch.float64 in (x.dtype, b.dtype, log_decay.dtype):
        raise ValueError("the Triton scan computes in fp32; --kernel-backend torch takes fp64")
    tiles = scan_tiles(chunk_len, size, width, device_capability(x), in_bf16=in_bf16)
    shape = ScanShape(
        *(batch, length, heads, rank, size, width, chunk_len),
        tiles=asked_tiles(tiles, blocks),
        has_rank_in=rank_in is not None,
        has_resets=segments is not None,
        in_bf16=in_bf16,
    )
    x = x if x.stride(-1) == 1 else x.contiguous()
    operands = SHORT_TYPE if in_bf16 else torch.float32
    b, c = (value.to(operands).contiguous() for value in (b, c))
    rank_in = None if rank_in is None else rank_in.contiguous()
    start = None if start is None else start.contiguous()
    return apply_opaque(
        _Scan, x, rank_in, b, c, log_decay, weight, gamma, skip, start, segments, shape
    )
