"""Attention on the shared latent by Triton kernels: launcher, autograd and face.

One map (MLA) or the difference of two (differential MLA) in one pass over keys and values; the
formulas stand in `attention_kernel_src.py`, the definition is `reference_ops.attention`. Documents
are compared by number inside the kernels: no mask of size T x S exists.

Kept for backward: inputs, the output, A2 v and one number per map, query and head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.attention_kernel_src import (
    attention_kernel,
    delta_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
)
from model.launch import power_of_two
from model.opaque import apply_opaque
from model.ternary_linear import device_capability

MAX_WIDTH = 256
SHORT_TYPE = torch.bfloat16


class AttentionTiles(NamedTuple):
    """Launch settings: queries and keys of a tile, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_tiles(width: int, capability: int, *, in_bf16: bool) -> AttentionTiles:
    """Tiles for heads of `width`, so that no kernel keeps its sums on the stack.

    Two maps' queries, gradients and statistics share the registers. fp32 products split every
    operand in two and leave room for the smallest tile only; wgmma (sm_90, sm_100) wants 64 rows.
    """
    if not in_bf16:
        return AttentionTiles(16, 16, 4, 1)
    if width > 64:
        return AttentionTiles(32, 32, 8, 2)
    edge = 64 if 90 <= capability < 120 else 32
    return AttentionTiles(edge, edge, 4, 2)


