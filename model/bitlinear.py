"""Ternary (1.58-bit) linear layers with straight-through gradients.

Weights are latent full-precision matrices; every forward rounds them to {-1, 0, 1} times one scale
per group and rounds activations to int8 per token, so that the trained function is the one a packed
model computes. Codes are kept between forwards only where weights cannot change (weight_cache.py).

Products run on codes, not on dequantised values: sums of int8 times ternary codes are integers
below 2^24, which fp32 adds without rounding in any order. A token's output is therefore the same
to the bit whatever other rows stand in the product (prefill, decode, any batch), where a last-bit
difference would be blown up to a whole int8 step by the next layer's rounding. The scales are
applied to the product. With several scale groups per row they cannot be, and dequantised values
are multiplied. In bf16/fp16 codes matter once more: those types hold them exactly.

Sources: BitNet 2310.11453, b1.58 2402.17764; least-squares scale 1605.04711 (ternary weight nets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.byte_product import code_product
from model.norm_rope import RMSNorm
from model.opaque import apply_opaque
from model.weight_cache import cached

EPS = 1e-12
_TINY = 1e-30
_CODE_UNIT = 1.0 / 128.0  # exact power of two: keeps sums of codes inside fp16's range


def ternarize(weight: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Ternary codes of `weight` and the least-squares scale of every group.

    codes = clip(round(W / (mean|W| + eps)), -1, 1) and scale = sum(|W| [codes != 0]) / nonzeros,
    both per group of `group_size` consecutive inputs (0 = one group per output row; the last group
    may be shorter; a group without non-zero codes gets scale 0).

    weight: (..., out, in). Returns codes (..., out, in) of weight's dtype holding -1, 0 or 1, and
    scale (..., out, groups) in fp32 (fp64 for fp64 weights). Neither may be written to.
    """
    return cached("codes", (weight,), group_size, lambda: _ternarize(weight, group_size))


def _ternarize(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    values = weight.detach()
    if values.dtype in (torch.bfloat16, torch.float16):
        values = values.float()
    width = values.shape[-1]
    if 0 < group_size < width:
        padding = -width % group_size
        values = F.pad(values, (0, padding)).unflatten(-1, (-1, group_size))
        counts = values.new_full((values.shape[-2], 1), group_size)  # (groups, 1)
        counts[-1] = group_size - padding
        mean = values.abs().sum(-1, keepdim=True) / counts
    else:
        values = values.unsqueeze(-2)  # (..., out, groups, group)
        mean = values.abs().mean(-1, keepdim=True)
    codes = (values / (mean + EPS)).round_().clamp_(-1.0, 1.0)
    # |W| [q != 0] equals W q because a code carries the sign of its weight.
    total = (values * codes).sum(-1)
    scale = total / codes.abs().sum(-1).clamp_min_(1.0)  # (..., out, groups)
    return codes.flatten(-2)[..., :width].to(weight.dtype), scale


def expand_scale(scale: Tensor, width: int, group_size: int = 0) -> Tensor:
    """Scales (..., out, groups) of `ternarize`, laid out to multiply codes (..., out, in)."""
    if scale.shape[-1] == 1:
        return scale
    return scale.repeat_interleave(group_size, dim=-1)[..., :width]


class _RoundWeight(torch.autograd.Function):
    """scale * codes forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, group_size: int) -> Tensor:
        codes, scale = ternarize(weight, group_size)
        return codes * expand_scale(scale, weight.shape[-1], group_size).to(codes.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def ternary_weight(weight: Tensor, group_size: int = 0) -> Tensor:
    """The ternary weight `scale * codes` of weight (..., out, in), with identity gradient."""
    return apply_opaque(_RoundWeight, weight, group_size)


def _token_peak(x: Tensor) -> Tensor:
    """max|x| per token, (..., 1). Two reads and no temporary; abs().amax() is slower on CPU."""
    return torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).clamp_min_(_TINY)


class _RoundTokens(torch.autograd.Function):
    """Dequantised int8 activations forward, identity backward.

    The scale comes from the token's own maximum, so no value is ever clipped and the
    straight-through mask is one everywhere.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        peak = _token_peak(x)
        return (x * (127.0 / peak)).round_().mul_(peak / 127.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def quantize_tokens(x: Tensor) -> Tensor:
    """x (..., in) rounded to int8 per token and dequantised, with identity gradient."""
    return apply_opaque(_RoundTokens, x)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., n, in) times weight (..., out, in) transposed."""
    return F.linear(x, weight) if weight.dim() == 2 else torch.matmul(x, weight.mT)


class _ExactProduct(torch.autograd.Function):
    """y = sx (cx q^T) alpha in fp32 or fp64 with integer codes cx and q, one scale per row.

    dx = dy (alpha q) and dW = (dy sx)^T cx.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        codes, scale = ternarize(weight)
        codes = codes.to(x.dtype)
        peak = _token_peak(x)
        x_codes = (x * (127.0 / peak)).round_()
        x_scale = peak / 127.0  # (..., 1)
        ctx.save_for_backward(x_codes, x_scale, codes, scale)
        ctx.weight_dtype = weight.dtype
        row_scale = _row_scale(scale).to(x.dtype)
        return code_product(x_codes, codes, weight).mul(x_scale).mul_(row_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_codes, x_scale, codes, scale = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grads[0], codes * scale.to(codes.dtype))
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grads[0] * x_scale, x_codes, codes.dim())
            grad_weight = grad_weight.to(ctx.weight_dtype)
        return grad_x, grad_weight


