"""Preference pairs and the loss on them: DPO with SamPO's length control, reference = no adapter.

    logit = beta * (R_w - R_l) - verbosity * (|y_w| - |y_l|) / max_len,   loss = -log sigma(logit)

R is the sum over an answer's tokens of log pi / pi_ref. Sums over more tokens are larger whatever
they say, so of the longer answer only as many tokens as the shorter has are counted, drawn at
random without replacement. The second term stands inside the sigmoid: a pair whose better answer is
the longer one has a larger gradient than its likelihoods alone would give it, because the margin it
has to reach is larger; a constant beside the loss would have none.

Sources: DPO 2305.18290; SamPO 2406.10957.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.adapters import Adapter, attached, frozen
from training.rl.rollout import Rollout, completion_log_probs

PAIRS_AT_ONCE = 32  # in one forward


@dataclass(slots=True, kw_only=True, frozen=True)
class DPOSettings:
    """max_len: tokens, the unit of the length term."""

    beta: float = 0.1
    verbosity: float = 0.02
    max_len: int = 24


@dataclass(slots=True, kw_only=True, frozen=True)
class Pair:
    """Two completions of one prompt, in tokens, and what they earned. ValueError unless the first
    earned more and both say something."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    reward_chosen: float
    reward_rejected: float

    def __post_init__(self) -> None:
        if not self.margin > 0.0:
            raise ValueError(f"a pair with margin {self.margin:g} says nothing")
        if not (self.prompt and self.chosen and self.rejected):
            raise ValueError("a pair needs a prompt and two completions")

    @property
    def margin(self) -> float:
        return self.reward_chosen - self.reward_rejected


def length_masks(chosen: Tensor, rejected: Tensor, *, generator: torch.Generator) -> Tensor:
    """Which tokens count, (2, N, C) bool, given those there are, (N, C) bool each.

    Of both answers of a pair equally many: all of the shorter, a uniform draw of the longer.
    `generator` (CPU) gives 2 N C numbers.
    """
    masks = torch.stack((chosen, rejected)).cpu()
    keep = masks.sum(2).amin(0)  # (N,)
    draw = torch.rand(masks.shape, generator=generator, dtype=torch.float64)
    ranks = draw.masked_fill(~masks, 2.0).argsort(2).argsort(2)
    return (ranks < keep.view(1, -1, 1)).to(chosen.device)


def pair_logits(
    log_ratios: Tensor, masks: Tensor, lengths: Tensor, settings: DPOSettings
) -> Tensor:
    """(N,) from log-ratios and counted tokens (2, N, C), chosen first, and all tokens (2, N)."""
    sums = (log_ratios * masks).sum(2)
    surplus = (lengths[0] - lengths[1]).to(sums.dtype) / settings.max_len
    return settings.beta * (sums[0] - sums[1]) - settings.verbosity * surplus


def pair_gradients(
    model: Any,
    adapter: Adapter,
    pairs: Sequence[Pair],
    settings: DPOSettings,
    *,
    generator: torch.Generator,
    pad_id: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> float:
    """Add the gradient of the mean loss to the adapter's factors; that loss, in nats.

    The model's own parameters get none. Modules are in eval mode.
    """
    total = 0.0
    for first in range(0, len(pairs), PAIRS_AT_ONCE):
        part = pairs[first : first + PAIRS_AT_ONCE]
        rollout = as_rollout(part, device=model.embed.weight.device, pad_id=pad_id)
        with torch.no_grad(), autocast(), attached(model, None):
            reference, _ = completion_log_probs(model, rollout)
        shape = (2, len(part), -1)
        mask = rollout.completion_mask.view(shape)
        masks = length_masks(mask[0], mask[1], generator=generator)
        with torch.enable_grad(), frozen(model), attached(model, adapter):
            with autocast():
                log_probs, _ = completion_log_probs(model, rollout)
            ratios = (log_probs - reference).view(shape)
            logits = pair_logits(ratios, masks, mask.sum(2), settings)
            loss = -F.logsigmoid(logits).sum() / len(pairs)
            loss.backward()
        total += float(loss.detach())
    return total


def as_rollout(pairs: Sequence[Pair], *, device: torch.device, pad_id: int) -> Rollout:
    """All chosen completions, then all rejected ones."""
    prompts = [list(pair.prompt) for pair in pairs] * 2
    said = [list(pair.chosen) for pair in pairs] + [list(pair.rejected) for pair in pairs]
    before, after = max(map(len, prompts)), max(map(len, said))
    completion = torch.tensor([row + [pad_id] * (after - len(row)) for row in said])
    lengths = torch.tensor([len(row) for row in said]).unsqueeze(1)
    starts = torch.tensor([before - len(row) for row in prompts]).unsqueeze(1)
    return Rollout(
        prompt_ids=torch.tensor(
            [[pad_id] * (before - len(row)) + row for row in prompts], device=device
        ),
        prompt_mask=(torch.arange(before) >= starts).to(device),
        completion_ids=completion.to(device),
        completion_mask=(torch.arange(after) < lengths).to(device),
        old_log_probs=torch.zeros(completion.shape, device=device),
        temperature=1.0,
        top_k=0,
    )