class AttentionShape(NamedTuple):
    """Sizes of one call, and the constants that its kernels share."""

    batch: int
    queries: int
    keys: int
    maps: int
    heads: int
    content: int
    rope: int
    width: int
    tiles: AttentionTiles
    has_documents: bool
    in_bf16: bool

    def constants_of(self, kernel: Any) -> dict[str, Any]:
        """Every constant of a kernel; no edge of a tile is below 16, as tensor cores want it."""
        values = {
            "HAS_DOCUMENTS": self.has_documents,
            "MAPS": self.maps,
            "HEADS": self.heads,
            "CONTENT": self.content,
            "ROPE": self.rope,
            "WIDTH": self.width,
            "BLOCK_M": self.tiles.queries,
            "BLOCK_N": self.tiles.keys,
            "BLOCK_C": max(16, power_of_two(self.content)),
            "BLOCK_R": max(16, power_of_two(self.rope)),
            "BLOCK_W": max(16, power_of_two(self.width)),
            "DOT_IN_BF16": self.in_bf16,
        }
        return {name: values[name] for name in kernel.arg_names if name.isupper()}

    def launch(self, kernel: Any, rows: int, per_program: int, *args: Any) -> None:
        """One program per head and `per_program` of the rows."""
        grid = (self.batch * self.heads * -(-rows // per_program),)
        kernel[grid](
            *args,
            **self.constants_of(kernel),
            num_warps=self.tiles.warps,
            num_stages=self.tiles.stages,
        )


def _as_rows(value: Tensor) -> tuple[Tensor, int]:
    """value (B, T, ...) with everything behind T contiguous and rows of all batches one stride
    apart, and that stride; copied where it is not so."""
    inner = value[0, 0].numel()
    step = value.stride(1)
    regular = value.shape[0] == 1 or value.stride(0) == value.shape[1] * step
    if not (regular and step >= inner and value[0, 0].is_contiguous()):
        value = value.contiguous()
        step = inner
    return value, step


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        q, q_rope, k, k_rope, v, lam, documents, scale, shape = args
        rows = [_as_rows(value) for value in (q, q_rope, k, k_rope, v)]
        values, strides = [row[0] for row in rows], [row[1] for row in rows]
        # Stand-ins for what is absent are never read.
        lam_values = values[0] if lam is None else lam.contiguous()
        numbers = values[0] if documents is None else documents.contiguous()
        dtype = SHORT_TYPE if shape.in_bf16 else torch.float32
        sizes = (shape.batch, shape.queries, shape.heads, shape.width)
        out = torch.empty(sizes, dtype=dtype, device=q.device)
        second = torch.empty_like(out) if shape.maps == 2 else out
        log_sum = torch.empty(
            *(shape.batch, shape.heads, shape.maps, shape.queries),
            dtype=torch.float32,
            device=q.device,
        )
        shape.launch(
            attention_kernel,
            *(shape.queries, shape.tiles.queries, *values, lam_values, numbers),
            *(out, second, log_sum, shape.queries, shape.keys, scale, *strides),
        )
        ctx.save_for_backward(*values, lam_values, numbers, out, second, log_sum)
        ctx.strides, ctx.scale, ctx.shape = strides, scale, shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *values, lam, numbers, out, second, log_sum = ctx.saved_tensors
        shape, q, k, v = ctx.shape, values[0], values[2], values[4]
        grad = grads[0].contiguous()
        delta = torch.empty_like(log_sum)
        shape.launch(
            delta_kernel,
            *(shape.queries, shape.tiles.queries, grad, out, second, lam, delta, shape.queries),
        )
        inputs = (grad, *values, lam, numbers, log_sum, delta)
        sizes = (shape.queries, shape.keys, ctx.scale, *ctx.strides)
        empty = {"dtype": out.dtype, "device": q.device}
        grad_q, grad_q_rope = (torch.empty(value.shape, **empty) for value in values[:2])
        shape.launch(
            query_gradient_kernel,
            *(shape.queries, shape.tiles.queries, *inputs, grad_q, grad_q_rope, *sizes),
        )
        grad_k, grad_v = torch.empty(k.shape, **empty), torch.empty(v.shape, **empty)
        parts = torch.empty(
            *(shape.batch, shape.keys, shape.heads, shape.rope),
            dtype=torch.float32,
            device=q.device,
        )
        shape.launch(
            key_gradient_kernel,
            *(shape.keys, shape.tiles.keys, *inputs, grad_k, parts, grad_v, *sizes),
        )
        found = (grad_q, grad_q_rope, grad_k, parts.sum(2), grad_v)
        of_lam = -delta[:, :, 1] if shape.maps == 2 else None
        return (
            *(value.to(wanted.dtype) for value, wanted in zip(found, values, strict=True)),
            *(of_lam, None, None, None),
        )


def attend_parts(
    q: Tensor, q_rope: Tensor, k: Tensor, k_rope: Tensor, v: Tensor, *, scale: float,
    lam: Tensor | None = None, documents: Tensor | None = None, in_bf16: bool = False,
    tiles: AttentionTiles | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of the last T of S positions: (B, T, H, dv), in bf16 or fp32.

    q (B, T, H, P, dC) and q_rope (B, T, H, P, dR) with P = 1, or P = 2 and lam (B, H, T);
    k (B, S, H, dC); k_rope (B, S, dR), one for all heads; v (B, S, H, dv); documents (B, S) int32
    as from `attention.context_documents`. scale multiplies the scores. in_bf16: products of bf16
    operands and a bf16 result.
    """
    batch, queries, heads, maps, content = q.shape
    if (lam is None) != (maps == 1):
        raise ValueError("two query maps need lam, one map must not have it")
    width = max(content, q_rope.shape[-1], v.shape[-1])
    if width > MAX_WIDTH:
        raise ValueError(
            f"a head is {width} wide: the Triton attention takes at most {MAX_WIDTH};"
            " raise --n-heads or use --kernel-backend torch"
        )
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        raise ValueError("Triton attention computes in fp32; --kernel-backend torch takes fp64")
    shape = AttentionShape(
        *(batch, queries, k.shape[1], maps, heads, content, q_rope.shape[-1], v.shape[-1]),
        tiles=tiles or attention_tiles(width, device_capability(q), in_bf16=in_bf16),
        has_documents=documents is not None,
        in_bf16=in_bf16,
    )
    return apply_opaque(_Attention, q, q_rope, k, k_rope, v, lam, documents, scale, shape)
