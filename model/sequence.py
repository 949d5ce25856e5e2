"""What every block must know about the rows of one forward pass.

Built once per forward by SigmaLLM and handed down, so that document boundaries and padding have
one meaning for attention, scan and n-gram memory alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True, kw_only=True)
class SequenceContext:
    """Positions, document boundaries and padding of a batch of rows.

    positions: (B, T) int64, index inside the row, continued across decode steps (RoPE is
        relative, so document starts need no restart of the count).
    reset_mask: (B, T) bool or None; True = a document starts at this position and nothing before
        it may be seen.
    valid_mask: (B, T) bool or None; False = padding, which may neither be attended nor scanned.
    document_ids: (B, T) int64 or None; running count of resets, set when reset_mask is given.
    use_cache: whether mixers return a state that continues the rows.
    cache: tables that blocks derive from the fields above (RoPE, attention masks), kept for the
        length of this forward so that they are built once and not once per layer.
    """

    positions: Tensor
    reset_mask: Tensor | None = None
    valid_mask: Tensor | None = None
    document_ids: Tensor | None = None
    use_cache: bool = False
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def create(
        cls,
        batch_size: int,
        length: int,
        *,
        device: torch.device | str,
        start: int | Tensor = 0,
        reset_mask: Tensor | None = None,
        valid_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> SequenceContext:
        """Context of rows of `length` tokens whose first token has index `start` (int or (B,))."""
        # A number goes into the launch; as a tensor it would be copied, which no graph may hold.
        offset = start.to(device).reshape(-1, 1) if isinstance(start, Tensor) else start
        positions = torch.arange(length, device=device) + offset  # (T,) or (B, T)
        return cls(
            positions=positions.expand(batch_size, length),
            reset_mask=reset_mask,
            valid_mask=valid_mask,
            document_ids=None if reset_mask is None else reset_mask.long().cumsum(dim=1),
            use_cache=use_cache,
        )
