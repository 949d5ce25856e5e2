"""The ternary linear layer on int8 tensor cores: launchers, autograd and the face of the kernels.

With codes cx, q and scales sx, alpha (one per token, one per output row):
    y  = sx alpha (cx q^T)                      int8 product, as in bitlinear.py
    dx = sg (cg q),  (cg, sg) = int8(dy alpha)  int8 product; only dy alpha is rounded
    dW = (dy sx)^T cx                           bf16 product, fp32 sums
The activations kept for backward are one byte each. Rounding dy to 8 bits per token is the one
difference from bitlinear.py's backward, and what buys the second fast product.

Source: 2402.17764 (the layer); int8 gradients of inputs as in SwitchBack 2304.13013.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.launch import (
    Tiles,
    cdiv,
    device_capability,
    launcher,
    power_of_two,
    processor_count,
)
from model.launch_table import measured_tiles
from model.opaque import apply_opaque
from model.triton_kernels import (
    int8_product_kernel,
    quantize_rows_kernel,
    ternarize_kernel,
    weight_gradient_kernel,
)

MAX_ROW_BLOCK = 4096
MIN_ROW_BLOCK = 1024
MAX_SPLITS = 32


class TernaryWeight(NamedTuple):
    """A weight (..., out, in) as ternary codes in both layouts, and its scales."""

    codes: Tensor  # (..., out, in) int8
    codes_t: Tensor  # (..., in, out) int8
    scale: Tensor  # (..., out) fp32


def product_tiles(num_rows: int, capability: int) -> Tiles:
    """Tile of the int8 product by compute capability (major * 10 + minor).

    Shared memory decides: a stage holds (m + n) k bytes, and 99 KiB are there on GeForce (86, 89,
    120), 163 on sm_80, 227 on sm_90 and sm_100. Few rows leave too few tiles for large ones. Only
    sm_90 has an int8 instruction whose sums leave registers for a larger tile: sm_100's fifth
    generation has none, and its mma spilled at 128 x 256.
    """
    if num_rows <= 64:
        return Tiles(16 if num_rows <= 16 else 64, 64, 128, 4, 4)
    if capability == 90:
        return Tiles(128, 256, 128, 8, 4)
    if capability in (80, 100):
        return Tiles(128, 128, 128, 8, 4)
    return Tiles(128, 128, 64, 8, 4)


def gradient_tiles(capability: int) -> Tiles:
    """Tile of the weight gradient: m counts tokens, n outputs, k inputs."""
    if capability >= 90 and capability < 120:
        return Tiles(64, 128, 128, 8, 3)
    return Tiles(32, 128, 128, 8, 3)


class RowBlock(NamedTuple):
    """What a program that owns whole rows handles at once: rows, columns, warps."""

    rows: int
    columns: int
    warps: int

    def grid(self, num_rows: int) -> tuple[int]:
        """Launch grid whose programs cover `num_rows` rows."""
        return (cdiv(num_rows, self.rows),)

    def constants(self) -> dict[str, int]:
        """The two sizes by the names that kernels have for them as constexpr arguments."""
        return {"BLOCK_ROWS": self.rows, "BLOCK": self.columns}


def row_block(columns: int) -> RowBlock:
    """Block for rows of so many columns: short rows share a program, long ones take several turns.

    Eight to sixteen elements a thread.
    """
    block = min(MAX_ROW_BLOCK, power_of_two(columns))
    rows = max(1, MIN_ROW_BLOCK // block)
    return RowBlock(rows, block, max(1, min(8, rows * block // 256)))


def quantize_rows(
    x: Tensor,
    column_scale: Tensor | None = None,
    *,
    source: Tensor | None = None,
    expert: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of x (M, K), times column_scale (K,) if given, as int8 codes (M, K) and scales (M,).

    source (N,) int64: the rows of x to take, in place of all of them; expert (N,) int64: which row
    of column_scale (E, K) belongs to each.
    """
    rows, columns = x.shape[0] if source is None else source.shape[0], x.shape[1]
    if x.stride(1) != 1:
        x = x.contiguous()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = row_block(columns)
        launcher(quantize_rows_kernel, block.grid(rows), warps=block.warps)(
            *(x, scale if column_scale is None else column_scale, codes, scale),
            *(scale if source is None else source, scale if expert is None else expert),
            *(rows, columns, x.stride(0)),
            HAS_COLUMN_SCALE=column_scale is not None,
            HAS_SOURCE=source is not None,
            HAS_EXPERT=expert is not None,
            **block.constants(),
        )
    return codes, scale


