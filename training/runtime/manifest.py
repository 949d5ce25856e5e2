"""What makes a directory a checkpoint: its manifest, and the verdict on what the manifest claims.

A directory is a checkpoint from the moment `MANIFEST.json` stands in it, and only while every
byte it lists is unchanged. A safetensors file accepts nearly every flipped bit, so nothing is
built from a file before its sha256 has been compared.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from training.runtime.atomic_io import FileOps, hash_file, read_file, write_file

SCHEMA = 1
MANIFEST_NAME = "MANIFEST.json"
TEMPORARY_NAME = "MANIFEST.json.tmp"
STATE_NAME = "state.json"
MANIFEST_LIMIT_BYTES = 4 * 2**20
# Left behind by file browsers and storage boxes; they say nothing about what they lie beside.
LEFTOVERS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini", "@eaDir"})
APPLE_DOUBLE = "._"  # begins the name of what macOS adds to a file on a disk or in an archive

_DIRECTORY = re.compile(r"checkpoint_step_(\d{8,})(?:\.(\d+))?")


class Verdict(Enum):
    """VALID may be resumed. CORRUPT is damaged for certain. INCOMPATIBLE is sound, but of other
    settings. UNREADABLE could not be judged now. UNCOMMITTED was never finished."""

    VALID = "valid"
    CORRUPT = "corrupt"
    INCOMPATIBLE = "incompatible"
    UNREADABLE = "unreadable"
    UNCOMMITTED = "uncommitted"


@dataclass(slots=True, kw_only=True)
class FileRecord:
    """A file of a checkpoint; `group` is the tensor group it belongs to, "" for plain state."""

    size: int
    sha256: str
    group: str = ""


@dataclass(slots=True, kw_only=True)
class Manifest:
    """step: training step. sequence: rises by one per save, whatever the step does, so "newest"
    stays true after a rollback or a fresh start in the same directory. parent: step of the
    checkpoint this one grew from. fingerprint: settings that must match to resume."""

    step: int
    sequence: int
    parent: int | None
    fingerprint: dict[str, str]
    files: dict[str, FileRecord]

    @property
    def num_bytes(self) -> int:
        return sum(record.size for record in self.files.values())


@dataclass(slots=True, kw_only=True)
class Inspection:
    """A verdict; `reason` is a short slug, `detail` a sentence for the user."""

    verdict: Verdict
    manifest: Manifest | None = None
    reason: str = ""
    detail: str = ""


class DamagedManifest(ValueError):
    """The bytes of a manifest are not what was written."""


class ForeignManifest(ValueError):
    """A sound manifest of a schema this program does not know."""


def directory_name(step: int, revision: int = 0) -> str:
    """`checkpoint_step_00000050`; a second save of the same step gets `.1`, and so on."""
    return f"checkpoint_step_{step:08d}" + (f".{revision}" if revision else "")


def state_name(owner: str = "") -> str:
    """File of the plain state; of several ranks each has its own, marked with its owner."""
    return STATE_NAME.replace(".", f"{owner}.")


def is_leftover(name: str) -> bool:
    """Whether a file or directory was put there by a system that only looked, or copied."""
    return name in LEFTOVERS or name.startswith(APPLE_DOUBLE)


def is_own_name(name: str) -> bool:
    """Whether this program, or a file browser, may have put a file that is no tensors here."""
    state = name.startswith("state") and name.endswith(".json")
    return state or name == TEMPORARY_NAME or is_leftover(name)


def parse_directory_name(name: str) -> int | None:
    """The step a directory name claims, None for any other directory."""
    match = _DIRECTORY.fullmatch(name)
    return int(match[1]) if match else None


def commit_manifest(ops: FileOps, directory: Path, manifest: Manifest) -> None:
    """Steps 4 to 7 of the protocol: after this the checkpoint exists and survives a power loss."""
    ops.sync_dir(directory)
    temporary = directory / TEMPORARY_NAME
    write_file(ops, temporary, [encode_manifest(manifest)])
    ops.replace(temporary, directory / MANIFEST_NAME)
    ops.sync_dir(directory)
    ops.sync_dir(directory.parent)


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON with a hash over itself, which reading it compares."""
    return _seal({"schema": SCHEMA, **asdict(manifest)})


