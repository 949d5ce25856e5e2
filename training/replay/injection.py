"""An item in the place of a batch's first row, and the loss on it.

The item opens row 0 and takes the row's whole share of the loss; only its completion is learned.
What the row has left is the text it would have begun with, read as if the row began there, so that
an injection costs as many tokens of text as the item has.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from model.cross_entropy import linear_cross_entropy
from training.replay.buffer import ReplayItem
from training.stream.batch import IGNORED_LABEL, Batch


def inject(batch: Batch, item: ReplayItem) -> Batch:
    """The batch with the item at the head of row 0; its tokens have no label there.

    ValueError unless the item leaves room for text.
    """
    size, length = len(item.tokens), batch.input_ids.shape[1]
    if size >= length:
        raise ValueError(f"an item of {size} tokens does not fit into a row of {length}")
    inputs, labels = batch.input_ids.clone(), batch.labels.clone()
    resets, sources = batch.reset_mask.clone(), batch.source_ids.clone()
    inputs[0, size:] = batch.input_ids[0, : length - size]
    labels[0, size:] = batch.labels[0, : length - size]
    resets[0, size:] = batch.reset_mask[0, : length - size]
    sources[0, size:] = batch.source_ids[0, : length - size]
    inputs[0, :size] = torch.tensor(item.tokens, device=inputs.device)
    labels[0, :size] = IGNORED_LABEL
    resets[0, :size] = False
    resets[0, 0] = resets[0, size] = True
    sources[0, :size] = batch.source_ids[0, 0]
    return replace(batch, input_ids=inputs, labels=labels, reset_mask=resets, source_ids=sources)


def item_loss(model: Any, hidden: Tensor, item: ReplayItem) -> Tensor:
    """Mean nats per token of the completion; hidden (B, T, D) of a batch with the item in it."""
    first, last = len(item.prompt) - 1, len(item.tokens) - 1
    targets = torch.tensor(item.completion, device=hidden.device)
    return linear_cross_entropy(
        hidden[0, first:last], model.head_weight, targets, backend=model.kernel_backend
    )
