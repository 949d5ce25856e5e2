"""Causal softmax attention over one or two query maps that share keys and values.

With two maps the result is A1 v - lambda A2 v (differential attention). Two routes, one function:

- CPU in fp32 or fp64, up to 1024 keys: `_BlockedAttention`. Query blocks of 64 rows, each against
  only the keys it may see, so almost half of the T^2 work is never done; the two maps are combined
  before they meet v, so v, dv and dA are shared. The maps are kept for backward. Measured with two
  threads, forward and backward, batch 8, 4 heads in two maps: at T = 256 and head 32+32, 18 ms
  against 35 ms for torch's flash kernel with v padded to the width of k (unpadded torch falls back
  to its unfused path, 58 ms); at T = 512 and head 64+32, 76 ms against 172 ms. Recomputing the
  maps in backward instead of keeping them cost 25 to 35 % more.
- Longer rows on CPU, where kept maps would dominate memory, and every other device or dtype: one
  call of torch's scaled_dot_product_attention over all heads of both maps.

A position always sees itself, also where it is padding: no softmax runs over an empty set.

Sources: differential attention 2410.05258 and its V2 (two maps on shared keys and values).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.opaque import apply_opaque
from model.sequence import SequenceContext

QUERY_BLOCK = 64
MAX_BLOCKED_KEYS = 1024
SAMPLED_QUERIES = 32  # from which the size of the subtracted term is estimated
PADDING = -1  # document number of a position that is not text


def context_documents(context: SequenceContext, *, continued: bool = False) -> Tensor | None:
    """Document number of every position, (B, T) int32, PADDING where invalid.

    None where everything belongs to one document and is valid. `continued`: earlier tokens exist,
    so that a start at the first position separates something. Off the CPU, and while compiling,
    given masks count as non-trivial: looking inside would wait for the device or cut the graph.
    """
    key = f"documents_{continued}"
    if key not in context.cache:
        context.cache[key] = _build_documents(context, first=0 if continued else 1)
    return context.cache[key]


def _build_documents(context: SequenceContext, *, first: int) -> Tensor | None:
    resets, valid = context.reset_mask, context.valid_mask
    if may_read(context.positions):
        if resets is not None and not resets[:, first:].any():
            resets = None
        if valid is not None and valid.all():
            valid = None
    if resets is not None:
        documents = resets.cumsum(dim=1, dtype=torch.int32)
    elif valid is not None:
        documents = torch.zeros_like(valid, dtype=torch.int32)
    else:
        return None
    return documents if valid is None else documents.masked_fill_(~valid, PADDING)


def may_read(values: Tensor) -> bool:
    """Whether the host may look at values on the way: they are its own, and no graph is made."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def blocked_pairs(documents: Tensor, num_queries: int) -> Tensor:
    """Which keys the last `num_queries` positions must not see: (B, 1, T, S) bool.

    documents: (B, S) as from `context_documents`. Blocked are later positions, other documents and
    padding, but never the position itself.
    """
    length = documents.shape[1]
    offset = length - num_queries
    queries, keys = documents[:, offset:, None], documents[:, None, :]
    seen = (queries == keys) & (keys != PADDING)  # (B, T, S)
    seen = seen.tril_(offset)
    seen.diagonal(offset, dim1=1, dim2=2).fill_(True)
    return seen.logical_not_().unsqueeze(1)


def context_blocked_pairs(context: SequenceContext) -> Tensor | None:
    """`blocked_pairs` of a forward without earlier tokens, built once; None = plainly causal."""
    if "blocked_pairs" not in context.cache:
        documents = context_documents(context)
        context.cache["blocked_pairs"] = (
            None if documents is None else blocked_pairs(documents, documents.shape[1])
        )
    return context.cache["blocked_pairs"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    lam: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """Causal attention of the last T of S positions, with one map or the difference of two.

    q: (B, P, H, T, d) with P = 1, or P = 2 and lam (B, H, T, 1); k: (B, H, S, d);
    v: (B, H, S, dv); blocked: (B, 1, T, S) bool that includes causality, or None = causal only.
    Returns (B, T, H, dv).
    """
    if q.shape[1] != (1 if lam is None else 2):
        raise ValueError("two query maps need lam, one map must not have it")
    exact = q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64)
    if exact and k.shape[2] <= MAX_BLOCKED_KEYS:
        return apply_opaque(_BlockedAttention, q, k, v, lam, blocked, scale)
    return _attend_with_sdpa(q, k, v, scale=scale, lam=lam, blocked=blocked)


def _attend_with_sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, lam: Tensor | None, blocked: Tensor | None
) -> Tensor:
    maps, heads, num_queries, width = q.shape[1:]
    num_keys, value_width = v.shape[2:]
    causal = blocked is None and num_queries == num_keys
    allowed = None
    if blocked is not None:
        allowed = ~blocked
    elif not causal:
        allowed = ~_causal_block(num_queries, num_keys, device=q.device)
    if q.device.type == "cpu":
        v = F.pad(v, (0, width - value_width))  # torch's fused CPU kernel wants equal widths
    if maps > 1:
        k, v = (x.unsqueeze(1).expand(-1, maps, -1, -1, -1).flatten(1, 2) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2), k, v, attn_mask=allowed, is_causal=causal, scale=scale
    )[..., :value_width].unflatten(1, (maps, heads))  # (B, P, H, T, dv)
    result = out[:, 0] if lam is None else out[:, 0] - lam.to(out.dtype) * out[:, 1]
    return result.transpose(1, 2)


