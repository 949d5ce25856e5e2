"""Readers of one local file: text and code, JSON lines, parquet.

Each gives one record after another, good or not, and a position after each, so that reading goes on
from any record without touching those before it: a byte offset with the frame it lies in, or a row
group and a row. Bad material becomes a reason, never an exception.

A parquet column is read as a dictionary column, because a value that stands in a file once and is
referred to a million times must not be unpacked a million times.
"""

import codecs
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from training.sources.byte_stream import (
    EXCESS_BYTES,
    MAX_RATIO,
    ByteWindow,
    DamagedFile,
    open_regular,
)
from training.sources.file_list import ListedFile

# A record may carry other fields, and JSON writes a character of three bytes in six.
_LINE_FACTOR = 4
_ID_CHARS = 512
_ROWS_PER_BATCH = 64
_READ_BUFFER_BYTES = 1 << 18


@dataclass(slots=True, kw_only=True, frozen=True)
class Record:
    """What stood at one place: the text, or the reason why it is left out. `key` is the record's
    number in its file, `own_id` the name that it carries itself."""

    key: int
    text: str = ""
    reason: str | None = None
    own_id: str | None = None


class Reader(Protocol):
    """A file being read. `position` is where the record after the last one begins."""

    @property
    def position(self) -> dict[str, int]: ...

    def read(self) -> Record | None:
        """The next record, None at the end. DamagedFile: the rest is lost; OSError."""
        ...

    def close(self) -> None: ...


def open_reader(
    file: ListedFile, *, position: dict[str, int], text_field: str, max_document_bytes: int
) -> Reader:
    """The reader of a file by its kind, at a position. DamagedFile, OSError."""
    if file.kind == "parquet":
        return ParquetReader(file, position, field=text_field, limit=max_document_bytes)
    if file.kind == "jsonl":
        return JsonReader(file, position, field=text_field, limit=max_document_bytes)
    return TextReader(file, position, limit=max_document_bytes)


def judge_text(text: str) -> str | None:
    """Why a text is no text: empty, or with a NUL, which is the mark of binary data."""
    if "\0" in text:
        return "binary"
    return None if text and not text.isspace() else "empty"


class TextReader:
    """A text as one record, or in pieces of at most `limit` bytes, cut at the end of a paragraph,
    line or word. Line ends become \\n and a byte-order mark goes."""

    def __init__(self, file: ListedFile, position: dict[str, int], *, limit: int) -> None:
        self._piece = position.get("piece", 0)
        self._limit = limit
        self._window = ByteWindow(file.path, codec=file.codec, size=file.size, position=position)

    @property
    def position(self) -> dict[str, int]:
        return {**self._window.position, "piece": self._piece}

    def read(self) -> Record | None:
        """The next piece; an empty file gives one empty record. A piece that is no text has a
        reason."""
        # The look-ahead lets the bomb rule speak before the first piece is given out.
        data = self._window.peek(self._limit + EXCESS_BYTES)
        if not data and self._piece:
            return None
        if len(data) > self._limit:
            data = data[: _cut(data, self._limit)]
        self._window.advance(len(data))
        text, reason = decode(data, is_first=self._piece == 0)
        record = Record(key=self._piece, text=text, reason=reason or judge_text(text))
        self._piece += 1
        return record

    def close(self) -> None:
        self._window.close()


