"""Test-time training, score first: each chunk of a text is scored before anything learns from it.

The weights that score chunk n have seen chunks 0 to n - 1 and nothing of chunk n or later, so the
bits per byte are those of an adaptive compressor: a decoder could do the same. One optimizer (SGD
with momentum) lives through the whole text, its rate falls by a cosine over the chunks, and the
last chunk is scored only. Afterwards the weights are what they were, to the bit.

`vectors` trains norms, steps, decays and biases alone, so ternary codes stay what they are; `all`
trains every weight. Losses are those of evaluation, without dropout or routing noise; buffers of
expert balance are left alone.

Sources: Sun et al. 1909.13231 (test-time training); Krause et al. 1709.07432 (dynamic evaluation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.data import IGNORED_LABEL, Batch
from training.evaluation import EvalResult, bits_per_byte, evaluate_bpb
from training.micro_batch import move_batch
from training.probe import evaluating

SCOPES = ("vectors", "all")


@dataclass(slots=True, kw_only=True, frozen=True)
class TTTSettings:
    """The `--ttt-*` flags. chunk_tokens: scored before the next training. epochs: over a chunk."""

    chunk_tokens: int = 32768
    epochs: int = 3
    lr: float = 0.002
    momentum: float = 0.9
    grad_clip: float = 1.0
    scope: str = "vectors"


@dataclass(slots=True, kw_only=True)
class TTTResult:
    """score: of all chunks. ttt_chunks: how many there were; ttt_trained_chunks: those that changed
    a weight. ttt_delta_norm: how far the weights had gone at the end. ttt_grad_clipped_fraction: of
    updates."""

    score: EvalResult
    ttt_chunks: int
    ttt_trained_chunks: int
    ttt_delta_norm: float
    ttt_grad_clipped_fraction: float


def evaluate_with_ttt(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    settings: TTTSettings,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TTTResult:
    """Score the batches in their order, learning from every chunk once it is scored.

    ValueError as in `evaluate_bpb`, for a scope without weights, and when it diverges.
    """
    chunks = cut_chunks(batches, num_tokens=settings.chunk_tokens)
    params = trained_parameters(model, settings.scope)
    scores, num_trained = [], 0
    with restored(params), evaluating(model):
        learner = ChunkLearner(model, params, settings=settings, autocast=autocast)
        for number, chunk in enumerate(chunks):
            scores.append(evaluate_bpb(model, chunk, device=device, autocast=autocast))
            if number + 1 < len(chunks):
                rate = 0.5 * (1.0 + math.cos(math.pi * number / (len(chunks) - 1)))
                num_trained += learner.train([move_batch(b, device) for b in chunk], rate=rate)
        distance = learner.distance()
    return TTTResult(
        score=joined(scores),
        ttt_chunks=len(chunks),
        ttt_trained_chunks=num_trained,
        ttt_delta_norm=distance,
        ttt_grad_clipped_fraction=learner.num_clipped / max(1, learner.num_updates),
    )


class ChunkLearner:
    """The one optimizer of an evaluation, and what it did."""

    def __init__(
        self,
        model: nn.Module,
        params: Sequence[nn.Parameter],
        *,
        settings: TTTSettings,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self._model, self._params, self._settings = model, list(params), settings
        self._autocast = autocast
        self._optimizer = torch.optim.SGD(self._params, lr=0.0, momentum=settings.momentum)
        self._start = [param.detach().clone() for param in self._params]
        self.num_updates = self.num_clipped = 0

    @torch.enable_grad()
    def train(self, chunk: Sequence[Batch], *, rate: float) -> bool:
        """`epochs` times over the chunk, at `rate` of the learning rate; whether a weight moved."""
        before = [param.detach().clone() for param in self._params]
        self._optimizer.param_groups[0]["lr"] = rate * self._settings.lr
        for _ in range(self._settings.epochs):
            for batch in chunk:
                if bool((batch.labels != IGNORED_LABEL).any()):
                    self._update(batch)
        return any(not torch.equal(a, b) for a, b in zip(before, self._params))

    def _update(self, batch: Batch) -> None:
        self._optimizer.zero_grad()
        with self._autocast():
            output = self._model(batch.input_ids, reset_mask=batch.reset_mask, labels=batch.labels)
        torch.autograd.backward(output.loss, inputs=self._params)
        norm = float(nn.utils.clip_grad_norm_(self._params, self._settings.grad_clip))
        if not math.isfinite(norm):
            raise ValueError("test-time training: a gradient is not finite; lower --ttt-lr")
        self._optimizer.step()
        self.num_updates += 1
        self.num_clipped += norm > self._settings.grad_clip

    def distance(self) -> float:
        """Euclidean distance of the weights from where they began."""
        squares = [
            (param.detach() - start).float().square().sum()
            for param, start in zip(self._params, self._start)
        ]
        return float(torch.stack(squares).sum().sqrt())


def trained_parameters(model: nn.Module, scope: str) -> list[nn.Parameter]:
    """The weights of a scope; ValueError for one that is unknown or empty."""
    if scope not in SCOPES:
        raise ValueError(f"--ttt-scope is {scope!r}; choose from {', '.join(SCOPES)}")
    found = [p for p in model.parameters() if p.requires_grad and (scope == "all" or p.dim() < 2)]
    if not found:
        raise ValueError(f"--ttt-scope {scope}: this model has no such weights")
    return found


def cut_chunks(batches: Iterable[Batch], *, num_tokens: int) -> list[list[Batch]]:
    """Consecutive batches in chunks of at least `num_tokens` positions; the last may have fewer.

    A last one without a byte to predict (the end of the text alone) belongs to the one before.
    """
    chunks: list[list[Batch]] = [[]]
    held = 0
    for batch in batches:
        if held >= num_tokens:
            chunks.append([])
            held = 0
        chunks[-1].append(batch)
        held += batch.input_ids.numel()
    if len(chunks) > 1 and not any(batch.num_bytes for batch in chunks[-1]):
        chunks[-2:] = [chunks[-2] + chunks[-1]]
    return chunks


def joined(scores: Sequence[EvalResult]) -> EvalResult:
    """The score of several texts as one."""
    nats = sum(score.loss * score.num_tokens for score in scores)
    num_tokens = sum(score.num_tokens for score in scores)
    num_bytes = sum(score.num_bytes for score in scores)
    return EvalResult(
        loss=nats / num_tokens,
        bpb=bits_per_byte(nats, num_bytes),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


@contextmanager
def restored(params: Sequence[Tensor]) -> Iterator[None]:
    """The tensors have their values and gradients again after the block, however it ends."""
    values = [param.detach().clone() for param in params]
    grads = [param.grad for param in params]
    try:
        yield
    finally:
        with torch.no_grad():
            for param, value, grad in zip(params, values, grads):
                param.copy_(value)
                param.grad = grad
