"""Interpolated modified Kneser-Ney n-gram model over the network's own tokens, by counting.

    python scripts/baseline_ngram.py                     the whole training split
    python scripts/baseline_ngram.py --tokens 1500000    the first tokens a network is served

Estimates after Chen & Goodman (1998): an n-gram's count is reduced by a discount that depends on
whether it was seen once, twice or more often, and what is left goes to the distribution of the
shorter context, whose counts are the number of different contexts it continues. N-grams that open a
document have nothing to the left of them and keep their counts (as in KenLM, Heafield 2013).
Contexts end at document boundaries; the opening token may begin a context.

All of it is sorting: an n-gram is the key (index of its first n-1 tokens among the (n-1)-grams) x V
+ its last token, so any order fits 64 bits, and a table is a sorted array of keys.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from scripts.baseline_data import (
    add_data_flags,
    load_corpus,
    report,
    served_rows,
    validation_tokens,
)
from training.evaluation import bits_per_byte

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
MISSING = -1
FALLBACK_DISCOUNTS = (0.0, 0.5, 1.0, 1.5)  # where a text is too small to estimate them


@dataclass(slots=True, kw_only=True)
class Level:
    """The n-grams of one order.

    keys: (n-grams,) sorted. shares: (n-grams,) discounted count over the context's sum. backoff:
    (contexts,) share left to the shorter context, 1 for contexts never continued.
    """

    keys: Ints
    shares: Floats
    backoff: Floats


class KneserNey:
    """P(token | up to order - 1 tokens before it in its document), normalised."""

    def __init__(
        self,
        tokens: Ints,
        *,
        order: int,
        vocab_size: int,
        end_id: int,
        row_length: int | None = None,
    ) -> None:
        """Count (n,) tokens; with `row_length`, they are rows that know nothing of each other."""
        if order < 1:
            raise ValueError("--order must be at least 1")
        self.order = order
        self.vocab_size = vocab_size
        self.end_id = end_id
        tokens = np.asarray(tokens, dtype=np.int64)
        self.levels = self._count(tokens, reach=self._reach(tokens, row_length))

    def probabilities(self, tokens: Ints, *, row_length: int | None = None) -> Floats:
        """(n,): probability of every token after those before it (in its row and document)."""
        tokens = np.asarray(tokens, dtype=np.int64)
        reach = self._reach(tokens, row_length)
        result = np.full(len(tokens), 1.0 / self.vocab_size)
        before = np.zeros(len(tokens), dtype=np.int64)  # index of the context, one for order 1
        for order, level in enumerate(self.levels, start=1):
            known = (reach >= order - 1) & (before != MISSING)
            context = before[known]
            places, found = _find(level.keys, context * self.vocab_size + tokens[known])
            share = np.where(found, level.shares[places], 0.0)
            result[known] = share + level.backoff[context] * result[known]
            indices = np.full(len(tokens), MISSING, dtype=np.int64)
            indices[known] = np.where(found, places, MISSING)
            before = _shifted(indices)
        return result

    def distribution(self, context: list[int]) -> Floats:
        """(V,): probability of every token after `context`."""
        recent = context[-(self.order - 1) :] if self.order > 1 else []
        rows = np.empty((self.vocab_size, len(recent) + 1), dtype=np.int64)
        rows[:, :-1] = recent
        rows[:, -1] = np.arange(self.vocab_size)
        scores = self.probabilities(rows.reshape(-1), row_length=rows.shape[1])
        return scores.reshape(rows.shape)[:, -1]

    @property
    def num_ngrams(self) -> int:
        return sum(len(level.keys) for level in self.levels)

    def _reach(self, tokens: Ints, row_length: int | None) -> Ints:
        """(n,): how many tokens before each one belong to its document and row."""
        places = np.arange(len(tokens))
        starts = places % row_length == 0 if row_length else places == 0
        opened = np.maximum.accumulate(np.where(starts | (tokens == self.end_id), places, 0))
        reach = places - np.append(0, opened[:-1])
        # An end-of-text token is the last of its document as a target, the first as a context.
        return np.where(starts, 0, reach)

    def _count(self, tokens: Ints, *, reach: Ints) -> list[Level]:
        levels: list[Level] = []
        before = np.zeros(len(tokens), dtype=np.int64)
        num_contexts = 1
        pending: dict[str, Any] = {}
        for order in range(1, self.order + 1):
            valid = np.flatnonzero(reach >= order - 1)
            keys, first, inverse, counts = np.unique(
                before[valid] * self.vocab_size + tokens[valid],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            where = valid[first]  # an occurrence of each n-gram
            if pending:
                continued = np.bincount(pending["indices"][where], minlength=len(pending["counts"]))
                opens = (tokens[pending["where"] - (order - 2)] == self.end_id) & (order > 2)
                adjusted = np.where(opens, pending["counts"], continued)
                levels.append(self._discount(pending["keys"], adjusted, pending["contexts"]))
            indices = np.full(len(tokens), MISSING, dtype=np.int64)
            indices[valid] = inverse.reshape(-1)
            pending = {
                "keys": keys,
                "counts": counts,
                "where": where,
                "indices": indices,
                "contexts": num_contexts,
            }
            before, num_contexts = _shifted(indices), len(keys)
        levels.append(self._discount(pending["keys"], pending["counts"], pending["contexts"]))
        return levels

    def _discount(self, keys: Ints, counts: Ints, num_contexts: int) -> Level:
        """Turn adjusted counts into shares and what they leave to the shorter context."""
        discounts = np.array(estimate_discounts(counts))[np.minimum(counts, 3)]
        contexts = keys // self.vocab_size
        sums = np.bincount(contexts, weights=counts, minlength=num_contexts)
        left = np.bincount(contexts, weights=discounts, minlength=num_contexts)
        seen = sums > 0
        backoff = np.ones(num_contexts)
        backoff[seen] = left[seen] / sums[seen]
        shares = (counts - discounts) / np.where(seen, sums, 1.0)[contexts]
        return Level(keys=keys, shares=shares, backoff=backoff)


def estimate_discounts(counts: Ints) -> tuple[float, float, float, float]:
    """Discounts of n-grams seen 0, 1, 2 and 3 or more times (Chen & Goodman 1998, eq. 26)."""
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == times)) for times in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return FALLBACK_DISCOUNTS
    ratio = n1 / (n1 + 2.0 * n2)
    raw = (1.0 - 2.0 * ratio * n2 / n1, 2.0 - 3.0 * ratio * n3 / n2, 3.0 - 4.0 * ratio * n4 / n3)
    # Sampling noise in small texts can push an estimate out of the range that keeps shares >= 0.
    one, two, three = (min(max(value, 0.0), float(i)) for i, value in enumerate(raw, start=1))
    return 0.0, one, two, three


def _shifted(indices: Ints) -> Ints:
    """The same values one place later: what ended just before a token is its context."""
    return np.append(MISSING, indices[:-1])


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Places of `wanted` in sorted `keys`, and whether they are really there."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return places, keys[places] == wanted


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Count, then score the validation split; the row of results."""
    tokenizer, corpus = load_corpus(options.tokenizer_name)
    start = time.perf_counter()
    row_length = None
    if options.tokens:
        rows = served_rows(
            corpus,
            num_tokens=options.tokens,
            seed=options.seed,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
        )
        tokens, row_length = rows.reshape(-1), rows.shape[1]
        num_tokens = rows.shape[0] * options.seq_len
    else:
        tokens = corpus.splits["train"].tokens.astype(np.int64)
        num_tokens = len(tokens)
    model = KneserNey(
        tokens,
        order=options.order,
        vocab_size=tokenizer.vocab_size,
        end_id=tokenizer.end_id,
        row_length=row_length,
    )
    built = time.perf_counter()
    held_out, num_bytes = validation_tokens(
        corpus,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        max_tokens=options.eval_tokens or None,
    )
    nats = -np.log(model.probabilities(held_out)[1:]).sum()
    return {
        "baseline": f"Kneser-Ney {options.order}-gram",
        "bpb": bits_per_byte(float(nats), num_bytes),
        "loss": float(nats) / (len(held_out) - 1),
        "train_tokens": num_tokens,
        "num_ngrams": model.num_ngrams,
        "eval_tokens": len(held_out) - 1,
        "eval_bytes": num_bytes,
        "build_s": round(built - start, 2),
        "score_s": round(time.perf_counter() - built, 2),
        "tokenizer": options.tokenizer_name,
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Count and score a Kneser-Ney n-gram model.", allow_abbrev=False
    )
    parser.add_argument("--order", type=int, default=5, help="longest n-gram")
    parser.add_argument(
        "--tokens", type=int, default=0, help="tokens counted, as a network is served; 0 = all"
    )
    add_data_flags(parser)
    options = parser.parse_args(arguments)
    try:
        report(measure(options), output=options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