def _row_scale(scale: Tensor) -> Tensor:
    """Scales (..., out, 1) as a factor of outputs: (out,), or (..., 1, out) if stacked."""
    return scale.squeeze(-1) if scale.dim() == 2 else scale.mT


def _weight_gradient(grad: Tensor, x: Tensor, weight_dim: int) -> Tensor:
    """grad^T x over the tokens, (..., out, in)."""
    if weight_dim == 2:
        grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return torch.matmul(grad.mT, x)


class _CodeProduct(torch.autograd.Function):
    """y = (sx cx) (alpha q)^T with the product in a 16-bit type on the codes cx and q.

    dx = (dy alpha) q and dW = (dy sx)^T cx: in all three products one side is exact. With several
    groups per row the scale cannot leave the product, so q is replaced by rounded alpha q. The
    activations kept for backward are one byte each.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, group_size: int, quantize: bool, dtype: torch.dtype
    ) -> Tensor:
        codes, scale = ternarize(weight, group_size)
        if scale.shape[-1] > 1:
            codes = codes * expand_scale(scale, weight.shape[-1], group_size)
            row_scale = None
        else:
            row_scale = _row_scale(scale).float()
        codes = codes.to(dtype)
        if quantize:
            values = x.float()
            peak = _token_peak(values)
            x_codes = (values * (127.0 / peak)).round_()
            x_scale = peak * (1.0 / (127.0 * _CODE_UNIT))
            saved_x = x_codes.to(torch.int8)
            x_codes = x_codes.mul_(_CODE_UNIT).to(dtype)
        else:
            x_codes = saved_x = x.to(dtype)
            x_scale = None
        ctx.save_for_backward(saved_x, codes, x_scale, row_scale)
        ctx.dtypes = (x.dtype, weight.dtype)
        return _scaled(_product(x_codes, codes), x_scale, row_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x_codes, codes, x_scale, row_scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        grad = grads[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(_scaled(grad, None, row_scale), codes).to(x_dtype)
        if ctx.needs_input_grad[1]:
            if x_scale is not None:
                x_codes = x_codes.to(grad.dtype) * _CODE_UNIT
            grad_weight = _weight_gradient(_scaled(grad, x_scale, None), x_codes, codes.dim())
            grad_weight = grad_weight.to(weight_dtype)
        return grad_x, grad_weight, None, None, None


def _scaled(value: Tensor, token_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """value times the given scales, computed in fp32, in value's dtype."""
    result = value
    for scale in (token_scale, row_scale):
        if scale is not None:
            result = result * scale
    return result.to(value.dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which products of x run: autocast's if it is on, else that of x."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def bit_linear(
    x: Tensor,
    weight: Tensor,
    *,
    group_size: int = 0,
    quantize_activations: bool = True,
    backend: str = "torch",
) -> Tensor:
    """y = int8(x) @ ternary(weight)^T with straight-through gradients.

    x: (..., in) with weight (out, in), or (..., n, in) with stacked weights (..., out, in).
    backend: "triton" computes on int8 codes and rounds the input gradient to 8 bits per token,
    where it can (one scale per row, rounded activations, one weight). Returns (..., out) in x's
    dtype, or in autocast's.
    """
    dtype = compute_dtype(x)
    one_scale = not 0 < group_size < weight.shape[-1]
    if backend == "triton" and one_scale and quantize_activations and weight.dim() == 2:
        from model.ternary_linear import ternarize_rows, ternary_linear

        ternary = cached("int8", (weight,), 0, lambda: ternarize_rows(weight))
        return ternary_linear(x, weight, ternary=ternary, dtype=dtype)
    if dtype in (torch.bfloat16, torch.float16):
        return apply_opaque(_CodeProduct, x, weight, group_size, quantize_activations, dtype)
    if quantize_activations and one_scale:
        return apply_opaque(_ExactProduct, x, weight)
    if quantize_activations:
        x = quantize_tokens(x)
    return _product(x, ternary_weight(weight, group_size).to(x.dtype))


