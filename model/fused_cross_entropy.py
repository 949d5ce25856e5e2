"""Mean cross entropy of a linear head on Triton kernels: launchers, autograd and face.

With z = h W^T, l = logsumexp(z) and c counted labels:
    loss = sum (l - z[label]) / c,  G = softmax(z) - one hot (0 in ignored rows)
    dh = (dloss / c) G W,  dW = (dloss / c) G^T h
Forward keeps one number per row. Backward forms G for blocks of rows of at most
MAX_GRADIENT_ENTRIES entries, in the type of the products, and adds dW over the blocks in fp32 in
a fixed order. The count and the incoming gradient stay on the device.

Source: cut cross entropy 2411.09009; blocks of rows as in Liger 2410.10989.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.cross_entropy_kernels import (
    logit_gradient_kernel,
    logit_statistics_kernel,
    scaled_product_kernel,
)
from model.launch import Tiles, cdiv, device_capability, launcher, processor_count
from model.launch_table import measured_tiles
from model.opaque import apply_opaque

IGNORED = -100
MAX_GRADIENT_ENTRIES = 2**25  # 64 MiB in a 16-bit type
ROW_GRAIN = 64  # entries; keeps every row of G aligned for wide loads
MAX_SPLITS = 64


def logits_tiles(capability: int, itemsize: int) -> Tiles:
    """Tile of z = h W^T: rows, vocabulary entries, depth. fp32 has no tensor core to feed."""
    if itemsize > 2:
        return Tiles(64, 64, 32, 4, 3)
    if 90 <= capability < 120:
        return Tiles(128, 128, 64, 8, 4)
    if capability == 80:
        return Tiles(128, 128, 64, 8, 3)
    return Tiles(128, 128, 32, 8, 4)


def count_splits(num_rows: int, vocabulary: int, tiles: Tiles, processors: int) -> tuple[int, int]:
    """Parts of the vocabulary and blocks in each, so that every multiprocessor has a program."""
    blocks = cdiv(vocabulary, tiles.n)
    wanted = cdiv(2 * processors, cdiv(num_rows, tiles.m))
    per_split = cdiv(blocks, min(wanted, MAX_SPLITS, blocks))
    return cdiv(blocks, per_split), per_split


def _tiles(operation: str, x: Tensor, shape: tuple[int, int, int]) -> Tiles:
    found = measured_tiles(operation, x, shape, itemsize=x.element_size())
    return found or logits_tiles(device_capability(x), x.element_size())


def logit_statistics(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp of h W^T and the label's logit, (N,) fp32 each; 0 for a label that is no entry.

    hidden (N, D) and weight (V, D) of one type with unit inner stride, labels (N,) int64, N > 0.
    """
    (rows, depth), vocabulary = hidden.shape, weight.shape[0]
    tiles = _tiles("logits", hidden, (rows, vocabulary, depth))
    splits, per_split = count_splits(rows, vocabulary, tiles, processor_count(hidden.device))
    grid = (cdiv(rows, tiles.m), splits)
    normaliser = torch.empty(splits, rows, dtype=torch.float32, device=hidden.device)
    picked = torch.empty_like(normaliser)
    launcher(logit_statistics_kernel, grid, warps=tiles.warps, stages=tiles.stages)(
        *(hidden, weight, labels, normaliser, picked, rows, vocabulary, depth),
        *(hidden.stride(0), weight.stride(0), per_split),
        **{"BLOCK_M": tiles.m, "BLOCK_V": tiles.n, "BLOCK_K": tiles.k},
    )
    return torch.logsumexp(normaliser, 0), picked.sum(0)


