"""Placebos of the ablations for features that have none of their own: same work, signal destroyed.

Each changes a built trainer before its first step; the networks stay as large and as dear.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from model.engram import Engram
from model.mla import MLA
from model.moe import MoE
from model.sequence import SequenceContext
from training.context import StepContext
from training.sigma_trainer import SigmaTrainer

Layer = TypeVar("Layer", bound=nn.Module)
_PLACE_FACTOR = 0x9E3779B97F  # odd; times a place below 2^22 it stays below 2^62


def misplace_memory(trainer: SigmaTrainer) -> None:
    """n-gram memory whose keys hold the place in the row too: an n-gram met at another place reads
    other rows of the table, so nothing is remembered but place and n-gram together."""
    for layer in _layers(trainer, Engram):
        _salt_keys(layer)


def _salt_keys(layer: Engram) -> None:
    inner = layer._ngram_keys

    def keys(ids: Tensor, context: SequenceContext, previous: Tensor) -> tuple[Tensor, Tensor]:
        found, state = inner(ids, context, previous)
        places = torch.arange(1, ids.shape[1] + 1, device=ids.device) * _PLACE_FACTOR
        return found ^ places[:, None], state

    layer._ngram_keys = keys


def ask_for_others(trainer: SigmaTrainer) -> None:
    """Differential attention whose subtracted map belongs to the batch's next row: its queries are
    as trained and as varied, but of another text."""
    for layer in _layers(trainer, MLA):
        _exchange_queries(layer)


def _exchange_queries(layer: MLA) -> None:
    inner = layer._project

    def project(x: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        content, rotary, latent, key = inner(x, context)  # queries (B, 2, H, T, d)
        content, rotary = (
            torch.cat((queries[:, :1], queries[:, 1:].roll(1, dims=0)), dim=1)
            for queries in (content, rotary)
        )
        return content, rotary, latent, key

    layer._project = project


def misdirect_balance(trainer: SigmaTrainer) -> None:
    """Selection biases that move as often and as far, by the load of an expert drawn at random."""
    rng = random.Random(trainer.config.run.seed)
    for layer in _layers(trainer, MoE):
        _shuffle_load(layer, rng)


def _shuffle_load(layer: MoE, rng: random.Random) -> None:
    inner = layer.apply_balance_update

    def update() -> None:
        order = list(range(len(layer.load_counts)))
        rng.shuffle(order)
        layer.load_counts.copy_(layer.load_counts[order])
        inner()

    layer.apply_balance_update = update


def shuffle_lengths(trainer: SigmaTrainer) -> None:
    """The curriculum's row lengths, each as often, in a random order."""
    feature = trainer.features._entry("curriculum").feature
    if feature is None:
        raise ValueError("the placebo needs --curriculum-enabled")
    inner = feature.on_batch
    order: list[int] = []

    def on_batch(ctx: StepContext) -> bool | Tensor:
        if not order:
            order.extend(range(1, ctx.total_steps + 1))
            random.Random(trainer.config.run.seed).shuffle(order)
        step = ctx.step
        ctx.step = order[step - 1]
        try:
            return inner(ctx)
        finally:
            ctx.step = step

    feature.on_batch = on_batch


def _layers(trainer: SigmaTrainer, kind: type[Layer]) -> list[Layer]:
    found = [module for module in trainer.model.modules() if isinstance(module, kind)]
    if not found:
        raise ValueError(f"the placebo needs a network with {kind.__name__}")
    return found


PLACEBOS: dict[str, Callable[[SigmaTrainer], None]] = {
    "misplaced memory": misplace_memory,
    "the next row's questions": ask_for_others,
    "misdirected balance": misdirect_balance,
    "lengths in random order": shuffle_lengths,
}
