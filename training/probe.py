"""The probe: text of the training split that is never trained on, for decisions while training.

Documents are held out whole, by the hash of their tokens: those with the smallest hashes, as many
as the probe needs. So the choice depends on neither order nor seed, and what is trained on is the
rest. Losses are measured as in evaluation, without dropout or routing noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.data import TokenCorpus, TokenSplit, split_batches
from training.micro_batch import move_batch
from training.stream.batch import Batch

LARGEST_SHARE = 0.2  # of the training text


def hold_out(corpus: TokenCorpus, *, num_tokens: int) -> tuple[TokenCorpus, TokenSplit]:
    """The corpus with `num_tokens` or a little more taken out of its training split, and those.

    ValueError when that is more than a fifth of the training text.
    """
    split = corpus.splits["train"]
    if num_tokens > LARGEST_SHARE * len(split.tokens):
        raise ValueError(
            f"the probe takes {num_tokens} of the {len(split.tokens)} tokens of the training text; "
            "lower --probe-batches, --probe-batch-size or --seq-len"
        )
    hashes = [document_hash(split, number) for number in range(split.num_documents)]
    lengths = np.diff(split.starts)
    order = sorted(range(split.num_documents), key=hashes.__getitem__)
    enough = int(np.searchsorted(np.cumsum(lengths[order]), num_tokens)) + 1
    # Equal documents have equal hashes: none of them may stay behind.
    limit = hashes[order[enough - 1]]
    chosen = np.array([value <= limit for value in hashes])
    probe = _select(split, np.flatnonzero(chosen))
    digest = hashlib.sha256(probe.tokens.tobytes()).hexdigest()[:16]
    rest = TokenCorpus(
        splits={**corpus.splits, "train": _select(split, np.flatnonzero(~chosen))},
        fingerprint=f"{corpus.fingerprint}-without-{digest}",
        tokenizer_sha256=corpus.tokenizer_sha256,
        end_id=corpus.end_id,
        byte_lengths=corpus.byte_lengths,
    )
    return rest, probe


def document_hash(split: TokenSplit, number: int) -> bytes:
    """Hash of a document's tokens."""
    tokens = split.tokens[split.starts[number] : split.starts[number + 1]]
    return hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest()


def _select(split: TokenSplit, numbers: np.ndarray) -> TokenSplit:
    pieces = [split.tokens[split.starts[n] : split.starts[n + 1]] for n in numbers]
    starts = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=starts[1:])
    return TokenSplit(
        tokens=np.concatenate(pieces) if pieces else split.tokens[:0],
        starts=starts,
        source_ids=split.source_ids[numbers],
    )


def probe_batches(
    probe: TokenSplit, corpus: TokenCorpus, *, batch_size: int, num_batches: int, seq_len: int
) -> list[Batch]:
    """`num_batches` batches of `batch_size` rows, each a window of the probe text."""
    batches = split_batches(
        probe,
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=batch_size * num_batches * seq_len,
        end_id=corpus.end_id,
        byte_lengths=corpus.byte_lengths,
    )
    return list(batches)


class Probe:
    """Batches of probe text, and the loss and gradient of a model on them."""

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if not batches:
            raise ValueError("a probe needs at least one batch")
        self._batches = batches
        self._device = device
        self._autocast = autocast

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, number: int) -> Batch:
        """Batch `number`, counted round and round, on the training device."""
        return move_batch(self._batches[number % len(self._batches)], self._device)

    @torch.no_grad()
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """0-d mean loss in nats per token; changes nothing in the model."""
        with evaluating(model):
            return self._forward(model, batch)

    @torch.enable_grad()
    def gradient(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[Tensor, Tensor]]:
        """Loss, and its gradient by parameter; the gradients of training stay where they are.

        Parameters that the loss does not reach are left out.
        """
        params = [param for param in model.parameters() if param.requires_grad]
        kept = [param.grad for param in params]
        try:
            for param in params:
                param.grad = None
            with evaluating(model):
                loss = self._forward(model, batch)
                loss.backward()
            found: dict[Tensor, Tensor] = {
                param: param.grad for param in params if param.grad is not None
            }
        finally:
            for param, grad in zip(params, kept):
                param.grad = grad
        return loss.detach(), found

    def _forward(self, model: nn.Module, batch: Batch) -> Tensor:
        with self._autocast():
            output = model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
        return output.loss.float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
