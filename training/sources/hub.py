"""Text from any dataset of a Hugging Face hub, streamed row group by row group.

The files are read here with pyarrow, not with `datasets`, although they are found by its rules. Its
streaming resumes by reading the shard again from its start (FineWeb-Edu: up to 2 GB), takes a whole
file for the part that it asked for, does not notice a file replaced meanwhile, asks other hosts
than the hub, and imports for 330 MB. Here a position is (file, row group, row): resuming asks for
the file list, a footer and one row group, however far in. The dataset's revision is fixed when the
first document is asked for and stays so across a resume. Where a dataset has no parquet files, the
hub's own conversion is read (branch refs/convert/parquet).

Sources: the hub's HTTP interface; Penedo et al. 2024 (FineWeb-Edu and its score).
"""

import os
import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from training.sources.base import JSON, Document, SourceError, SourceExhausted
from training.sources.connection import Allow, allow_hosts
from training.sources.hub_listing import HubDataset
from training.sources.net import FileVersion, HttpClient
from training.sources.remote import (
    Patience,
    RemoteFile,
    as_passing,
    is_of_the_material,
    seeded_order,
    version_from_json,
    version_to_json,
)

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

DEFAULT_ENDPOINT = "https://huggingface.co"
ROWS_PER_BATCH = 256
READ_BYTES = 4 << 20  # of a column at a time
STATE_FORMAT = 1
_DATASET_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?\Z", re.ASCII)


@dataclass(slots=True, kw_only=True)
class _Position:
    """Where the source is, all of it. `file` counts in the epoch's order, `group` likewise."""

    epoch: int = 0
    revision: str = ""  # commit; empty until the hub was asked
    is_converted: bool = False
    file: int = 0
    group: int = 0
    row: int = 0
    version: FileVersion | None = None
    opening: Patience = field(default_factory=Patience)  # with this file
    reading: Patience = field(default_factory=Patience)  # with this row group
    documents: int = 0  # given out in this epoch


def hub_endpoint() -> str:
    """The hub's address: HF_ENDPOINT, as for every other program, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def hub_allow(endpoint: str) -> Allow:
    """The hub's host, and those from which the public hub serves its files."""
    host = urlsplit(endpoint).hostname or ""
    return allow_hosts(host, "huggingface.co", ".huggingface.co", "hf.co", ".hf.co")


