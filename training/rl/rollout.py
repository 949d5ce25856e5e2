"""Completions of a batch of prompts, and their log-probabilities when the weights have moved on.

All rows are decoded together, with the cached state, one token per forward. Prompts of different
length are padded on the left; equal prompts are read once and their state is copied, so a group of
G completions pays for one prompt. A row draws its token from uniform numbers of its own (inverse
distribution function), drawn for all rows and steps beforehand: what a row says depends neither on
the rows beside it nor on when they leave, and a call always takes the same share of the generator.

Old log-probabilities are those of the sampling forward itself, at temperature 1 over the whole
vocabulary. In full precision they equal the recomputed ones up to rounding. A ternary model rounds
activations to eight bits, so a difference in the last bit between decoding and one pass over the
row can move an activation by one step, and a log-probability by far more than rounding would.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from model.sigma_llm import SigmaLLM, SigmaState
from model.weight_cache import TernaryCache
from training.probe import evaluating

LARGEST_LOGITS = 2**24  # values of (tokens, vocabulary) that are held for backward at once
LEAVING_SHARE = 0.25  # of the rows in flight; to leave costs a copy of the others' state
STEPS_BETWEEN_LOOKS = {"cpu": 1}  # elsewhere a look at who has finished waits for the device
STEPS_BETWEEN_LOOKS_DEVICE = 4


class Decoder(Protocol):
    """The part of a tokenizer that texts need."""

    def decode(self, ids: Iterable[int]) -> str: ...


@dataclass(slots=True, kw_only=True)
class Rollout:
    """N completions of N prompts, on the model's device.

    prompt_ids (N, P) int64, left padded, and prompt_mask (N, P) bool; completion_ids (N, C) int64,
    right padded, and completion_mask (N, C) bool: a sampled stop token is inside, what follows is
    not; old_log_probs (N, C) fp32, log pi(y_t) at temperature 1 over the whole vocabulary when it
    was sampled, 0 outside the mask. temperature and top_k: of the behaviour.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    old_log_probs: Tensor
    temperature: float
    top_k: int

    def __len__(self) -> int:
        return self.completion_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Sampled tokens. Waits for the device."""
        return int(self.completion_mask.sum())

    def select(self, rows: Sequence[int] | Tensor) -> Rollout:
        """The rows of these numbers, in this order; columns that none of them uses are dropped."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.completion_ids.device)
        prompt_mask, completion_mask = self.prompt_mask[index], self.completion_mask[index]
        first = prompt_mask.shape[1] - int(prompt_mask.sum(1).amax()) if len(index) else 0
        stop = int(completion_mask.sum(1).amax()) if len(index) else 0
        return Rollout(
            prompt_ids=self.prompt_ids[index, first:],
            prompt_mask=prompt_mask[:, first:],
            completion_ids=self.completion_ids[index, :stop],
            completion_mask=completion_mask[:, :stop],
            old_log_probs=self.old_log_probs[index, :stop],
            temperature=self.temperature,
            top_k=self.top_k,
        )

    def mean_log_probs(self) -> Tensor:
        """(N,) fp32, mean of the old log-probabilities over a row's tokens."""
        return self.old_log_probs.sum(1) / self.completion_mask.sum(1).clamp_min(1)

    def token_rows(self, *, stop_ids: Sequence[int] = ()) -> list[list[int]]:
        """Ids of every completion; of a stop token at its end none remains."""
        lengths = self.completion_mask.sum(1).tolist()
        rows = [row[:size] for row, size in zip(self.completion_ids.tolist(), lengths)]
        return [row[:-1] if row and row[-1] in stop_ids else row for row in rows]

    def texts(self, tokenizer: Decoder, *, stop_ids: Sequence[int] = ()) -> list[str]:
        """What every completion says, the stop token left out. Prompts are not part of it."""
        return [tokenizer.decode(row) for row in self.token_rows(stop_ids=stop_ids)]


