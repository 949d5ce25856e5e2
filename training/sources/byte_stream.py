"""Decoded bytes of a plain, gzip, zstd or xz file in small chunks, restartable near any position.

A compressed file is a sequence of frames (members, streams), and decoding can begin at any of them:
a `Mark` names the frame's offset and the decoded bytes before it, so a position deep in a file of
many frames is reached without decoding what lies before. A file of one frame is decoded from its
start.

A decompression bomb is found by how it is made, not by its size: text packs 3 to 20 times, a bomb
a thousand times and more. Output beyond `MAX_RATIO` times the input is summed up, the sum falls
again while the file behaves, and a file whose sum passes `EXCESS_BYTES` is given up. Input is fed
in slices so small that a single call cannot unpack more than 17 MB.

Formats: RFC 1952 (gzip), RFC 8878 (zstd), the .xz format 1.2.
"""

import lzma
import os
import stat
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Codec = Literal["gzip", "zstd", "xz"]
CODEC_OF_SUFFIX: dict[str, Codec] = {".gz": "gzip", ".zst": "zstd", ".xz": "xz"}
CHUNK_BYTES = 1 << 16
MAX_RATIO = 200
EXCESS_BYTES = 3 << 19
# The worst a slice can unpack to: 1,032 a byte in gzip, 32,768 in zstd, about 7,000 in xz.
_SLICE_BYTES: dict[Codec, int] = {"gzip": 4096, "zstd": 512, "xz": 2048}
_MAX_WINDOW_BYTES = 1 << 27  # what `zstd --long` and `--ultra -22` ask for at most
_XZ_MEMORY_BYTES = 80 << 20  # preset -9 needs 65 MiB


class DamagedFile(Exception):
    """The rest of a file cannot be used; `reason` is the word that is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True, frozen=True)
class Mark:
    """A place where decoding can begin: offset in the file, decoded bytes before it, and the sum
    of the bomb rule there, so that a resumed file is judged as an unbroken one."""

    packed: int = 0
    plain: int = 0
    excess: int = 0


def open_regular(path: Path) -> Any:
    """A binary file that is a regular one; never waits on a pipe. OSError, DamagedFile."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))

    try:
        file = open(path, "rb", opener=opener)
    except FileNotFoundError as error:
        raise DamagedFile("vanished") from error
    except (PermissionError, IsADirectoryError) as error:
        raise DamagedFile("unreadable") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedFile("not_a_file")
    return file


def import_zstandard() -> Any:
    """The zstandard module, or ValueError saying how to get it."""
    try:
        import zstandard
    except ImportError as error:
        raise ValueError(
            ".zst files need the package zstandard: python -m pip install zstandard"
        ) from error
    return zstandard


class ByteStream:
    """The decoded bytes of the first `size` bytes of a file, from a mark on.

    Reading stops at `size`, the file's length when it was listed: what a writer appends meanwhile
    does not change what follows.
    """

    def __init__(
        self, path: Path, *, codec: Codec | None, size: int, mark: Mark | None = None
    ) -> None:
        self.mark = mark or Mark()  # of the frame that the last chunk belongs to
        self._codec: Codec | None = codec
        self._size = size
        self._offset = self.mark.packed
        self._plain = self.mark.plain
        self._excess = self.mark.excess
        self._decoder: Any = None
        self._failures: tuple[type[Exception], ...] = ()
        self._file = open_regular(path)
        self._file.seek(self._offset)

    def read_chunk(self) -> bytes:
        """The next decoded bytes, all of one frame; empty at the end. DamagedFile, OSError."""
        if self._codec is None:
            self.mark = Mark(packed=self._offset, plain=self._offset)
            return self._read(CHUNK_BYTES)
        while (decoder := self._decoder or self._begin_frame()) is not None:
            data = self._read(_SLICE_BYTES[self._codec])
            if not data:
                raise DamagedFile(f"truncated_{self._codec}")
            try:
                chunk = decoder.decompress(data)
            except self._failures as error:
                raise DamagedFile(f"bad_{self._codec}") from error
            self._plain += len(chunk)
            used = len(data)
            if decoder.eof:
                # The next frame is read from its first byte, so slices fall as after a resume.
                used -= len(decoder.unused_data)
                self._offset -= len(decoder.unused_data)
                self._file.seek(self._offset)
                self._decoder = None
            self._excess = max(0, self._excess + len(chunk) - MAX_RATIO * used)
            if self._excess > EXCESS_BYTES:
                raise DamagedFile("bomb")
            if chunk:
                return chunk
        return b""

    def close(self) -> None:
        """Close the file, which the stream has opened itself."""
        self._file.close()

    def _read(self, size: int) -> bytes:
        data = self._file.read(max(0, min(size, self._size - self._offset)))
        self._offset += len(data)
        if not data and self._offset < self._size:
            raise DamagedFile("shrunk")
        return data

    def _begin_frame(self) -> Any:
        """The decoder of the next frame, None at the end; zero padding before it is passed."""
        is_first = self._offset == 0
        while head := self._read(CHUNK_BYTES):
            padding = 0 if is_first else len(head) - len(head.lstrip(b"\0"))
            if padding < len(head):
                self._offset -= len(head) - padding
                self._file.seek(self._offset)
                self._decoder, self._failures = _decoder_of(self._codec)
                self.mark = Mark(packed=self._offset, plain=self._plain, excess=self._excess)
                return self._decoder
        return None


