"""From checkpoint directories back to tensors and plain state.

Building starts only after every hash of a directory has been compared (manifest.py). A failure
here is never taken for damage: short memory or a busy disk must not cost a healthy checkpoint.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from training.runtime.atomic_io import FileOps, read_file
from training.runtime.manifest import (
    MANIFEST_NAME,
    STATE_NAME,
    DamagedManifest,
    ForeignManifest,
    Manifest,
    Verdict,
    describe_difference,
    inspect_checkpoint,
    parse_directory_name,
    read_manifest,
)
from training.runtime.memory_guard import is_out_of_memory
from training.runtime.state_tree import join_state
from training.runtime.tensor_file import read_tensors

SCANS = 5

_LOG = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names path, cause and remedy.

    path, free_bytes, needed_bytes: where, and how much room there was and should have been.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | None = None,
        free_bytes: int | None = None,
        needed_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.path = path
        self.free_bytes = free_bytes
        self.needed_bytes = needed_bytes


class IncompatibleCheckpoint(CheckpointError):
    """The newest checkpoint is sound but was written with other settings."""


class UnreadableCheckpoint(CheckpointError):
    """The newest checkpoint could not be judged or built; it is left as it is."""


@dataclass(slots=True, kw_only=True)
class Checkpoint:
    """tensors: group -> name -> tensor in host memory, shared with nothing. state: plain values.
    parent: step of the checkpoint it grew from."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path
    parent: int | None


@dataclass(slots=True, kw_only=True)
class Candidate:
    """A directory with a manifest; sequence None = the manifest says nothing usable."""

    path: Path
    step: int
    sequence: int | None
    fingerprint: dict[str, str] | None


def find_candidates(
    ops: FileOps, directory: Path, *, unreadable: list[str] | None = None
) -> list[Candidate]:
    """Committed checkpoints, newest first; those whose manifest is unusable come before all.

    UnreadableCheckpoint when the directory or a manifest cannot be read: an empty answer would
    restart a run from nothing. unreadable: for who does not choose among them; takes the names of
    those whose manifest cannot be read, which then is no error.
    """
    found = []
    try:
        entries = ops.list_dir(directory)
    except OSError as error:
        raise _unreadable(f"checkpoints in {directory}", directory, error) from error
    for name, is_dir in entries.items():
        step = parse_directory_name(name)
        if not is_dir or step is None:
            continue
        try:
            if MANIFEST_NAME in ops.list_dir(directory / name):
                found.append(_read_candidate(ops, directory / name, step))
        except FileNotFoundError:  # a run that is training has just deleted it
            continue
        except OSError as error:
            if unreadable is None:
                path = directory / name
                raise _unreadable(f"the manifest of {path}", path, error) from error
            unreadable.append(name)
    unusable = [c for c in found if c.sequence is None]
    usable = [c for c in found if c.sequence is not None]
    unusable.sort(key=lambda c: (c.step, c.path.name), reverse=True)
    usable.sort(key=lambda c: (c.sequence, c.step, c.path.name), reverse=True)
    return unusable + usable


def _unreadable(what: str, path: Path, error: OSError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(f"{what} cannot be read: {error.strerror or error}", path=path)


def check_settings(ops: FileOps, directory: Path, fingerprint: dict[str, str]) -> None:
    """IncompatibleCheckpoint when the newest checkpoint in `directory` is of other settings.

    From its manifest alone, so that a start that will be refused anyway is refused before anything
    is built or written. It decides nothing else: `load_newest` does, from every hash.
    """
    for candidate in find_candidates(ops, directory) if directory.is_dir() else []:
        if candidate.fingerprint is not None:
            if candidate.fingerprint != fingerprint:
                difference = describe_difference(candidate.fingerprint, fingerprint)
                raise cannot_resume(candidate.path, difference)
            return


def cannot_resume(path: Path, detail: str) -> IncompatibleCheckpoint:
    """The error to raise for a sound checkpoint that this run cannot use; says what to do."""
    return IncompatibleCheckpoint(
        f"{path} cannot be resumed: {detail}. Use the old settings, another --checkpoint-dir, or "
        "--no-resume"
    )


def build_checkpoint(
    ops: FileOps, path: Path, manifest: Manifest, *, groups: frozenset[str] | None = None
) -> Checkpoint:
    """Tensors (of `groups`, None = all) and state of a directory that was just verified."""
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        for name, record in manifest.files.items():
            if record.group and (groups is None or record.group in groups):
                tensors.setdefault(record.group, {}).update(read_tensors(ops, path / name))
        limit = manifest.files[STATE_NAME].size
        plain = json.loads(read_file(ops, path / STATE_NAME, limit=limit))
    except OSError as error:
        raise UnreadableCheckpoint(
            f"{path} cannot be read: {error.strerror or error}. Nothing was moved", path=path
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UnreadableCheckpoint(
            f"{path} needs {manifest.num_bytes / 2**20:.0f} MiB of memory that is not free. "
            "Nothing was moved",
            path=path,
        ) from error
    return Checkpoint(
        step=manifest.step,
        tensors=tensors,
        state=join_state({}, plain),
        path=path,
        parent=manifest.parent,
    )


def newest_for_inference(
    directory: Path, *, groups: frozenset[str] | None = None, ops: FileOps | None = None
) -> Checkpoint | None:
    """The newest valid checkpoint for reading only: no lock, nothing is moved, any settings.

    A training run may delete old checkpoints meanwhile; then the directory is looked at again.
    """
    ops = ops or FileOps()
    for _ in range(SCANS):
        if not directory.is_dir():
            return None
        for candidate in find_candidates(ops, directory):
            try:
                checkpoint = _load_for_inference(ops, candidate.path, groups)
            except UnreadableCheckpoint:
                if (candidate.path / MANIFEST_NAME).exists():
                    raise
                break
            if checkpoint is not None:
                return checkpoint
        else:
            return None
    raise UnreadableCheckpoint(f"checkpoints in {directory} keep changing; try again")


def _load_for_inference(
    ops: FileOps, path: Path, groups: frozenset[str] | None
) -> Checkpoint | None:
    found = inspect_checkpoint(ops, path, fingerprint=None)
    if found.verdict is Verdict.VALID and found.manifest is not None:
        return build_checkpoint(ops, path, found.manifest, groups=groups)
    if found.verdict is Verdict.INCOMPATIBLE:
        raise IncompatibleCheckpoint(f"{path} cannot be used: {found.detail}", path=path)
    if found.verdict is Verdict.UNREADABLE or not (path / MANIFEST_NAME).exists():
        raise UnreadableCheckpoint(f"{path} cannot be read: {found.detail}", path=path)
    _LOG.warning("%s is passed over: %s", path, found.detail)
    return None


def _read_candidate(ops: FileOps, path: Path, step: int) -> Candidate:
    try:
        manifest = read_manifest(ops, path)
    except (DamagedManifest, ForeignManifest):
        return Candidate(path=path, step=step, sequence=None, fingerprint=None)
    return Candidate(
        path=path, step=step, sequence=manifest.sequence, fingerprint=manifest.fingerprint
    )
