"""Ternary SwiGLU over rows that belong to different experts, with a hand-written backward.

y = W_down quantise(RMS(silu(W_gate x) * W_up x)), the same function as three BitLinear layers with
a parameter-free sub-norm in front of the last one. The products run on int8 activation codes and
ternary weight codes held in floating point: sums of such codes are integers below 2^24, which fp32
adds without rounding in any order. A token's result is therefore the same to the bit whatever
other rows stand in its matrix product, which rounding activations to int8 would otherwise turn
from a last-bit difference into a visible one. (With --bitlinear-group-size the scale stays inside
the product and only closeness remains.)

Between the products the elementwise work of one block of rows stays in the cache, and backward
recomputes it from the gate and up values, the only activations kept besides the input codes.

Sources: SwiGLU 2002.05202; BitLinear 2402.17764; sorting by expert as in MegaBlocks 2211.15841.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.bitlinear import expand_scale, quantize_tokens, ternarize, ternary_weight
from model.byte_product import code_dtype, held_as, token_codes
from model.dispatch import DispatchPlan, expert_products, slot_of_row, take_rows
from model.norm_rope import rms_norm
from model.opaque import apply_opaque

_CODE_UNIT = 1.0 / 128.0  # keeps sums of codes inside fp16's range; exact in every type


@dataclass(slots=True, kw_only=True, frozen=True)
class SwigluSettings:
    """ternary: round weights and activations; sub_norm: RMS-normalise the hidden values.

    backend: "triton" runs what has a kernel (`has_kernels`) on int8 products.
    """

    ternary: bool = True
    group_size: int = 0
    sub_norm: bool = True
    eps: float = 1e-6
    backend: str = "torch"

    def has_kernels(self, *widths: int) -> bool:
        """Whether the kernels compute products of these depths: one scale per row is theirs."""
        one_scale = not 0 < self.group_size < max(widths)
        return self.backend == "triton" and self.ternary and one_scale


def _weight_codes(weight: Tensor, settings: SwigluSettings) -> tuple[Tensor, Tensor | None]:
    """Factor of the product (E, out, in) and the scale (E, out) left for its result."""
    if not settings.ternary:
        return _stacked(weight.detach()), None
    codes, scale = map(_stacked, ternarize(weight, settings.group_size))
    if scale.shape[-1] > 1:
        return codes * expand_scale(scale, weight.shape[-1], settings.group_size), None
    return codes, scale.squeeze(-1)


def _stacked(weight: Tensor) -> Tensor:
    """A weight (out, in) as a stack of one; a stack as it is."""
    return weight.unsqueeze(0) if weight.dim() == 2 else weight


def _write_scaled(
    result: Tensor, product: Tensor, step: Tensor | None, scale: Tensor | None, unit: float
) -> None:
    """result (fp32 or wider) = product of codes, times the token's step and the row's scale."""
    if step is None:
        result.copy_(product)
    else:
        torch.mul(product, step if unit == 1.0 else step / unit, out=result)
    if scale is not None:
        result.mul_(scale)


def activate(gate_up: Tensor, settings: SwigluSettings) -> tuple[Tensor, Tensor | None]:
    """Normalised hidden values (n, h) and the factor (n, 1) that normalised them."""
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = F.silu(gate).mul_(up)
    if not settings.sub_norm:
        return hidden, None
    norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    rate = (norm.square_() / hidden.shape[-1]).add_(settings.eps).rsqrt_()
    return hidden.mul_(rate), rate


class _Swiglu(torch.autograd.Function):
    """Forward and backward over blocks of rows; see `swiglu` for the arguments.

    With n the normalised hidden values, n^ their rounded form and g the gate of a row:
    dg = <dy W_down, n^>, dn = g dy W_down, dW_down = dy^T (g n^), then the Jacobians of the RMS,
    of silu(a) b, and dW_in = d[a, b]^T x^, dx = d[a, b] W_in. Rounding has identity gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        gates: Tensor | None,
        plan: DispatchPlan | None,
        settings: SwigluSettings,
        dtype: torch.dtype,
    ) -> Tensor:
        unit = _CODE_UNIT if dtype in (torch.bfloat16, torch.float16) and settings.ternary else 1.0
        x_codes, x_step = token_codes(x) if settings.ternary else (x, None)
        x_codes = (x_codes * unit if unit != 1.0 else x_codes).to(dtype)
        codes_in, scale_in = _weight_codes(weight_in, settings)
        codes_out, scale_out = _weight_codes(weight_out, settings)
        num_rows = x.shape[0] if plan is None else plan.token_of_row.numel()
        products = expert_products(plan, num_rows)
        grouped = plan is not None and plan.grouped
        whole = settings.ternary and scale_in is not None and scale_out is not None
        operand = code_dtype(x_codes) if whole and not grouped else dtype
        x_operand = x_codes.to(operand)
        operand_in = held_as(codes_in, weight_in, operand)
        operand_out = held_as(codes_out, weight_out, operand)

        gate_up = x.new_empty(num_rows, weight_in.shape[-2])
        y_rows = x.new_empty(num_rows, weight_out.shape[-2])
        for rows, expert in products.blocks():
            token = rows if plan is None else plan.token_of_row[rows]
            product = products.times_transposed(take_rows(x_operand, token), operand_in, expert)
            step = None if x_step is None else take_rows(x_step, token)
            scale = None if scale_in is None else products.row_scale(scale_in, expert)
            block = gate_up[rows]
            _write_scaled(block, product, step, scale, unit)
            hidden, _ = activate(block, settings)
            step = None
            if settings.ternary:
                hidden, step = token_codes(hidden)
                hidden = hidden.mul_(unit) if unit != 1.0 else hidden
            product = products.times_transposed(hidden.to(operand), operand_out, expert)
            scale = None if scale_out is None else products.row_scale(scale_out, expert)
            _write_scaled(y_rows[rows], product, step, scale, unit)

        ctx.save_for_backward(
            x_codes, x_step, codes_in, scale_in, codes_out, scale_out, gate_up, gates
        )
        ctx.plan, ctx.settings, ctx.dtype, ctx.unit = plan, settings, dtype, unit
        ctx.single = weight_in.dim() == 2
        return y_rows if plan is None else _combine(y_rows, plan.row_of_slot, gates)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_step, codes_in, scale_in, codes_out, scale_out, gate_up, gates = (
            ctx.saved_tensors
        )
        plan, settings, dtype, unit = ctx.plan, ctx.settings, ctx.dtype, ctx.unit
        grad_y = grads[0].contiguous()
        weight_in = _dequantise(codes_in, scale_in).to(dtype)
        weight_out = _dequantise(codes_out, scale_out).to(dtype)
        num_rows = gate_up.shape[0]
        grad_in, grad_out = torch.zeros_like(codes_in), torch.zeros_like(codes_out)
        grad_rows = grad_y.new_empty(num_rows, codes_in.shape[2])
        gate_rows = grad_gate = None
        if plan is not None and gates is not None:
            gate_rows = gates.flatten()[slot_of_row(plan)].unsqueeze(1)  # (N, 1)
            grad_gate = grad_y.new_empty(num_rows)

        products = expert_products(plan, num_rows)
        for rows, expert in products.blocks():
            token = rows if plan is None else plan.token_of_row[rows]
            grad_block = take_rows(grad_y, token).to(dtype)
            hidden, rate = activate(gate_up[rows], settings)
            rounded = hidden
            if settings.ternary:
                rounded, step = token_codes(hidden)
                rounded.mul_(step)
            grad_hidden = products.times(grad_block, weight_out, expert).to(gate_up.dtype)
            if gate_rows is not None and grad_gate is not None:
                grad_gate[rows] = torch.linalg.vecdot(grad_hidden, rounded)
                grad_hidden = grad_hidden.mul_(gate_rows[rows])
                rounded = rounded * gate_rows[rows]
            products.add_outer(grad_out, grad_block, rounded.to(dtype), expert)
            grad_block = _activation_grad(grad_hidden, hidden, rate, gate_up[rows]).to(dtype)
            rounded = take_rows(x_codes, token)
            if x_step is not None:
                rounded = (rounded * (take_rows(x_step, token) / unit)).to(dtype)
            products.add_outer(grad_in, grad_block, rounded, expert)
            grad_rows[rows] = products.times(grad_block, weight_in, expert)

        if ctx.single:
            grad_in, grad_out = grad_in[0], grad_out[0]
        if plan is None:
            return grad_rows, grad_in, grad_out, None, None, None, None
        grad_x = _combine(grad_rows, plan.row_of_slot, None)
        if grad_gate is not None:
            grad_gate = grad_gate[plan.row_of_slot]
        return grad_x, grad_in, grad_out, grad_gate, None, None, None


