"""Checkpoints of several processes that train one model: one directory, one manifest.

Every rank writes its shards under names of its own; when all are on the medium rank 0 writes the
manifest that lists them, which is the commit. A failure of one rank is the failure of all, in the
same save. On resume each rank looks for itself, because file systems of several machines may show
different things, and all take the newest that every one of them has verified.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from training.runtime.atomic_io import FileOps, read_file
from training.runtime.checkpoint import CheckpointStore
from training.runtime.manifest import (
    FileRecord,
    Manifest,
    Verdict,
    commit_manifest,
    inspect_checkpoint,
    read_manifest,
    state_name,
)
from training.runtime.restore import (
    Checkpoint,
    CheckpointError,
    IncompatibleCheckpoint,
    UnreadableCheckpoint,
    find_candidates,
)
from training.runtime.snapshot import Snapshot, take_snapshot
from training.runtime.state_tree import join_state
from training.runtime.tensor_file import read_tensors

FAILURES = (OSError, MemoryError, RuntimeError, ValueError)
KINDS = {kind.__name__: kind for kind in (IncompatibleCheckpoint, UnreadableCheckpoint)}


class Ranks(Protocol):
    """The processes of a run."""

    rank: int
    size: int

    def gather(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, by rank; waits for each of them."""
        ...


