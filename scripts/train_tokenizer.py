"""Train a byte-level BPE tokenizer on local text and say how it packs text it has not seen.

    python scripts/train_tokenizer.py corpus/train --vocab-size 16384 --output tokenizer.json
    python train_sigma.py --tokenizer-name tokenizer.json ...

Trains on the documents of the training side of the split, in the order of the files, up to
`--max-megabytes`; measures bytes per token on the validation side, beside the shipped tokenizers.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.runtime.atomic_io import FileOps, replace_file
from training.sources.base import SourceExhausted, split_of
from training.sources.local import LocalSource
from training.tokenizer import Tokenizer, train_bpe

MEASURED_BYTES = 2_000_000
LEAST_VOCABULARY = 257  # every byte and the end of a text
YARDSTICKS = ("assets-4k", "assets-32k")


def read_split(
    source: LocalSource, *, max_bytes: int, held_out: list[str] | None = None
) -> Iterator[str]:
    """Training texts up to `max_bytes` of UTF-8; texts of the other side go into `held_out`, as
    many as are needed to measure."""
    used = kept = 0
    while used < max_bytes:
        try:
            document = source.next_document()
        except SourceExhausted:
            return
        size = len(document.text.encode("utf-8", "replace"))
        if split_of(document.id) == "train":
            used += size
            yield document.text
        elif held_out is not None and kept < MEASURED_BYTES:
            kept += size
            held_out.append(document.text)


def bytes_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    """UTF-8 bytes that a token stands for, over all the texts."""
    num_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    return num_bytes / max(1, sum(len(ids) for ids in tokenizer.encode_batch(texts)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Train a byte-level BPE tokenizer.")
    parser.add_argument("paths", nargs="+", type=Path, help="files and folders of text")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--max-megabytes", type=float, default=200.0, help="of text to learn from")
    parser.add_argument("--text-field", default="text", help="of JSON lines and parquet")
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    options = parser.parse_args(argv)
    if options.vocab_size < LEAST_VOCABULARY:
        parser.error(f"--vocab-size must be at least {LEAST_VOCABULARY}")
    if not options.output.parent.is_dir():
        parser.error(f"--output {options.output}: there is no such folder")
    try:
        source = LocalSource(options.paths, text_field=options.text_field, flag="paths")
    except ValueError as error:
        parser.error(str(error))
    held_out: list[str] = []
    limit = int(options.max_megabytes * 1e6)
    texts = read_split(source, max_bytes=limit, held_out=held_out)
    content = train_bpe(texts, vocab_size=options.vocab_size).encode()
    trained = Tokenizer(content)
    replace_file(FileOps(), options.output, content)
    print(f"{options.output}: {trained.vocab_size:,} tokens, sha256 {trained.sha256}")
    if trained.vocab_size < options.vocab_size:
        print("the text holds no further pairs that occur twice")
    if held_out:
        names = {"this one": trained, **{n: Tokenizer.from_name(n) for n in YARDSTICKS}}
        for name, tokenizer in names.items():
            print(f"  {name}: {bytes_per_token(tokenizer, held_out):.3f} bytes per unseen token")
    for reason, count in sorted(source.rejected.items()):
        print(f"  left out, {reason}: {count:,}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
