"""Bases of C3O: Muon, SOAP, AdamW, a damped Adam; with clamped gradients and bf16 moments."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.optim.adamw import AdamW
from training.optim.base import ScaledOptimizer, Update, gradients
from training.optim.muon import Muon
from training.optim.rounding import keyed_generator, round_stochastically
from training.optim.soap import Soap

MOMENTS = ("momentum", "exp_avg", "exp_avg_sq")


class C3OPart(ScaledOptimizer):
    """Mixin before a base optimizer: clamps gradients, keeps moments in bf16 if asked to, counts.

    Moments are fp32 while the base works on them. Their rounding noise is a function of the seed,
    the parameter's place and the number of its updates, so it needs no state of its own.
    """

    state_dtype = torch.float32  # or bfloat16
    grad_clip = 0.0
    seed = 0
    num_elements = num_groups = num_clipped_groups = 0  # of the last step

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.num_elements = self.num_groups = self.num_clipped_groups = 0
        places = (param for group in self.param_groups for param in group["params"])
        self._places = {param: place for place, param in enumerate(places)}
        super().step(closure)

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        self.num_groups += 1
        self.num_elements += sum(param.numel() for param in params)
        if self.grad_clip:
            grads = gradients(params)
            torch._foreach_clamp_min_(grads, -self.grad_clip)
            torch._foreach_clamp_max_(grads, self.grad_clip)
            self.num_clipped_groups += 1
        if self.state_dtype == torch.float32:
            return super().propose(params, group)
        for param in params:
            state = self.state[param]
            for key in MOMENTS:
                if key in state:
                    state[key] = state[key].float()
        update = super().propose(params, group)
        for param in params:
            self._pack(param)
        return update

    def _pack(self, param: Tensor) -> None:
        state = self.state[param]
        count = int(state.get("updates", 0)) + 1
        state["updates"] = torch.tensor(count)
        noise = keyed_generator(param.device, self.seed, self._places[param], count)
        for key in MOMENTS:
            if key in state:
                state[key] = round_stochastically(state[key], generator=noise)


class DampedAdam(ScaledOptimizer):
    """u = m / sqrt(v + damping + eps), both moments bias-corrected; the damping bounds 1 / sqrt."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
        damping: float = 1e-4,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "damping": damping,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def bucket_key(self, param: Tensor) -> Hashable:
        state = self.state[param]
        return param.device, param.dtype, int(state["step"]) if "step" in state else 0

    def propose(self, params: list[Tensor], group: dict[str, Any]) -> Update:
        beta1, beta2 = group["betas"]
        states = [self._state_of(param) for param in params]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        grads = gradients(params)
        count = max(int(state["step"].add_(1)) for state in states)  # one and the same in a bucket
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_div(squares, 1 - beta2**count)
        torch._foreach_add_(roots, group["damping"] + group["eps"])
        torch._foreach_sqrt_(roots)
        torch._foreach_mul_(roots, 1 - beta1**count)
        directions = list(torch._foreach_div(means, roots))
        return Update(params=params, directions=directions, gain=1.0, group=group)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        return state


class C3OMuon(C3OPart, Muon):
    """Muon as a base."""


class C3OAdamW(C3OPart, AdamW):
    """AdamW as a base: what the Muon split leaves."""


class C3OSoap(C3OPart, Soap):
    """SOAP as a base; its factors and bases stay in fp32."""


class C3OAdam(C3OPart, DampedAdam):
    """The damped Adam as a base."""