@dataclass(slots=True, kw_only=True)
class LowRank:
    """What an adapter adds to one layer: down (r, in), up (out, r) (see model/adapters.py)."""

    down: Tensor
    up: Tensor
    scale: float

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """y (..., out) and what x (..., in) gives, in y's dtype."""
        delta = F.linear(F.linear(x, self.down), self.up) * self.scale
        return y + delta.to(y.dtype)

    def product(self) -> Tensor:
        """(out, in), what is added to the weight."""
        return (self.up @ self.down) * self.scale


class BitLinear(nn.Module):
    """Linear layer without bias whose forward uses ternary weights and int8 activations.

    `weight` (out_features, in_features) is the latent matrix. `quant_mode="none"` makes it an
    ordinary linear layer: the high-precision twin of the same network. `group_size` as in
    `ternarize`. The caller normalises the input (RMSNorm or SubLN) before this layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        group_size: int = 0,
        quant_mode: str = "bitnet_1_58",
        quantize_activations: bool = True,
        init_std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if quant_mode not in ("bitnet_1_58", "none"):
            raise ValueError(f"--quant-mode is {quant_mode!r}; choose bitnet_1_58 or none")
        if group_size < 0:
            raise ValueError("--bitlinear-group-size must be 0 (one scale per row) or positive")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = group_size
        self.ternary = quant_mode != "none"
        self.quantize_activations = quantize_activations
        self.backend = "torch"
        self.adapter: LowRank | None = None  # no parameter of this layer
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=init_std, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = self._multiply(x)
        return y if self.adapter is None else self.adapter.added(y, x)

    def _multiply(self, x: Tensor) -> Tensor:
        if not self.ternary:
            return F.linear(x, self.weight)
        return bit_linear(
            x,
            self.weight,
            group_size=self.group_size,
            quantize_activations=self.quantize_activations,
            backend=self.backend,
        )

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        """self(norm(x)); on the triton backend without writing the normalised values."""
        from_kernels = self.ternary and self.backend == "triton" and self.quantize_activations
        if not from_kernels or 0 < self.group_size < self.in_features:
            return self(norm(x))
        from model.norm_linear import MAX_WIDTH, norm_ternary_linear

        if self.in_features > MAX_WIDTH:
            return self(norm(x))
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            y = norm_ternary_linear(x, norm.weight, self.weight, eps=norm.eps, dtype=dtype)
        return y if self.adapter is None else self.adapter.added(y, norm(x))

    def effective_weight(self) -> Tensor:
        """The weight (out, in) that the forward pass uses, differentiable in the latent weight."""
        weight = ternary_weight(self.weight, self.group_size) if self.ternary else self.weight
        return weight if self.adapter is None else weight + self.adapter.product()

    def extra_repr(self) -> str:
        kind = f"ternary, group {self.group_size or 'row'}" if self.ternary else "high precision"
        return f"in={self.in_features}, out={self.out_features}, {kind}"


def fused_linear(x: Tensor, layers: Sequence[BitLinear]) -> tuple[Tensor, ...]:
    """Outputs of several BitLinear layers of one input, as one product.

    The rounding of x, its gradient and the product are done once. Equal to calling each layer,
    because scales belong to rows; the layers must agree in group size and modes.
    """
    first = layers[0]
    weights = tuple(layer.weight for layer in layers)
    if torch.is_grad_enabled():
        weight = torch.cat(weights)
    else:  # as a parameter, so that its codes are remembered as well
        weight = cached("joined", weights, 0, lambda: nn.Parameter(torch.cat(weights)))
    if first.ternary:
        y = bit_linear(
            x,
            weight,
            group_size=first.group_size,
            quantize_activations=first.quantize_activations,
            backend=first.backend,
        )
    else:
        y = F.linear(x, weight)
    parts = y.split([layer.out_features for layer in layers], dim=-1)
    return tuple(
        part if layer.adapter is None else layer.adapter.added(part, x)
        for part, layer in zip(parts, layers)
    )
