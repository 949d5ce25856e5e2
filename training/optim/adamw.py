"""AdamW on the common interface; undisturbed, it is torch's own to the last bit.

Source: Loshchilov and Hutter 1711.05101.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from training.optim.base import ScaledOptimizer, Update, gradients


class AdamW(ScaledOptimizer):
    """Bias-corrected m / (sqrt(v) + eps), with decoupled weight decay.

    `fused` runs torch's fused kernel while nobody scales, adjusts or measures the updates.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        self.fused = fused

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        beta1, beta2 = group["betas"]
        states = [self._state_of(param) for param in params]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        grads = gradients(params)
        steps = [state["step"].add_(1) for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        counts = torch.stack(steps).tolist()  # one wait where they live on the device
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(roots, group["eps"])
        torch._foreach_mul_(roots, [1 - beta1**count for count in counts])
        directions = list(torch._foreach_div(means, roots))
        return Update(params=params, directions=directions, gain=1.0, group=group)

    def apply_plainly(self, params: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(param) for param in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            gradients(params),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=False,
            fused=self.fused,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        home = param.device if self.fused else torch.device("cpu")
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=home)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        elif state["step"].device != home:  # as a checkpoint brought it
            state["step"] = state["step"].to(home)
        return state