def concatenate(rollouts: Sequence[Rollout], *, pad_id: int) -> Rollout:
    """All rows of rollouts that were sampled alike; ValueError if they were not."""
    if not rollouts:
        raise ValueError("there is no rollout to concatenate")
    if len({(rollout.temperature, rollout.top_k) for rollout in rollouts}) > 1:
        raise ValueError("rollouts of different temperature or top-k do not make one batch")
    prompt = max(rollout.prompt_ids.shape[1] for rollout in rollouts)
    completion = max(rollout.completion_ids.shape[1] for rollout in rollouts)

    def before(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (prompt - values.shape[1], 0), value=fill)

    def after(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, completion - values.shape[1]), value=fill)

    return Rollout(
        prompt_ids=torch.cat([before(r.prompt_ids, pad_id) for r in rollouts]),
        prompt_mask=torch.cat([before(r.prompt_mask, 0) for r in rollouts]),
        completion_ids=torch.cat([after(r.completion_ids, pad_id) for r in rollouts]),
        completion_mask=torch.cat([after(r.completion_mask, 0) for r in rollouts]),
        old_log_probs=torch.cat([after(r.old_log_probs, 0) for r in rollouts]),
        temperature=rollouts[0].temperature,
        top_k=rollouts[0].top_k,
    )


