"""Ternary SwiGLU on int8 tensor cores, of all planned experts at once: launchers and autograd.

With n = rms(silu(a) b), [a, b] = sx alpha_in (cx q_in^T), codes cn and steps sn of n, and a row's
gate w:
    y   = sum over a token's rows of w sn alpha_out (cn q_out^T)
    dn  = sg (cg q_out), (cg, sg) = int8(dy alpha_out);   dw = <dn, sn cn>
    dW_out = (w sn dy)^T cn;   d[a, b] from w dn
    dx  = sum over rows of su (cu q_in), (cu, su) = int8(d[a, b] alpha_in)
    dW_in = (d[a, b] sx)^T cx
which is `swiglu.py` with the output gradients of both products rounded to 8 bits per row.

Kept for backward: the codes of x and n (one byte each), [a, b] in the products' type, and numbers
per row. Experts' loads stay on the device from the router to the last gradient; no step of the
host depends on them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dispatch import DispatchPlan
from model.expert_kernels import (
    activate_rows_kernel,
    activation_gradient_kernel,
    combine_rows_kernel,
    grouped_int8_product_kernel,
    grouped_weight_gradient_kernel,
)
from model.launch import Tiles, cdiv, device_capability, launcher, power_of_two
from model.launch_table import measured_tiles
from model.opaque import apply_opaque
from model.ternary_linear import (
    TernaryWeight,
    gradient_tiles,
    int8_product,
    product_tiles,
    quantize_rows,
    row_block,
    ternarize_rows,
    weight_gradient,
)
from model.weight_cache import cached

COMBINE_BLOCK = 1024


def grouped_tiles(mean_rows: int, capability: int, itemsize: int) -> Tiles:
    """Tile of the grouped product by rows an expert has on average and bytes of an output.

    As `product_tiles`; with gathered rows and fp32 outputs its largest tile spills registers.
    """
    tiles = product_tiles(mean_rows, capability)
    return tiles._replace(n=128) if itemsize > 2 and tiles.n > 128 else tiles


class RowGroups(NamedTuple):
    """Rows sorted by expert, as the kernels need them; every tensor stays on its device."""

    token_of_row: Tensor  # (N,) int64
    row_of_slot: Tensor  # (T, k) int64
    slot_of_row: Tensor  # (N,) int64, the inverse of row_of_slot
    expert_of_row: Tensor  # (N,) int64
    row_ends: Tensor  # (E,) int64, rows up to and with an expert
    block_ends: Tensor  # (E,) int64, row blocks of the product up to and with an expert
    num_blocks: int  # the most that any distribution of the rows can need
    mean_rows: int  # rows an expert has on average, which chooses the tiles
    block_rows: int  # of a row block, which the tiles of every product must have

    @classmethod
    def create(cls, plan: DispatchPlan) -> RowGroups:
        """Groups of a plan for this device's tile height; reads no tensor, so it never
        synchronises."""
        rows, experts = plan.token_of_row.numel(), plan.counts.numel()
        mean_rows = max(1, rows // experts)
        block = product_tiles(mean_rows, device_capability(plan.counts)).m
        slots = torch.empty_like(plan.token_of_row)
        slots[plan.row_of_slot.flatten()] = torch.arange(rows, device=slots.device)
        return cls(
            token_of_row=plan.token_of_row,
            row_of_slot=plan.row_of_slot,
            slot_of_row=slots,
            expert_of_row=plan.expert_of_row,
            row_ends=plan.counts.cumsum(0),
            block_ends=((plan.counts + (block - 1)) // block).cumsum(0),
            num_blocks=min(rows, rows // block + experts),
            mean_rows=mean_rows,
            block_rows=block,
        )


def grouped_int8_product(
    a: Tensor,
    b: Tensor,
    groups: RowGroups,
    *,
    a_scale: Tensor,
    b_scale: Tensor | None,
    dtype: torch.dtype,
    by_token: bool,
    tiles: Tiles | None = None,
) -> Tensor:
    """Each row of a times its expert's b (E, outputs, depth) transposed, scaled; (N, outputs).

    a int8 and a_scale: one row per token, taken as often as experts chose it, if `by_token`, else
    one per row. b_scale (E, outputs) or none. Measured tiles count if they have the groups' rows.
    """
    experts, outputs, depth = b.shape
    rows = groups.token_of_row.numel()
    out = torch.empty(rows, outputs, dtype=dtype, device=a.device)
    if rows:
        shape, itemsize = (groups.mean_rows, outputs, depth), out.element_size()
        tiles = tiles or measured_tiles("grouped_product", a, shape, itemsize=itemsize)
        if tiles is None or tiles.m != groups.block_rows:
            tiles = grouped_tiles(groups.mean_rows, device_capability(a), itemsize)
        grid = (groups.num_blocks * cdiv(outputs, tiles.n),)
        launcher(grouped_int8_product_kernel, grid, warps=tiles.warps, stages=tiles.stages)(
            *(a, b, a_scale, a_scale if b_scale is None else b_scale, out),
            *(groups.token_of_row, groups.row_ends, groups.block_ends, experts, outputs, depth),
            HAS_SOURCE=by_token,
            HAS_B_SCALE=b_scale is not None,
            BLOCK_E=power_of_two(experts),
            **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP_M": 8},
        )
    return out


def grouped_weight_gradient(
    grad: Tensor,
    codes: Tensor,
    scale: Tensor,
    groups: RowGroups,
    *,
    in_bf16: bool,
    by_token: tuple[bool, bool],
) -> Tensor:
    """Per expert (scale grad)^T codes over its rows, (E, outputs, inputs) fp32; 0 without rows.

    by_token: whether grad (., outputs) and codes (., inputs) int8 have one row per token instead
    of one per row; scale (N,) belongs to rows.
    """
    experts, outputs, inputs = groups.row_ends.numel(), grad.shape[1], codes.shape[1]
    out = torch.empty(experts, outputs, inputs, dtype=torch.float32, device=grad.device)
    tiles = gradient_tiles(device_capability(grad))
    grid = (cdiv(outputs, tiles.n), cdiv(inputs, tiles.k), experts)
    launcher(grouped_weight_gradient_kernel, grid, warps=tiles.warps, stages=tiles.stages)(
        *(grad, codes, scale, out, groups.token_of_row, groups.token_of_row, groups.row_ends),
        *(outputs, inputs),
        HAS_GRAD_SOURCE=by_token[0],
        HAS_CODES_SOURCE=by_token[1],
        DOT_IN_BF16=in_bf16,
        **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k},
    )
    return out


def activate_rows(gate_up: Tensor, *, sub_norm: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, h) int8 and steps (N,) of rms(silu(a) b) of gate_up (N, 2h), and 1 / rms (N,)."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty(rows, width, dtype=torch.int8, device=gate_up.device)
    step = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    rate = torch.empty(rows, dtype=torch.float32, device=gate_up.device)
    if rows:
        block = row_block(width)
        launcher(activate_rows_kernel, block.grid(rows), warps=block.warps)(
            *(gate_up, codes, step, rate, rows, width),
            SUB_NORM=sub_norm,
            EPS=eps,
            **block.constants(),
        )
    return codes, step, rate


def activation_gradient(
    grad: Tensor,
    gate_up: Tensor,
    codes: Tensor,
    step: Tensor,
    rate: Tensor,
    gates: Tensor | None,
    *,
    sub_norm: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of gate_up (N, 2h) and of the rows' gates (N,), from grad (N, h) before them."""
    rows, width = grad.shape
    out = torch.empty_like(gate_up)
    grad_gates = None if gates is None else torch.empty_like(step)
    if rows:
        block = row_block(width)
        launcher(activation_gradient_kernel, block.grid(rows), warps=block.warps)(
            *(grad, gate_up, codes, step, rate, step if gates is None else gates),
            *(out, step if grad_gates is None else grad_gates, rows, width),
            SUB_NORM=sub_norm,
            HAS_GATES=gates is not None,
            **block.constants(),
        )
    return out, grad_gates


