"""Web archives over ranges: one gzip member at a time, and the text of the record within.

In the archives of Common Crawl every record is a gzip member of its own, so the offset of a member
is a position to resume at, and the member's own checksum says whether it arrived whole. Members are
unpacked here rather than by the archive parser because a parser that reads past damage reports no
offset to continue at. Sources: RFC 1952, the WARC 1.1 specification, fastwarc and resiliparse
(Bevendorff et al. 2018).
"""

import io
import math
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, Literal

from training.sources.base import SourceError
from training.sources.net import FileVersion, HttpClient

MAX_RECORD_BYTES = 16 << 20  # unpacked; Common Crawl itself cuts pages at 1 MiB
MAX_PAGE_BYTES = 2 << 20  # of HTML that is taken apart
MIN_PACKED_BYTES = 1 << 14  # fed to the inflater at a time
HEAD_BYTES = 512  # enough for an inflater to give its first words, code tables and all
_MAGIC = b"\x1f\x8b\x08"
_HTML_TYPES = ("text/html", "application/xhtml+xml")


class BadRecord(Exception):
    """A record that gives no text; `reason` is counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True, kw_only=True)
class Member:
    """One unpacked gzip member and where the next begins. `content` is None for one too large."""

    start: int
    stop: int
    content: bytes | None


class MemberReader:
    """The gzip members of a file on a server, from an offset on.

    With `executor` the next block is fetched while this one is read, unless `wanted_bytes` says
    that what is at hand will do.
    """

    def __init__(
        self,
        client: HttpClient,
        url: str,
        *,
        offset: int,
        version: FileVersion | None,
        block_bytes: int,
        executor: Executor | None = None,
    ) -> None:
        self._client = client
        self._url = url
        self._block_bytes = max(block_bytes, HEAD_BYTES)
        self._executor = executor
        self._pending: tuple[int, Future[tuple[bytes, FileVersion]]] | None = None
        self._block = memoryview(b"")
        self._block_start = 0
        self.version = version
        self.offset = offset  # of the next member
        self.wanted_bytes = math.inf  # from the offset on; a guess, which costs only time
        self._prefetch(offset)

    def next_member(self) -> Member | None:
        """The next member, None at the end of the file. SourceError `bad_gzip` for a damaged one.

        After an error the position is unchanged, and what was fetched is fetched anew.
        """
        start = position = self.offset
        inflater = zlib.decompressobj(wbits=31)
        content = bytearray()
        while not inflater.eof:
            packed = self._bytes_at(position)
            if not len(packed):
                if position == start:
                    return None
                raise self._damage(start, "the file ends within a record")
            packed = packed[:MIN_PACKED_BYTES]
            try:
                content += inflater.decompress(packed, MAX_RECORD_BYTES + 1 - len(content))
            except zlib.error as error:
                raise self._damage(start, str(error)) from error
            if len(content) > MAX_RECORD_BYTES:
                self.skip_damage()
                return Member(start=start, stop=self.offset, content=None)
            position += len(packed) - len(inflater.unused_data)
        self.offset = position
        return Member(start=start, stop=position, content=bytes(content))

    def skip_damage(self) -> None:
        """Go on to the next place after this one where a WARC record begins, or to the end."""
        position = self.offset + 1
        while len(stretch := self._at_least(len(_MAGIC), position)) >= len(_MAGIC):
            found = bytes(stretch).find(_MAGIC)
            if found < 0:
                position += len(stretch) - len(_MAGIC) + 1  # it may lie across two blocks
            elif self._begins_record(position + found):
                self.offset = position + found
                return
            else:
                position += found + 1
        self.offset = position + len(stretch)

    def close(self) -> None:
        """Let go of a block that is still being fetched."""
        if self._pending is not None:
            self._pending[1].cancel()
            self._pending = None

    def _begins_record(self, position: int) -> bool:
        head = bytes(self._at_least(HEAD_BYTES, position)[:HEAD_BYTES])
        try:
            return zlib.decompressobj(wbits=31).decompress(head, 5) == b"WARC/"
        except zlib.error:
            return False

    def _damage(self, start: int, what: str) -> SourceError:
        checksum = zlib.crc32(self._block)
        self._block = memoryview(b"")
        self.close()
        return SourceError(
            f"{self._url} at byte {start}: {what} (in a block with checksum {checksum:08x})",
            reason="bad_gzip",
            transient=True,
        )

    def _bytes_at(self, position: int) -> memoryview:
        """What is at hand from a position on, at least one byte unless the file ends there."""
        block_stop = self._block_start + len(self._block)
        if not self._block_start <= position < block_stop:
            if self.version is not None and position >= self.version.size:
                return memoryview(b"")
            content, self.version = self._fetch(position)
            self._block, self._block_start = memoryview(content), position
            self._prefetch(position + len(content))
        return self._block[position - self._block_start :]

    def _at_least(self, count: int, position: int) -> memoryview:
        """What is at hand from a position on, and `count` bytes if block and file are so long."""
        stretch = self._bytes_at(position)
        is_all = self.version is not None and position + len(stretch) >= self.version.size
        if len(stretch) < count and not is_all:
            self._block = memoryview(b"")
            stretch = self._bytes_at(position)
        return stretch

    def _fetch(self, position: int) -> tuple[bytes, FileVersion]:
        pending, self._pending = self._pending, None
        if pending is not None and pending[0] == position:
            return pending[1].result()
        if pending is not None:
            pending[1].cancel()
        return self._read_block(position, self.version)

    def _prefetch(self, position: int) -> None:
        is_past_end = self.version is not None and position >= self.version.size
        is_enough = position - self.offset >= self.wanted_bytes
        if self._executor is not None and not is_past_end and not is_enough:
            future = self._executor.submit(self._read_block, position, self.version)
            self._pending = (position, future)

    def _read_block(self, position: int, version: FileVersion | None) -> tuple[bytes, FileVersion]:
        return self._client.read_range(
            self._url, start=position, stop=position + self._block_bytes, version=version
        )


def open_text_reader(kind: str) -> Callable[[bytes], tuple[str, str] | None]:
    """A function from a record's bytes to (text, languages), for `wet` or `warc` archives.

    It returns None for a record of another type, and raises BadRecord. `languages` is the record's
    own header (`eng,deu`), empty where there is none.
    """
    try:
        return _TextReader(is_wet=kind == "wet")
    except ImportError as error:
        raise SourceError(
            "Common Crawl needs the packages fastwarc and resiliparse: pip install resiliparse",
            reason="missing_package",
            transient=False,
        ) from error


class _TextReader:
    """See open_text_reader. The libraries are imported when one is made, not with the module."""

    def __init__(self, *, is_wet: bool) -> None:
        from fastwarc.warc import ArchiveIterator, WarcRecordType
        from resiliparse.extract import html2text
        from resiliparse.parse import encoding

        self._is_wet = is_wet
        self._open = ArchiveIterator
        self._wanted = WarcRecordType.conversion if is_wet else WarcRecordType.response
        self._html2text = html2text
        self._encoding = encoding

    def __call__(self, content: bytes) -> tuple[str, str] | None:
        try:
            record = self._first_record(content, decode="all")
            if not self._is_alone(content):  # between records there is no position to resume at
                raise BadRecord("many_records")
            if record.record_type != self._wanted:
                return None
            languages = record.headers.get("WARC-Identified-Content-Language") or ""
            text = record.reader.read().decode() if self._is_wet else self._page(record, content)
        except UnicodeDecodeError as error:
            raise BadRecord("bad_utf8") from error
        except (OSError, LookupError, ValueError, RuntimeError) as error:
            raise BadRecord("bad_record") from error
        return text.strip(), languages

    def _first_record(self, content: bytes, *, decode: Literal["none", "all"]) -> Any:
        stream = io.BytesIO(content)
        records = self._open(stream, parse_http=not self._is_wet, auto_decode=decode)
        record = next(iter(records), None)
        if record is None:
            raise BadRecord("bad_record")
        return record

    def _is_alone(self, content: bytes) -> bool:
        records = iter(self._open(io.BytesIO(content), parse_http=False))
        return next(records, None) is None or next(records, None) is None

    def _page(self, record: Any, content: bytes) -> str:
        """The main text of a page."""
        try:
            page = _body_of(record)
        except OSError:
            # Many archives keep the headers of a packed body that they store unpacked, Common
            # Crawl's of 2014 among them.
            record = self._first_record(content, decode="none")
            page = _body_of(record)
            if page.lstrip()[:1] != b"<":
                raise
        encodings = self._encoding
        named = record.http_charset or encodings.detect_encoding(page, from_html_meta=True)
        encoding = encodings.map_encoding_to_html5(named or "utf-8") or "utf-8"
        return self._html2text.extract_plain_text(
            encodings.bytes_to_str(page, encoding),
            main_content=True,
            alt_texts=False,
            preserve_formatting=True,
        )


def _body_of(record: Any) -> bytes:
    """What a server answered, if it is a page."""
    if record.http_headers is None or record.http_headers.status_code != 200:
        raise BadRecord("http_status")
    if (record.http_content_type or "").lower() not in _HTML_TYPES:
        raise BadRecord("content_type")
    page = record.reader.read(MAX_PAGE_BYTES + 1)
    if len(page) > MAX_PAGE_BYTES:
        raise BadRecord("too_large")
    return page
