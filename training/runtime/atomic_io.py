"""Every file operation whose failure or order matters, in one place.

Crash safety is a property of an order of system calls. Callers write in terms of `FileOps`, so a
test can record that order, lose everything that was not flushed, or let any single call fail
(the failure model is that of Pillai et al., OSDI 2014, and
Rebello et al., ATC 2020: after a failed fsync the pages are marked clean, so it is never retried).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

if sys.platform == "darwin":
    import fcntl

Result = TypeVar("Result")

# Access denied, sharing violation, directory not empty: an indexer or virus scanner still holds
# the file for a moment.
TRANSIENT_WINDOWS_ERRORS = frozenset({5, 32, 145})
TRANSIENT_WAIT_S = 30.0
CHUNK_BYTES = 4 * 2**20
DISK_FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})

_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
_APPEND_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0)


def retry_transient(
    call: Callable[[], Result],
    *,
    limit_s: float = TRANSIENT_WAIT_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Result:
    """Result of `call`, repeated with growing pauses while Windows says the file is in use.

    Raises the last OSError once the pauses sum to `limit_s` seconds, and any other one at once.
    """
    waited, pause = 0.0, 0.01
    while True:
        try:
            return call()
        except OSError as error:
            if getattr(error, "winerror", None) not in TRANSIENT_WINDOWS_ERRORS:
                raise
            if waited >= limit_s:
                raise
        pause = min(pause, limit_s - waited)
        sleep(pause)
        waited += pause
        pause *= 2


class FileOps:
    """The primitive operations, each one call to the system; all may raise OSError."""

    transient_wait_s = TRANSIENT_WAIT_S
    sleep: Callable[[float], None] = staticmethod(time.sleep)

    def make_dir(self, path: Path) -> None:
        """Create one directory; FileExistsError if the name is taken."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """Descriptor of a new file; FileExistsError if the name is taken."""
        return os.open(path, _CREATE_FLAGS, 0o666)

    def open_append(self, path: Path) -> int:
        """Descriptor that writes at the end of a file, which is made if it is missing."""
        return os.open(path, _APPEND_FLAGS, 0o666)

    def open_read(self, path: Path) -> int:
        """Descriptor of a file that exists; the caller closes it."""
        return os.open(path, _READ_FLAGS)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Number of bytes written, which may be fewer than given."""
        return os.write(descriptor, data)

    def read(self, descriptor: int, size: int) -> bytes:
        """At most `size` bytes, perhaps fewer; b"" at the end of the file."""
        return os.read(descriptor, size)

    def seek(self, descriptor: int, position: int) -> None:
        """Set the position from the file's beginning, in bytes."""
        os.lseek(descriptor, position, os.SEEK_SET)

    def size(self, descriptor: int) -> int:
        """Bytes of the open file as it is now."""
        return os.fstat(descriptor).st_size

    def truncate(self, descriptor: int, size: int) -> None:
        """Cut the file, or extend it by zeros; durable after `fsync`."""
        os.ftruncate(descriptor, size)

    def fsync(self, descriptor: int) -> None:
        """Flush a file to the medium itself, not only to the drive's cache."""
        if sys.platform == "darwin":
            try:
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
        os.fsync(descriptor)

    def drop_cache(self, descriptor: int) -> None:
        """Forget the flushed pages of a file, so that reading it back asks the medium."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def sync_dir(self, path: Path) -> None:
        """Make the names in a directory durable; Windows has no such call and needs none."""
        if os.name == "nt":
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # this file system cannot flush directories
                raise
        finally:
            os.close(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        """Rename a file over whatever `target` was, in one step."""
        self._retry(lambda: os.replace(source, target))

    def move_dir(self, source: Path, target: Path) -> None:
        """Rename a directory to a name that is free."""
        self._retry(lambda: os.rename(source, target))

    def remove(self, path: Path) -> None:
        """Unlink a file; FileNotFoundError if there is none. A passing refusal is waited out."""
        self._retry(lambda: os.unlink(path))

    def remove_dir(self, path: Path) -> None:
        """Remove an empty directory."""
        self._retry(lambda: os.rmdir(path))

    def _retry(self, call: Callable[[], None]) -> None:
        retry_transient(call, limit_s=self.transient_wait_s, sleep=self.sleep)

    def list_dir(self, path: Path) -> dict[str, bool]:
        """Names in a directory, each with whether it is itself a directory."""
        with os.scandir(path) as entries:
            return {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the file system of an existing path."""
        return shutil.disk_usage(path).free

    def map_file(self, path: Path) -> mmap.mmap:
        """A non-empty file as private memory; the caller closes it."""
        descriptor = os.open(path, _READ_FLAGS)
        try:
            return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)