class ProcessGroupRanks:
    """The ranks of torch.distributed, over a group of their own (gloo: host memory, any thread)."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message, in the order of ranks; blocks until all have called it."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(message)]), group=self._group)
        longest = max(1, *(int(length) for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [torch.zeros_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._group)
        return [
            part[: int(length)].numpy().tobytes()
            for part, length in zip(parts, lengths, strict=True)
        ]


class RankCheckpointStore(CheckpointStore):
    """CheckpointStore of one rank; every rank must call the same methods in the same order."""

    def __init__(
        self,
        directory: Path,
        *,
        max_checkpoints: int,
        fingerprint: dict[str, str],
        ranks: Ranks,
        ops: FileOps | None = None,
    ) -> None:
        super().__init__(
            directory,
            max_checkpoints=max_checkpoints,
            fingerprint=fingerprint | {"ranks": str(ranks.size)},
            ops=ops,
        )
        self._ranks = ranks
        self._owner = f"-rank-{ranks.rank:05d}" if ranks.rank else ""
        self._is_open = False

    def load_newest(self, *, before_step: int | None = None) -> Checkpoint | None:
        """The newest checkpoint that every rank has verified, this rank's part of it."""
        self.wait()
        self.open()
        damaged: list[tuple[Path, str, str]] = []
        look = functools.partial(self._look, before_step=before_step, damaged=damaged)
        newest = None
        while True:
            answers = self._together(functools.partial(look, newest))
            if any(answer is None for answer in answers):
                return None
            first = min(answers, key=lambda answer: answer["sequence"])
            if all(answer == first for answer in answers):
                break
            newest = first["sequence"]
        if self._ranks.rank == 0:
            for path, reason, detail in damaged:
                self._quarantine(path, reason, detail)
        path = self.directory / first["name"]
        self._together(lambda: None)  # nothing is moved any more while somebody reads
        checkpoint = read_part(self._ops, path, self._owner)
        self._verified.add(path.name)
        self.last_saved_step = checkpoint.step
        return checkpoint

    def close(self) -> None:
        super().close()
        self._is_open = False

    def open(self) -> Self:
        """Rank 0 holds the lock for all of them."""
        if not self._is_open:
            self._together(self._take_directory if self._ranks.rank == 0 else lambda: None)
            self._is_open = True
        return self

    def _take(
        self,
        step: int,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        *,
        copy: bool,
    ) -> Snapshot:
        """Of all ranks or of none: no rank may begin to write a step that another will not."""
        taken: list[Snapshot] = []
        self._together(lambda: taken.append(take_snapshot(step, tensors, state, copy=copy)))
        return taken[0]

    def _write(self, snapshot: Snapshot) -> None:
        leads, step = self._ranks.rank == 0, snapshot.step
        begun = self._together(lambda: self._begin(snapshot) if leads else None)[0]
        directory = self.directory / begun["name"]
        try:
            parts = self._together(lambda: self._write_part(directory, snapshot))
            files = {name: FileRecord(**record) for part in parts for name, record in part.items()}
            manifest = Manifest(
                step=step,
                sequence=begun["sequence"],
                parent=self.last_saved_step,
                fingerprint=self._fingerprint,
                files=files,
            )
            self._together(
                lambda: commit_manifest(self._ops, directory, manifest) if leads else None
            )
        except CheckpointError:
            if leads:
                self._discard(directory)
            raise
        self._together(lambda: self._verify(directory))
        self.last_saved_step, self._last_bytes = step, manifest.num_bytes
        if leads:
            self._retain()

    def _begin(self, snapshot: Snapshot) -> dict[str, Any]:
        sequence = self._prepare(snapshot)
        return {"name": self._make_directory(snapshot.step).name, "sequence": sequence}

    def _write_part(self, directory: Path, snapshot: Snapshot) -> dict[str, Any]:
        records = self._write_files(directory, snapshot, owner=self._owner)
        return {name: asdict(record) for name, record in records.items()}

    def _needed_bytes(self, snapshot: Snapshot) -> int:
        return self._ranks.size * super()._needed_bytes(snapshot)

    def _look(
        self, newest: int | None, *, before_step: int | None, damaged: list[tuple[Path, str, str]]
    ) -> dict[str, Any] | None:
        """Name and sequence of the newest valid checkpoint here, at most of sequence `newest`."""
        damaged.clear()
        for candidate in find_candidates(self._ops, self.directory):
            late = before_step is not None and candidate.step >= before_step
            if late or (newest is not None and (candidate.sequence or 0) > newest):
                continue
            found = inspect_checkpoint(self._ops, candidate.path, fingerprint=self._fingerprint)
            if found.verdict is Verdict.VALID:
                return {"name": candidate.path.name, "sequence": candidate.sequence}
            if found.verdict is Verdict.CORRUPT:
                damaged.append((candidate.path, found.reason, found.detail))
            elif found.verdict is Verdict.INCOMPATIBLE:
                raise IncompatibleCheckpoint(f"{candidate.path} cannot be resumed: {found.detail}")
            elif found.verdict is Verdict.UNREADABLE:
                raise UnreadableCheckpoint(f"{candidate.path} cannot be read: {found.detail}")
        return None

    def _together(self, work: Any) -> list[Any]:
        """Do `work` on every rank; what each returned, or CheckpointError on all if one failed."""
        try:
            answer: dict[str, Any] = {"value": work()}
        except FAILURES as error:
            answer = {"failed": type(error).__name__, "text": str(error)}
        try:
            gathered = self._ranks.gather(json.dumps(answer).encode())
        except RuntimeError as error:
            raise CheckpointError(f"another rank of this run is gone: {error}") from error
        answers = [json.loads(data) for data in gathered]
        for rank, other in enumerate(answers):
            if "failed" in other:
                kind = KINDS.get(other["failed"], CheckpointError)
                raise kind(f"rank {rank}: {other['text']}. Older checkpoints are kept")
        return [other["value"] for other in answers]


def read_part(ops: FileOps, path: Path, owner: str) -> Checkpoint:
    """What one rank wrote into a checkpoint that was just verified."""
    manifest = read_manifest(ops, path)
    name = state_name(owner)
    if name not in manifest.files:
        raise CheckpointError(f"{path} has no part{owner}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for file, record in manifest.files.items():
        group, mark, rank = record.group.partition("-rank-")
        if group and mark + rank == owner:
            tensors.setdefault(group, {}).update(read_tensors(ops, path / file))
    plain = json.loads(read_file(ops, path / name, limit=manifest.files[name].size))
    return Checkpoint(
        step=manifest.step,
        tensors=tensors,
        state=join_state({}, plain),
        path=path,
        parent=manifest.parent,
    )