def sample(
    model: SigmaLLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    generator: torch.Generator,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    """One completion of at most `max_new_tokens` tokens for every prompt.

    A row ends with the first of `stop_ids`. temperature 0 takes the likeliest token, top_k 0 draws
    from the whole vocabulary. `generator` gives max_new_tokens * N numbers, whatever is sampled;
    the model is in eval mode meanwhile and must not be trained before this returns.
    """
    _check(prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
    device = model.embed.weight.device
    distinct: dict[tuple[int, ...], int] = {}
    order = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
    ids, mask = _left_padded(list(distinct), pad_id=pad_id, device=device)
    index = torch.tensor(order, device=device)
    uniforms = torch.rand(
        max_new_tokens,
        len(prompts),
        dtype=torch.float64,
        generator=generator,
        device=generator.device,
    )
    with evaluating(model), TernaryCache().held(), torch.no_grad():
        output = model(ids, valid_mask=_given(mask), use_cache=True, num_logits_to_keep=1)
        assert output.logits is not None and output.state is not None
        state, logits = output.state, output.logits[:, -1]
        if order != list(range(len(distinct))):
            state, logits = state.reorder(index), logits[index]
        columns = _decode(
            model,
            state,
            logits,
            uniforms=uniforms.to(device),
            temperature=temperature,
            top_k=top_k,
            stops=torch.tensor(list(stop_ids), dtype=torch.int64, device=device),
        )
    tokens, log_probs, said = columns
    return Rollout(
        prompt_ids=ids[index],
        prompt_mask=mask[index],
        completion_ids=tokens.masked_fill(~said, pad_id),
        completion_mask=said,
        old_log_probs=log_probs.masked_fill(~said, 0.0),
        temperature=temperature,
        top_k=top_k,
    )


def _check(
    prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, top_k: int
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every rollout needs a prompt of at least one token")
    if max_new_tokens < 1:
        raise ValueError("--ttrl-max-new-tokens must be at least 1")
    if temperature < 0.0:
        raise ValueError("--ttrl-temperature must be 0 (greedy) or positive")
    if top_k < 0:
        raise ValueError("--ttrl-top-k must be 0 (all tokens) or positive")


def _left_padded(
    prompts: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    length = max(map(len, prompts))
    ids = [[pad_id] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[False] * (length - len(prompt)) + [True] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _given(mask: Tensor) -> Tensor | None:
    """The mask, or None when nothing is padding: then attention needs no mask at all."""
    return None if bool(mask.all()) else mask


def _decode(
    model: SigmaLLM,
    state: SigmaState | None,
    logits: Tensor,
    *,
    uniforms: Tensor,
    temperature: float,
    top_k: int,
    stops: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, log-probabilities and whether they were said, each (N, C); uniforms (C', N)."""
    num_steps, num_rows = uniforms.shape
    device = logits.device
    tokens = torch.zeros(num_rows, num_steps, dtype=torch.int64, device=device)
    log_probs = torch.zeros(num_rows, num_steps, device=device)
    said = torch.zeros(num_rows, num_steps, dtype=torch.bool, device=device)
    rows = torch.arange(num_rows, device=device)  # which row each row in flight is
    speaking = torch.ones(num_rows, dtype=torch.bool, device=device)
    pause = STEPS_BETWEEN_LOOKS.get(device.type, STEPS_BETWEEN_LOOKS_DEVICE)
    for step in range(num_steps):
        chosen = choose(logits, uniforms[step, rows], temperature=temperature, top_k=top_k)
        picked = logits.gather(1, chosen.unsqueeze(1)).squeeze(1)
        tokens[rows, step] = chosen
        log_probs[rows, step] = picked - logits.logsumexp(1)
        said[rows, step] = speaking
        if step + 1 == num_steps:
            break
        if len(stops):
            speaking = speaking & ~torch.isin(chosen, stops)
            if step % pause == 0:
                remaining = int(speaking.sum())
                if remaining == 0:
                    break
                if remaining <= (1.0 - LEAVING_SHARE) * len(rows):
                    staying = speaking.nonzero().squeeze(1)
                    rows, chosen, speaking = rows[staying], chosen[staying], speaking[staying]
                    state = None if state is None else state.reorder(staying)
        output = model(chosen.unsqueeze(1), state=state, num_logits_to_keep=1)
        assert output.logits is not None
        state, logits = output.state, output.logits[:, -1]
    length = int(said.any(0).sum())
    return tokens[:, :length], log_probs[:, :length], said[:, :length]


def choose(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int) -> Tensor:
    """(N,) int64: the token of logits (N, V) at which the distribution function passes `uniforms`.

    uniforms (N,) fp64 in [0, 1). temperature 0 takes the likeliest token.
    """
    if temperature == 0.0:
        return logits.argmax(dim=1)
    tokens = None
    if 0 < top_k < logits.shape[1]:
        logits, tokens = logits.topk(top_k, dim=1)
    sums = (logits / temperature).softmax(dim=1).cumsum(dim=1, dtype=torch.float64)
    target = uniforms.unsqueeze(1) * sums[:, -1:]
    place = torch.searchsorted(sums, target, right=True).clamp_max_(sums.shape[1] - 1)
    return (place if tokens is None else tokens.gather(1, place)).squeeze(1)


def completion_log_probs(
    model: SigmaLLM, rollout: Rollout, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log pi(y_t) and the entropy in nats at every completion position, (N, C), with gradient.

    0 outside the mask. Modules are in eval mode: no dropout, no noise in routing, so that with
    unchanged weights these are the old log-probabilities.
    """
    hidden = completion_hidden(model, rollout)
    return head_log_probs(model, rollout, hidden, temperature=temperature)


def completion_hidden(model: SigmaLLM, rollout: Rollout) -> Tensor:
    """Hidden values (M, D) that predict the M completion tokens, row after row."""
    length = rollout.prompt_ids.shape[1]
    ids = torch.cat((rollout.prompt_ids, rollout.completion_ids[:, :-1]), dim=1)
    valid = _given(rollout.prompt_mask)
    if valid is not None:  # what follows a completion is seen by none of its tokens
        valid = F.pad(valid, (0, ids.shape[1] - length), value=True)
    with evaluating(model):
        hidden, _, _ = model.run(ids, valid_mask=valid)
    return hidden[:, length - 1 :][rollout.completion_mask]


def head_log_probs(
    model: SigmaLLM, rollout: Rollout, hidden: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """As `completion_log_probs`, from its hidden values; DISPO scores them at two temperatures.

    Of many tokens the logits are formed again in backward, block by block.
    """
    if temperature <= 0.0:
        raise ValueError("--sigma-rl-dispo-logit-temp must be positive")
    mask, weight = rollout.completion_mask, model.head_weight
    targets = rollout.completion_ids[mask]
    size = max(1, LARGEST_LOGITS // weight.shape[0])
    if len(targets) <= size:
        values = _score(hidden, weight, targets, temperature)
    else:
        blocks = [
            checkpoint(_score, rows, weight, wanted, temperature, use_reentrant=False)
            for rows, wanted in zip(hidden.split(size), targets.split(size))
        ]
        values = tuple(torch.cat(parts) for parts in zip(*blocks))
    log_probs, entropy = (
        value.new_zeros(mask.shape).masked_scatter(mask, value) for value in values
    )
    return log_probs, entropy


def _score(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    normal = wide.log_softmax(dim=1)
    entropy = -(normal.exp() * normal).sum(1)
    return normal.gather(1, targets.unsqueeze(1)).squeeze(1), entropy