def write_all(ops: FileOps, descriptor: int, data: bytes | memoryview) -> None:
    """Write everything, over short writes and interruptions."""
    rest = memoryview(data).cast("B")
    while rest:
        try:
            written = ops.write(descriptor, rest[:CHUNK_BYTES])
        except InterruptedError:
            continue
        if written == 0:
            raise OSError(errno.EIO, "the system accepted no byte of a write")
        rest = rest[written:]


def write_file(
    ops: FileOps, path: Path, parts: Iterable[bytes | memoryview], *, durable: bool = True
) -> tuple[int, str]:
    """Create a file from `parts`; its size and sha256, hashed on the way.

    The contents are on the medium when this returns, the name is so only after a `sync_dir`.
    """
    digest, size = hashlib.sha256(), 0
    descriptor = ops.create(path)
    try:
        for part in parts:
            digest.update(part)
            size += memoryview(part).nbytes
            write_all(ops, descriptor, part)
        if durable:
            ops.fsync(descriptor)
            ops.drop_cache(descriptor)
    except BaseException:
        close_quietly(ops, descriptor)
        raise
    ops.close(descriptor)
    return size, digest.hexdigest()


def replace_file(ops: FileOps, path: Path, data: bytes, *, durable: bool = True) -> None:
    """Put `data` under `path` so that a reader sees the old or the new contents, never a mix."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        ops.remove(temporary)
    except FileNotFoundError:
        pass
    write_file(ops, temporary, [data], durable=durable)
    ops.replace(temporary, path)
    if durable:
        ops.sync_dir(path.parent)


def read_file(ops: FileOps, path: Path, *, limit: int) -> bytes:
    """Contents of a small file, cut after `limit` bytes."""
    descriptor = ops.open_read(path)
    try:
        parts, size = [], 0
        while size < limit and (part := ops.read(descriptor, min(CHUNK_BYTES, limit - size))):
            parts.append(part)
            size += len(part)
    finally:
        close_quietly(ops, descriptor)
    return b"".join(parts)


def hash_file(ops: FileOps, path: Path, *, limit: int) -> tuple[int, str]:
    """Size and sha256 of a file; reading stops after `limit` bytes."""
    digest, size = hashlib.sha256(), 0
    descriptor = ops.open_read(path)
    try:
        while size < limit and (part := ops.read(descriptor, min(CHUNK_BYTES, limit - size))):
            digest.update(part)
            size += len(part)
    finally:
        close_quietly(ops, descriptor)
    return size, digest.hexdigest()


def make_dirs(ops: FileOps, path: Path) -> None:
    """Create a directory and its missing parents, each of them durable."""
    if path.is_dir():
        return
    make_dirs(ops, path.parent)
    try:
        ops.make_dir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    ops.sync_dir(path.parent)


def remove_tree(ops: FileOps, path: Path) -> None:
    """Delete a directory of files and directories."""
    for name, is_dir in sorted(ops.list_dir(path).items()):
        if is_dir:
            remove_tree(ops, path / name)
        else:
            ops.remove(path / name)
    ops.remove_dir(path)


def close_quietly(ops: FileOps, descriptor: int) -> None:
    """Close a descriptor whose outcome no longer matters: a read, or a write that failed."""
    try:
        ops.close(descriptor)
    except OSError:
        pass
