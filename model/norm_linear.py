"""RMSNorm and the ternary product behind it on kernels: launchers, autograd and face.

    y = W n,  n = x rate gain  with the product of `ternary_linear.py` on the codes of n
    dn from its int8 product, straight through the rounding;  dx, dgain = Jacobian of the norm at x
For backward the codes of n stand in for n, one byte each, and x is kept by reference: whatever
made it keeps it as well. It could be had from the codes too, but for columns whose gain is 0,
which would then stay 0 for ever.

Source: SubLN of b1.58 2B4T 2504.12285.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.launch import cdiv, launcher, power_of_two, processor_count
from model.norm_kernels import norm_gradient_kernel, norm_quantize_kernel
from model.opaque import apply_opaque
from model.ternary_linear import (
    RowBlock,
    TernaryWeight,
    int8_product,
    quantize_rows,
    ternarize_rows,
    weight_gradient,
)
from model.weight_cache import cached

MAX_WIDTH = 16384  # a program holds whole rows in registers


def whole_row_block(width: int) -> RowBlock:
    """Block of whole rows: 1,024 elements or one row, eight to thirty-two elements a thread."""
    columns = power_of_two(width)
    rows = max(1, 1024 // columns)
    return RowBlock(rows, columns, max(1, min(16, rows * columns // 256)))


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def norm_quantize(x: Tensor, gain: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (M, K) int8 and steps (M,) of rms_norm(x) * gain, and 1 / rms (M,); x (M, K)."""
    rows, width = x.shape
    x = _inner_contiguous(x)
    codes = torch.empty(rows, width, dtype=torch.int8, device=x.device)
    step = torch.empty(rows, dtype=torch.float32, device=x.device)
    rate = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        block = whole_row_block(width)
        launcher(norm_quantize_kernel, block.grid(rows), warps=block.warps)(
            *(x, step if gain is None else gain, codes, step, rate, rows, width, x.stride(0)),
            HAS_GAIN=gain is not None,
            EPS=eps,
            **block.constants(),
        )
    return codes, step, rate


def norm_gradient(
    grad: Tensor, x: Tensor, gain: Tensor | None, rate: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x (M, K) and gain (K,) fp32, from grad (M, K) of the normalised values."""
    rows, width = x.shape
    grad, x = _inner_contiguous(grad), _inner_contiguous(x)
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    block = whole_row_block(width)
    blocks = cdiv(max(rows, 1), block.rows)
    per_program = cdiv(blocks, 2 * processor_count(x.device)) * block.rows
    programs = cdiv(max(rows, 1), per_program)
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    launcher(norm_gradient_kernel, (programs,), warps=block.warps)(
        *(grad, x, rate if gain is None else gain, rate, out, partial),
        *(rows, width, grad.stride(0), x.stride(0), per_program),
        HAS_GAIN=gain is not None,
        **block.constants(),
    )
    return out, None if gain is None else partial.sum(0)


class _NormTernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor | None,
        weight: Tensor,
        ternary: TernaryWeight,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        codes, step, rate = norm_quantize(x, gain, eps=eps)
        ctx.save_for_backward(x, gain, rate, codes, step, ternary.codes_t, ternary.scale)
        ctx.weight_dtype = weight.dtype
        return int8_product(codes, ternary.codes, a_scale=step, b_scale=ternary.scale, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, rate, codes, step, weight_codes_t, weight_scale = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad_gain = grad_weight = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_codes, grad_step = quantize_rows(grad, weight_scale)
            grad_n = int8_product(
                grad_codes, weight_codes_t, a_scale=grad_step, b_scale=None, dtype=x.dtype
            )
            grad_x, grad_gain = norm_gradient(grad_n, x, gain, rate)
        if grad_gain is not None:
            grad_gain = grad_gain.to(gain.dtype)
        if ctx.needs_input_grad[2]:
            in_bf16 = grad.dtype is not torch.float32
            grad_weight = weight_gradient(grad, codes, step, in_bf16=in_bf16).to(ctx.weight_dtype)
        return grad_x, grad_gain, grad_weight, None, None, None


def norm_ternary_linear(
    x: Tensor, gain: Tensor | None, weight: Tensor, *, eps: float, dtype: torch.dtype
) -> Tensor:
    """bit_linear(rms_norm(x, gain), weight) with one scale per row of weight (out, in).

    x (..., in) with in <= MAX_WIDTH; gain (in,) or none. Returns (..., out) in `dtype`.
    """
    ternary = cached("int8", (weight,), 0, lambda: ternarize_rows(weight))
    flat = x.reshape(-1, x.shape[-1])
    y = apply_opaque(_NormTernaryLinear, flat, gain, weight, ternary, eps, dtype)
    return y.view(*x.shape[:-1], weight.shape[0])