def ternarize_rows(weight: Tensor) -> TernaryWeight:
    """Codes and scales of weight (..., out, in), one scale per row; reads the weight twice."""
    weight = weight.detach()
    matrices, (rows, columns) = weight.shape[:-2], weight.shape[-2:]
    flat = weight.reshape(-1, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    codes = torch.empty(*matrices, rows, columns, dtype=torch.int8, device=weight.device)
    codes_t = torch.empty(*matrices, columns, rows, dtype=torch.int8, device=weight.device)
    scale = torch.empty(*matrices, rows, dtype=torch.float32, device=weight.device)
    block_rows = 16
    launcher(ternarize_kernel, (cdiv(flat.shape[0], block_rows),))(
        *(flat, codes, codes_t, scale, flat.shape[0], columns, flat.stride(0), rows),
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=min(256, power_of_two(columns)),
    )
    return TernaryWeight(codes, codes_t, scale)


def int8_product(
    a: Tensor,
    b: Tensor,
    *,
    a_scale: Tensor,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:
    """a (M, K) times b (N, K) transposed, both int8 and contiguous, scaled; (M, N) in `dtype`."""
    (rows, depth), outputs = a.shape, b.shape[0]
    out = torch.empty(rows, outputs, dtype=dtype, device=a.device)
    if rows:
        tiles = tiles or measured_tiles("int8_product", a, (rows, outputs, depth))
        tiles = tiles or product_tiles(rows, device_capability(a))
        grid = (cdiv(rows, tiles.m) * cdiv(outputs, tiles.n),)
        launcher(int8_product_kernel, grid, warps=tiles.warps, stages=tiles.stages)(
            *(a, b, a_scale, a_scale if b_scale is None else b_scale, out),
            *(rows, outputs, depth, out.stride(0)),
            HAS_B_SCALE=b_scale is not None,
            **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP_M": 8},
        )
    return out


def weight_gradient(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    *,
    in_bf16: bool,
    processors: int | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """(grad * scale)^T codes over the rows: grad (M, N), codes (M, K) int8; (N, K) in fp32.

    processors: multiprocessors (the device's by default); the rows are split until every one has
    a tile.
    """
    if processors is None:
        processors = processor_count(grad.device)
    (rows, outputs), inputs = grad.shape, codes.shape[1]
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    shape, itemsize = (rows, outputs, inputs), 2 if in_bf16 else 4
    tiles = tiles or measured_tiles("weight_gradient", grad, shape, itemsize=itemsize)
    tiles = tiles or gradient_tiles(device_capability(grad))
    grid = (cdiv(outputs, tiles.n), cdiv(inputs, tiles.k))
    wanted = max(1, min(MAX_SPLITS, processors // (grid[0] * grid[1])))
    per_split = cdiv(cdiv(max(rows, 1), wanted), tiles.m) * tiles.m
    splits = cdiv(max(rows, 1), per_split)
    partial = torch.empty(splits, outputs, inputs, dtype=torch.float32, device=grad.device)
    launch = launcher(
        weight_gradient_kernel, (*grid, splits), warps=tiles.warps, stages=tiles.stages
    )
    launch(
        *(grad, codes, scale, partial, rows, outputs, inputs, grad.stride(0), per_split),
        DOT_IN_BF16=in_bf16,
        **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k},
    )
    return partial[0] if splits == 1 else partial.sum(0)


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, ternary: TernaryWeight, dtype: torch.dtype
    ) -> Tensor:
        codes, scale = quantize_rows(x)
        ctx.save_for_backward(codes, scale, *ternary)
        ctx.dtypes = (x.dtype, weight.dtype)
        return int8_product(codes, ternary.codes, a_scale=scale, b_scale=ternary.scale, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        codes, scale, _, weight_codes_t, weight_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        (grad,) = grads
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_codes, grad_scale = quantize_rows(grad, weight_scale)
            grad_x = int8_product(
                grad_codes, weight_codes_t, a_scale=grad_scale, b_scale=None, dtype=x_dtype
            )
        if ctx.needs_input_grad[1]:
            in_bf16 = grad.dtype is not torch.float32
            grad_weight = weight_gradient(grad, codes, scale, in_bf16=in_bf16).to(weight_dtype)
        return grad_x, grad_weight, None, None


def ternary_linear(
    x: Tensor, weight: Tensor, *, ternary: TernaryWeight | None = None, dtype: torch.dtype
) -> Tensor:
    """bit_linear with one scale per output row, on int8 products.

    x: (..., in) on the kernels' device, weight: (out, in). `ternary`: codes of exactly this weight
    if the caller holds them. Returns (..., out) in `dtype`. fp32 x gets an fp32 weight gradient
    product, 16-bit x one in bf16 with fp32 sums.
    """
    codes = ternarize_rows(weight) if ternary is None else ternary
    flat = x.reshape(-1, x.shape[-1])
    y = apply_opaque(_TernaryLinear, flat, weight, codes, dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
