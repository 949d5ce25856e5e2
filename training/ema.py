"""Exponential moving average of the weights, kept beside them.

For ternary models the average of latent weights drifts towards the rounding cut and can be worse
after quantisation, which is why it is off by default and read only on request.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAverage:
    """Shadow copies `s <- decay s + (1 - decay) w` of a model's trainable parameters."""

    def __init__(self, *, decay: float) -> None:
        self.decay = decay
        self.shadow: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> bool:
        """Fold the current weights in; the first call copies them. Whether a shadow moved."""
        params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        if not self.shadow:
            self.shadow = {name: param.clone() for name, param in params.items()}
            return False
        for name, param in params.items():  # a restored shadow comes from host memory
            self.shadow[name] = self.shadow[name].to(param.device)
        shadows = [self.shadow[name] for name in params]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            shadows, list(params.values()), 1.0 - self.decay
        )
        return self.decay < 1.0

    @torch.no_grad()
    def distance(self, model: nn.Module) -> Tensor:
        """Relative L2 distance between the shadow and the weights, a 0-dim tensor."""
        gap, size = torch.zeros(()), torch.zeros(())
        for name, param in model.named_parameters():
            if name in self.shadow:
                gap = gap.to(param.device) + (self.shadow[name] - param).float().pow(2).sum()
                size = size.to(param.device) + param.float().pow(2).sum()
        return (gap / size.clamp_min(1e-30)).sqrt()
