"""A disk that remembers every write and every flush, in order, for what a power loss may leave.

`python -m tests.training.runtime.block_recorder DISK LOG` mounts a single file over DISK by the
FUSE protocol, spoken here directly (linux/fuse.h): a loop device on that file turns each write of
a file system's blocks into one WRITE request and each flush or barrier into one FSYNC. Both are
appended to LOG, with a mark for every line on standard input. dm-log-writes does the same inside
the kernel, where there is a device mapper. Needs root.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

WRITE, FLUSH, MARK = range(3)
ENTRY = struct.Struct("<BQI")
IN_HEADER, OUT_HEADER = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, READ, WRITE_FILE, STATFS = 1, 2, 3, 4, 14, 15, 16, 17
RELEASE, FSYNC, FLUSH_FILE, INIT, ACCESS, INTERRUPT, DESTROY, BATCH_FORGET = (
    18, 20, 25, 26, 34, 36, 38, 42,
)  # fmt: skip
WITHOUT_REPLY = (FORGET, BATCH_FORGET, INTERRUPT)
MAX_WRITE = 128 * 1024
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22


class Recorder:
    """Serves one file of fixed size from memory."""

    def __init__(self, disk: Path, log: Path) -> None:
        self.content = bytearray(disk.read_bytes())
        self.log = log.open("wb", buffering=0)
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode=100000,user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"recorder", bytes(disk), b"fuse", 0, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"cannot mount over {disk}")

    def note(self, kind: int, offset: int, data: bytes) -> None:
        self.log.write(ENTRY.pack(kind, offset, len(data)) + data)

    def serve(self) -> None:
        """Answer until the file is unmounted or standard input ends."""
        while True:
            ready, _, _ = select.select([self.device, sys.stdin.buffer.raw], [], [])
            if sys.stdin.buffer.raw in ready:
                line = sys.stdin.buffer.raw.readline()
                if not line:
                    return
                self.note(MARK, int(line), b"")
                print("noted", flush=True)
                continue
            try:
                request = os.read(self.device, MAX_WRITE + 8192)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                if error.errno == errno.ENOENT:  # a request that was interrupted meanwhile
                    continue
                raise
            self.answer(request)

    def answer(self, request: bytes) -> None:
        _, operation, unique, *_ = IN_HEADER.unpack_from(request)
        if operation in WITHOUT_REPLY:
            return
        body = self.reply_to(operation, request[IN_HEADER.size :])
        error, data = (-body, b"") if isinstance(body, int) else (0, body)
        os.write(self.device, OUT_HEADER.pack(OUT_HEADER.size + len(data), error, unique) + data)

    def reply_to(self, operation: int, body: bytes) -> bytes | int:
        """The reply's body, or the number of an error."""
        if operation == INIT:
            _, _, readahead, _ = struct.unpack_from("<IIII", body)
            return struct.pack(
                "<IIIIHHIIHHII24x", 7, 31, readahead, BIG_WRITES | MAX_PAGES, 16, 12, MAX_WRITE,
                1, MAX_WRITE // 4096, 0, 0, 0,
            )  # fmt: skip
        if operation in (GETATTR, SETATTR):
            return struct.pack("<QII", 3600, 0, 0) + self.attributes()
        if operation == OPEN:
            return struct.pack("<QII", 1, 0, 0)
        if operation == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return bytes(self.content[offset : offset + size])
        if operation == WRITE_FILE:
            _, offset, size = struct.unpack_from("<QQI", body)
            data = body[40 : 40 + size]
            self.content[offset : offset + size] = data
            self.note(WRITE, offset, data)
            return struct.pack("<II", size, 0)
        if operation == FSYNC:
            self.note(FLUSH, 0, b"")
            return b""
        if operation in (FLUSH_FILE, RELEASE, ACCESS, DESTROY):
            return b""
        return errno.ENOSYS

    def attributes(self) -> bytes:
        size = len(self.content)
        times, mode = (0,) * 6, stat.S_IFREG | 0o600
        return struct.pack("<6Q10I", 1, size, size // 512, *times[:3], *times[3:], mode, 1, 0, 0,
                           0, 4096, 0)  # fmt: skip


def read_log(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(kind, offset or number of the mark, data) of every entry."""
    data, place = path.read_bytes(), 0
    while place < len(data):
        kind, offset, size = ENTRY.unpack_from(data, place)
        place += ENTRY.size
        yield kind, offset, data[place : place + size]
        place += size


if __name__ == "__main__":
    recorder = Recorder(Path(sys.argv[1]), Path(sys.argv[2]))
    print("ready", flush=True)
    recorder.serve()