def decode_manifest(data: bytes) -> Manifest:
    """Inverse of `encode_manifest`, byte for byte: DamagedManifest if even a space differs."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedManifest("is not JSON") from error
    body = document.get("body") if isinstance(document, dict) else None
    if not isinstance(body, dict) or _seal(body) != data:
        raise DamagedManifest("does not match its own sha256")
    if body.get("schema") != SCHEMA:
        raise ForeignManifest(f"has schema {body.get('schema')!r}, this program knows {SCHEMA}")
    try:
        files = {name: FileRecord(**record) for name, record in body["files"].items()}
        return Manifest(
            step=body["step"],
            sequence=body["sequence"],
            parent=body["parent"],
            fingerprint=body["fingerprint"],
            files=files,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedManifest("lacks a field") from error


def read_manifest(ops: FileOps, directory: Path) -> Manifest:
    """OSError if it cannot be read, DamagedManifest or ForeignManifest if it cannot be used."""
    path = directory / MANIFEST_NAME
    return decode_manifest(read_file(ops, path, limit=MANIFEST_LIMIT_BYTES))


def inspect_checkpoint(
    ops: FileOps, directory: Path, *, fingerprint: dict[str, str] | None
) -> Inspection:
    """Verdict on a checkpoint directory, from names, sizes and hashes alone; builds nothing.

    `fingerprint` None accepts any settings. A failing system call is never taken for damage.
    """
    try:
        return _inspect(ops, directory, fingerprint)
    except OSError as error:
        what = error.strerror or str(error)
        return Inspection(verdict=Verdict.UNREADABLE, reason="io-error", detail=what)


def _inspect(ops: FileOps, directory: Path, fingerprint: dict[str, str] | None) -> Inspection:
    entries = ops.list_dir(directory)
    if MANIFEST_NAME not in entries:
        return Inspection(verdict=Verdict.UNCOMMITTED, reason="no-manifest")
    try:
        manifest = read_manifest(ops, directory)
    except DamagedManifest as error:
        return _corrupt("bad-manifest", f"{MANIFEST_NAME} {error}")
    except ForeignManifest as error:
        detail = f"{MANIFEST_NAME} {error}"
        return Inspection(verdict=Verdict.INCOMPATIBLE, reason="schema", detail=detail)
    if parse_directory_name(directory.name) != manifest.step:
        return _corrupt("wrong-step", f"holds step {manifest.step}")
    if fingerprint is not None and fingerprint != manifest.fingerprint:
        return Inspection(
            verdict=Verdict.INCOMPATIBLE,
            manifest=manifest,
            reason="fingerprint",
            detail=describe_difference(manifest.fingerprint, fingerprint),
        )
    present = {name for name in entries if name != MANIFEST_NAME and not is_leftover(name)}
    if missing := set(manifest.files) - {name for name in present if not entries[name]}:
        return _corrupt("missing-file", f"{min(missing)} is missing")
    if extra := present - set(manifest.files):
        return _corrupt("extra-file", f"{min(extra)} does not belong to it")
    for name, record in manifest.files.items():
        size, sha256 = hash_file(ops, directory / name, limit=record.size + 1)
        if size != record.size:
            return _corrupt("wrong-size", f"{name} is not {record.size} bytes long")
        if sha256 != record.sha256:
            return _corrupt("wrong-hash", f"{name} does not match its sha256")
    return Inspection(verdict=Verdict.VALID, manifest=manifest)


def describe_difference(saved: dict[str, str], now: dict[str, str]) -> str:
    """`--d-model was 64, is now 128; ...` over every entry that differs."""
    names = [name for name in sorted(saved | now) if saved.get(name) != now.get(name)]
    return "; ".join(
        f"{name} was {saved.get(name, 'absent')}, is now {now.get(name, 'absent')}"
        for name in names
    )


def _corrupt(reason: str, detail: str) -> Inspection:
    return Inspection(verdict=Verdict.CORRUPT, reason=reason, detail=detail)


def _seal(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"body":{text},"sha256":"{digest}"}}\n'.encode()
