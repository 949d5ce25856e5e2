"""Checkpoints that are either whole and verified or not there, after any crash at any moment.

`CheckpointStore` is the order of things: copy to host memory at the step boundary, write in a
thread, commit by one rename, read back, and only then let go of an older one. What counts as a
checkpoint is decided in manifest.py, every system call is in atomic_io.py.
"""

from __future__ import annotations

import concurrent.futures
import errno
import logging
import os
import time
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from training.runtime.atomic_io import DISK_FULL, FileOps, make_dirs, remove_tree, write_file
from training.runtime.locks import CHECKPOINT_LOCK_NAME, RunLock
from training.runtime.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    Verdict,
    commit_manifest,
    directory_name,
    inspect_checkpoint,
    is_own_name,
    parse_directory_name,
    state_name,
)
from training.runtime.restore import (
    Checkpoint,
    CheckpointError,
    IncompatibleCheckpoint,
    UnreadableCheckpoint,
    build_checkpoint,
    cannot_resume,
    check_settings,
    find_candidates,
    newest_for_inference,
)
from training.runtime.snapshot import Snapshot, take_snapshot
from training.runtime.tensor_file import encode_tensors, split_shards

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointStore",
    "IncompatibleCheckpoint",
    "UnreadableCheckpoint",
]

QUARANTINE_NAME = "quarantine"
MIN_VERIFIED = 2
SPACE_FACTOR = 2
MAX_REVISIONS = 10_000

_LOG = logging.getLogger(__name__)


