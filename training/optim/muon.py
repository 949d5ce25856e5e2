"""Muon: momentum of each weight matrix, orthogonalised before it is applied.

Both iterations need matrix products only. `quintic` repeats one polynomial that lifts small
singular values fast and leaves them anywhere in [0.68, 1.13]; `polar-express` takes the best
polynomial for each step and ends in [0.84, 1.13] for singular values down to 1e-3 of the norm (five
steps), 1e-2 (four) or 0.02 (three). Matrices of one shape are stacked and iterated together, since
a small model has dozens of small ones. On the CPU the iteration runs in fp32: bf16 products have no
fast path there.
Sources: K. Jordan et al., Muon (2024); Amsel et al., Polar Express 2505.16932. The stacked form,
the zero rule and the shortened Polar Express are ours.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.base import ScaledOptimizer, Update, gradients

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = ("quintic", "polar-express")
_POLAR_MARGIN = 1.01  # against rounding: values above 1 would leave the polynomials' interval
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_POLAR_LIMIT = (1.875, -1.25, 0.375)
_POLAR_LENGTH = 5
# Largest singular value after the first k polynomials: where a shorter iteration, which leaves
# those out, must begin.
_POLAR_BOUNDS = (1.0, 1.9917, 1.9660, 1.8657, 1.5604)


def polynomials(iteration: str, num_steps: int) -> tuple[float, list[tuple[float, float, float]]]:
    """Factor for the matrix of norm one, and (a, b, c) of x -> a x + b x^3 + c x^5 per step."""
    if iteration == "quintic":
        return 1.0, [QUINTIC] * num_steps
    skipped = max(0, _POLAR_LENGTH - num_steps)
    margin = _POLAR_MARGIN
    steps = [(a / margin, b / margin**3, c / margin**5) for a, b, c in _POLAR_EXPRESS]
    steps += [_POLAR_LIMIT] * max(0, num_steps - len(steps))
    return _POLAR_BOUNDS[skipped] / margin, steps[skipped : skipped + num_steps]


def orthogonalize(
    updates: Tensor,
    *,
    num_steps: int,
    iteration: str = "quintic",
    dtype: torch.dtype | None = None,
) -> Tensor:
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
    factor, steps = polynomials(iteration, num_steps)
    if factor != 1.0:
        work = work * factor
    for a, b, c in steps:
        gram = work @ work.mT  # (N, short, short)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        work = torch.baddbmm(work, polynomial, work, beta=a)
    if transposed:
        work = work.mT
    return work.to(updates.dtype)


def shape_gain(param: Tensor) -> float:
    """sqrt(max(1, rows / cols)): equal effect on the output of tall and of wide matrices."""
    rows, cols = param.shape[-2:]
    return max(1.0, rows / cols) ** 0.5


class Muon(ScaledOptimizer):
    """Nesterov momentum, orthogonalised per matrix, with decoupled weight decay.

    Parameters have at least two dimensions; leading ones count as a stack of matrices (experts).
    The update is scaled by `shape_gain`. `refine` is where variants change what was orthogonalised.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        num_steps: int = 5,
        iteration: str = "quintic",
        **more: float,
    ) -> None:
        if iteration not in ITERATIONS:
            raise ValueError(f"iteration must be one of {', '.join(ITERATIONS)}, not {iteration!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_steps": num_steps,
            "iteration": iteration,
            **more,
        }
        super().__init__(params, defaults)

    def bucket_key(self, param: Tensor) -> Hashable:
        return *param.shape[-2:], param.device, param.dtype

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        rows, cols = params[0].shape[-2:]
        buffers = [self.moment(param, "momentum") for param in params]
        grads = gradients(params)
        beta = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        directions = torch._foreach_lerp(grads, buffers, beta)
        stacked = torch.cat([direction.reshape(-1, rows, cols) for direction in directions])
        stacked = orthogonalize(
            stacked,
            num_steps=group["num_steps"],
            iteration=group["iteration"],
            dtype=torch.bfloat16 if stacked.is_cuda else None,
        )
        sizes = [param.numel() // (rows * cols) for param in params]
        pieces = [piece.reshape(param.shape) for piece, param in zip(stacked.split(sizes), params)]
        self.refine(params, pieces, group)
        return Update(params=params, directions=pieces, gain=self.gain(params[0]), group=group)

    def refine(self, params: list[Tensor], pieces: list[Tensor], group: dict[str, Any]) -> None:
        """Change orthogonalised updates of one matrix shape in place; plain Muon leaves them."""

    def gain(self, param: Tensor) -> float:
        """Common factor of the updates of all parameters of this one's matrix shape."""
        return shape_gain(param)
