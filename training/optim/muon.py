"""Muon: momentum of each weight matrix, orthogonalised before it is applied.

The quintic Newton-Schulz iteration needs matrix products only. Matrices of one shape are stacked
and iterated together, since a small model has dozens of small ones. On the CPU the iteration runs
in fp32: bf16 products have no fast path there (PERFORMANCE section 4).
Source: K. Jordan et al., Muon (2024); the stacked form and the zero rule are ours.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.base import ScaledOptimizer, Update, gradients

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(updates: Tensor, *, num_steps: int, dtype: torch.dtype | None = None) -> Tensor:
    """Replace the singular values of each matrix by values near 1.

    updates: (N, rows, cols). Returns the same shape and dtype. A matrix whose norm is below 1e-12
    becomes zero: dividing it by its norm would turn rounding noise into a full update.
    """
    work = updates.to(dtype) if dtype is not None else updates
    transposed = work.size(-2) > work.size(-1)
    if transposed:
        work = work.mT
    norm = work.flatten(1).norm(dim=1).view(-1, 1, 1)  # (N, 1, 1)
    alive = norm > 1e-12
    work = torch.where(alive, work / norm.clamp_min(1e-12), torch.zeros_like(work))
    a, b, c = QUINTIC
    for _ in range(num_steps):
        gram = work @ work.mT  # (N, short, short)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        work = torch.baddbmm(work, polynomial, work, beta=a)
    if transposed:
        work = work.mT
    return work.to(updates.dtype)


class Muon(ScaledOptimizer):
    """Nesterov momentum, orthogonalised per matrix, with decoupled weight decay.

    Parameters have at least two dimensions; leading ones count as a stack of matrices (experts).
    The update is scaled by sqrt(max(1, rows / cols)), so that its effect on the output is the same
    for tall and wide matrices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        num_steps: int = 5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_steps": num_steps,
        }
        super().__init__(params, defaults)

    def bucket_key(self, param: Tensor) -> Hashable:
        return *param.shape[-2:], param.device, param.dtype

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        rows, cols = params[0].shape[-2:]
        buffers = [self._momentum_buffer(param) for param in params]
        grads = gradients(params)
        beta = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        directions = torch._foreach_lerp(grads, buffers, beta)
        stacked = torch.cat([direction.reshape(-1, rows, cols) for direction in directions])
        dtype = torch.bfloat16 if stacked.is_cuda else None
        stacked = orthogonalize(stacked, num_steps=group["num_steps"], dtype=dtype)
        sizes = [param.numel() // (rows * cols) for param in params]
        pieces = [piece.reshape(param.shape) for piece, param in zip(stacked.split(sizes), params)]
        gain = max(1.0, rows / cols) ** 0.5
        return Update(params=params, directions=pieces, gain=gain, group=group)

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        return state["momentum"]
