"""Mean cross entropy of a linear head without ever holding all logits.

Logits in fp32 with their gradient take 8 bytes per token and vocabulary entry, more than the rest
of a small model together. The rows are handled in blocks: logits, their softmax and both gradients
of a block are formed while it is in the cache (on CPU) or at least bounded in size (on a GPU), so
that backward only multiplies by the incoming scalar.

Same idea as cut cross entropy 2411.09009 and Liger 2410.10989; written for the three matrix
products (logits, d hidden, d weight) and one pass of exponentials.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.opaque import apply_opaque

IGNORED = -100
_BLOCK_LOGITS = {"cpu": 2**20}
_BLOCK_LOGITS_DEVICE = 2**26
# Every block passes over the weight's gradient once: fewer rows would pay for memory, not products.
_FEWEST_ROWS = 256


class _LinearCrossEntropy(torch.autograd.Function):
    """loss = sum over counted rows of (logsumexp(z) - z[label]) / count, z = h W^T in fp32."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        counted = labels != IGNORED
        targets = labels.masked_fill(~counted, 0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        row_weight = counted.to(wide) / counted.sum().clamp_min(1)
        operand = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        loss = row_weight.new_zeros(())
        size = _BLOCK_LOGITS.get(hidden.device.type, _BLOCK_LOGITS_DEVICE)
        num_rows = max(_FEWEST_ROWS, size // weight.shape[0])
        for start in range(0, hidden.shape[0], num_rows):
            rows = slice(start, start + num_rows)
            block = hidden[rows].to(dtype)
            logits = (block @ operand.mT).to(wide)  # (n, V)
            target = targets[rows].unsqueeze(1)
            picked = logits.gather(1, target)
            probs = torch.softmax(logits, dim=1)
            # logsumexp from the largest probability: softmax has already paid for the exponentials.
            normaliser = logits.amax(1, keepdim=True) - probs.amax(1, keepdim=True).log_()
            loss += ((normaliser - picked).squeeze(1) * row_weight[rows]).sum()
            if not (needs_hidden or needs_weight):
                continue
            share = row_weight[rows].unsqueeze(1)
            probs.mul_(share).scatter_add_(1, target, -share)
            grad_logits = probs.to(dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ operand
            if grad_weight is not None:
                if dtype == wide:
                    grad_weight.addmm_(grad_logits.mT, block)
                else:
                    grad_weight += grad_logits.mT @ block
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, backend: str = "torch"
) -> Tensor:
    """Mean nats over the labels that are not -100 (0 if there are none), an fp32 scalar.

    hidden (N, D); weight (V, D); labels (N,) int64. The products run in autocast's type where
    autocast is on; everything after them is fp32. Differentiable once, in hidden and weight.
    backend: "triton" forms logits in registers, in fp32, and never writes them.
    """
    device_type = hidden.device.type
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        if backend == "triton":
            from model.fused_cross_entropy import fused_cross_entropy

            return fused_cross_entropy(hidden, weight, labels, dtype=dtype)
        return apply_opaque(_LinearCrossEntropy, hidden, weight, labels, dtype)
