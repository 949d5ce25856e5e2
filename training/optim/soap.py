"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's two factors.

For a matrix gradient G the factors are running means of G G^T and G^T G. Their eigenvectors are
found once and then followed by one power iteration and a QR decomposition every `refresh` steps;
Adam's second moment lives in that basis, the first one outside of it. The first gradient of a
parameter only makes the basis and moves nothing: it would be seen through its own eigenvectors.
Source: Vyas et al., SOAP 2409.11321.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.base import ScaledOptimizer, Update, gradients

_SIDES = ("left", "right")


class Soap(ScaledOptimizer):
    """Parameters have at least two dimensions; leading ones count as a stack of matrices.

    A side longer than `max_side` gets no basis: its factor would be larger than the weights.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        refresh: int = 10,
        max_side: int = 2048,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.refresh = refresh
        self.max_side = max_side

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        directions = [
            self._direction(param, grad, group) for param, grad in zip(params, gradients(params))
        ]
        return Update(params=params, directions=directions, gain=1.0, group=group)

    def _direction(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[param]
        beta1, beta2 = group["betas"]
        if not state:
            self._begin(param, grad, beta2)
            return torch.zeros_like(param)
        step = state["step"] = state["step"] + 1
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].lerp_(self._turn(param, grad).square(), 1 - beta2)
        correction = (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        turned = self._turn(param, mean) / square.sqrt().add_(group["eps"])
        direction = self._turn_back(param, turned).mul_(correction)
        self._follow(param, grad, beta2, refresh=step % self.refresh == 0)
        return direction

    def _begin(self, param: Tensor, grad: Tensor, beta2: float) -> None:
        state = self.state[param]
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(param)
        for side, size in zip(_SIDES, param.shape[-2:]):
            if size <= self.max_side:
                factor = self._outer(grad, side).mul_(1 - beta2)
                # Largest eigenvalue first, as the power iteration orders them.
                vectors = torch.linalg.eigh(factor).eigenvectors.flip(-1)
                state[side], state[f"{side}_basis"] = factor, vectors.contiguous()

    def _follow(self, param: Tensor, grad: Tensor, beta2: float, *, refresh: bool) -> None:
        state = self.state[param]
        for side in _SIDES:
            if side not in state:
                continue
            factor = state[side].lerp_(self._outer(grad, side), 1 - beta2)
            if refresh:
                basis = state[f"{side}_basis"]
                product = factor @ basis
                order = (basis * product).sum(-2).argsort(dim=-1, descending=True)  # (..., size)
                self._reorder(state, side, order)
                index = order.unsqueeze(-2).expand_as(product)
                state[f"{side}_basis"] = torch.linalg.qr(product.gather(-1, index)).Q.contiguous()

    @staticmethod
    def _reorder(state: dict[str, Any], side: str, order: Tensor) -> None:
        """The second moment follows its eigenvectors to their new places."""
        square = state["exp_avg_sq"]
        along = -2 if side == "left" else -1
        index = order.unsqueeze(-1 if side == "left" else -2).expand_as(square)
        state["exp_avg_sq"] = square.gather(along, index)

    @staticmethod
    def _outer(grad: Tensor, side: str) -> Tensor:
        return grad @ grad.mT if side == "left" else grad.mT @ grad

    def _turn(self, param: Tensor, value: Tensor) -> Tensor:
        """Into the eigenbasis: L^T value R."""
        state = self.state[param]
        if "left_basis" in state:
            value = state["left_basis"].mT @ value
        return value @ state["right_basis"] if "right_basis" in state else value

    def _turn_back(self, param: Tensor, value: Tensor) -> Tensor:
        """Out of it: L value R^T. Always a new tensor."""
        state = self.state[param]
        if "left_basis" in state:
            value = state["left_basis"] @ value
        return value @ state["right_basis"].mT if "right_basis" in state else value