def _decoder_of(codec: Codec | None) -> tuple[Any, tuple[type[Exception], ...]]:
    """A decoder of one frame, and what it raises on bytes that are none."""
    if codec == "gzip":
        return zlib.decompressobj(wbits=31), (zlib.error,)
    if codec == "xz":
        decoder = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
        return decoder, (lzma.LZMAError,)
    zstandard = import_zstandard()
    decoder = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()
    return decoder, (zstandard.ZstdError,)


class ByteWindow:
    """Records cut from a stream: a buffer that grows to a record's end and no further.

    `position` is where the next record begins, as a small plain value that the constructor takes.
    """

    def __init__(
        self,
        path: Path,
        *,
        codec: Codec | None,
        size: int,
        position: dict[str, int] | None = None,
    ) -> None:
        place = position or {}
        mark = Mark(**{key: place.get(key, 0) for key in ("packed", "plain", "excess")})
        offset = place.get("offset", 0)
        if codec is None:
            mark = Mark(packed=offset, plain=offset)
        self._stream = ByteStream(path, codec=codec, size=size, mark=mark)
        self._marks = [mark]
        self._buffer = bytearray()
        self._start = mark.plain  # decoded offset of the buffer's first byte
        self._at = 0  # index in the buffer of the next record
        while self.offset + len(self._buffer) < offset and self._more():
            self._drop(min(len(self._buffer), offset - self._start))
        self._at = offset - self._start

    @property
    def offset(self) -> int:
        """Decoded bytes before the next record."""
        return self._start + self._at

    @property
    def position(self) -> dict[str, int]:
        """A frame's mark and `offset`, the decoded bytes before the record; drops marks left
        behind."""
        while len(self._marks) > 1 and self._marks[1].plain <= self.offset:
            self._marks.pop(0)
        return {**asdict(self._marks[0]), "offset": self.offset}

    def read_line(self, *, limit: int) -> tuple[bytes, bool] | None:
        """The next line without its end, and whether it is whole: a line above `limit` bytes is
        passed over. None at the end of the file."""
        search = self._at
        while (end := self._buffer.find(b"\n", search)) < 0:
            if len(self._buffer) - self._at > limit:
                return self._pass_line()
            search = len(self._buffer)
            at_before = self._at
            if not self._more():
                end = len(self._buffer)
                if end == self._at:
                    return None
                break
            search -= at_before - self._at
        line = bytes(memoryview(self._buffer)[self._at : min(end, self._at + limit)])
        is_whole = end - self._at <= limit
        self._at = min(end + 1, len(self._buffer))
        return line, is_whole

    def peek(self, size: int) -> bytes:
        """The next `size` bytes, fewer at the end; the place does not move."""
        while len(self._buffer) - self._at < size and self._more():
            pass
        return bytes(memoryview(self._buffer)[self._at : self._at + size])

    def advance(self, size: int) -> None:
        """Move on by `size` bytes that `peek` has shown."""
        self._at += size

    def close(self) -> None:
        """Close the stream; the position stays readable."""
        self._stream.close()

    def _more(self) -> bool:
        """Append a chunk; False at the end. What lies before the next record is dropped first."""
        self._drop(self._at)
        chunk = self._stream.read_chunk()
        if chunk and self._stream.mark != self._marks[-1]:
            self._marks.append(self._stream.mark)
        self._buffer += chunk
        return bool(chunk)

    def _drop(self, size: int) -> None:
        del self._buffer[:size]
        self._start += size
        self._at = max(0, self._at - size)

    def _pass_line(self) -> tuple[bytes, bool]:
        while (end := self._buffer.find(b"\n", self._at)) < 0:
            self._at = len(self._buffer)
            _ = self.position  # forget the marks that lie behind
            if not self._more():
                return b"", False
        self._at = end + 1
        return b"", False