def combine_rows(
    rows: Tensor, row_of_slot: Tensor, gates: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    """sum over slots of gate * row: rows (N, D), row_of_slot and gates (T, k) -> (T, D)."""
    (tokens, top_k), width = row_of_slot.shape, rows.shape[1]
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    if tokens:
        block = row_block(min(width, COMBINE_BLOCK))
        grid = (*block.grid(tokens), cdiv(width, block.columns))
        launcher(combine_rows_kernel, grid, warps=block.warps)(
            *(rows, row_of_slot, rows if gates is None else gates, out, tokens, width),
            TOP_K=top_k,
            HAS_GATES=gates is not None,
            **block.constants(),
        )
    return out


class _TernarySwiglu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_in: Tensor,
        weight_out: Tensor,
        gates: Tensor | None,
        codes_in: TernaryWeight,
        codes_out: TernaryWeight,
        groups: RowGroups | None,
        sub_norm: bool,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        x_codes, x_step = quantize_rows(x)
        norm = {"sub_norm": sub_norm, "eps": eps}
        given = {"a_scale": x_step, "b_scale": codes_in.scale, "dtype": dtype}
        if groups is None:
            gate_up = int8_product(x_codes, codes_in.codes, **given)
            codes, step, rate = activate_rows(gate_up, **norm)
            given = {"a_scale": step, "b_scale": codes_out.scale, "dtype": x.dtype}
            y = int8_product(codes, codes_out.codes, **given)
        else:
            assert gates is not None
            gates = gates.contiguous()
            gate_up = grouped_int8_product(x_codes, codes_in.codes, groups, by_token=True, **given)
            codes, step, rate = activate_rows(gate_up, **norm)
            given = {"a_scale": step, "b_scale": codes_out.scale, "dtype": dtype}
            rows = grouped_int8_product(codes, codes_out.codes, groups, by_token=False, **given)
            y = combine_rows(rows, groups.row_of_slot, gates, dtype=x.dtype)
        ctx.save_for_backward(
            *(x_codes, x_step, gate_up, codes, step, rate, gates),
            *(codes_in.codes_t, codes_in.scale, codes_out.codes_t, codes_out.scale),
        )
        ctx.groups, ctx.sub_norm, ctx.dtype = groups, sub_norm, dtype
        ctx.dtypes = (x.dtype, weight_in.dtype, weight_out.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        backward = _backward_rows if ctx.groups is None else _backward_groups
        grad_x, grad_in, grad_out, grad_gates = backward(ctx, grads[0].contiguous())
        return (
            grad_x,
            None if grad_in is None else grad_in.to(ctx.dtypes[1]),
            None if grad_out is None else grad_out.to(ctx.dtypes[2]),
            *(grad_gates, None, None, None, None, None, None),
        )


def _backward_rows(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_codes, x_step, gate_up, codes, step, rate, _, in_t, scale_in, out_t, scale_out = (
        ctx.saved_tensors
    )
    needs_x, needs_in, needs_out = ctx.needs_input_grad[:3]
    in_bf16 = ctx.dtype is not torch.float32
    grad_x = grad_in = grad_out = None
    grad_codes, grad_step = quantize_rows(grad, scale_out)
    grad_hidden = int8_product(grad_codes, out_t, a_scale=grad_step, b_scale=None, dtype=ctx.dtype)
    grad_gate_up, _ = activation_gradient(
        grad_hidden, gate_up, codes, step, rate, None, sub_norm=ctx.sub_norm
    )
    if needs_out:
        grad_out = weight_gradient(grad, codes, step, in_bf16=in_bf16)
    if needs_in:
        grad_in = weight_gradient(grad_gate_up, x_codes, x_step, in_bf16=in_bf16)
    if needs_x:
        grad_codes, grad_step = quantize_rows(grad_gate_up, scale_in)
        grad_x = int8_product(
            grad_codes, in_t, a_scale=grad_step, b_scale=None, dtype=ctx.dtypes[0]
        )
    return grad_x, grad_in, grad_out, None


def _backward_groups(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x_codes, x_step, gate_up, codes, step, rate, gates, in_t, scale_in, out_t, scale_out = (
        ctx.saved_tensors
    )
    groups: RowGroups = ctx.groups
    needs_x, needs_in, needs_out, needs_gates = ctx.needs_input_grad[:4]
    in_bf16 = ctx.dtype is not torch.float32
    given = {"b_scale": None, "dtype": ctx.dtype, "by_token": False}
    grad_x = grad_in = grad_out = grad_gates = None
    grad_codes, grad_step = quantize_rows(
        grad, scale_out, source=groups.token_of_row, expert=groups.expert_of_row
    )
    grad_hidden = grouped_int8_product(grad_codes, out_t, groups, a_scale=grad_step, **given)
    gate_of_row = gates.flatten()[groups.slot_of_row]
    grad_gate_up, grad_gate_of_row = activation_gradient(
        grad_hidden, gate_up, codes, step, rate, gate_of_row, sub_norm=ctx.sub_norm
    )
    if needs_gates and grad_gate_of_row is not None:
        grad_gates = grad_gate_of_row[groups.row_of_slot].to(gates.dtype)
    if needs_out:
        scale = step * gate_of_row
        grad_out = grouped_weight_gradient(
            grad, codes, scale, groups, in_bf16=in_bf16, by_token=(True, False)
        )
    if needs_in:
        scale = x_step[groups.token_of_row]
        grad_in = grouped_weight_gradient(
            grad_gate_up, x_codes, scale, groups, in_bf16=in_bf16, by_token=(False, True)
        )
    if needs_x:
        grad_codes, grad_step = quantize_rows(grad_gate_up, scale_in, expert=groups.expert_of_row)
        rows = grouped_int8_product(grad_codes, in_t, groups, a_scale=grad_step, **given)
        grad_x = combine_rows(rows, groups.row_of_slot, None, dtype=ctx.dtypes[0])
    return grad_x, grad_in, grad_out, grad_gates


def ternary_swiglu(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    *,
    sub_norm: bool,
    eps: float,
    plan: DispatchPlan | None,
    gates: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`swiglu` on int8 products; arguments as there, sub_norm and eps as its settings have them.

    dtype: of [a, b] and of the rows' outputs; fp32 gets fp32 weight gradient products, a 16-bit
    type products in bf16 with fp32 sums.
    """
    weights = [
        cached("int8", (weight,), 0, lambda weight=weight: ternarize_rows(weight))
        for weight in (weight_in, weight_out)
    ]
    groups = None if plan is None else RowGroups.create(plan)
    return apply_opaque(
        _TernarySwiglu, x, weight_in, weight_out, gates, *weights, groups, sub_norm, eps, dtype
    )
