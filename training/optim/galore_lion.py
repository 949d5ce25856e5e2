"""GaLore-Lion: Lion whose momentum of a matrix lives in the gradient's leading subspace.

Every `refresh` steps P becomes the top singular vectors of the gradient on its shorter side. The
momentum is kept in those `rank` dimensions, (rank, long) instead of (short, long), and rotated into
the new ones at a refresh. The sign is taken after projecting back, so that full rank is Lion.
Sources: Zhao et al., GaLore 2403.03507; Halko et al. 0909.4061 (randomised range finder).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.lion import Lion

_RANDOMIZED_ABOVE = 4  # times the rank: from there on a full decomposition is mostly thrown away
_OVERSAMPLING = 8
_POWER_ITERATIONS = 2


class GaloreLion(Lion):
    """Lion with a projected momentum for every parameter of two or more dimensions.

    Leading dimensions count as a stack of matrices. Where `rank` is no smaller than the shorter
    side there is nothing to project and the parameter is plain Lion's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        rank: int = 128,
        refresh: int = 200,
        **options: Any,
    ) -> None:
        super().__init__(params, lr=lr, **options)
        self.rank = rank
        self.refresh = refresh

    def project(self, param: Tensor, grad: Tensor) -> Tensor:
        if not self.projects(param):
            return grad
        if self.step_of(param) % self.refresh == 0:
            self._refresh(param, grad)
        basis = self.state[param]["basis"]
        return basis.mT @ grad if _is_wide(param) else grad @ basis

    def unproject(self, param: Tensor, direction: Tensor) -> Tensor:
        if not self.projects(param):
            return direction
        basis = self.state[param]["basis"]
        return basis @ direction if _is_wide(param) else direction @ basis.mT

    def projects(self, param: Tensor) -> bool:
        """Whether a parameter (..., out, in) gets a projected momentum; if not it is plain
        Lion's."""
        return param.dim() >= 2 and self.rank < min(param.shape[-2:])

    def metrics(self) -> dict[str, float]:
        """The columns `galore_*`, over all projected parameters. Waits for the device."""
        states = [state for param, state in self.state.items() if self.projects(param)]
        energies = [float(state["energy"]) for state in states if "energy" in state]
        tensors = [v for state in self.state.values() for v in state.values()]
        return {
            "galore_rank": self.rank,
            "galore_refreshes": sum(-(-state["step"] // self.refresh) for state in states),
            "galore_state_bytes": sum(
                value.numel() * value.element_size()
                for value in tensors
                if isinstance(value, Tensor) and value.dim()
            ),
            "galore_energy_captured": sum(energies) / max(1, len(energies)),
        }

    def _refresh(self, param: Tensor, grad: Tensor) -> None:
        state = self.state[param]
        sided = grad if _is_wide(param) else grad.mT  # (..., short, long)
        basis = leading_basis(sided, rank=self.rank, generator=self.generator(param, 1))
        if "basis" in state:
            turn = basis.mT @ state["basis"]  # (..., rank, rank)
            old = state["momentum"].to(turn.dtype)
            turned = turn @ old if _is_wide(param) else old @ turn.mT
            self.state[param]["momentum"].copy_(turned)
        kept, whole = (basis.mT @ sided).square().sum(), sided.square().sum()
        state["energy"] = kept / whole.clamp_min(torch.finfo(whole.dtype).tiny)
        state["basis"] = basis


def leading_basis(matrices: Tensor, *, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal (..., short, rank): the top left singular vectors of (..., short, long).

    Exact where the decomposition is small, else by the randomised range finder with two power
    iterations.
    """
    short, long = matrices.shape[-2:]
    width = rank + _OVERSAMPLING
    if short <= _RANDOMIZED_ABOVE * rank or width >= short:
        return torch.linalg.svd(matrices, full_matrices=False).U[..., :rank].contiguous()
    shape = (*matrices.shape[:-2], long, width)
    start = torch.randn(shape, generator=generator, device=matrices.device, dtype=matrices.dtype)
    ranges = torch.linalg.qr(matrices @ start).Q
    for _ in range(_POWER_ITERATIONS):
        back = torch.linalg.qr(matrices.mT @ ranges).Q
        ranges = torch.linalg.qr(matrices @ back).Q
    small = torch.linalg.svd(ranges.mT @ matrices, full_matrices=False).U[..., :rank]
    return (ranges @ small).contiguous()


def state_bytes(shape: Iterable[int], *, rank: int, bytes_per_moment: int) -> int:
    """State a parameter of this shape needs: momentum in rank dimensions and the fp32 basis."""
    sizes = list(shape)
    count = 1
    for size in sizes:
        count *= size
    if len(sizes) < 2 or rank >= min(sizes[-2:]):
        return bytes_per_moment * count
    stack = count // (sizes[-2] * sizes[-1])
    short, long = sorted(sizes[-2:])
    return stack * (bytes_per_moment * rank * long + 4 * short * rank)


def _is_wide(param: Tensor) -> bool:
    return param.shape[-2] <= param.shape[-1]
