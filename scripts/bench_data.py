"""How fast the data stream makes tokens, against `datasets` and `tokenizers` used plainly.

The same files go four ways in one process, in turns: through the stream with threads, through it
without, and through `datasets` streaming with `Tokenizer.encode` on each text and the same packing
into rows; and once more with every check on, which the plain way does not have. Medians of the
rounds, so that a busy machine hits all alike.

    python scripts/bench_data.py FOLDER_OF_TXT [--rounds 5] [--batches 400]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.build_data import TOKEN_CACHE, build_evaluation_index
from training.config.cli import parse_args
from training.data import TokenCorpus, tokenize_corpus
from training.sources.embedded import EmbeddedCorpus
from training.stream.batch import Batch, to_batch
from training.stream.open_stream import open_stream
from training.tokenizer import Tokenizer

SEQ_LEN, BATCH_SIZE = 512, 8
OFF = (
    "--no-quality-filter", "--no-contamination-check", "--dedup-window-size", "0",
    "--near-dedup-window", "0",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=400)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_name("assets-4k")
    corpus = tokenize_corpus(EmbeddedCorpus(), tokenizer, cache_dir=TOKEN_CACHE)

    def stream(*flags: str) -> Callable[[], Iterator[Batch]]:
        return lambda: stream_batches(options.folder, flags, tokenizer=tokenizer, corpus=corpus)

    ways: dict[str, Callable[[], Iterator[Batch]]] = {
        "datasets + tokenizers, plainly": lambda: plain_batches(options.folder, tokenizer),
        "stream, 2 workers": stream("--num-workers", "2", *OFF),
        "stream, no worker": stream("--num-workers", "0", *OFF),
        "stream, 2 workers, all checks": stream("--num-workers", "2"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, make in ways.items():
            speeds[name].append(tokens_per_second(make(), options.batches))
    for name, values in speeds.items():
        row = {
            "way": name,
            "tokens_per_s_median": round(statistics.median(values)),
            "min": round(min(values)),
            "max": round(max(values)),
        }
        print(json.dumps(row))


def tokens_per_second(batches: Iterator[Batch], count: int) -> float:
    """From the request for the first batch to the last one; includes every start-up cost."""
    start = time.perf_counter()
    tokens = sum(next(batches).input_ids.numel() for _ in range(count))
    return tokens / (time.perf_counter() - start)


def stream_batches(
    folder: Path, flags: tuple[str, ...], *, tokenizer: Tokenizer, corpus: TokenCorpus
) -> Iterator[Batch]:
    config = parse_args(
        ["--data-backend", "local", "--local-path", str(folder), "--seq-len", str(SEQ_LEN),
         "--batch-size", str(BATCH_SIZE), "--spool-max-mb", "0", "--source-prefetch", "2048",
         "--source-read-timeout-sec", "60", *flags]
    )  # fmt: skip
    spool = Path(tempfile.mkdtemp())
    stream = open_stream(
        config,
        tokenizer=tokenizer,
        corpus=corpus,
        spool_directory=spool,
        evaluation=build_evaluation_index(config),
    )
    try:
        while True:
            yield stream.next_batch()
    finally:
        stream.close()
        shutil.rmtree(spool)


def plain_batches(folder: Path, tokenizer: Tokenizer) -> Iterator[Batch]:
    """What one writes in ten minutes: stream the files, encode each text, cut the tokens."""
    import datasets  # pyright: ignore[reportMissingImports]

    files = sorted(str(path) for path in folder.rglob("*.txt"))
    rows = datasets.load_dataset(
        "text", data_files=files, sample_by="document", split="train", streaming=True
    )
    needed = SEQ_LEN * BATCH_SIZE
    waiting: list[int] = []
    shape = (BATCH_SIZE, SEQ_LEN)
    while True:
        for row in rows:
            waiting += [tokenizer.end_id, *tokenizer.encode(row["text"])]
            while len(waiting) > needed:
                tokens = np.array(waiting[: needed + 1], dtype=np.int64)
                del waiting[:needed]
                yield to_batch(
                    tokens[:-1].reshape(shape),
                    tokens[1:].reshape(shape),
                    np.full(shape, 9, dtype=np.int16),
                    end_id=tokenizer.end_id,
                    byte_lengths=tokenizer.token_byte_lengths,
                )


if __name__ == "__main__":
    main()
