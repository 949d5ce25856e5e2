"""`--mode generate`: the newest checkpoint continues a prompt, as a stream of whole characters."""

from __future__ import annotations

import codecs
import json
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from model.generation import iter_generate
from training.build import build_autocast
from training.build_inference import load_for_inference
from training.config.sigma_config import SigmaConfig
from training.runtime.environment import configure_threads, resolve_device
from training.runtime.text import printable
from training.tokenizer import Tokenizer


def run(config: SigmaConfig) -> int:
    """Write the prompt and its continuation to stdout; with --json one object at the end."""
    device = resolve_device(config)
    configure_threads()
    loaded = load_for_inference(config)
    tokenizer = loaded.tokenizer
    settings = config.generate
    prompt = [tokenizer.end_id, *tokenizer.encode(settings.prompt)]
    with build_autocast(config, device)():
        tokens = iter_generate(
            loaded.model,
            torch.tensor([prompt], device=device),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            generator=torch.Generator(device=device).manual_seed(config.run.seed),
            stop_id=tokenizer.end_id,
        )
        if config.run.json:
            row = _collect(settings.prompt, tokens, tokenizer=tokenizer, step=loaded.step)
            print(json.dumps(row))
            return 0
        # A terminal obeys control characters; a model that has learned little may produce them.
        clean = printable if sys.stdout.isatty() else str
        sys.stdout.write(clean(settings.prompt))
        for piece in stream_text(tokens, tokenizer=tokenizer):
            sys.stdout.write(clean(piece))
            sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def stream_text(tokens: Iterable[int], *, tokenizer: Tokenizer) -> Iterator[str]:
    """Text of token ids as soon as its characters are complete.

    A character of several bytes may span tokens: its first bytes wait for the rest. Bytes that
    can no longer become a character are replaced by U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        piece = decoder.decode(tokenizer.decode_bytes([token]))
        if piece:
            yield piece
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest


def _collect(
    prompt: str, tokens: Iterable[int], *, tokenizer: Tokenizer, step: int
) -> dict[str, object]:
    start = time.perf_counter()
    ids = list(tokens)
    seconds = max(time.perf_counter() - start, 1e-9)
    return {
        "checkpoint_step": step,
        "prompt": prompt,
        "text": "".join(stream_text(ids, tokenizer=tokenizer)),
        "num_tokens": len(ids),
        "tokens_per_s": len(ids) / seconds,
    }