def _dequantise(codes: Tensor, scale: Tensor | None) -> Tensor:
    return codes if scale is None else codes * scale.unsqueeze(-1)


def _activation_grad(grad: Tensor, hidden: Tensor, rate: Tensor | None, gate_up: Tensor) -> Tensor:
    """Gradient (n, 2h) at gate_up of the normalised hidden values; consumes grad and hidden."""
    if rate is not None:
        mean = torch.linalg.vecdot(grad, hidden).unsqueeze(-1) / hidden.shape[-1]
        grad = grad.addcmul_(hidden, mean, value=-1.0).mul_(rate)
    gate, up = gate_up.chunk(2, dim=-1)
    result = torch.empty_like(gate_up)
    half = gate.shape[-1]
    torch.mul(grad, F.silu(gate), out=result[:, half:])
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=result[:, :half])
    return result


def _combine(rows: Tensor, row_of_slot: Tensor, gates: Tensor | None) -> Tensor:
    """sum over slots of gate * row: rows (N, D), row_of_slot and gates (tokens, k) -> (tokens, D).

    A gather instead of a scatter: deterministic on every device and several times faster on CPU.
    """
    total = rows.index_select(0, row_of_slot[:, 0])
    if gates is not None:
        total.mul_(gates[:, :1])
    for slot in range(1, row_of_slot.shape[1]):
        picked = rows.index_select(0, row_of_slot[:, slot])
        if gates is None:
            total.add_(picked)
        else:
            total.addcmul_(picked, gates[:, slot : slot + 1])
    return total


