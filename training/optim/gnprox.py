"""gnprox: diagonal Gauss-Newton proximal step with a damping that its own success adapts.

u = m / (h + damping + eps), with m and h running means of g and g^2: the minimiser of the local
model m.u + u.h.u / 2 plus the proximal term damping |u|^2 / 2. Each parameter tensor has its own
damping (Levenberg and Marquardt): it grows when a step brought less than a quarter of what the
model promised and falls above three quarters.

The decrease a step brought is taken along the step, from the slopes at both of its ends
(trapezoid rule): lr (m.u + g'.u) / 2, where g' is the next gradient. It needs no further forward
pass, and where gradients are all noise the ratio is about a half, so that noise alone moves no
damping. u is recomputed from m and h, which still are what they were.
Sources: Marquardt (1963); Sophia 2305.14342 for the diagonal; Martens and Grosse 1503.05671.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.optim.base import ScaledOptimizer, Update, gradients

POOR, GOOD = 0.25, 0.75
NEUTRAL = 0.5
_BELIEVED = (-1.0, 2.0)  # one wild step must not outweigh the next fifty


@dataclass(slots=True, kw_only=True, frozen=True)
class Damping:
    """Where a damping begins and how it moves; `gain` is the rate of the ratio's average."""

    initial: float = 1e-4
    minimum: float = 1e-4
    maximum: float = 1.0
    up: float = 1.08
    down: float = 0.97
    gain: float = 0.02


class GNProx(ScaledOptimizer):
    """Scales and adjustments from outside do not enter the judgement of the damping."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.9),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_grad: float = 0.0,
        damping: Damping | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.clip_grad = clip_grad
        self.damping = damping or Damping()

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        grads = gradients(params)
        if self.clip_grad:
            grads = list(torch._foreach_clamp_max(grads, self.clip_grad))
            torch._foreach_clamp_min_(grads, -self.clip_grad)
        for param, grad in zip(params, grads):
            if "step" in self.state[param]:
                self._judge(param, grad, group)
            else:
                self._begin(param)
        states = [self.state[param] for param in params]
        beta1, beta2 = group["betas"]
        means = [state["mean"] for state in states]
        curvatures = [state["curvature"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_lerp_(curvatures, torch._foreach_mul(grads, grads), 1 - beta2)
        for state in states:
            state["step"] += 1
            state["lr"] = group["lr"]
        directions = [self._step_vector(param, group) for param in params]
        return Update(params=params, directions=directions, gain=1.0, group=group)

    def metrics(self) -> dict[str, float]:
        """Mean and largest damping over the parameters. Waits for the device."""
        values = [state["damping"] for state in self.state.values() if "damping" in state]
        if not values:
            return {"gnprox_damping": self.damping.initial, "gnprox_damping_max": 0.0}
        stacked = torch.stack(values)
        return {
            "gnprox_damping": float(stacked.mean()),
            "gnprox_damping_max": float(stacked.max()),
        }

    def _begin(self, param: Tensor) -> None:
        state = self.state[param]
        state["step"] = 0
        state["mean"] = torch.zeros_like(param)
        state["curvature"] = torch.zeros_like(param)
        state["damping"] = torch.tensor(self.damping.initial, device=param.device)
        state["ratio"] = torch.tensor(NEUTRAL, device=param.device)

    def _corrections(self, param: Tensor, group: dict[str, Any]) -> tuple[float, float]:
        step = self.state[param]["step"]
        return tuple(1 / (1 - beta**step) for beta in group["betas"])  # type: ignore[return-value]

    def _step_vector(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[param]
        lift_mean, lift_curvature = self._corrections(param, group)
        denominator = (state["curvature"] * lift_curvature).add_(state["damping"] + group["eps"])
        return (state["mean"] * lift_mean).div_(denominator)

    def _judge(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        """Compare what the last step brought with what it promised, and move the damping."""
        state, rule = self.state[param], self.damping
        for key in ("damping", "ratio"):  # scalars come from a checkpoint on the host
            state[key] = state[key].to(param.device)
        lift_mean, lift_curvature = self._corrections(param, group)
        lr, step = state["lr"], self._step_vector(param, group)
        slope = (state["mean"] * step).sum() * lift_mean
        bend = (state["curvature"] * step * step).sum() * lift_curvature
        promised = lr * slope - 0.5 * lr * lr * bend
        brought = 0.5 * lr * (slope + (grad * step).sum())
        judged = torch.where(promised > 0, brought / promised, state["ratio"])
        judged = judged.clamp(*_BELIEVED)
        ratio = state["ratio"].lerp(judged, rule.gain)
        factor = torch.where(ratio < POOR, rule.up, torch.where(ratio > GOOD, rule.down, 1.0))
        state["damping"] = (state["damping"] * factor).clamp(rule.minimum, rule.maximum)
        state["ratio"] = ratio
