"""Files and folders of the user's own: text, Markdown, source code, JSON lines, parquet, packed or
not.

Files come in the order of their names. A position is a file's number and a place inside it, so
resuming costs the same however far in. Whatever is wrong with a file or a record is counted by
reason and left out; only trouble with the machine (input/output errors, too many open files) is
raised, because there trying again helps.

Records of JSON lines that carry their own `id` keep it, which makes the split between training and
validation that of the corpus they come from (scripts/fetch_corpus.py).
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from training.sources.base import JSON, Document, SourceError, SourceExhausted
from training.sources.byte_stream import DamagedFile, import_zstandard
from training.sources.file_list import check_same_files, digest_of, list_files
from training.sources.file_readers import (
    JsonReader,
    ParquetReader,
    Reader,
    import_parquet,
    open_reader,
)

LOCAL_KINDS = ("text", "code", "jsonl", "parquet")
MAX_DOCUMENT_BYTES = 2 << 20
_PROBED_FILES = 8
_PROBED_RECORDS = 100


class LocalSource:
    """A DocumentSource of local files; see the module. Building it lists the files and looks at the
    first records.

    paths: files and folders. kinds: the kinds to read of a folder (`text`, `code`, `jsonl`,
    `parquet`), all by default. text_field: the field or column of the text. max_document_bytes:
    longer records are left out, longer texts are cut into pieces. ValueError in one line for a
    mistake of the user.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        *,
        kinds: Iterable[str] | None = None,
        text_field: str = "text",
        max_document_bytes: int = MAX_DOCUMENT_BYTES,
        name: str = "local",
        flag: str = "--local-path",
    ) -> None:
        wanted = tuple(kinds or LOCAL_KINDS)
        if unknown := sorted(set(wanted) - set(LOCAL_KINDS)):
            raise ValueError(
                f"{flag}: unknown kind {unknown[0]!r}; known: {', '.join(LOCAL_KINDS)}"
            )
        if max_document_bytes < 1:
            raise ValueError("max_document_bytes must be at least 1")
        self.name = name
        self.rejected: Counter[str] = Counter()
        self._field = text_field
        self._limit = max_document_bytes
        self._files, self._left_out = list_files(paths, kinds=wanted, flag=flag)
        self.rejected += self._left_out
        self._identity = {
            "kind": "local",
            "files": digest_of(self._files),
            "text_field": text_field,
            "max_document_bytes": max_document_bytes,
        }
        self._index = 0
        self._position: dict[str, int] = {}
        self._reader: Reader | None = None
        self._check_packages()
        self._probe(flag)

    def identity(self) -> dict[str, JSON]:
        """Names and sizes of the files as a hash, and the settings that shape documents."""
        return dict(self._identity)

    def next_document(self) -> Document:
        """The next good record. SourceError (transient) when the machine, not the file, fails."""
        while self._index < len(self._files):
            file = self._files[self._index]
            try:
                record = self._open().read()
            except DamagedFile as damage:
                self.rejected[damage.reason] += 1
                record = None
            except OSError as error:
                self._close_reader()
                raise SourceError(
                    f"{file.path}: {error.strerror or error}", reason="io_error", transient=True
                ) from error
            if record is None:
                self._close_reader()
                self._index, self._position = self._index + 1, {}
                continue
            if self._reader is not None:
                self._position = self._reader.position
            if record.reason is None:
                identifier = record.own_id or f"{file.name}#{record.key}"
                return Document(id=identifier, source=self.name, text=record.text)
            self.rejected[record.reason] += 1
        raise SourceExhausted(f"{self.name}: all {len(self._files)} files are read")

    def state_dict(self) -> dict[str, JSON]:
        """File, place in it, and what has been left out so far."""
        return {
            "files": self._identity["files"],
            "index": self._index,
            "position": dict(self._position),
            "rejected": dict(self.rejected),
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Go to a saved place. ValueError when it belongs to other files."""
        check_same_files(state, digest=self._identity["files"], name=self.name)
        self._close_reader()
        self._index = state["index"]
        self._position = dict(state["position"])
        self.rejected.clear()
        self.rejected.update(state["rejected"])

    def rewind(self, *, epoch: int) -> None:
        """Begin at the first file again; every epoch has the same order."""
        self._close_reader()
        self._index, self._position = 0, {}

    def close(self) -> None:
        self._close_reader()

    def _open(self) -> Reader:
        if self._reader is None:
            self._reader = open_reader(
                self._files[self._index],
                position=self._position,
                text_field=self._field,
                max_document_bytes=self._limit,
            )
        return self._reader

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _check_packages(self) -> None:
        if any(file.kind == "parquet" for file in self._files):
            import_parquet()
        if any(file.codec == "zstd" for file in self._files):
            import_zstandard()

    def _probe(self, flag: str) -> None:
        """Complain before training when no record at the front has the text field.

        The first files of the kinds with fields are looked at; damaged ones say nothing.
        """
        seen: Any = None
        structured = [file for file in self._files if file.kind in ("jsonl", "parquet")]
        for file in structured[:_PROBED_FILES]:
            try:
                reader = open_reader(
                    file, position={}, text_field=self._field, max_document_bytes=self._limit
                )
            except (DamagedFile, OSError):
                continue
            try:
                fields = _fields_without_text(reader)
            except (DamagedFile, OSError):
                continue
            finally:
                reader.close()
            if fields is None:
                return
            seen = seen or (file.path, fields)
        if seen:
            path, fields = seen
            raise ValueError(
                f"{flag} {path}: no text field {self._field!r} in the first records; "
                f"fields there: {', '.join(fields[:12])}"
            )


def _fields_without_text(reader: Reader) -> list[str] | None:
    """The fields of a file whose first records lack the text field; None if one has it."""
    if isinstance(reader, ParquetReader):
        return None if reader.has_text else reader.fields
    assert isinstance(reader, JsonReader)
    for _ in range(_PROBED_RECORDS):
        record = reader.read()
        if record is None:
            break
        if record.reason not in ("missing_field", "wrong_type"):
            return None
    return reader.fields or None
