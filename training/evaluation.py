"""Bits per byte of a language model, the one quality figure of this project.

Bits per byte (total nats / ln 2 / bytes of the predicted text) compares models with different
tokenizers, n-gram models and compressors on one scale; loss per token cannot. The cost of
predicting the end of a document is counted while its token adds no bytes, so that no model gets
document boundaries for free. Context is cut at window edges, as in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.data import IGNORED_LABEL, Batch


@dataclass(slots=True, kw_only=True)
class EvalResult:
    """Mean loss in nats per label token, bits per byte, and what they were measured on."""

    loss: float
    bpb: float
    num_tokens: int
    num_bytes: int


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Convert a summed negative log likelihood to bits per byte of text.

    Raises ValueError when there are no bytes to divide by.
    """
    if num_bytes <= 0:
        raise ValueError("bits per byte needs at least one byte of text to predict")
    return total_nats / math.log(2.0) / num_bytes


def read_eval_file(name: str) -> bytes | None:
    """Content of `--eval-file`, None when the flag is not given."""
    if not name:
        return None
    try:
        content = Path(name).read_bytes()
    except OSError as error:
        raise ValueError(
            f"--eval-file {name}: {error.strerror or error}; give a readable text file"
        ) from error
    if not content:
        raise ValueError(f"--eval-file {name} is empty; give a text file with at least one byte")
    return content


@torch.no_grad()
def evaluate_bpb(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]] | None = None,
) -> EvalResult:
    """Average a model's loss over `batches`; deterministic, leaves every module's mode as it was.

    `model(input_ids, reset_mask=..., labels=...)` must return an object whose `loss` is the mean
    nats over labels that are not -100. Sums are kept in double precision on the host, weighted by
    label count, so the split into batches does not matter. ValueError when no label is left.
    """
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    context = autocast or nullcontext
    total_nats, num_tokens, num_bytes = 0.0, 0, 0
    try:
        for batch in batches:
            count = int((batch.labels != IGNORED_LABEL).sum())
            if count == 0:
                continue
            with context():
                output = model(
                    batch.input_ids.to(device),
                    reset_mask=batch.reset_mask.to(device),
                    labels=batch.labels.to(device),
                )
            total_nats += float(output.loss) * count
            num_tokens += count
            num_bytes += batch.num_bytes
    finally:
        # Module by module: `model.train()` would also wake parts that were frozen in eval mode.
        for module in training_modules:
            module.training = True
    if num_tokens == 0:
        raise ValueError("nothing to evaluate: the batches hold no label tokens")
    return EvalResult(
        loss=total_nats / num_tokens,
        bpb=bits_per_byte(total_nats, num_bytes),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )
