"""Tokenized documents of one source, a few hundred at a time: the unit of production and of resume.

A shard is a pure function of where in its source it begins (`before`) and of the settings, so a
position in a stream is a shard's beginning, its number and a document in it: whatever was
prefetched behind that can be thrown away and is made again, identical. Stores keep the shards
between the thread that makes them and the stream that reads them; `SpoolStore` keeps them on disk,
so that they outlive an outage and a restart.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from training.runtime.state_tree import join_state, split_state
from training.stream.token_cache import read_token_file, write_token_file

SPOOL_FORMAT = 1
AFTER = "after:"  # begins the names of a snapshot's tensors in a file


@dataclass(slots=True, kw_only=True)
class Shard:
    """`number` counts a source's shards from 0; documents stand in the order of reading them."""

    number: int
    tokens: NDArray[np.integer]  # (N,) uint16 or int32, each document with its opening token
    starts: NDArray[np.int64]  # (documents + 1,)
    source_ids: NDArray[np.int16]  # (documents,)
    hashes: NDArray[np.uint64]  # (documents,) of each document's normalised beginning
    before: str  # hash of the snapshot it was made from
    after: dict[str, Any]  # snapshot that the next shard is made from; JSON and tensors
    rejected: dict[str, int]  # documents left out, by reason
    num_read: int  # documents of the source, left out ones included

    def __len__(self) -> int:
        return len(self.source_ids)

    def document(self, index: int) -> NDArray[np.integer]:
        """Tokens of a document, the opening one first."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def snapshot_hash(snapshot: dict[str, Any]) -> str:
    """What names the place in a source where a shard begins."""
    content = json.dumps(snapshot, sort_keys=True, separators=(",", ":"), default=_tensor_hash)
    return hashlib.sha256(content.encode()).hexdigest()


def _tensor_hash(value: Any) -> str:
    """What stands for a tensor (a window of duplicates) in a snapshot's hash."""
    array = value.numpy()
    return f"{array.dtype}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()}"


class ShardStore(Protocol):
    """Shards between producer and consumer; used from both threads."""

    def put(self, shard: Shard) -> None:
        """Keep a finished shard under its number; one that was there is replaced."""
        ...

    def load(self, number: int, *, before: str) -> Shard | None:
        """The shard, or None when it is not here, damaged or of another beginning."""
        ...

    def release(self, number: int) -> None:
        """Shards before `number` have been consumed."""
        ...

    def has_room(self, number: int) -> bool:
        """Whether shard `number` may be made now; always when the consumer needs it next."""
        ...

    def depth(self) -> int:
        """Documents that wait to be consumed."""
        ...

    def shrink(self) -> bool:
        """Let half as much wait in memory; False where no less can."""
        ...

    def clear(self) -> None:
        """Forget what is in memory; files stay."""
        ...


class MemoryStore:
    """Keeps shards in memory until `documents` wait, always one ahead of the consumer."""

    def __init__(self, *, documents: int) -> None:
        self._limit = documents
        self._lock = threading.Lock()
        self._shards: dict[int, Shard] = {}
        self._current = 0

    def put(self, shard: Shard) -> None:
        with self._lock:
            self._shards[shard.number] = shard

    def load(self, number: int, *, before: str) -> Shard | None:
        with self._lock:
            shard = self._shards.get(number)
        return shard if shard is not None and shard.before == before else None

    def release(self, number: int) -> None:
        with self._lock:
            self._current = number
            for old in [key for key in self._shards if key < number]:
                del self._shards[old]

    def has_room(self, number: int) -> bool:
        with self._lock:
            ahead = [len(shard) for key, shard in self._shards.items() if key > self._current]
        return number <= self._current + 1 or sum(ahead) < self._limit

    def depth(self) -> int:
        with self._lock:
            return sum(len(shard) for shard in self._shards.values())

    def shrink(self) -> bool:
        with self._lock:
            before, self._limit = self._limit, self._limit // 2
        return before > 0

    def clear(self) -> None:
        with self._lock:
            self._shards.clear()


class SpoolStore:
    """Keeps shards as checksummed files of one directory, at most `max_bytes` of them.

    Consumed shards go first, and only for want of room: a run that resumes from an older checkpoint
    finds them here. A file that cannot be written keeps its shard in memory. `damaged` counts
    files that failed their checksum.
    """

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.damaged = 0
        self._lock = threading.Lock()
        self._current = 0
        self._sizes = {_number(path): path.stat().st_size for path in directory.glob("*.shard")}
        self._unread: dict[int, int] = {}  # documents of the shards ahead
        self._unwritten: dict[int, Shard] = {}

    def put(self, shard: Shard) -> None:
        path = self._path(shard.number)
        write_token_file(path, _to_arrays(shard))
        with self._lock:
            self._unread[shard.number] = len(shard)
            try:
                self._sizes[shard.number] = path.stat().st_size
                self._unwritten.pop(shard.number, None)
            except FileNotFoundError:
                self._unwritten[shard.number] = shard
            self._shrink(shard.number)

    def load(self, number: int, *, before: str) -> Shard | None:
        with self._lock:
            kept = self._unwritten.get(number)
            known = number in self._sizes
        if kept is not None:
            return kept if kept.before == before else None
        if not known:
            return None
        arrays = read_token_file(self._path(number))
        shard = None if arrays is None else _from_arrays(arrays)
        if shard is not None and shard.before == before:
            with self._lock:
                self._unread[number] = len(shard)
            return shard
        with self._lock:
            self.damaged += shard is None
            self._remove(number)
        return None

    def release(self, number: int) -> None:
        with self._lock:
            self._current = number
            for old in [key for key in self._unread if key < number]:
                del self._unread[old]
            for old in [key for key in self._unwritten if key < number]:
                del self._unwritten[old]

    def has_room(self, number: int) -> bool:
        with self._lock:
            if number <= self._current + 1:
                return True
            if self._unwritten:
                return False
            ahead = [size for key, size in self._sizes.items() if self._current < key < number]
            return sum(ahead) + max(ahead, default=0) <= self.max_bytes

    def depth(self) -> int:
        with self._lock:
            return sum(self._unread.values())

    def shrink(self) -> bool:
        return False  # what waits is in files

    def clear(self) -> None:
        with self._lock:
            self._unwritten.clear()
            self._unread.clear()

    def _shrink(self, newest: int) -> None:
        """Make room: consumed shards from the oldest on, then what an earlier life left ahead."""
        consumed = sorted(key for key in self._sizes if key < self._current)
        far = sorted((key for key in self._sizes if key > newest), reverse=True)
        for number in (*consumed, *far):
            if sum(self._sizes.values()) <= self.max_bytes:
                return
            self._remove(number)

    def _remove(self, number: int) -> None:
        self._sizes.pop(number, None)
        with contextlib.suppress(OSError):
            self._path(number).unlink()

    def _path(self, number: int) -> Path:
        return self.directory / shard_file(number)


def shard_file(number: int) -> str:
    """Name of a shard's file in its spool."""
    return f"{number:08d}.shard"


def _number(path: Path) -> int:
    return int(path.stem)


def _to_arrays(shard: Shard) -> dict[str, np.ndarray]:
    tensors, after = split_state(shard.after)
    facts: dict[str, Any] = {
        "format": SPOOL_FORMAT,
        "number": shard.number,
        "before": shard.before,
        "after": after,
        "rejected": shard.rejected,
        "num_read": shard.num_read,
    }
    return {
        "tokens": shard.tokens,
        "starts": shard.starts,
        "source_ids": shard.source_ids,
        "hashes": shard.hashes,
        "facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
        **{f"{AFTER}{name}": tensor.numpy() for name, tensor in tensors.items()},
    }


def _from_arrays(arrays: dict[str, np.ndarray]) -> Shard | None:
    facts = json.loads(arrays["facts"].tobytes())
    if facts["format"] != SPOOL_FORMAT:
        return None
    tensors = {
        name.removeprefix(AFTER): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(AFTER)
    }
    return Shard(
        number=facts["number"],
        tokens=arrays["tokens"],
        starts=arrays["starts"],
        source_ids=arrays["source_ids"],
        hashes=arrays["hashes"],
        before=facts["before"],
        after=join_state(tensors, facts["after"]),
        rejected=facts["rejected"],
        num_read=facts["num_read"],
    )
