"""Counterfactual credit: how much worse the probe loss would be had one block not been updated.

Parameters are cut into blocks, contiguous slices of one tensor. For an update p -= step the credit
of block b is L(update without b) - L(update), with L the loss on text that is never trained on.
`leave_one_block_out` measures just that, with one forward per block; `masked_credit` estimates it
from losses under random masks, without bias; `inner_products` predicts it to first order from one
gradient, <g_b, step_b>, which is what a run can afford. `block_scales` turns credits into factors
with mean one, so that credit moves effort between blocks and is never a changed learning rate.

Only gradients, updates and probe losses enter: no speed, no reported or hidden evaluation.
Sources: difference rewards, and COMA (Foerster et al., arXiv 1705.08926).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-30


@dataclass(slots=True, kw_only=True, frozen=True)
class CreditSettings:
    """How a block's credit becomes its factor; the fields are the `--c3o-credit-*` flags."""

    ema: float = 0.92
    gain: float = 0.40
    clip_value: float = 2.0
    skip_threshold: float = 1e-2
    scale_min: float = 0.60
    scale_max: float = 1.80


class BlockLayout:
    """Which slices of a list of tensors are the blocks: `block_size` elements each, the last of a
    tensor what is left. Vectors over blocks go tensor by tensor."""

    def __init__(self, tensors: Sequence[Tensor], *, block_size: int) -> None:
        if block_size < 1:
            raise ValueError("a credit block needs at least one element (--c3o-block-size)")
        self.block_size = block_size
        self.counts = [-(-tensor.numel() // block_size) for tensor in tensors]
        sizes: list[int] = []
        for tensor in tensors:
            whole, rest = divmod(tensor.numel(), block_size)
            sizes += [block_size] * whole + [rest] * (rest > 0)
        device = tensors[0].device if tensors else None
        self.sizes = torch.tensor(sizes, dtype=torch.float32, device=device)  # (N,)

    def __len__(self) -> int:
        return len(self.sizes)

    def sums(self, tensors: Sequence[Tensor]) -> Tensor:
        """Sum over each block, fp32 (N,)."""
        return torch.cat([self._sums(tensor.flatten().float()) for tensor in tensors])

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """Euclidean norm of each block (N,)."""
        return self.sums([tensor.float().square() for tensor in tensors]).sqrt()

    def scale_(self, tensors: Sequence[Tensor], factors: Tensor) -> None:
        """Multiply every block of contiguous tensors in place by its factor (N,)."""
        for tensor, own in zip(tensors, factors.split(self.counts)):
            flat = tensor.view(-1)
            whole = len(flat) // self.block_size
            if whole:
                head = flat[: whole * self.block_size].view(whole, self.block_size)
                head.mul_(own[:whole, None].to(tensor.dtype))
            if whole < len(own):
                flat[whole * self.block_size :].mul_(own[whole].to(tensor.dtype))

    def _sums(self, flat: Tensor) -> Tensor:
        whole = len(flat) // self.block_size
        head = flat[: whole * self.block_size].view(whole, self.block_size).sum(1)
        if whole * self.block_size == len(flat):
            return head
        return torch.cat([head, flat[whole * self.block_size :].sum().view(1)])


def inner_products(layout: BlockLayout, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """<left_b, right_b> of every block (N,); with a probe gradient and a step, the first-order
    prediction of the credit in nats."""
    return layout.sums([a.float() * b.float() for a, b in zip(left, right)])


class UpdateTrial:
    """Probe losses of an update that has been applied, had its blocks been smaller or left out.

    `steps` are what was subtracted from the parameters; those are left as they were found.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        steps: Sequence[Tensor],
        *,
        layout: BlockLayout,
        evaluate: Callable[[], Tensor],
    ) -> None:
        self._params, self._steps = list(params), list(steps)
        self._layout, self._evaluate = layout, evaluate
        self._found = [param.detach().clone() for param in params]

    @torch.no_grad()
    def loss(self, factors: Tensor) -> Tensor:
        """0-d loss with every block's step multiplied by its factor (N,); ones: as it was."""
        undone = [
            step.detach().clone(memory_format=torch.contiguous_format) for step in self._steps
        ]
        self._layout.scale_(undone, 1.0 - factors)
        try:
            torch._foreach_add_(self._params, undone)
            return self._evaluate().detach().float()
        finally:
            torch._foreach_copy_(self._params, self._found)


def leave_one_block_out(trial: UpdateTrial, *, num_blocks: int, device: torch.device) -> Tensor:
    """The exact credit of every block in nats (N,): one forward each, and one more."""
    ones = torch.ones(num_blocks, device=device)
    full = trial.loss(ones)
    credit = torch.empty(num_blocks, device=device)
    for block in range(num_blocks):
        without = ones.clone()
        without[block] = 0.0
        credit[block] = trial.loss(without) - full
    return credit


def masked_credit(
    loss: Callable[[Tensor], Tensor],
    *,
    num_blocks: int,
    draws: int,
    generator: torch.Generator,
    device: torch.device,
    probability: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """Credit of every block from `draws` losses under random masks: estimate and its standard
    error, both (N,) in nats.

    Each block is left out with `probability`. The loss, less the mean of the other draws, is
    regressed on the mask with the known variance p (1 - p), which is unbiased for the mean effect
    of a block. ValueError for fewer than two draws.
    """
    if draws < 2:
        raise ValueError("a randomised credit needs at least two draws (--c3o-credit-draws)")
    uniform = torch.rand(draws, num_blocks, generator=generator)
    masked = (uniform < probability).float().to(device)  # (draws, N)
    losses = torch.stack([loss(1.0 - row) for row in masked])  # (draws,)
    others = (losses.sum() - losses) / (draws - 1)
    weight = (masked - probability) / (probability * (1.0 - probability))
    terms = (losses - others)[:, None] * weight  # (draws, N)
    return terms.mean(0), terms.std(0) / draws**0.5


def scale_free(credit: Tensor, gradient_norms: Tensor, step_norms: Tensor) -> Tensor:
    """Credit over what it could be at most, ||g_b|| ||step_b|| (all (N,)): large blocks and large
    steps are no merit. 0 where a block has no gradient or no step."""
    bound = gradient_norms * step_norms
    return torch.where(bound > TINY, credit / bound.clamp_min(TINY), torch.zeros_like(credit))


def observe_credit(
    mean: Tensor, count: Tensor, credit: Tensor, seen: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """Moving average of the scale-free credit and its number of observations (both (N,)) after one
    more; blocks not `seen` (bool), or whose credit is not finite, keep theirs."""
    seen = seen & credit.isfinite()
    moved = torch.where(seen, beta * mean + (1.0 - beta) * credit, mean)
    return moved, count + seen.float()


def block_scales(
    mean: Tensor,
    count: Tensor,
    sizes: Tensor,
    *,
    settings: CreditSettings,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factor of every block (N,), mean one over elements, and a 0-d bool: whether they differ.

    `mean` and `count` come from `observe_credit`, sizes (N,) are elements per block. All factors
    are one while the spread of the bias-corrected credit is below the threshold. `permutation`
    hands every block the credit of another one: the placebo.
    """
    known = count > 0
    corrected = mean / (1.0 - settings.ema**count).clamp_min(TINY)
    number = known.sum().clamp_min(1)
    centre = torch.where(known, corrected, 0.0).sum() / number
    deviation = torch.where(known, corrected - centre, 0.0)
    spread = (deviation.square().sum() / number).sqrt()
    z = (deviation / spread.clamp_min(TINY)).clamp(-settings.clip_value, settings.clip_value)
    if permutation is not None:
        z = z[permutation]
    scales = mean_one(
        torch.exp(settings.gain * z), sizes, least=settings.scale_min, most=settings.scale_max
    )
    active = spread >= settings.skip_threshold
    return torch.where(active, scales, torch.ones_like(scales)), active


def mean_one(scales: Tensor, sizes: Tensor, *, least: float, most: float) -> Tensor:
    """clip(f * scales, least, most) with the one factor f for which the mean over elements is one.

    scales, sizes: (N,), least < 1 < most. The mean grows with f, so bisection in log f finds it
    without asking the device; rounds of normalising and clipping end in the same place but may
    need many when most elements lie at a bound.
    """
    share = (sizes / sizes.sum()).double()
    log = scales.double().log()
    low = (torch.tensor(least).double().log() - log.max()).expand(())
    high = (torch.tensor(most).double().log() - log.min()).expand(())
    for _ in range(50):
        middle = (low + high) / 2
        too_much = ((log + middle).exp().clamp(least, most) * share).sum() > 1.0
        high = torch.where(too_much, middle, high)
        low = torch.where(too_much, low, middle)
    return (log + (low + high) / 2).exp().clamp(least, most).to(scales.dtype)
