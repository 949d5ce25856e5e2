"""Text generation with the incremental state: one prefill, then one token per forward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache, active_cache


def sample_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token per row from logits (B, V): (B,) int64.

    temperature 0 takes the largest; top_k > 0 samples among the k largest, 0 among all.
    """
    if temperature < 0.0:
        raise ValueError("--temperature must be 0 (greedy) or positive")
    if top_k < 0:
        raise ValueError("--top-k must be 0 (all tokens) or positive")
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    scaled = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        values, tokens = scaled.topk(top_k, dim=-1)
        place = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)
        return tokens.gather(1, place).squeeze(1)
    return torch.multinomial(scaled.softmax(dim=-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def iter_tokens(
    model: SigmaLLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the next token (B,) of every row, `max_new_tokens` times.

    The model is in eval mode while it computes and gets its mode back between tokens, so that a
    caller may stop at any token. Its ternary codes are kept for the whole text, or as long as the
    caller holds them: no training between two tokens.
    """
    tokens, state = input_ids, None
    cache = active_cache() or TernaryCache()
    for step in range(max_new_tokens):
        was_training = model.training
        if was_training:  # asked first, because a switch walks over all modules
            model.eval()
        try:
            with cache.held():
                output = model(tokens, state=state, use_cache=True, num_logits_to_keep=1)
        finally:
            if was_training:
                model.train()
        state = output.state
        chosen = sample_token(
            output.logits[:, -1], temperature=temperature, top_k=top_k, generator=generator
        )
        yield chosen
        if step + 1 < max_new_tokens:
            tokens = chosen.unsqueeze(1)


def iter_generate(
    model: SigmaLLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Yield the new token ids of one row (1, T); ends before `stop_id`."""
    if input_ids.shape[0] != 1:
        raise ValueError("iter_generate continues one row; use generate for a batch")
    for token in iter_tokens(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=generator,
    ):
        value = int(token)
        if value == stop_id:
            return
        yield value


def generate(
    model: SigmaLLM,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    generator: torch.Generator | None = None,
    stop_id: int | None = None,
) -> Tensor:
    """input_ids (B, T) int64 with at most `max_new_tokens` new tokens appended: (B, T + new).

    A row that produced `stop_id` is filled with it; generation ends when all rows did.
    """
    finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    columns = [input_ids]
    for token in iter_tokens(
        model,
        input_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        generator=generator,
    ):
        if stop_id is not None:
            token = token.masked_fill(finished, stop_id)
            finished = finished | (token == stop_id)
        columns.append(token.unsqueeze(1))
        if stop_id is not None and bool(finished.all()):
            break
    return torch.cat(columns, dim=1)
