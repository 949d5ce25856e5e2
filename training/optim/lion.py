"""Lion: the sign of an interpolation between momentum and gradient.

One moment per parameter, in fp32 or in bf16 with stochastic rounding (rounding.py says why).
Source: Chen et al. 2302.06675.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.base import ScaledOptimizer, Update, gradients
from training.optim.rounding import keyed_generator, round_stochastically

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Lion(ScaledOptimizer):
    """c = b1 m + (1 - b1) g; p <- decayed p - lr sign(c); m <- b2 m + (1 - b2) g; sign(0) = 0."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.state_dtype = state_dtype
        self.seed = seed
        self._indices: dict[Tensor, int] = {}

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        grads = [self.project(param, grad) for param, grad in zip(params, gradients(params))]
        moments = [self._momentum(param, grad) for param, grad in zip(params, grads)]
        beta1, beta2 = group["betas"]
        means = moments
        if self.state_dtype != torch.float32:
            means = [moment.float() for moment in moments]
        looks_ahead = torch._foreach_mul(means, beta1)
        torch._foreach_add_(looks_ahead, grads, alpha=1 - beta1)
        torch._foreach_mul_(means, beta2)
        torch._foreach_add_(means, grads, alpha=1 - beta2)
        for param, moment, mean in zip(params, moments, means):
            if mean is not moment:
                moment.copy_(round_stochastically(mean, generator=self.generator(param, 0)))
            self.state[param]["step"] = self.step_of(param) + 1
        directions = [
            self.unproject(param, ahead).sign_() for param, ahead in zip(params, looks_ahead)
        ]
        return Update(params=params, directions=directions, gain=1.0, group=group)

    def project(self, param: Tensor, grad: Tensor) -> Tensor:
        """Gradient as the momentum sees it."""
        return grad

    def unproject(self, param: Tensor, direction: Tensor) -> Tensor:
        """Inverse of `project`, of the parameter's shape."""
        return direction

    def generator(self, param: Tensor, purpose: int) -> torch.Generator:
        """Random numbers of this parameter at this step, repeated by a resumed run."""
        if param not in self._indices:
            params = [one for group in self.param_groups for one in group["params"]]
            self._indices = {one: index for index, one in enumerate(params)}
        key = (self.seed, self._indices[param], self.step_of(param), purpose)
        return keyed_generator(param.device, *key)

    def step_of(self, param: Tensor) -> int:
        """How many updates the parameter has had."""
        return self.state[param].get("step", 0)

    def _momentum(self, param: Tensor, grad: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad, dtype=self.state_dtype)
        return state["momentum"]
