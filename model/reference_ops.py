"""Definitions of the model's operations in plain PyTorch.

Every fast path is tested against these, on values and on gradients. They are written to be read
next to the formulas and are slow on purpose: loops over groups, heads and positions. (The scan's
definition is in reference_mamba.py.)

Sources: the papers named in the modules of the fast paths.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 for 16-bit x."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    y = values / torch.sqrt((values * values).mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rope(x: Tensor, positions: Tensor, *, theta: float = 10000.0) -> Tensor:
    """Half-split rotary embedding: pair (i, i + d/2) of x (B, T, ..., d) turned by position.

    The pair's angle is positions (B, T) * theta^(-2 i / d).
    """
    half = x.shape[-1] // 2
    parts: list[Tensor] = []
    for part in (0, 1):
        for i in range(half):
            angle = positions.double() * theta ** (-2.0 * i / x.shape[-1])
            angle = angle.view(*angle.shape, *[1] * (x.dim() - 3))
            cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
            first, second = x[..., i], x[..., i + half]
            parts.append(first * cos - second * sin if part == 0 else second * cos + first * sin)
    return torch.stack(parts, dim=-1)


def ternarize(weight: Tensor, group_size: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and scales (out, groups) of weight (out, in), one group at a time."""
    size = group_size or weight.shape[1]
    codes = torch.zeros_like(weight)
    scales = []
    for start in range(0, weight.shape[1], size):
        group = weight[:, start : start + size]
        gamma = group.abs().mean(1, keepdim=True)
        q = torch.clamp(torch.round(group / (gamma + 1e-12)), -1, 1)
        nonzero = (q != 0).sum(1)
        total = (group.abs() * (q != 0)).sum(1)
        scales.append(torch.where(nonzero > 0, total / nonzero.clamp(min=1), 0.0))
        codes[:, start : start + size] = q
    return codes, torch.stack(scales, dim=1)


def bit_linear(
    x: Tensor, weight: Tensor, *, group_size: int = 0, quantize_activations: bool = True
) -> Tensor:
    """(x_q / s) (alpha q)^T for weight (out, in); both roundings pass gradients unchanged."""
    codes, scales = ternarize(weight.detach(), group_size)
    size = group_size or weight.shape[1]
    columns = torch.arange(weight.shape[1], device=weight.device) // size
    effective = codes * scales[:, columns]
    effective = weight + (effective - weight).detach()
    if quantize_activations:
        peak = x.detach().abs().amax(-1, keepdim=True)
        s = 127.0 / torch.where(peak > 0, peak, 1.0)
        rounded = torch.clamp(torch.round(s * x), -128, 127) / s
        x = x + (rounded - x).detach()
    return x @ effective.T


def norm_bit_linear(x: Tensor, gain: Tensor | None, weight: Tensor, *, eps: float) -> Tensor:
    """bit_linear of the normalised rows of x (M, K), weight (N, K)."""
    return bit_linear(rms_norm(x, gain, eps=eps), weight)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integer codes in [-127, 127] of x (M, K) in its dtype and one scale per row, (M,)."""
    peak = x.abs().amax(1).clamp(min=1e-30)
    return torch.round(x * (127.0 / peak)[:, None]), peak / 127.0


def ternary_linear_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of bit_linear for x (M, K) and weight (N, K), the output gradient (M, N) times the
    weight's scales being rounded to 8 bits per token: dx = sg (cg q), dW = (dy sx)^T cx."""
    codes, scale = ternarize(weight)
    grad_codes, grad_scale = round_rows(grad * scale[:, 0])
    x_codes, x_scale = round_rows(x)
    return (grad_codes @ codes) * grad_scale[:, None], (grad * x_scale[:, None]).T @ x_codes


