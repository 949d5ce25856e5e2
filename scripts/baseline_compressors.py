"""Bits per byte that general-purpose compressors reach on the validation text.

    python scripts/baseline_compressors.py              the embedded corpus's validation split
    python scripts/baseline_compressors.py --file F     any file

`xz -9e` is the yardstick a language model must beat to have learned anything beyond repetition. A
compressor starts without knowledge of the language; the model read a training text first. The
figure includes the container's few bytes.
"""

from __future__ import annotations

import argparse
import bz2
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.baseline_data import report
from training.sources.embedded import EmbeddedCorpus


def _compress_xz(content: bytes) -> bytes:
    return lzma.compress(content, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "xz -9e": _compress_xz,
    "bzip2 -9": lambda content: bz2.compress(content, 9),
    "zlib -9": lambda content: zlib.compress(content, 9),
}


def compressed_bits_per_byte(content: bytes, *, compressor: str) -> float:
    """Bits of the compressed form per byte of `content`; ValueError when it is empty."""
    if not content:
        raise ValueError("there is nothing to compress: the text is empty")
    return 8.0 * len(COMPRESSORS[compressor](content)) / len(content)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description="Bits per byte of general compressors.", allow_abbrev=False
    )
    parser.add_argument("--file", type=Path, help="a file instead of the validation text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="append results as JSON lines")
    options = parser.parse_args(arguments)
    try:
        content = options.file.read_bytes() if options.file else EmbeddedCorpus().validation_text()
        for name in COMPRESSORS:
            bpb = compressed_bits_per_byte(content, compressor=name)
            row = {"baseline": name, "bpb": bpb, "num_bytes": len(content)}
            report(row, output=options.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
