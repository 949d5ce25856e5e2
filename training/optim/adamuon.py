"""AdaMuon: Muon with Adam's element-wise second moment on the orthogonalised update.

The result is rescaled to a root mean square of 0.2 per matrix, which is about that of Adam's
updates, so that learning rates are Adam's.
Source: Si et al., AdaMuon 2507.11005.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.muon import Muon

ADAM_RMS = 0.2
_EPS = 1e-8


class AdaMuon(Muon):
    """Muon divided by the root of its running mean square, `beta2` the decay."""

    def __init__(
        self, params: Iterable[Any], *, lr: float, beta2: float = 0.95, **options: Any
    ) -> None:
        super().__init__(params, lr=lr, beta2=beta2, **options)

    def refine(self, params: list[Tensor], pieces: list[Tensor], group: dict[str, Any]) -> None:
        squares = [self.moment(param, "square") for param in params]
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, pieces, pieces, 1 - group["beta2"])
        roots = torch._foreach_sqrt(squares)
        torch._foreach_add_(roots, _EPS)
        torch._foreach_div_(pieces, roots)
        for piece in pieces:  # the norm makes a bias correction of the squares superfluous
            norm = torch.linalg.vector_norm(piece, dim=(-2, -1), keepdim=True)
            piece.div_(norm.add_(_EPS))

    def gain(self, param: Tensor) -> float:
        rows, cols = param.shape[-2:]
        return ADAM_RMS * (rows * cols) ** 0.5