def ternary_swiglu(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, *, sub_norm: bool = True, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """W_out rms(silu(a) b) with [a, b] = W_in x, both products ternary on rounded rows.

    x (M, D), weight_in (2h, D), weight_out (D, h). Returns y (M, D) and the second product's
    input (M, h) before rounding.
    """
    gate, up = bit_linear(x, weight_in).chunk(2, dim=-1)
    hidden = gate * torch.sigmoid(gate) * up
    if sub_norm:
        hidden = rms_norm(hidden, eps=eps)
    return bit_linear(hidden, weight_out), hidden


def ternary_swiglu_backward(
    grad: Tensor,
    gates: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    *,
    sub_norm: bool = True,
    eps: float = 1e-6,
) -> dict[str, Tensor]:
    """Gradients by name of gates[:, None] * ternary_swiglu(x), grad (M, D), gates (M,).

    Output gradients of both products are rounded to 8 bits per row, as ternary_linear_backward
    does it; what lies between them is differentiated by autograd.
    """
    gate_up = bit_linear(x, weight_in).detach().requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    hidden = gate * torch.sigmoid(gate) * up
    if sub_norm:
        hidden = rms_norm(hidden, eps=eps)
    grad_hidden, _ = ternary_linear_backward(grad, hidden.detach(), weight_out)
    codes, step = round_rows(hidden.detach())
    hidden.backward(grad_hidden * gates[:, None])
    assert gate_up.grad is not None
    grad_x, grad_in = ternary_linear_backward(gate_up.grad, x, weight_in)
    rounded = codes * step[:, None]
    return {
        "x": grad_x,
        "weight_in": grad_in,
        "weight_out": (grad * gates[:, None]).T @ rounded,
        "gates": (grad_hidden * rounded).sum(1),
    }


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Mean of logsumexp(z) - z[label], z = W h, over the rows of hidden (N, D) whose label (N,) is
    not -100, or 0; weight (V, D)."""
    terms = []
    for h, label in zip(hidden, labels.tolist()):
        if label != -100:
            z = weight @ h
            terms.append(torch.logsumexp(z, 0) - z[label])
    return torch.stack(terms).mean() if terms else 0.0 * (hidden.sum() + weight.sum())


def visible(
    query: int, key: int, *, documents: list[int] | None = None, valid: list[bool] | None = None
) -> bool:
    """Whether position `query` may attend position `key` of the same row."""
    if query == key:
        return True
    if key > query or (valid is not None and not (valid[key] and valid[query])):
        return False
    return documents is None or documents[query] == documents[key]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lam: Tensor | None = None,
    documents: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Causal attention with documents and padding, plain or differential, query by query.

    q: (B, T, P, H, d) with P maps, k: (B, T, H, d), v: (B, T, H, dv), lam: (B, T, H) if P = 2,
    documents: (B, T) int, valid: (B, T) bool. Scores are scaled by 1 / sqrt(d). Returns
    (B, T, H, dv).
    """
    batch, length, maps, heads, width = q.shape
    rows = []
    for b in range(batch):
        docs = None if documents is None else documents[b].tolist()
        real = None if valid is None else valid[b].tolist()
        for t in range(length):
            seen = [s for s in range(length) if visible(t, s, documents=docs, valid=real)]
            for h in range(heads):
                terms = []
                for p in range(maps):
                    scores = k[b, seen, h] @ q[b, t, p, h] / math.sqrt(width)
                    terms.append(torch.softmax(scores, dim=0) @ v[b, seen, h])
                rows.append(terms[0] if lam is None else terms[0] - lam[b, t, h] * terms[1])
    return torch.stack(rows).view(batch, length, heads, v.shape[-1])


def mla(
    x: Tensor,
    weights: dict[str, Tensor],
    *,
    heads: int,
    rope_theta: float = 10000.0,
    norm_eps: float = 1e-6,
    ternary: bool = True,
    group_size: int = 0,
    lambda_range: tuple[float, float] | None = None,
    documents: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Multi-head latent attention of x (B, T, D), differential where `lambda_range` is given.

    weights: state dict of model.mla.MLA. documents (B, T) int and valid (B, T) bool as in
    `attention`.
    """
    batch, length, width = x.shape
    maps = 1 if lambda_range is None else 2
    d_head = width // heads

    def project(name: str, inputs: Tensor, *, quantize_activations: bool = True) -> Tensor:
        weight = weights[f"{name}.weight"]
        if not ternary:
            return inputs @ weight.T
        return bit_linear(
            inputs, weight, group_size=group_size, quantize_activations=quantize_activations
        )

    positions = torch.arange(length).expand(batch, length)
    latent = rms_norm(project("kv_down", x), weights["latent_norm.weight"], eps=norm_eps)
    key_rope = rope(project("k_rope_up", x), positions, theta=rope_theta)  # (B, T, d_R)
    k = project("k_content_up", latent, quantize_activations=False).view(batch, length, heads, -1)
    v = project("v_up", latent, quantize_activations=False).view(batch, length, heads, d_head)
    k = torch.cat((k, key_rope.unsqueeze(2).expand(-1, -1, heads, -1)), dim=-1)
    q = project("q_content", x).view(batch, length, heads, maps, d_head)
    q_rope = project("q_rope", x).view(batch, length, heads, maps, key_rope.shape[-1])
    q = torch.cat((q, rope(q_rope, positions, theta=rope_theta)), dim=-1).transpose(2, 3)
    lam = None
    if lambda_range is not None:
        low, high = lambda_range
        gate = x @ weights["gate_lambda.weight"].T + weights["gate_lambda.bias"]
        lam = low + (high - low) * torch.sigmoid(gate)  # (B, T, H)
    out = attention(q, k, v, lam=lam, documents=documents, valid=valid).flatten(2)
    if "sub_norm.weight" in weights:
        out = rms_norm(out, weights["sub_norm.weight"], eps=norm_eps)
    return project("out_proj", out)
