"""The eight broken protocols of suite R4, over real file operations, for strace to watch.

Each entry makes a store class and its operations; those that patch a module do so in the process
they are made in, so they are made in a child that is thrown away.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.runtime import atomic_io, checkpoint, manifest
from training.runtime.atomic_io import FileOps
from training.runtime.checkpoint import CheckpointStore
from training.runtime.manifest import FileRecord


class NoFileFsync(FileOps):
    def fsync(self, descriptor: int) -> None: ...


class NoDirFsync(FileOps):
    def sync_dir(self, path: Path) -> None: ...


class DeafToErrors(FileOps):
    def fsync(self, descriptor: int) -> None:
        with suppress(OSError):
            super().fsync(descriptor)


class InPlace(CheckpointStore):
    def _make_directory(self, step: int) -> Path:
        target = self.directory / manifest.directory_name(step)
        self._ops.move_dir(self.directory / manifest.directory_name(2), target)
        atomic_io._CREATE_FLAGS &= ~os.O_EXCL
        return target


class DeletesFirst(CheckpointStore):
    def _make_directory(self, step: int) -> Path:
        for path in sorted(self.directory.glob("checkpoint_step_*")):
            self._ops.remove(path / manifest.MANIFEST_NAME)
            atomic_io.remove_tree(self._ops, path)
        return super()._make_directory(step)


class MarksFirst(CheckpointStore):
    """Commits before there are files; they follow when the commit is done."""

    def _write_files(
        self, directory: Path, snapshot: Any, *, owner: str = ""
    ) -> dict[str, FileRecord]:
        scratch = self.directory.parent / "scratch"
        scratch.mkdir()
        records = super()._write_files(scratch, snapshot, owner=owner)
        commit = manifest.commit_manifest

        def commit_then_move(ops: FileOps, target: Path, written: manifest.Manifest) -> None:
            commit(ops, target, written)
            for name in records:
                atomic_io.write_file(ops, target / name, [(scratch / name).read_bytes()])

        checkpoint.commit_manifest = commit_then_move
        return records


def commits_early() -> tuple[type[CheckpointStore], FileOps]:
    commit = manifest.commit_manifest

    def write_unflushed(ops: FileOps, path: Path, parts: Any) -> tuple[int, str]:
        return atomic_io.write_file(ops, path, parts, durable=False)

    def commit_then_flush(ops: FileOps, directory: Path, written: manifest.Manifest) -> None:
        commit(ops, directory, written)
        for name in written.files:
            descriptor = os.open(directory / name, os.O_RDWR)
            ops.fsync(descriptor)
            os.close(descriptor)

    checkpoint.write_file, checkpoint.commit_manifest = write_unflushed, commit_then_flush
    return CheckpointStore, FileOps()


def believes_the_manifest() -> tuple[type[CheckpointStore], FileOps]:
    def believe(ops: FileOps, path: Path, *, limit: int) -> tuple[int, str]:
        record = manifest.read_manifest(ops, path.parent).files[path.name]
        return min(path.stat().st_size, limit), record.sha256

    manifest.hash_file = believe
    return CheckpointStore, FileOps()


MUTANTS: dict[str, Callable[[], tuple[type[CheckpointStore], FileOps]]] = {
    "no-file-fsync": lambda: (CheckpointStore, NoFileFsync()),
    "no-dir-fsync": lambda: (CheckpointStore, NoDirFsync()),
    "early-commit": commits_early,
    "no-hash": believes_the_manifest,
    "marker-first": lambda: (MarksFirst, FileOps()),
    "in-place-write": lambda: (InPlace, FileOps()),
    "delete-old-first": lambda: (DeletesFirst, FileOps()),
    "ignored-fsync-error": lambda: (CheckpointStore, DeafToErrors()),
}