def logit_gradient(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    normaliser: Tensor,
    *,
    out: Tensor,
    tiles: Tiles | None = None,
) -> Tensor:
    """softmax - one hot of the rows into `out` (N or more, V or more); returns its (N, V) part."""
    (rows, depth), vocabulary = hidden.shape, weight.shape[0]
    tiles = tiles or _tiles("logits", hidden, (rows, vocabulary, depth))
    grid = (cdiv(rows, tiles.m) * cdiv(vocabulary, tiles.n),)
    launcher(logit_gradient_kernel, grid, warps=tiles.warps, stages=tiles.stages)(
        *(hidden, weight, labels, normaliser, out, rows, vocabulary, depth),
        *(hidden.stride(0), weight.stride(0), out.stride(0)),
        IGNORED=IGNORED,
        **{"BLOCK_M": tiles.m, "BLOCK_V": tiles.n, "BLOCK_K": tiles.k, "GROUP_M": 8},
    )
    return out[:rows, :vocabulary]


def scaled_product(
    a: Tensor, b: Tensor, scale: Tensor, *, out: Tensor, add: bool, tiles: Tiles | None = None
) -> None:
    """out (M, N) = scale * a (M, K) b (K, N), added to out if `add`; sums in fp32.

    a may be a transposed view; b and out have unit inner stride; scale is 0-d fp32.
    """
    (rows, depth), columns = a.shape, b.shape[1]
    tiles = tiles or _tiles("scaled_product", b, (rows, columns, depth))
    grid = (cdiv(rows, tiles.m) * cdiv(columns, tiles.n),)
    launcher(scaled_product_kernel, grid, warps=tiles.warps, stages=tiles.stages)(
        *(a, b, scale, out, rows, columns, depth),
        *(a.stride(0), a.stride(1), b.stride(0), out.stride(0)),
        ADD=add,
        **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP_M": 8},
    )


def _operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    values = values.to(dtype)
    return values if values.stride(1) == 1 else values.contiguous()


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        counted = labels != IGNORED
        count = counted.sum().clamp_min(1).float()
        normaliser = picked = torch.zeros(labels.shape, device=hidden.device)
        if labels.numel():
            operands = _operand(hidden, dtype), _operand(weight, dtype)
            normaliser, picked = logit_statistics(*operands, labels)
        # A label that is no entry of the vocabulary must not pass for a logit of 0.
        strange = counted & ((labels < 0) | (labels >= weight.shape[0]))
        picked = picked.masked_fill(strange, float("nan"))
        ctx.save_for_backward(hidden, weight, labels, normaliser, count)
        ctx.dtype = dtype
        return torch.where(counted, normaliser - picked, 0.0).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, labels, normaliser, count = ctx.saved_tensors
        (rows, depth), vocabulary = hidden.shape, weight.shape[0]
        scale = (grads[0] / count).float()
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = torch.empty(rows, depth, dtype=hidden.dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            make = torch.empty if rows else torch.zeros
            grad_weight = make(vocabulary, depth, dtype=torch.float32, device=hidden.device)
        width = cdiv(vocabulary, ROW_GRAIN) * ROW_GRAIN
        size = min(rows, max(ROW_GRAIN, MAX_GRADIENT_ENTRIES // width))
        store = torch.empty(size, width, dtype=ctx.dtype, device=hidden.device)
        operand = _operand(weight, ctx.dtype)
        for start in range(0, rows, max(size, 1)):
            part = slice(start, start + size)
            block = _operand(hidden[part], ctx.dtype)
            grad = logit_gradient(block, operand, labels[part], normaliser[part], out=store)
            if grad_hidden is not None:
                scaled_product(grad, operand, scale, out=grad_hidden[part], add=False)
            if grad_weight is not None:
                scaled_product(grad.mT, block, scale, out=grad_weight, add=start > 0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, dtype: torch.dtype
) -> Tensor:
    """Mean nats over the labels that are not -100 (0 if there are none), an fp32 scalar.

    hidden (N, D); weight (V, D); labels (N,) int64; products in `dtype`, everything after them in
    fp32. NaN if a counted label is no row of the weight: raising would have to wait for the device.
    """
    return apply_opaque(_FusedCrossEntropy, hidden, weight, labels.contiguous(), dtype)
