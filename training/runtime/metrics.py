"""metrics.jsonl: one JSON object per step, each step once, readable after any crash.

A row is one write at the end of the file. What a crash tears off the last row is cut when the file
is opened; what a resumed run will write again is moved to `metrics.orphan-N.jsonl`, so the file
tells one history and nothing measured is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from training.runtime.atomic_io import (
    CHUNK_BYTES,
    DISK_FULL,
    FileOps,
    close_quietly,
    make_dirs,
    replace_file,
    write_all,
    write_file,
)

TAIL_BYTES = 2**16
STATUS_WAIT_S = 0.5
_NEWLINE = b"\n"

_LOG = logging.getLogger(__name__)


class MetricsLog:
    """Appends rows to a file that is repaired on opening.

    While the disk is full, rows are kept in memory and written before the next one.
    """

    def __init__(self, path: Path, *, ops: FileOps | None = None) -> None:
        self.path = path
        self._ops = ops or FileOps()
        self._waiting: list[bytes] = []
        make_dirs(self._ops, path.parent)
        self._descriptor = self._ops.open_append(path)
        self._offset = self._ops.size(self._descriptor)
        self._repair()

    @property
    def offset(self) -> int:
        """Bytes of whole rows in the file; what a checkpoint stores to resume from."""
        return self._offset

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row; non-finite numbers become null. TypeError for a value JSON has no word for.

        Raises OSError if the file cannot be written, except on a full disk.
        """
        self._waiting.append(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY) + _NEWLINE)
        self._flush()

    def fsync(self) -> None:
        """Put the rows of `offset` on the medium; rows that wait for disk space are not in it."""
        self._flush()
        try:
            self._ops.fsync(self._descriptor)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            _LOG.warning("disk full: rows of %s are not safe yet", self.path)

    def resume(self, offset: int, *, last_step: int | None = None) -> Path | None:
        """Cut the file at a checkpoint's offset; the file the rows behind it were moved to.

        An offset beyond the end (a medium has lost rows, or the run goes on in another directory)
        keeps all there is; one inside a row
        moves that row too. Rows above `last_step` go in any case: in a file that lost rows, those
        of a later life stand where the checkpoint's own were. On a full disk they are written where
        they stood until then, and lost only if there is no room even so.
        """
        self._waiting.clear()
        if 0 < self._offset < offset:
            _LOG.warning("%s lost %d bytes of rows", self.path, offset - self._offset)
        elif offset > self._offset:
            _LOG.warning("%s begins anew: the rows of earlier steps are not here", self.path)
        cut = max(0, min(offset, self._offset))
        if cut and self._read(cut - 1, cut) != _NEWLINE:
            cut = self._row_start(cut)
        while last_step is not None and cut:
            start = self._row_start(cut)
            if _step_of(self._read(start, cut)) <= last_step:
                break
            cut = start
        if cut == self._offset:
            return None
        orphan = self._write_orphan(self._parts(cut, self._offset))  # perhaps gigabytes
        rows = b"" if orphan else self._read(cut, self._offset)
        self._truncate(cut)
        if orphan is None:
            orphan = self._write_orphan([rows])
        if orphan is None:
            _LOG.warning("disk full: %d bytes of %s were cut and lost", len(rows), self.path)
        return orphan

    def close(self) -> None:
        """Write what waits, as far as the disk takes it, and close the file."""
        if self._descriptor < 0:
            return
        try:
            self._flush()
        finally:
            descriptor, self._descriptor = self._descriptor, -1
            self._ops.close(descriptor)
        if self._waiting:
            _LOG.warning("%d rows of %s were lost: disk full", len(self._waiting), self.path)

    def _flush(self) -> None:
        while self._waiting:
            try:
                write_all(self._ops, self._descriptor, self._waiting[0])
            except OSError as error:
                self._truncate(self._offset)
                if error.errno not in DISK_FULL:
                    raise
                if len(self._waiting) == 1:
                    _LOG.warning("disk full: rows of %s wait in memory", self.path)
                return
            self._offset += len(self._waiting.pop(0))

    def _repair(self) -> None:
        """Cut everything behind the last whole row; a whole row without its newline gets one."""
        size, window = self._offset, TAIL_BYTES
        while True:
            start = max(0, size - window)
            end, complete = _last_row_end(self._read(start, size), at_file_start=start == 0)
            if end is not None or start == 0:
                break
            window *= 4
        end = start + end if end is not None else 0
        if end < size:
            self._cut_torn(end, size)
        if not complete:
            write_all(self._ops, self._descriptor, _NEWLINE)
            self._offset += 1

    def _cut_torn(self, end: int, size: int) -> None:
        # A row is torn in one line. Several lines of text are somebody else's file: they are kept.
        head = self._read(end, min(size, end + TAIL_BYTES))
        foreign = head.count(_NEWLINE) > 1 and _is_text(head[: head.rfind(_NEWLINE)])
        orphan = self._write_orphan(self._parts(end, size)) if foreign else None
        kept = f"kept in {orphan.name}" if orphan else "now cut"
        _LOG.warning("%s ended in %d bytes that are no row, %s", self.path, size - end, kept)
        self._truncate(end)

    def _row_start(self, end: int) -> int:
        """Where the row begins whose bytes, or the first of them, end at `end`."""
        window = TAIL_BYTES
        while True:
            start = max(0, end - window)
            found = self._read(start, end - 1).rfind(_NEWLINE)
            if found >= 0 or start == 0:
                return start + found + 1
            window *= 4

    def _read(self, start: int, end: int) -> bytes:
        return b"".join(self._parts(start, end))

    def _parts(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes of the file; a descriptor of its own, as appending ones have no read position."""
        descriptor = self._ops.open_read(self.path)
        try:
            self._ops.seek(descriptor, start)
            left = end - start
            while left > 0 and (part := self._ops.read(descriptor, min(CHUNK_BYTES, left))):
                yield part
                left -= len(part)
        finally:
            close_quietly(self._ops, descriptor)

    def _truncate(self, size: int) -> None:
        self._ops.truncate(self._descriptor, size)
        self._offset = size

    def _write_orphan(self, rows: Iterable[bytes]) -> Path | None:
        """Where the rows are now; None when the disk is full."""
        taken, number = self._ops.list_dir(self.path.parent), 1
        while (name := f"{self.path.stem}.orphan-{number}{self.path.suffix}") in taken:
            number += 1
        path = self.path.with_name(name)
        try:
            write_file(self._ops, path, rows)
            self._ops.sync_dir(path.parent)
        except OSError as error:
            with suppress(OSError):
                self._ops.remove(path)
            if error.errno not in DISK_FULL:
                raise
            return None
        return path


def write_status(path: Path, row: Mapping[str, Any], *, ops: FileOps | None = None) -> bool:
    """Replace the status file at one stroke; False if that failed now and the old one stands.

    Not flushed, and on Windows not waited for while a viewer has it open: the next row comes soon.
    """
    if ops is None:
        ops = FileOps()
        ops.transient_wait_s = STATUS_WAIT_S
    data = orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_INDENT_2)
    try:
        replace_file(ops, path, data + _NEWLINE, durable=False)
    except OSError as error:
        _LOG.warning("%s was not updated: %s", path, error.strerror or error)
        return False
    return True


def _last_row_end(data: bytes, *, at_file_start: bool) -> tuple[int | None, bool]:
    """Where the last whole row ends in the tail of a file, and whether its newline is there.

    None: no row in this part. The piece before the first newline counts only at the file's start,
    elsewhere it may be the rest of a row.
    """
    end = len(data)
    while end > 0:
        start = data.rfind(_NEWLINE, 0, end) + 1
        if start == end:  # the newline of the row before
            start = data.rfind(_NEWLINE, 0, end - 1) + 1
        if start == 0 and not at_file_start:
            return None, True
        line = data[start:end].rstrip(b"\0")  # a file system may grow the file before it fills it
        if _is_row(line):
            return start + len(line), line.endswith(_NEWLINE)
        end = start
    return None, True


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _step_of(line: bytes) -> int:
    """Step of a row; 0 for what is no row with a step."""
    try:
        step = orjson.loads(line)["step"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return 0
    return step if isinstance(step, int) else 0


def _is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False