class CheckpointStore:
    """The checkpoints of one run directory; this process is their only writer while it is open.

    fingerprint: settings by name that a resumed run must share. max_checkpoints: how many stay
    (never fewer than two). quarantine_count: damaged checkpoints set aside by this process.
    last_saved_step: step of the newest checkpoint that this process wrote and verified, or loaded.
    """

    newest_for_inference = staticmethod(newest_for_inference)

    def __init__(
        self,
        directory: Path,
        *,
        max_checkpoints: int,
        fingerprint: dict[str, str],
        ops: FileOps | None = None,
    ) -> None:
        self.directory = directory
        self.quarantine_count = 0
        self.last_saved_step: int | None = None
        self.last_save_seconds = 0.0
        self._keep = max(MIN_VERIFIED, max_checkpoints)
        self._fingerprint = dict(fingerprint)
        self._ops = ops or FileOps()
        self._lock: RunLock | None = None
        self._executor: concurrent.futures.ThreadPoolExecutor | None = None
        self._pending: concurrent.futures.Future[None] | None = None
        self._verified: set[str] = set()
        self._left_behind: set[str] = set()
        self._last_bytes = 0

    def save(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        block: bool = False,
    ) -> None:
        """Copy the state of `step` now and write it in a thread; `block` waits for the result, and
        needs no memory for a copy.

        `tensors` holds one dictionary per group, one file each; `state` plain values only.
        CheckpointError reports the failure of the previous save, or that there is no memory for
        the copy, in which case this one has not been started and may be tried again; with `block`
        also the failure of this one.
        """
        self.wait()
        self.open()
        snapshot = self._take(step, tensors, state, copy=not block)
        if self._executor is None:
            self._executor = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending = self._executor.submit(self._write, snapshot)
        if block:
            self.wait()

    def start_anew(self) -> None:
        """Never load what is there now: to go back must not lead into the run before this one."""
        self.open()
        self._left_behind = set(self._ops.list_dir(self.directory))

    def load_newest(self, *, before_step: int | None = None) -> Checkpoint | None:
        """The newest valid checkpoint (of a step below `before_step`), None if there is none.

        Damaged ones on the way are moved to quarantine. IncompatibleCheckpoint and
        UnreadableCheckpoint leave every file where it is.
        """
        self.wait()
        self.open()
        for candidate in find_candidates(self._ops, self.directory):
            is_late = before_step is not None and candidate.step >= before_step
            if is_late or candidate.path.name in self._left_behind:
                continue
            found = inspect_checkpoint(self._ops, candidate.path, fingerprint=self._fingerprint)
            if found.verdict is Verdict.CORRUPT:
                self._quarantine(candidate.path, found.reason, found.detail)
            elif found.verdict is Verdict.INCOMPATIBLE:
                raise cannot_resume(candidate.path, found.detail)
            elif found.verdict is Verdict.UNREADABLE:
                raise UnreadableCheckpoint(
                    f"{candidate.path} cannot be read: {found.detail}. Nothing was moved; free "
                    "the cause, or move it away to resume from an older one"
                )
            elif found.manifest is not None:
                checkpoint = build_checkpoint(self._ops, candidate.path, found.manifest)
                self._verified.add(candidate.path.name)
                self._last_bytes = found.manifest.num_bytes
                self.last_saved_step = checkpoint.step
                return checkpoint
        return None

    def check_settings(self) -> None:
        """IncompatibleCheckpoint if `load_newest` would raise it for the settings of the newest."""
        check_settings(self._ops, self.directory, self._fingerprint)

    def wait(self) -> None:
        """Return once no save is under way; CheckpointError if the last one failed."""
        if self._pending is None:
            return
        concurrent.futures.wait([self._pending])
        pending, self._pending = self._pending, None
        pending.result()

    def take_failure(self) -> CheckpointError | None:
        """The failure of a save that has ended since it was last asked about; does not wait."""
        if self._pending is None or not self._pending.done():
            return None
        try:
            self.wait()
        except CheckpointError as error:
            return error
        return None

    def close(self) -> None:
        """Finish the save under way and give up the directory; raises like `wait`."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def open(self) -> Self:
        """Take the directory until `close`; RuntimeError if another process has it."""
        if self._lock is None:
            self._take_directory()
        return self

    def _take_directory(self) -> None:
        lock = RunLock(self.directory, name=CHECKPOINT_LOCK_NAME)
        try:
            make_dirs(self._ops, self.directory)
            lock.acquire()
        except OSError as error:
            raise CheckpointError(
                f"--checkpoint-dir {self.directory} cannot be used: {_reason(error)}"
            ) from error
        self._lock = lock

    def _take(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        copy: bool,
    ) -> Snapshot:
        try:
            return take_snapshot(step, tensors, state, copy=copy)
        except MemoryError as error:
            raise CheckpointError(
                f"step {step} could not be saved to {self.directory}: {error}. Older checkpoints "
                "are kept",
                path=self.directory,
            ) from error

    def _write(self, snapshot: Snapshot) -> None:
        """The protocol, in the writer thread; ends in a verified checkpoint or CheckpointError."""
        started = time.perf_counter()
        directory = self.directory
        try:
            sequence = self._prepare(snapshot)
            directory = self._make_directory(snapshot.step)
            manifest = Manifest(
                step=snapshot.step,
                sequence=sequence,
                parent=self.last_saved_step,
                fingerprint=self._fingerprint,
                files=self._write_files(directory, snapshot),
            )
            commit_manifest(self._ops, directory, manifest)
        except (OSError, MemoryError) as error:
            failure = self._failure(snapshot, directory, error)
            self._discard(directory)
            raise failure from error
        self._verify(directory)
        self.last_saved_step, self._last_bytes = snapshot.step, manifest.num_bytes
        self._retain()
        self.last_save_seconds = time.perf_counter() - started

    def _prepare(self, snapshot: Snapshot) -> int:
        """Leftovers gone, room for two more checkpoints; the sequence of the one to come."""
        for name, is_dir in self._ops.list_dir(self.directory).items():
            if is_dir and parse_directory_name(name) is not None:
                self._discard(self.directory / name)
        needed, free = self._needed_bytes(snapshot), self._ops.free_bytes(self.directory)
        if free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        # A bad sector under an old checkpoint must not end all saving. It may be of the newest one.
        unreadable: list[str] = []
        known = find_candidates(self._ops, self.directory, unreadable=unreadable)
        return 1 + len(unreadable) + max((c.sequence or 0 for c in known), default=0)

    def _needed_bytes(self, snapshot: Snapshot) -> int:
        return SPACE_FACTOR * max(self._last_bytes, snapshot.num_bytes)

    def _make_directory(self, step: int) -> Path:
        """A new directory: a name that exists may hold the only good copy of that step."""
        for revision in range(MAX_REVISIONS):
            directory = self.directory / directory_name(step, revision)
            try:
                self._ops.make_dir(directory)
            except FileExistsError:
                continue
            self._left_behind.discard(directory.name)
            return directory
        raise FileExistsError(f"{MAX_REVISIONS} directories of step {step} exist already")

    def _write_files(
        self, directory: Path, snapshot: Snapshot, *, owner: str = ""
    ) -> dict[str, FileRecord]:
        """Files of one rank, with the mark of their `owner` in name and group."""
        records: dict[str, FileRecord] = {}
        for group, host in snapshot.groups.items():
            shards = split_shards(host)
            for index, shard in enumerate(shards, start=1):
                part = f"-{index:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
                name = f"{group}{owner}{part}.safetensors"
                size, sha256 = write_file(self._ops, directory / name, encode_tensors(shard))
                records[name] = FileRecord(size=size, sha256=sha256, group=group + owner)
        name = state_name(owner)
        size, sha256 = write_file(self._ops, directory / name, [snapshot.state])
        records[name] = FileRecord(size=size, sha256=sha256)
        return records

    def _verify(self, directory: Path) -> None:
        """Read a committed checkpoint back before anything older may be deleted for it."""
        found = inspect_checkpoint(self._ops, directory, fingerprint=self._fingerprint)
        if found.verdict is Verdict.VALID:
            self._verified.add(directory.name)
            return
        if found.verdict is Verdict.CORRUPT:
            self._quarantine(directory, found.reason, found.detail)
        raise CheckpointError(
            f"{directory} was written but reads back {found.verdict.value}: {found.detail}; check "
            "disk and memory. Older checkpoints are kept",
            path=directory,
        )

    def _retain(self) -> None:
        """Delete what is older than the newest `max_checkpoints` of these settings.

        Nothing is deleted while fewer than two of those that stay were verified by this process.
        """
        unreadable: list[str] = []
        try:
            candidates = find_candidates(self._ops, self.directory, unreadable=unreadable)
        except CheckpointError as error:
            _LOG.warning("no old checkpoint was deleted: %s", error)
            return
        for name in unreadable:
            _LOG.warning("the manifest of %s cannot be read now", self.directory / name)
        own = [c for c in candidates if c.fingerprint == self._fingerprint]
        kept, old = own[: self._keep], own[self._keep :]
        if len(self._verified & {c.path.name for c in kept}) < MIN_VERIFIED:
            return
        for candidate in old:
            try:
                # Without its manifest it is no checkpoint, so a crash from here on leaves rubbish
                # to sweep and not a checkpoint with missing files.
                self._ops.remove(candidate.path / MANIFEST_NAME)
                self._ops.sync_dir(candidate.path)
                remove_tree(self._ops, candidate.path)
            except OSError as error:
                _LOG.warning("%s could not be deleted: %s", candidate.path, _reason(error))

    def _discard(self, directory: Path) -> None:
        """Remove a directory that this program left without a manifest; never anything else."""
        if directory == self.directory:
            return
        try:
            entries = self._ops.list_dir(directory)
            own = all(name.endswith(".safetensors") or is_own_name(name) for name in entries)
            if own and not any(entries.values()):
                remove_tree(self._ops, directory)
        except OSError as error:
            _LOG.warning("unfinished %s could not be removed: %s", directory, _reason(error))

    def _quarantine(self, path: Path, reason: str, detail: str) -> None:
        """Set a damaged checkpoint aside; where it cannot be moved it stays and is passed over."""
        home = self.directory / QUARANTINE_NAME
        self.quarantine_count += 1
        try:
            make_dirs(self._ops, home)
            taken = self._ops.list_dir(home)
            target, number = f"{path.name}-{reason}", 1
            while target in taken:
                number += 1
                target = f"{path.name}-{reason}-{number}"
            self._ops.move_dir(path, home / target)
            self._ops.sync_dir(home)
            self._ops.sync_dir(self.directory)
        except OSError as error:
            _LOG.warning("damaged %s (%s) could not be moved: %s", path, detail, _reason(error))
            return
        _LOG.warning("damaged checkpoint %s (%s) was moved to %s", path.name, detail, home)

    def _failure(
        self, snapshot: Snapshot, directory: Path, error: OSError | MemoryError
    ) -> CheckpointError:
        needed = self._needed_bytes(snapshot)
        try:
            free = self._ops.free_bytes(self.directory)
        except OSError:
            free = None
        text = f"step {snapshot.step} could not be saved to {directory}: {_reason(error)}"
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            text = _disk_full_text(snapshot.step, directory, free, needed)
        return CheckpointError(
            f"{text}. Older checkpoints are kept",
            path=directory,
            free_bytes=free,
            needed_bytes=needed,
        )


def _disk_full_text(step: int, path: Path, free: int | None, needed: int) -> str:
    shown = "unknown" if free is None else f"{free / 2**20:.1f} MiB"
    return (
        f"step {step} could not be saved to {path}: disk full, {shown} free, "
        f"{needed / 2**20:.1f} MiB needed; free some space or use another --checkpoint-dir"
    )


def _reason(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "not enough memory"
    return error.strerror or str(error)