def _cut(data: bytes, limit: int) -> int:
    """Where to end a piece: in the last half of the limit if any break is there."""
    for mark in (b"\n\n", b"\n", b" "):
        if (end := data.rfind(mark, limit // 2, limit)) >= 0:
            return end + len(mark)
    while limit > 1 and data[limit] & 0xC0 == 0x80:  # not inside a character
        limit -= 1
    return limit


def decode(data: bytes, *, is_first: bool) -> tuple[str, str | None]:
    """Text and None, or nothing and the reason."""
    try:
        if is_first and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = data.decode("utf-16")
        else:
            text = data.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError:
        return "", "binary" if b"\0" in data else "bad_utf8"
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, None


class JsonReader:
    """A JSON object a line; `field` holds the text, and a field `id` the record's own name."""

    def __init__(
        self, file: ListedFile, position: dict[str, int], *, field: str, limit: int
    ) -> None:
        self._row = position.get("row", 0)
        self._field = field
        self._limit = limit
        self._window = ByteWindow(file.path, codec=file.codec, size=file.size, position=position)
        self.fields: list[str] = []  # of the last record that lacked the field

    @property
    def position(self) -> dict[str, int]:
        return {**self._window.position, "row": self._row}

    def read(self) -> Record | None:
        """The record of the next line that is not blank; blank ones count in `key`."""
        while (found := self._window.read_line(limit=_LINE_FACTOR * self._limit)) is not None:
            line, is_whole = found
            key = self._row
            self._row += 1
            if not is_whole:
                return Record(key=key, reason="too_long")
            if key == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line and not line.isspace():
                return self._parse(line, key=key)
        return None

    def close(self) -> None:
        self._window.close()

    def _parse(self, line: bytes, *, key: int) -> Record:
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError:
            return Record(key=key, reason="bad_json")
        if not isinstance(row, dict):
            return Record(key=key, reason="bad_json")
        if self._field not in row:
            self.fields = list(row)
            return Record(key=key, reason="missing_field")
        text = row[self._field]
        if not isinstance(text, str):
            return Record(key=key, reason="wrong_type")
        if len(text) > self._limit or len(text.encode()) > self._limit:
            return Record(key=key, reason="too_long")
        own_id = row.get("id")
        if not (isinstance(own_id, str) and 0 < len(own_id) <= _ID_CHARS):
            own_id = None
        return Record(key=key, text=text, reason=judge_text(text), own_id=own_id)


def import_parquet() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet, or ValueError saying how to get them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            ".parquet files need the package pyarrow: python -m pip install pyarrow"
        ) from error
    return pyarrow, pyarrow.parquet


class ParquetReader:
    """The rows of a text column. Memory is bounded by one page, its dictionary and one record."""

    def __init__(
        self, file: ListedFile, position: dict[str, int], *, field: str, limit: int
    ) -> None:
        self._arrow, parquet = import_parquet()
        self._limit = limit
        self._field = field
        self._group = position.get("group", 0)
        self._row = position.get("row", 0)  # in the group
        self._decoded = position.get("decoded", 0)  # bytes of the group's values before that row
        self._rows_before = 0
        self._packed = 0
        self._batches: Any = None
        self._values: Any = None
        self._index = 0
        self._file = open_regular(file.path)
        if self._file.seek(0, 2) != file.size:
            self._file.close()
            raise DamagedFile("changed")
        self._table = self._guard(
            parquet.ParquetFile,
            self._file,
            read_dictionary=[field],
            buffer_size=_READ_BUFFER_BYTES,
            pre_buffer=False,
        )
        self.fields = list(self._table.schema_arrow.names)
        for group in range(min(self._group, self._table.num_row_groups)):
            self._rows_before += self._table.metadata.row_group(group).num_rows

    @property
    def position(self) -> dict[str, int]:
        return {"group": self._group, "row": self._row, "decoded": self._decoded}

    @property
    def has_text(self) -> bool:
        """Whether the column is there and holds text."""
        if self._field not in self.fields:
            return False
        kind = self._table.schema_arrow.field(self._field).type
        types = self._arrow.types
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    def read(self) -> Record | None:
        """The next row, null ones too; DamagedFile already at the first if the field is not
        there."""
        if not self.has_text:
            raise DamagedFile("missing_field" if self._field not in self.fields else "wrong_type")
        while self._values is None or self._index == len(self._values):
            if not self._next_values():
                return None
        value = self._values[self._index]
        key = self._rows_before + self._row
        self._index += 1
        self._row += 1
        return self._record(value, key=key)

    def close(self) -> None:
        self._file.close()

    def _record(self, value: Any, *, key: int) -> Record:
        if not value.is_valid:
            return Record(key=key, reason="empty")
        value = value.dictionary[value.index.as_py()] if hasattr(value, "dictionary") else value
        if not value.is_valid:
            return Record(key=key, reason="empty")
        size = value.as_buffer().size
        self._decoded += size
        if self._decoded - MAX_RATIO * self._packed > EXCESS_BYTES:
            raise DamagedFile("bomb")
        if size > self._limit:
            return Record(key=key, reason="too_long")
        try:
            text = value.as_py()
        except UnicodeDecodeError:
            return Record(key=key, reason="bad_utf8")
        return Record(key=key, text=text, reason=judge_text(text))

    def _next_values(self) -> bool:
        """Take the next batch of the group, or go to the next group; False after the last."""
        if self._batches is None:
            if self._group >= self._table.num_row_groups:
                return False
            self._packed = self._packed_bytes(self._table.metadata.row_group(self._group))
            self._batches = self._table.iter_batches(
                _ROWS_PER_BATCH, row_groups=[self._group], columns=[self._field], use_threads=False
            )
            passed = 0
        else:
            passed = self._row
        batch = self._guard(next, self._batches, None)
        while batch is not None and passed + len(batch) <= self._row:
            passed += len(batch)
            batch = self._guard(next, self._batches, None)
        if batch is None:
            self._rows_before += self._table.metadata.row_group(self._group).num_rows
            self._group, self._row, self._batches, self._values = self._group + 1, 0, None, None
            self._index = self._decoded = 0
            return self._group < self._table.num_row_groups
        self._values = batch.column(0)
        self._index = self._row - passed
        return True

    def _packed_bytes(self, group: Any) -> int:
        """Bytes of the text column in a row group. DamagedFile when they claim to be a bomb."""
        for index in range(group.num_columns):
            column = group.column(index)
            if column.path_in_schema == self._field:
                packed, plain = column.total_compressed_size, column.total_uncompressed_size
                if plain - MAX_RATIO * packed > EXCESS_BYTES:
                    raise DamagedFile("bomb")
                return packed
        raise DamagedFile("bad_parquet")

    def _guard(self, call: Any, *args: Any, **options: Any) -> Any:
        """A call of pyarrow whose complaints about the file become DamagedFile.

        pyarrow reports damaged pages as an OSError without a number; one with a number comes from
        the system and is passed on.
        """
        try:
            return call(*args, **options)
        except OSError as error:
            if error.errno is not None:
                raise
            raise DamagedFile("bad_parquet") from error
        except (self._arrow.ArrowException, ValueError, MemoryError) as error:
            raise DamagedFile("bad_parquet") from error
