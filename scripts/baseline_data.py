"""The text every baseline is measured on: the network's own corpus, windows and order.

A comparison is only fair on the same bytes, so baselines read through training/data.py: the same
seed, batch size and sequence length give the same windows in the same order as `--mode train`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data import (
    IGNORED_LABEL,
    Batch,
    TokenCorpus,
    TokenStream,
    tokenize_corpus,
    validation_batches,
)
from training.sources.embedded import EmbeddedCorpus
from training.tokenizer import Tokenizer

TOKEN_CACHE = Path(".runtime_cache") / "tokens"


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that decide which text is read, named and set as in profiles/quickstart.txt."""
    parser.add_argument("--tokenizer-name", default="assets-4k", metavar="NAME")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--eval-tokens", type=int, default=0, help="validation tokens used; 0 = the whole split"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="append results as JSON lines")


def load_corpus(tokenizer_name: str) -> tuple[Tokenizer, TokenCorpus]:
    """The embedded corpus under a tokenizer."""
    tokenizer = Tokenizer.from_name(tokenizer_name)
    return tokenizer, tokenize_corpus(EmbeddedCorpus(), tokenizer, cache_dir=TOKEN_CACHE)


def served_rows(
    corpus: TokenCorpus, *, num_tokens: int, seed: int, batch_size: int, seq_len: int
) -> NDArray[np.int64]:
    """What a network has seen after `num_tokens` label tokens: (rows, seq_len + 1), labels last.

    At most one epoch: a counting model learns nothing from reading a text twice.
    """
    stream = TokenStream(corpus, seed=seed, batch_size=batch_size, seq_len=seq_len)
    num_rows = min(-(-num_tokens // seq_len), stream.windows_per_epoch)
    rows: list[NDArray[np.int64]] = []
    while len(rows) < num_rows:
        batch = stream.next_batch()
        pairs = np.concatenate([batch.input_ids.numpy(), batch.labels.numpy()[:, -1:]], axis=1)
        rows.extend(pairs)
    return np.stack(rows[:num_rows])


def validation_tokens(
    corpus: TokenCorpus, *, seq_len: int, batch_size: int, max_tokens: int | None
) -> tuple[NDArray[np.int64], int]:
    """The validation windows joined again, and the bytes of what they ask to predict.

    (n,): the opening token, then every label in order. ValueError if the windows do not join.
    """
    pieces: list[NDArray[np.int64]] = []
    num_bytes = 0
    for batch in validation_batches(
        corpus, seq_len=seq_len, batch_size=batch_size, max_tokens=max_tokens
    ):
        pieces.extend(_joined_labels(batch, previous=pieces[-1][-1] if pieces else None))
        num_bytes += batch.num_bytes
    return np.concatenate(pieces), num_bytes


def _joined_labels(batch: Batch, *, previous: int | None) -> list[NDArray[np.int64]]:
    pieces = []
    for inputs, labels in zip(batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
        if previous is None:
            pieces.append(inputs[:1])
        elif inputs[0] != previous:
            raise ValueError("validation windows are not consecutive")
        pieces.append(labels[labels != IGNORED_LABEL])
        previous = pieces[-1][-1]
    return pieces


def report(row: dict[str, Any], *, output: Path | None) -> None:
    """Print one result as a JSON line, and append it to `output`."""
    line = json.dumps(row)
    print(line, flush=True)
    if output is not None:
        with output.open("a", encoding="utf-8", newline="\n") as file:
            file.write(line + "\n")
