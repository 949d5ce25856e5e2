"""Feature `adaptive_sources`: measures every source's loss and moves the weights of the mixture.

A batch is measured before it is trained on, so its loss is one on unseen text. The clock is in
tokens, so that it does not depend on the batch size.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from model.cross_entropy import linear_cross_entropy
from training.config.sigma_config import SigmaConfig
from training.context import StepContext
from training.features.base import Feature, Schedule
from training.probe import evaluating
from training.runtime.checkpoint import CheckpointStore
from training.stream.batch import Batch
from training.stream.reweighting import SourceFactors
from training.stream.state import metric_name

MEASUREMENTS_PER_UPDATE = 32
IGNORED = -100


class AdaptiveSourcesFeature(Feature):
    name = "adaptive_sources"

    def __init__(
        self,
        factors: SourceFactors,
        *,
        interval_tokens: int,
        is_shuffled: bool = False,
        reference: str = "",
    ) -> None:
        self.factors = factors
        self.interval_tokens = interval_tokens
        self.is_shuffled = is_shuffled
        self.reference = reference
        self.tokens = self.measured_at = self.updated_at = 0
        self._reference_model: nn.Module | None = None

    @classmethod
    def schedule(cls, config: SigmaConfig) -> Schedule | None:
        return Schedule() if config.adaptive.enable_adaptive_sources else None

    @classmethod
    def create(cls, config: SigmaConfig) -> AdaptiveSourcesFeature:
        own = config.adaptive
        return cls(
            SourceFactors(
                signal=own.adaptive_signal,
                smoothing=own.adaptive_smoothing,
                least=own.adaptive_min_weight,
                most=own.adaptive_max_weight,
            ),
            interval_tokens=own.adaptive_interval_tokens,
            is_shuffled=own.adaptive_shuffled,
            reference=own.adaptive_reference if own.adaptive_signal == "excess" else "",
        )

    def on_setup(self, ctx: StepContext) -> bool:
        if self.reference:
            self._reference_model = _load_reference(ctx.model, Path(self.reference))
        return False

    def on_batch(self, ctx: StepContext) -> bool:
        assert ctx.batch is not None and ctx.mixture is not None
        if self.tokens - self.measured_at >= self.interval_tokens // MEASUREMENTS_PER_UPDATE:
            self.measured_at = self.tokens
            self._measure(ctx.model, ctx.batch, set(ctx.mixture.ids.values()))
        self.tokens += ctx.batch.input_ids.numel()
        return False

    def after_step(self, ctx: StepContext) -> bool:
        assert ctx.mixture is not None
        changed = False
        if self.tokens - self.updated_at >= self.interval_tokens:
            self.updated_at = self.tokens
            before = dict(ctx.mixture.weights)
            ctx.mixture.reweigh(self.factors.update(shuffle=ctx.rng if self.is_shuffled else None))
            changed = ctx.mixture.weights != before
        factors, losses = self.factors.factors, self.factors.losses
        for key, source in ctx.mixture.ids.items():
            name = metric_name(key)
            ctx.log(f"source_weight_{name}", factors.get(source, 1.0))
            ctx.log(f"source_loss_{name}", losses.get(source, math.nan))
            ctx.log(f"source_signal_{name}", self.factors.signals.get(source, 0.0))
        return changed

    def state_dict(self) -> dict[str, Any]:
        return {
            "factors": self.factors.state_dict(),
            "clock": (self.tokens, self.measured_at, self.updated_at),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factors.load_state_dict(state["factors"])
        self.tokens, self.measured_at, self.updated_at = state["clock"]

    def _measure(self, model: nn.Module, batch: Batch, sources: set[int]) -> None:
        losses = source_losses(model, batch, sources=sources)
        references: dict[int, float] = {}
        if self._reference_model is not None:
            references = source_losses(self._reference_model, batch, sources=sources)
        factors = copy.deepcopy(self.factors)  # in place it would outlast a step that is replayed
        for source, loss in losses.items():
            factors.observe(source, loss, reference=references.get(source))
        self.factors = factors


def source_losses(model: nn.Module, batch: Batch, *, sources: set[int]) -> dict[int, float]:
    """Mean loss in nats per token of each of the sources in the batch; changes nothing."""
    with evaluating(model), torch.no_grad():
        # With labels the model forms no logits, which would be the largest tensor of all.
        outputs = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
        losses: dict[int, Tensor] = {}
        for source in sorted(sources & set(batch.source_ids.unique().tolist())):
            labels = torch.where(batch.source_ids == source, batch.labels, IGNORED)
            if bool((labels != IGNORED).any()):
                weight = cast(Tensor, model.head_weight)
                losses[source] = linear_cross_entropy(
                    outputs.hidden.flatten(0, 1), weight, labels.flatten()
                )
    return {source: float(loss) for source, loss in losses.items()}


def _load_reference(model: nn.Module, directory: Path) -> nn.Module:
    """A copy of the model with the weights of the newest checkpoint in `directory`."""
    checkpoint = CheckpointStore.newest_for_inference(directory)
    if checkpoint is None:
        raise ValueError(f"--aux-adaptive-reference {directory} holds no valid checkpoint")
    reference = copy.deepcopy(model)
    try:
        reference.load_state_dict(checkpoint.tensors["model"])
    except RuntimeError as error:
        raise ValueError(
            f"--aux-adaptive-reference {directory}: its model has another shape or vocabulary; "
            "train the reference with the same model flags"
        ) from error
    return reference.requires_grad_(False)
