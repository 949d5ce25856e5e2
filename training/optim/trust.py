"""A trust region per tensor: no step longer than a share of its parameter's norm.

Parameter norms move slowly, so they are taken every `refresh_steps` updates of the parameter. With
`drift` > 0 the step of a tensor is not measured either while, at its last measurement, it kept a
margin above that; 0 measures every step.
Source: the norm ratio of LARS and LAMB (You et al., arXiv 1904.00962), as a limit.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.optim.base import Update

ZERO_NORM_FLOOR = 0.01  # root mean square that a tensor is taken to have at least: zeros must move


@dataclass(slots=True)
class _Cached:
    """Norm of a parameter (0-d), its updates since; 1 - length / limit when last measured, and the
    length then (0-d), shortened."""

    norm: Tensor
    age: int = 0
    margin: float = 0.0
    length: Tensor | None = None


class TrustRegion:
    """Shortens the directions of an update where lr * ||direction|| exceeds its limit."""

    def __init__(self, *, radius: float, refresh_steps: int = 16, drift: float = 0.0) -> None:
        self.radius = radius
        self.refresh_steps = refresh_steps
        self.drift = drift
        self.num_norms_taken = 0
        self.num_steps_unmeasured = 0
        self._cached: dict[Tensor, _Cached] = {}

    def confine(self, update: Update) -> None:
        """Shorten in place; a direction inside its limit keeps every bit."""
        self._refresh(update.params)
        chosen = []
        for index, param in enumerate(update.params):
            cached = self._cached[param]
            if self.drift == 0.0 or cached.age == 0 or cached.margin <= self.drift:
                chosen.append(index)
            cached.age += 1
        self.num_steps_unmeasured += len(update.params) - len(chosen)
        if not chosen:
            return
        params = [update.params[index] for index in chosen]
        directions = [update.directions[index] for index in chosen]
        norms = torch._foreach_norm(directions)
        lengths = torch.stack(list(norms)).float() * abs(update.gain * update.group["lr"])
        limits = self._limits(params)
        factors = (limits / lengths.clamp_min(1e-30)).clamp_max(1.0)
        torch._foreach_mul_(directions, list(factors.unbind()))
        for param, length in zip(params, (lengths * factors).unbind()):
            self._cached[param].length = length
        if self.drift > 0.0:  # the only wait for the device
            for param, margin in zip(params, (1.0 - lengths / limits).tolist()):
                self._cached[param].margin = margin

    def step_length(self) -> float:
        """Euclidean length of the last steps of all parameters together, as last measured."""
        lengths = [own.length for own in self._cached.values() if own.length is not None]
        if not lengths:
            return 0.0
        # Exactly summed: the order in which parameters came up may differ after a resume.
        return math.sqrt(math.fsum(torch.stack(lengths).double().square().tolist()))

    def state_dict(self, names: Mapping[Tensor, str]) -> dict[str, Any]:
        """Cached norms by parameter name, and the counts."""
        cached = {
            names[param]: {
                "norm": own.norm.clone(),
                "age": own.age,
                "margin": own.margin,
                "length": None if own.length is None else own.length.clone(),
            }
            for param, own in self._cached.items()
        }
        return {"cached": cached, "counts": [self.num_norms_taken, self.num_steps_unmeasured]}

    def load_state_dict(self, state: dict[str, Any], names: Mapping[Tensor, str]) -> None:
        """Continue from a saved state, for parameters of the same names."""
        self._cached = {
            param: _restored(entry, param.device)
            for param, name in names.items()
            if (entry := state["cached"].get(name)) is not None
        }
        self.num_norms_taken, self.num_steps_unmeasured = state["counts"]

    def _limits(self, params: list[Tensor]) -> Tensor:
        norms = torch.stack([self._cached[param].norm for param in params])
        floors = [ZERO_NORM_FLOOR * param.numel() ** 0.5 for param in params]
        return self.radius * torch.maximum(norms, torch.tensor(floors, device=norms.device))

    def _refresh(self, params: list[Tensor]) -> None:
        due = [
            param
            for param in params
            if param not in self._cached or self._cached[param].age >= self.refresh_steps
        ]
        if not due:
            return
        norms = torch._foreach_norm(due)
        self._cached.update({param: _Cached(norm.float()) for param, norm in zip(due, norms)})
        self.num_norms_taken += len(due)


def _restored(entry: dict[str, Any], device: torch.device) -> _Cached:
    length = entry["length"]
    return _Cached(
        entry["norm"].to(device).clone(),
        entry["age"],
        entry["margin"],
        None if length is None else length.to(device).clone(),
    )