def swiglu(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    *,
    settings: SwigluSettings,
    plan: DispatchPlan | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    """SwiGLU of every token by one expert (no plan), or the gated sum over its planned experts.

    x (T, D); weight_in (E, 2h, D): gate rows, then up rows; weight_out (E, D, h), or both without
    E; gates (T, k).
    Returns (T, D) in x's dtype. Under autocast the products run in autocast's type; on the
    triton backend on int8 codes, and the output gradients of both products are rounded to 8 bits.
    """
    device_type = x.device.type
    dtype = x.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    on_device = plan is None or plan.grouped
    if on_device and settings.has_kernels(weight_in.shape[-1], weight_out.shape[-1]):
        from model.ternary_experts import ternary_swiglu

        with torch.autocast(device_type, enabled=False):
            return ternary_swiglu(
                *(x, weight_in, weight_out),
                sub_norm=settings.sub_norm,
                eps=settings.eps,
                plan=plan,
                gates=gates,
                dtype=dtype,
            )
    values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    with torch.autocast(device_type, enabled=False):
        y = apply_opaque(_Swiglu, values, weight_in, weight_out, gates, plan, settings, dtype)
    return y.to(x.dtype)


def swiglu_definition(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, *, settings: SwigluSettings
) -> Tensor:
    """One expert in plain differentiable operations: x (n, D), (2h, D), (D, h) -> (n, D)."""
    gate, up = _code_linear(x, weight_in, settings).chunk(2, dim=-1)
    hidden = F.silu(gate) * up
    if settings.sub_norm:
        hidden = rms_norm(hidden, eps=settings.eps)
    return _code_linear(hidden, weight_out, settings)


def _code_linear(x: Tensor, weight: Tensor, settings: SwigluSettings) -> Tensor:
    """The value of the product on codes with the gradient of the product on rounded values."""
    if not settings.ternary:
        return F.linear(x, weight)
    rounded = F.linear(quantize_tokens(x), ternary_weight(weight, settings.group_size))
    if 0 < settings.group_size < weight.shape[-1]:
        return rounded
    codes, step = token_codes(x.detach())
    weight_codes, scale = ternarize(weight)
    exact = F.linear(codes, weight_codes) * step * scale.squeeze(-1)
    return exact + (rounded - rounded.detach())
