"""RMSNorm and rotary position embedding.

Both are memory-bound, so on CPU they are written as autograd functions with few passes: autograd
of the formulas keeps several full-size intermediates and runs twice as many kernels.

RoPE uses the half-split convention: coordinate i is paired with i + d/2 and the pair is turned by
positions * theta^(-2i/d). The interleaved convention with half-split frequencies is no rotation.
Sources: RMSNorm 1910.07467; RoPE 2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.opaque import apply_opaque
from model.sequence import SequenceContext


class _RmsNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x^2) + eps); statistics in fp32 (fp64 for fp64 input).

    dx = r (g w) - x r^3 mean(g w x), dw = sum over tokens of g x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        y, inverse = normalize(values, weight, eps=eps)
        ctx.save_for_backward(x, weight, inverse)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        values = x.to(inverse.dtype).reshape(-1, width)
        grad = grads[0].to(inverse.dtype).reshape(-1, width)
        rate = inverse.reshape(-1, 1)
        product = grad * values  # (N, D)
        grad_weight = None
        if weight is None:
            dot = product.sum(-1, keepdim=True)
            grad_x = grad * rate
        else:
            scale = weight.to(inverse.dtype)
            dot = product @ scale.unsqueeze(-1)
            grad_x = (grad * rate).mul_(scale)
            if ctx.needs_input_grad[1]:
                grad_weight = (rate.mT @ product).squeeze(0).to(weight.dtype)
        grad_x.addcmul_(values, dot * rate.pow(3), value=-1.0 / width)
        return grad_x.view(x.shape).to(x.dtype), grad_weight, None


class _BiasedNorm(torch.autograd.Function):
    """y = x r gain + bias, gain and bias broadcast to x, all in fp32 or wider.

    Keeps x and r alone: autograd of the formula would keep x r as well.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, bias: Tensor, eps: float) -> Tensor:
        normed, inverse = normalize(x, None, eps=eps)
        ctx.save_for_backward(x, gain, inverse)
        ctx.bias_shape = bias.shape
        return torch.addcmul(bias, normed, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, gain, inverse = ctx.saved_tensors
        normed = x * inverse
        grad_gain = (grads[0] * normed).sum_to_size(gain.shape)
        grad_x = grads[0] * gain
        dot = (grad_x * normed).sum(-1, keepdim=True)
        grad_x.addcmul_(normed, dot, value=-1.0 / x.shape[-1]).mul_(inverse)
        return grad_x, grad_gain, grads[0].sum_to_size(ctx.bias_shape), None


def normalize(x: Tensor, weight: Tensor | None, *, eps: float) -> tuple[Tensor, Tensor]:
    """x (..., D) over its root mean square, times weight (D,), and that factor (..., 1).

    x in fp32 or wider; the definition without a gradient.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = (norm.square_() / x.shape[-1]).add_(eps).rsqrt_()
    y = x * inverse
    return (y if weight is None else y.mul_(weight)), inverse


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x (..., D) divided by its root mean square over D, times weight (D,) if given.

    Statistics are taken in fp32 whatever the dtype of x; the result has x's dtype.
    """
    if x.device.type == "cpu":
        return apply_opaque(_RmsNorm, x, weight, eps)
    # Devices with a fused kernel: fp32 in and out keeps a fp32 gain exact.
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps).to(x.dtype)


def biased_norm(x: Tensor, gain: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """x (..., D), fp32 or wider, over its root mean square, times gain, plus bias."""
    if x.device.type == "cpu":
        return apply_opaque(_BiasedNorm, x, gain, bias, eps)
    return torch.addcmul(bias, rms_norm(x, eps=eps), gain)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a learnable gain by default."""

    def __init__(self, dim: int, *, eps: float = 1e-6, learnable: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if learnable else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., dim) -> same shape and dtype."""
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}, learnable={self.weight is not None}"


def rope_table(positions: Tensor, dim: int, *, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of positions (...) times the dim/2 frequencies: two (..., dim/2) fp32 tensors.

    Angles are formed in fp64: at position 100,000 a fp32 product is off by up to 0.004 rad.
    """
    index = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64)
    angles = positions.unsqueeze(-1).double() * theta ** (-index / dim)
    return angles.cos().float(), angles.sin().float()


def context_rope_table(
    context: SequenceContext, dim: int, *, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """`rope_table` of the context's positions, computed once per forward and kept on the context.

    Returns (B, T, dim/2) each, or (1, T, dim/2) where all rows share their positions.
    """
    key = f"rope_{dim}_{theta}"
    if key not in context.cache:
        positions = context.positions
        if positions.stride(0) == 0:
            positions = positions[:1]
        context.cache[key] = rope_table(positions, dim, theta=theta)
    return context.cache[key]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., d), its pairs turned by angles that broadcast to (..., d/2); without a gradient."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    turned_first = (first * cos).addcmul_(second, sin, value=-1.0)
    return torch.cat((turned_first, (second * cos).addcmul_(first, sin)), dim=-1)


class _Rope(torch.autograd.Function):
    """Rotation by the tabulated angles; its gradient is the rotation by the negative angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x.to(cos.dtype), cos, sin).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grads[0]
        return rotate(grad.to(cos.dtype), cos, -sin).to(grad.dtype), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x by the tabulated angles.

    x: (B, T, ..., d); cos, sin: (B or 1, T, d/2), without gradient. Returns x's shape and dtype;
    16-bit inputs are turned in fp32.
    """
    for _ in range(x.dim() - cos.dim()):
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return apply_opaque(_Rope, x, cos.to(dtype), sin.to(dtype))
