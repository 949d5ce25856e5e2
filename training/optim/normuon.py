"""NorMuon: Muon whose neurons (rows) get updates of equal size over time.

Orthogonalised updates have equal singular values but unequal rows. A running mean square per row
divides them; the norm of each matrix stays that of Muon's update, so learning rates carry over.
Source: Li et al., NorMuon 2510.05491.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.muon import Muon

_TINY = 1e-10


class NorMuon(Muon):
    """Muon with a second moment per row, `beta2` its decay."""

    def __init__(
        self, params: Iterable[Any], *, lr: float, beta2: float = 0.95, **options: Any
    ) -> None:
        super().__init__(params, lr=lr, beta2=beta2, **options)

    def refine(self, params: list[Tensor], pieces: list[Tensor], group: dict[str, Any]) -> None:
        before = [_norms(piece) for piece in pieces]
        squares = [self.moment(param, "row_square", (*param.shape[:-1], 1)) for param in params]
        means = [piece.square().mean(dim=-1, keepdim=True) for piece in pieces]
        torch._foreach_lerp_(squares, means, 1 - group["beta2"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, _TINY)
        for piece, root, norm in zip(pieces, roots, before):
            piece.div_(root)
            piece.mul_(norm / _norms(piece).add_(_TINY))


def _norms(matrices: Tensor) -> Tensor:
    """Frobenius norm of each matrix, (..., 1, 1)."""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
