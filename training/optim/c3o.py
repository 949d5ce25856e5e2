"""C3O: a base update under a trust region per tensor, its blocks scaled by counterfactual credit.

The base (training/optim/c3o_bases.py) proposes directions u. Before they are applied,

    step_p = lr * min(1, radius * max(||p||, 0.01 sqrt(n)) / ||lr u_p||) * u_p
    p     <- (1 - lr * weight_decay) * p - s_b * step_p        block by block

The limit is on what is subtracted, learning rate included, so that it means the same for every base
(a Muon direction is as long as its matrix).

Credit asks what the probe loss would be had one block not been updated, so it is measured where
that question arises: after the update, with the probe gradient there. Taken before the update the
gradient knows nothing of what the other blocks' steps did, and its ranking agreed with the exact
one at 0.3 instead of 0.9. For ternary weights the step is the change of the rounded weights: most
latent steps flip no code, and what flips none has changed nothing yet. The factors s_b that follow
hold until the next probe. Without credit no factor is applied at all.

Sources: LARS and LAMB for the norm ratio (arXiv 1904.00962); difference rewards (COMA, arXiv
1705.08926) for the credit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.credit import (
    BlockLayout,
    CreditSettings,
    UpdateTrial,
    block_scales,
    inner_products,
    leave_one_block_out,
    masked_credit,
    observe_credit,
    scale_free,
)
from training.optim.base import Update
from training.optim.c3o_bases import C3OPart
from training.optim.trust import TrustRegion


@dataclass(slots=True, kw_only=True, frozen=True)
class C3OSettings:
    """Trust region and blocks; `credit` None: no factors. Fields are the `--c3o-*` flags."""

    block_size: int = 4096
    trust_radius: float = 0.15
    trust_norm_refresh_steps: int = 16
    trust_norm_refresh_drift: float = 0.0
    credit: CreditSettings | None = None
    estimator: str = "first_order"
    draws: int = 8
    is_shuffled: bool = False
    seed: int = 0


Rounding = Callable[[Tensor], Tensor]


@dataclass(slots=True, kw_only=True)
class _Before:
    """Parameters as they were before an update: latent (only if asked for) and as computed with."""

    latent: dict[Tensor, Tensor]
    effective: dict[Tensor, Tensor]


class C3O:
    """Trust region and credit over several base optimizers; sees the updates of each."""

    def __init__(
        self,
        parts: Iterable[C3OPart],
        *,
        settings: C3OSettings,
        names: Mapping[Tensor, str],
        roundings: Mapping[Tensor, Rounding] | None = None,
    ) -> None:
        """`names` of all parameters of the parts; `roundings` say what the network computes with
        where that is not the parameter itself."""
        self.settings = settings
        self.parts = list(parts)
        self.trust = TrustRegion(
            radius=settings.trust_radius,
            refresh_steps=settings.trust_norm_refresh_steps,
            drift=settings.trust_norm_refresh_drift,
        )
        self.num_probes = 0
        self._names = dict(names)
        self._roundings = dict(roundings or {})
        self._layouts = {
            param: BlockLayout([param], block_size=settings.block_size) for param in self._names
        }
        self._layout = BlockLayout(list(self._names), block_size=settings.block_size)
        self._counts, self._sizes = self._layout.counts, self._layout.sizes
        self._mean = torch.zeros_like(self._sizes)
        self._seen = torch.zeros_like(self._sizes)
        self._factors: dict[Tensor, Tensor] | None = None
        self._before: _Before | None = None
        self.scales = torch.ones_like(self._sizes)  # (N,) of every block
        self.active = torch.zeros((), dtype=torch.bool, device=self._sizes.device)
        for part in self.parts:
            part.set_adjustment(self._adjust)

    @property
    def num_blocks(self) -> int:
        return len(self._sizes)

    def scales_of(self, param: Tensor) -> Tensor:
        """The factors of one parameter's blocks."""
        pieces = dict(zip(self._layouts, self.scales.split(self._counts)))
        return pieces[param]

    @torch.no_grad()
    def begin_probe(self) -> None:
        """Remember the parameters, which are about to be updated. An earlier memory is dropped."""
        keeps_latent = self.settings.estimator != "first_order"
        self._before = _Before(
            latent={p: p.detach().clone() for p in self._layouts} if keeps_latent else {},
            effective={p: self._effective(p).clone() for p in self._layouts},
        )

    @torch.no_grad()
    def finish_probe(
        self,
        gradients: Mapping[Tensor, Tensor],
        *,
        evaluate: Callable[[], Tensor],
        generator: torch.Generator,
    ) -> Tensor:
        """Credit of every block (N,) in nats for the update since `begin_probe`; new factors hold
        from now on.

        gradients: of the probe loss, by parameter, after the update. evaluate: the probe loss as
        the parameters stand. generator: draws the masks of the estimator `mask`. RuntimeError
        without `begin_probe`.
        """
        before, self._before = self._before, None
        if before is None:
            raise RuntimeError("finish_probe without begin_probe")
        self.num_probes += 1
        layout = self._layout
        steps = [before.effective[param] - self._effective(param) for param in self._layouts]
        grads = [gradients.get(param, torch.zeros_like(param)) for param in self._layouts]
        step_norms = layout.norms(steps)
        if self.settings.estimator == "first_order":
            credit = inner_products(layout, grads, steps)
        else:
            credit = self._measure(before, evaluate=evaluate, generator=generator)
        if self.settings.credit is not None:
            self._mean, self._seen = observe_credit(
                self._mean,
                self._seen,
                scale_free(credit, layout.norms(grads), step_norms),
                step_norms > 0.0,
                beta=self.settings.credit.ema,
            )
            self._rescale()
        return credit

    def metrics(self) -> dict[str, float]:
        """The `c3o_*` figures of the last step and the counts so far; reads the device."""
        share = self._sizes / self._sizes.sum()
        mean = (self.scales * share).sum()
        return {
            "c3o_block_scale_mean": float(mean),
            "c3o_block_scale_std": float(((self.scales - mean).square() * share).sum().sqrt()),
            "c3o_step_elements": sum(part.num_elements for part in self.parts),
            "c3o_update_norm": self.trust.step_length(),
            "c3o_trust_exact_recompute": self.trust.num_norms_taken,
            "c3o_trust_norm_skipped": self.trust.num_steps_unmeasured,
            "c3o_foreach_groups": sum(part.num_groups for part in self.parts),
            "c3o_grad_clip_foreach_groups": sum(part.num_clipped_groups for part in self.parts),
            "c3o_probe_steps": self.num_probes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Trust norms and credit by parameter name, and the counts."""
        credit = {
            self._names[param]: {"mean": mean.clone(), "seen": seen.clone()}
            for param, mean, seen in zip(
                self._layouts, self._mean.split(self._counts), self._seen.split(self._counts)
            )
        }
        return {
            "trust": self.trust.state_dict(self._names),
            "credit": credit,
            "num_probes": self.num_probes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; ValueError when its blocks are others."""
        own = {self._names[param]: len(layout) for param, layout in self._layouts.items()}
        if own != {name: len(entry["mean"]) for name, entry in state["credit"].items()}:
            raise ValueError("the saved credit has other blocks; keep --c3o-block-size as it was")
        self.trust.load_state_dict(state["trust"], self._names)
        entries = [state["credit"][name] for name in own]
        device = self._sizes.device
        self._mean = torch.cat([entry["mean"] for entry in entries]).to(device)
        self._seen = torch.cat([entry["seen"] for entry in entries]).to(device)
        self.num_probes = state["num_probes"]
        self._before = None
        self._rescale()

    def _rescale(self) -> None:
        """Factors from the averages; none while no block has been observed."""
        self._factors = None
        if self.settings.credit is None or self.num_probes == 0:
            return
        permutation = None
        if self.settings.is_shuffled:
            generator = torch.Generator().manual_seed(self.settings.seed)
            permutation = torch.randperm(self.num_blocks, generator=generator)
            permutation = permutation.to(self._sizes.device)
        self.scales, self.active = block_scales(
            self._mean,
            self._seen,
            self._sizes,
            settings=self.settings.credit,
            permutation=permutation,
        )
        self._factors = dict(zip(self._layouts, self.scales.split(self._counts)))

    def _measure(
        self, before: _Before, *, evaluate: Callable[[], Tensor], generator: torch.Generator
    ) -> Tensor:
        params = list(self._layouts)
        steps = [before.latent[param] - param for param in params]
        trial = UpdateTrial(params, steps, layout=self._layout, evaluate=evaluate)
        device = self._sizes.device
        if self.settings.estimator == "exact":
            return leave_one_block_out(trial, num_blocks=self.num_blocks, device=device)
        credit, _ = masked_credit(
            trial.loss,
            num_blocks=self.num_blocks,
            draws=self.settings.draws,
            generator=generator,
            device=device,
        )
        return credit

    def _effective(self, param: Tensor) -> Tensor:
        rounding = self._roundings.get(param)
        return param.detach() if rounding is None else rounding(param.detach())

    def _adjust(self, update: Update) -> None:
        update.directions = [direction.contiguous() for direction in update.directions]
        self.trust.confine(update)
        if self._factors is not None:
            for param, direction in zip(update.params, update.directions):
                self._layouts[param].scale_([direction], self._factors[param])
