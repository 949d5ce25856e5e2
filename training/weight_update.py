"""One update of the weights: gradients unscaled, clipped, judged and, if all is finite, applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.nonfinite import state_is_finite
from training.optimizer import OptimizerSet


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOutcome:
    """finite: the update was applied. sound: weights and moments were finite before it.

    overflow: the loss scale was too large, which says nothing about the batch. grad_norm: norm of
    all gradients before clipping, a 0-d tensor.
    """

    finite: bool
    sound: bool
    overflow: bool
    grad_norm: Tensor


def apply_gradients(
    model: Any,
    optimizer: OptimizerSet,
    *,
    scaler: torch.amp.GradScaler,
    max_norm: float,
    loss: Tensor,
) -> UpdateOutcome:
    """Clip the gradients to `max_norm` and step, unless loss, gradients or state are not finite."""
    for part in optimizer.parts:
        scaler.unscale_(part)
    grad_norm = nn.utils.clip_grad_norm_(list(optimizer.parameters()), max_norm)
    sound = state_is_finite(model, optimizer)
    usable = torch.isfinite(grad_norm) & torch.isfinite(loss)
    sound, finite = torch.stack([sound, sound & usable]).tolist()  # one wait for the device
    overflow = sound and not finite and scaler.is_enabled() and scaler.get_scale() > 1.0
    if finite:
        for part in optimizer.parts:
            scaler.step(part)
        model.after_optimizer_step()
    scaler.update()
    return UpdateOutcome(finite=finite, sound=sound, overflow=overflow, grad_norm=grad_norm)
