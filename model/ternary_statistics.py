"""What ternary weights look like while they train: zeros, scales, and how many codes change.

Zeros carry no sign and cost no product; codes that still change late in training are a learning
rate that is too high for them. Source: BitNet b1.58 2402.17764 (share of zeros).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from model.bitlinear import BitLinear, ternarize


def ternary_parameters(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[Tensor, int]]:
    """Latent weight and group size of every ternary BitLinear, by module name."""
    return {
        name: (module.weight, module.group_size)
        for name, module in modules
        if isinstance(module, BitLinear) and module.ternary
    }


class TernaryStatistics:
    """Zero fraction, mean scale and code churn of ternary weights, measured when asked.

    Works on at most `rows` evenly spaced output rows of each matrix, so that a log step costs far
    less than a forward pass; training steps cost nothing. Churn is the fraction of those codes
    that differ from the previous call; the first call has none and omits it. The previous codes
    are the only state: `state_dict` keeps them so that a resumed run logs the same churn.
    """

    def __init__(self, *, rows: int = 64) -> None:
        self.rows = rows
        self._previous: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, weights: Mapping[str, tuple[Tensor, int]]) -> dict[str, float]:
        """weights: name -> (latent weight (..., out, in), group size). Synchronises the device."""
        zeros = scale_total = changed = 0.0
        size = scale_count = compared = 0
        for name, (weight, group_size) in weights.items():
            flat = weight.detach().flatten(0, -2)
            step = max(1, -(-flat.shape[0] // self.rows))
            codes, scale = ternarize(flat[::step], group_size)
            codes = codes.to(device="cpu", dtype=torch.int8)
            zeros += float((codes == 0).sum())
            size += codes.numel()
            scale_total += float(scale.double().sum())
            scale_count += scale.numel()
            before = self._previous.get(name)
            if before is not None and before.shape == codes.shape:
                changed += float((codes != before).sum())
                compared += codes.numel()
            self._previous[name] = codes
        if not size:
            return {}
        result = {
            "bitlinear_zero_fraction": zeros / size,
            "bitlinear_scale_mean": scale_total / scale_count,
        }
        if compared:
            result["bitlinear_code_churn"] = changed / compared
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """The previous codes, int8 by weight name: the tensors themselves; empty before the first
        call."""
        return dict(self._previous)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Codes of any dtype are taken as int8; names that the model lacks do no harm."""
        self._previous = {name: codes.to(torch.int8) for name, codes in state.items()}