class HubSource:
    """The rows of one split as documents.

    `text_field`: a field of text, or several of them, joined by `template` (names of fields in
    braces; blank lines between the fields where it is None). `min_score`: rows whose `score_field`
    is below it are left out. `shuffle_seed` draws an order of files and row groups for every epoch;
    None keeps their own. `token` is sent to the endpoint alone.
    """

    def __init__(
        self,
        dataset: str,
        *,
        name: str,
        config: str | None = None,
        split: str = "train",
        text_field: str | tuple[str, ...] = "text",
        template: str | None = None,
        min_score: float | None = None,
        score_field: str | None = None,
        token: str | None = None,
        revision: str | None = None,
        shuffle_seed: int | None = None,
        client: HttpClient | None = None,
        endpoint: str | None = None,
    ) -> None:
        if not _DATASET_NAME.match(dataset):
            raise ValueError(f"{dataset!r} is no name of a dataset; it should be like owner/name")
        self.name = name
        self.rejected: Counter[str] = Counter()
        self._dataset = dataset
        self._config = config
        self._split = split
        self._fields = (text_field,) if isinstance(text_field, str) else tuple(text_field)
        self._template = _checked_template(template, self._fields)
        self._min_score = min_score
        self._score_field = None if min_score is None else score_field or "score"
        self._revision = revision
        self._shuffle_seed = shuffle_seed
        endpoint = endpoint or hub_endpoint()
        self._owns_client = client is None
        self._client = client or HttpClient(read_timeout_s=10.0, allow=hub_allow(endpoint))
        self._hub = HubDataset(
            dataset,
            endpoint=endpoint,
            client=self._client,
            headers={"Authorization": f"Bearer {token}"} if token else {},
        )
        self._files: list[str] | None = None  # in the epoch's order
        self._file: RemoteFile | None = None
        self._parquet: ParquetFile | None = None
        self._groups: list[int] = []  # of the open file, in the epoch's order
        self._rows: Iterator[dict[str, Any]] | None = None
        self._position = _Position()

    def identity(self) -> dict[str, JSON]:
        """What decides the order. The commit is part of the state."""
        return {
            "source": "hub",
            "dataset": self._dataset,
            "config": self._config,
            "split": self._split,
            "fields": list(self._fields),
            "template": self._template,
            "min_score": self._min_score,
            "score_field": self._score_field,
            "revision": self._revision,
            "shuffle_seed": self._shuffle_seed,
        }

    def next_document(self) -> Document:
        """The next row that has text and score enough."""
        if self._files is None:
            self._files = self._list_files()
        position = self._position
        while position.file < len(self._files):
            row = self._next_row()
            if row is None:
                continue
            place = f"{self._files[position.file]}#{self._groups[position.group]}.{position.row}"
            position.row += 1
            text = self._text_of(row)
            if text:
                position.documents += 1
                return Document(id=f"{self._dataset}/{place}", source=self.name, text=text)
        if position.documents == 0:
            raise SourceError(
                f"dataset {self._dataset} gave no document; left out: "
                f"{dict(self.rejected) or 'nothing'}",
                reason="no_documents",
                transient=False,
            )
        raise SourceExhausted(f"epoch {position.epoch} of {self._dataset}")

    def state_dict(self) -> dict[str, JSON]:
        return {
            "format": STATE_FORMAT,
            **asdict(self._position),
            "version": version_to_json(self._position.version),
            "rejected": dict(self.rejected),
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        if state.get("format") != STATE_FORMAT:
            raise ValueError(f"this is no position of the dataset source {self._dataset}")
        fields: dict[str, Any] = {**state, "version": version_from_json(state["version"])}
        for name in ("opening", "reading"):
            fields[name] = Patience(**state[name])
        del fields["format"]
        self.rejected = Counter(fields.pop("rejected"))
        self._let_go()
        self._files = None
        self._position = _Position(**fields)

    def rewind(self, *, epoch: int) -> None:
        """Begin an epoch over the same revision."""
        previous = self._position
        self._let_go()
        self._files = None
        self._position = _Position(
            epoch=epoch, revision=previous.revision, is_converted=previous.is_converted
        )

    def close(self) -> None:
        self._let_go()
        if self._owns_client:
            self._client.close()

    def _next_row(self) -> dict[str, Any] | None:
        """The row at the position; None when the position went on to another group or file."""
        try:
            import pyarrow
        except ImportError as error:
            raise SourceError(
                "hub datasets need the package pyarrow: pip install pyarrow",
                reason="missing_package",
                transient=False,
            ) from error
        position = self._position
        try:
            if self._parquet is None:
                self._open_file()
            if position.group >= len(self._groups):
                self._next_file()
                return None
            if self._rows is None:
                self._rows = self._read_group(skip=position.row)
            row = next(self._rows, None)
        except SourceError as error:
            self._meet(error)
            if is_of_the_material(error):
                raise as_passing(error) from error
            raise self._hub.user_error(error) from error
        except (pyarrow.ArrowException, OSError) as error:
            checksum = self._file.checksum if self._file else 0
            damage = SourceError(
                f"{self._dataset}: {self._current_path()}: {error} "
                f"(last read with checksum {checksum:08x})",
                reason="bad_parquet",
                transient=True,
            )
            self._meet(damage)
            raise damage from error
        position.reading.renew()
        if row is None:
            self._next_group()
        return row

    def _open_file(self) -> None:
        from pyarrow.parquet import ParquetFile

        path = self._current_path()
        self._file = file = RemoteFile(
            self._client,
            self._hub.url_of(path, revision=self._position.revision),
            headers=self._hub.headers,
            version=self._position.version,
        )
        parquet = ParquetFile(
            file, pre_buffer=False, buffer_size=READ_BYTES, page_checksum_verification=True
        )
        self._check_fields(parquet)
        self._position.version = file.version
        self._position.opening.renew()
        self._parquet = parquet
        self._groups = list(range(parquet.num_row_groups))
        if self._shuffle_seed is not None:
            names = [str(group) for group in self._groups]
            salt = f"{self._position.epoch}/{path}"
            order = seeded_order(names, seed=self._shuffle_seed, salt=salt)
            self._groups = [int(group) for group in order]

    def _read_group(self, *, skip: int) -> Iterator[dict[str, Any]]:
        """The rows of a row group from a row on, a batch in memory at a time."""
        assert self._parquet is not None
        batches = self._parquet.iter_batches(
            batch_size=ROWS_PER_BATCH,
            row_groups=[self._groups[self._position.group]],
            columns=[*self._fields, *([self._score_field] if self._score_field else [])],
            use_threads=False,
        )
        for batch in batches:
            if skip >= batch.num_rows:
                skip -= batch.num_rows
                continue
            yield from batch.slice(skip).to_pylist()
            skip = 0

    def _text_of(self, row: dict[str, Any]) -> str:
        """A row's text, empty and counted when it is left out."""
        if self._score_field:
            score = row[self._score_field]
            if score is None or not score >= self._min_score:
                self.rejected["low_score"] += 1
                return ""
        values = [row[field] for field in self._fields]
        if any(value is None or not value.strip() for value in values):
            self.rejected["empty"] += 1
            return ""
        if self._template is None:
            return "\n\n".join(values)
        return self._template.format(**dict(zip(self._fields, values, strict=True)))

    def _check_fields(self, parquet: "ParquetFile") -> None:
        """SourceError with the fields there are when a wanted one is missing or of another type."""
        from pyarrow import types

        schema = parquet.schema_arrow
        texts = [
            field.name
            for field in schema
            if types.is_string(field.type) or types.is_large_string(field.type)
        ]
        numbers = [
            field.name
            for field in schema
            if types.is_floating(field.type) or types.is_integer(field.type)
        ]
        for wanted, have, kind in (
            *((name, texts, "text") for name in self._fields),
            *([(self._score_field, numbers, "numbers")] if self._score_field else []),
        ):
            if wanted not in have:
                raise SourceError(
                    f"dataset {self._dataset} has no field {wanted!r} of {kind}; "
                    f"it has: {', '.join(have) or 'none at all'}",
                    reason="wrong_field",
                    transient=False,
                )

    def _meet(self, error: SourceError) -> None:
        """Forget what was read, and leave a damaged place out when it was met often enough."""
        position = self._position
        was_open = self._parquet is not None
        self._let_go()
        if not is_of_the_material(error):
            return
        if error.reason == "changed":  # files of a commit do not change: one reply was wrong
            position.version = None
        patience = position.reading if was_open else position.opening
        if patience.is_spent_by(error):
            self.rejected[error.reason] += 1
            if was_open:
                self._next_group()
            else:
                self._next_file()

    def _next_group(self) -> None:
        self._rows = None
        self._position.group += 1
        self._position.row = 0
        self._position.reading.renew()

    def _next_file(self) -> None:
        self._let_go()
        position = self._position
        position.file += 1
        position.group = position.row = 0
        position.opening.renew()
        position.reading.renew()
        position.version = None

    def _let_go(self) -> None:
        self._rows = None
        self._parquet = None
        self._file = None

    def _current_path(self) -> str:
        assert self._files is not None
        return self._files[self._position.file]

    def _list_files(self) -> list[str]:
        """The split's files in the epoch's order, at the revision that this run is fixed to."""
        position = self._position
        listing = self._hub.list_files(
            config=self._config,
            split=self._split,
            revision=position.revision or self._revision,
            is_converted=position.is_converted,
        )
        position.revision = listing.revision
        position.is_converted = listing.is_converted
        if self._shuffle_seed is None:
            return listing.files
        return seeded_order(listing.files, seed=self._shuffle_seed, salt=str(position.epoch))


def _checked_template(template: str | None, fields: tuple[str, ...]) -> str | None:
    """The template, whose braces may hold nothing but the names of the fields."""
    if template is None:
        return None
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise ValueError(f"the format {template!r} cannot be read: {error}") from error
    if named != set(fields):
        raise ValueError(
            f"the format {template!r} should name exactly these fields: {', '.join(fields)}"
        )
    return template
