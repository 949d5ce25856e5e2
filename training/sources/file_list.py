"""Which files a source of local material reads, in an order that depends on their names alone.

Folders are walked through symbolic links, each real folder once; hidden names and the folders that
tools fill (`__pycache__`, `node_modules`) are passed over. A file's name is its path below the
folder that was given, led by that folder's own name, so that moving the material moves no document
from one side of the split to the other.
"""

import difflib
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from training.sources.base import JSON
from training.sources.byte_stream import CODEC_OF_SUFFIX, Codec

TEXT_SUFFIXES = ".txt .text .md .markdown .rst .tex .org .adoc"
CODE_SUFFIXES = (
    ".py .pyi .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .rs .go .java .kt .scala .cs .fs .swift .m .js"
    " .jsx .ts .tsx .rb .php .pl .pm .lua .r .jl .hs .ml .mli .clj .ex .exs .erl .lisp .el .scm"
    " .rkt .sh .bash .zsh .ps1 .bat .sql .vim .f90 .f .asm .s .v .sv .vhd .zig .nim .dart"
    " .proto .cmake"
)
KIND_OF_SUFFIX = {
    **dict.fromkeys(TEXT_SUFFIXES.split(), "text"),
    **dict.fromkeys(CODE_SUFFIXES.split(), "code"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pdf": "pdf",
}
_PASSED_FOLDERS = {"__pycache__", "node_modules"}


@dataclass(slots=True, kw_only=True, frozen=True)
class ListedFile:
    """A file to read: its stable name, its size in bytes when listed, its kind and packing."""

    path: Path
    name: str
    size: int
    kind: str
    codec: Codec | None


def classify(path: Path) -> tuple[str | None, Codec | None]:
    """Kind and packing by suffix (`a.jsonl.zst`); the kind is None for an unknown suffix."""
    suffix = path.suffix.lower()
    codec = CODEC_OF_SUFFIX.get(suffix)
    if codec:
        suffix = Path(path.stem).suffix.lower()
    kind = KIND_OF_SUFFIX.get(suffix)
    if codec and kind in ("parquet", "pdf"):  # these need random access
        return None, codec
    return kind, codec


def list_files(
    paths: Iterable[Path], *, kinds: Iterable[str], flag: str
) -> tuple[list[ListedFile], Counter[str]]:
    """The files of these kinds under `paths` in stable order, and what was left out, by reason.

    ValueError in one line, naming `flag`, for a missing path, a file of an unknown suffix, a folder
    without material.
    """
    wanted = frozenset(kinds)
    given = [Path(path) for path in paths]
    if not given:
        raise ValueError(f"{flag}: no path given; name a file or a folder")
    rejected: Counter[str] = Counter()
    listed: list[ListedFile] = []
    labels: Counter[str] = Counter()
    for root in given:
        if not root.exists():
            raise ValueError(f"{flag} {root}: {_missing_line(root)}")
        label = root.resolve().name or "root"
        labels[label] += 1
        if labels[label] > 1:
            label = f"{label}~{labels[label]}"
        if root.is_dir():
            listed += _list_folder(root, label=label, wanted=wanted, flag=flag, rejected=rejected)
            continue
        kind, codec = classify(root)
        if kind not in wanted:
            suffix = "".join(root.suffixes[-2:]) if codec else root.suffix
            raise ValueError(
                f"{flag} {root}: the suffix {suffix or '(none)'} is not one that is read here; "
                f"{_known_line(wanted)}"
            )
        size = root.stat().st_size
        listed.append(ListedFile(path=root, name=label, size=size, kind=str(kind), codec=codec))
    return listed, rejected


def digest_of(files: Iterable[ListedFile]) -> str:
    """A hash of names and sizes in order: what a saved position belongs to."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size}\0{file.kind}\0".encode())
    return digest.hexdigest()


def check_same_files(state: dict[str, JSON], *, digest: str, name: str) -> None:
    """ValueError when a saved position of the source `name` belongs to files of another digest."""
    if state.get("files") != digest:
        raise ValueError(
            f"the saved position of {name} belongs to other files: names or sizes have "
            "changed since; restore them, or start afresh with --no-resume"
        )


def _missing_line(path: Path) -> str:
    try:
        names = sorted(os.listdir(path.parent))
    except OSError:
        return f"no such file or folder, nor is {path.parent} a folder that can be read"
    close = difflib.get_close_matches(path.name, names, n=1)
    return "no such file or folder" + (f"; is {close[0]} meant?" if close else "; check the path")


def _known_line(wanted: frozenset[str]) -> str:
    shown = [s for s, kind in KIND_OF_SUFFIX.items() if kind in wanted and kind != "code"]
    code = ", source code" if "code" in wanted else ""
    return f"known: {' '.join(shown)}{code}, packed as {' '.join(CODEC_OF_SUFFIX)}"


def _list_folder(
    root: Path, *, label: str, wanted: frozenset[str], flag: str, rejected: Counter[str]
) -> list[ListedFile]:
    found: list[ListedFile] = []
    suffixes: Counter[str] = Counter()
    for path, status in _walk(root, seen=set(), rejected=rejected):
        kind, codec = classify(path)
        if kind not in wanted:
            rejected["other_kind" if kind else "unknown_suffix"] += 1
            suffixes[path.suffix.lower() or "(none)"] += 1
            continue
        name = _printable(f"{label}/{path.relative_to(root).as_posix()}")
        found.append(
            ListedFile(path=path, name=name, size=status.st_size, kind=str(kind), codec=codec)
        )
    if not found:
        there = ", ".join(f"{count} x {suffix}" for suffix, count in suffixes.most_common(5))
        raise ValueError(
            f"{flag} {root}: the folder holds no file that is read here"
            f" (found: {there or 'nothing'}); {_known_line(wanted)}"
        )
    return sorted(found, key=lambda file: file.name)


def _printable(name: str) -> str:
    """A name as UTF-8, with what is no UTF-8 in a file's name written as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _walk(
    folder: Path, *, seen: set[tuple[int, int]], rejected: Counter[str]
) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files below a folder, each real folder once, so that a loop of links ends."""
    pending = [folder]
    while pending:
        current = pending.pop()
        try:
            status = current.stat()
            names = sorted(os.listdir(current), reverse=True)
        except OSError:
            rejected["unreadable"] += 1
            continue
        if (status.st_dev, status.st_ino) in seen:
            rejected["symlink_loop"] += 1
            continue
        seen.add((status.st_dev, status.st_ino))
        for name in names:
            if name.startswith(".") or name in _PASSED_FOLDERS:
                continue
            path = current / name
            try:
                status = path.stat()
            except OSError:  # a dangling link, a link to itself, a file removed meanwhile
                rejected["vanished"] += 1
                continue
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            elif stat.S_ISREG(status.st_mode):
                yield path, status
            else:
                rejected["not_a_file"] += 1