def _causal_block(num_queries: int, num_keys: int, *, device: torch.device) -> Tensor:
    """(T, S) bool, True where the key comes after the query; queries are the last positions."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.triu_(num_keys - num_queries + 1)


def _attention_map(queries: Tensor, keys: Tensor, blocked: Tensor | None) -> Tensor:
    """softmax(queries keys^T) with blocked pairs at zero.

    queries: (B, H, t, d) already scaled; keys: (B, H, s, d); blocked: (B, 1, t, s), or None = the
    queries are the last t of the s positions. Returns (B H, t, s).
    """
    batch, heads, rows, _ = queries.shape
    scores = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT)  # (B H, t, s)
    if blocked is None:
        corner = _causal_block(rows, rows, device=scores.device)
        scores[..., -rows:].masked_fill_(corner, float("-inf"))
    else:
        scores.unflatten(0, (batch, heads)).masked_fill_(blocked, float("-inf"))
    return torch.softmax(scores, dim=-1)


class _BlockedAttention(torch.autograd.Function):
    """Attention by query blocks; see `attend` for arguments and the module for reasons.

    With A = A1 - lam A2 and G = dL/dout: dv = A^T G, dA = G v^T, and for each map
    dS1 = A1 (dA - rowsum(dA A1)), dS2 = -lam A2 (dA - rowsum(dA A2)), dlam = -rowsum(dA A2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lam: Tensor | None,
        blocked: Tensor | None,
        scale: float,
    ) -> Tensor:
        batch, maps, heads, num_queries, _ = q.shape
        offset = k.shape[2] - num_queries
        keep = any(ctx.needs_input_grad)
        k, v = k.contiguous(), v.contiguous()
        kept: list[Tensor] = []
        out = q.new_empty(batch, num_queries, heads, v.shape[-1])
        for start in range(0, num_queries, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, num_queries)
            seen = offset + stop
            mask = None if blocked is None else blocked[:, :, start:stop, :seen]
            rows = q[:, :, :, start:stop] * scale
            found = [_attention_map(rows[:, p], k[:, :, :seen], mask) for p in range(maps)]
            total = _combine(found, lam, start, stop)
            mixed = torch.bmm(total, v[:, :, :seen].flatten(0, 1))
            out[:, start:stop] = mixed.unflatten(0, (batch, heads)).transpose(1, 2)
            if keep:
                kept += found
        ctx.save_for_backward(q, k, v, lam, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lam, *kept = ctx.saved_tensors
        batch, maps, heads, num_queries, width = q.shape
        offset = k.shape[2] - num_queries
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # (B H, S, d)
        grad_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        grad_lam = None if lam is None else torch.empty_like(lam)
        for index, start in enumerate(range(0, num_queries, QUERY_BLOCK)):
            stop = min(start + QUERY_BLOCK, num_queries)
            seen = offset + stop
            found = kept[index * maps : (index + 1) * maps]
            grad = grads[0][:, start:stop].transpose(1, 2).flatten(0, 1)  # (B H, t, dv)
            grad_total = torch.bmm(grad, v[:, :seen].mT)  # (B H, t, s)
            total = _combine(found, lam, start, stop)
            grad_v[:, :seen] += torch.bmm(total.mT, grad)
            factor: float | Tensor = ctx.scale
            for p, probs in enumerate(found):
                weighted = grad_total * probs
                rate = weighted.sum(-1, keepdim=True)  # (B H, t, 1)
                grad_scores = weighted.addcmul_(probs, rate, value=-1.0)
                if p == 1:
                    assert lam is not None and grad_lam is not None
                    grad_lam[:, :, start:stop] = -rate.view(batch, heads, -1, 1)
                    # The factor -lam of dS2 is cheaper on rows of width d than of width s.
                    factor = lam[:, :, start:stop] * -ctx.scale
                rows = (q[:, p, :, start:stop] * factor).flatten(0, 1)
                grad_k[:, :seen] += torch.bmm(grad_scores.mT, rows)
                grad_rows = torch.bmm(grad_scores, k[:, :seen])
                grad_q[:, p, :, start:stop] = grad_rows.view(batch, heads, -1, width) * factor
        shape = (batch, heads)
        return grad_q, grad_k.unflatten(0, shape), grad_v.unflatten(0, shape), grad_lam, None, None


def _combine(found: list[Tensor], lam: Tensor | None, start: int, stop: int) -> Tensor:
    """A1, or A1 - lam A2, of one query block: (B H, t, s)."""
    if lam is None:
        return found[0]
    rows = lam[:, :, start:stop].flatten(0, 1)
    return torch.addcmul(found[0], found[1], rows, value=-1.0)


@torch.no_grad()
def subtracted_share(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    lam: Tensor,
    blocked: Tensor | None = None,
    num_queries: int = SAMPLED_QUERIES,
) -> Tensor:
    """||lam A2 v|| / ||A1 v|| over the last queries of the first row, a 0-d tensor.

    A sample, because the combined maps never form A2 v. Arguments as in `attend`.
    """
    count = min(num_queries, q.shape[3])
    rows = q[0, :, :, -count:].float() * scale  # (2, H, t, d)
    keys, values = k[0].float(), v[0].float()
    mask = None if blocked is None else blocked[:1, :, -count:]
    first, second = (
        torch.bmm(_attention_map(rows[p : p + 1], keys.unsqueeze(0), mask), values)
        for p in range(2)
    )
    subtracted = lam[0, :, -count:].float() * second
    return subtracted.norm() / first.norm().clamp_min(1e-12)
