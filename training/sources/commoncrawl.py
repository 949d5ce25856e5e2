"""Text of Common Crawl, read over HTTP ranges: the newest crawls, some files of each, interleaved.

`parallel_files` files are open at a time and give a record each in turn, so that neighbours in the
stream come from different places; with more than one their blocks are fetched concurrently, which
changes the waiting and never the order. A position is, per open file, the byte offset of its next
record: resuming asks for the listings of the crawls and one block per open file, however far in.
The crawls are fixed by name when the first document is asked for and stay so across a resume; a
later epoch takes the next files of their shuffled listings.

Sources: commoncrawl.org, "Get started" (collinfo.json, wet.paths.gz, warc.paths.gz).
"""

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from training.sources.base import JSON, Document, SourceError, SourceExhausted
from training.sources.net import FileVersion, HttpClient
from training.sources.remote import (
    Patience,
    as_passing,
    is_of_the_material,
    seeded_order,
    version_from_json,
    version_to_json,
)
from training.sources.warc import BadRecord, MemberReader, open_text_reader

HOSTS = ("data.commoncrawl.org", "index.commoncrawl.org")
INDEX_URL = "https://index.commoncrawl.org/collinfo.json"
DATA_URL = "https://data.commoncrawl.org"
BLOCK_BYTES = 1 << 19
MAX_LISTING_BYTES = 64 << 20
STATE_FORMAT = 1

TextReader = Callable[[bytes], tuple[str, str] | None]


@dataclass(slots=True, kw_only=True)
class _Slot:
    """One of the files that are read in turn. `file` counts the epoch's files."""

    file: int
    offset: int = 0
    records: int = 0
    version: FileVersion | None = None
    patience: Patience = field(default_factory=Patience)
    skips_damage: bool = False

    def advance(self, stride: int) -> None:
        """Go on to this slot's next file."""
        self.file += stride
        self.offset = self.records = 0
        self.patience.renew()
        self.version = None
        self.skips_damage = False


@dataclass(slots=True, kw_only=True)
class _Position:
    """Where the source is, all of it."""

    epoch: int = 0
    crawls: list[str] = field(default_factory=list)  # empty until the index was read
    listings: dict[str, str] = field(default_factory=dict)  # crawl: hash of its list of files
    turn: int = 0
    documents: int = 0  # given out in this epoch
    slots: list[_Slot] = field(default_factory=list)


class CommonCrawlSource:
    """Documents from WET (extracted text) or WARC (pages, main text extracted here) files.

    `crawls`: how many of the newest crawls. `records_per_file`: records of the wanted type read per
    file, whatever becomes of them. `languages`: accepted values of the first language that a WET
    record names (ISO 639-3), empty for all; a record that names none passes.
    """

    name = "commoncrawl"

    def __init__(
        self,
        *,
        client: HttpClient,
        crawls: int,
        wet_paths_per_crawl: int,
        records_per_file: int,
        kind: Literal["wet", "warc"] = "wet",
        languages: tuple[str, ...] = ("eng",),
        parallel_files: int = 1,
        seed: int = 0,
        index_url: str = INDEX_URL,
        data_url: str = DATA_URL,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        counts = (crawls, wet_paths_per_crawl, records_per_file, parallel_files)
        if min(counts) < 1:
            raise ValueError(
                "--commoncrawl-latest-crawls, --commoncrawl-wet-paths-per-crawl, "
                "--commoncrawl-records-per-file and --commoncrawl-parallel-files must be at least "
                f"1, not {counts}"
            )
        self.rejected: Counter[str] = Counter()
        self._client = client
        self._num_crawls = crawls
        self._paths_per_crawl = wet_paths_per_crawl
        self._records_per_file = records_per_file
        self._kind = kind
        self._languages = frozenset(languages)
        self._parallel_files = parallel_files
        self._seed = seed
        self._index_url = index_url
        self._data_url = data_url.rstrip("/")
        self._block_bytes = block_bytes
        self._executor = (
            ThreadPoolExecutor(parallel_files, thread_name_prefix="commoncrawl")
            if parallel_files > 1
            else None
        )
        self._listings: dict[str, list[str]] = {}
        self._files: list[str] | None = None  # of this epoch
        self._readers: dict[int, MemberReader] = {}  # by slot
        self._read_text: TextReader | None = None
        self._position = self._start(epoch=0)

    def identity(self) -> dict[str, JSON]:
        """What decides the order. The crawls themselves are part of the state: new ones appear."""
        return {
            "source": self.name,
            "kind": self._kind,
            "crawls": self._num_crawls,
            "wet_paths_per_crawl": self._paths_per_crawl,
            "records_per_file": self._records_per_file,
            "languages": sorted(self._languages),
            "parallel_files": self._parallel_files,
            "seed": self._seed,
        }

    def next_document(self) -> Document:
        """The next record with text; slots that have no file left are passed over."""
        if self._read_text is None:
            self._read_text = open_text_reader(self._kind)
        if self._files is None:
            self._files = self._choose_files()
            self._open_ahead()
        position = self._position
        while any(slot.file < len(self._files) for slot in position.slots):
            number = position.turn % self._parallel_files
            if position.slots[number].file < len(self._files):
                document = self._read_slot(number)
                if document is None:
                    continue
                position.documents += 1
                position.turn = number + 1
                return document
            position.turn = number + 1
        if position.documents == 0:
            raise SourceError(
                f"Common Crawl gave no document in {len(self._files)} files; "
                f"left out: {dict(self.rejected) or 'nothing'}",
                reason="no_documents",
                transient=False,
            )
        raise SourceExhausted(f"epoch {position.epoch} of {self.name}")

    def state_dict(self) -> dict[str, JSON]:
        position = asdict(self._position)
        for slot, saved in zip(self._position.slots, position["slots"], strict=True):
            saved["version"] = version_to_json(slot.version)
        return {"format": STATE_FORMAT, **position, "rejected": dict(self.rejected)}

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        if state.get("format") != STATE_FORMAT or len(state["slots"]) != self._parallel_files:
            raise ValueError("this is no position of this Common Crawl source")
        self._let_go()
        fields: dict[str, Any] = {**state}
        del fields["format"]
        self.rejected = Counter(fields.pop("rejected"))
        slots = [
            _Slot(
                **{
                    **saved,
                    "version": version_from_json(saved["version"]),
                    "patience": Patience(**saved["patience"]),
                }
            )
            for saved in fields.pop("slots")
        ]
        self._position = _Position(**fields, slots=slots)

    def rewind(self, *, epoch: int) -> None:
        """Begin an epoch with the next files of the same crawls."""
        previous = self._position
        self._let_go()
        self._position = self._start(epoch=epoch)
        self._position.crawls = previous.crawls
        self._position.listings = previous.listings

    def close(self) -> None:
        self._let_go()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, *, epoch: int) -> _Position:
        slots = [_Slot(file=number) for number in range(self._parallel_files)]
        return _Position(epoch=epoch, slots=slots)

    def _let_go(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
        self._files = None

    def _read_slot(self, number: int) -> Document | None:
        """A slot's next record as a document; None when it gave none or its file is done."""
        slot = self._position.slots[number]
        try:
            reader = self._reader_of(number)
            if slot.records:
                bytes_per_record = slot.offset / slot.records
                reader.wanted_bytes = bytes_per_record * (self._records_per_file - slot.records)
            member = reader.next_member()
        except SourceError as error:
            self._close_reader(number)
            if is_of_the_material(error):
                self._meet_damage(slot, error)
                raise as_passing(error) from error
            if error.reason == "http_403":  # the answer to those who ask too fast
                raise as_passing(error) from error
            raise
        if member is None:
            self._finish_file(number)
            return None
        assert self._files is not None and self._read_text is not None
        slot.patience.renew()
        slot.version = self._readers[number].version
        slot.offset = member.stop
        path = self._files[slot.file]
        text = languages = ""
        try:
            if member.content is None:
                raise BadRecord("too_large")
            found = self._read_text(member.content)
            if found is None:  # a header record, or a request
                return None
            text, languages = found
            self._check(text, languages)
        except BadRecord as bad:
            self.rejected[bad.reason] += 1
            text = ""
        slot.records += 1
        if slot.records >= self._records_per_file:
            self._finish_file(number)
        return Document(id=f"{path}@{member.start}", source=self.name, text=text) if text else None

    def _check(self, text: str, languages: str) -> None:
        if not text:
            raise BadRecord("empty")
        first = languages.partition(",")[0].strip()
        if self._languages and first and first not in self._languages:
            raise BadRecord("language")

    def _meet_damage(self, slot: _Slot, error: SourceError) -> None:
        """Leave a damaged place out when it was met often enough: a record, or the file's rest."""
        if error.reason == "changed":  # the next read takes the file as it is now
            slot.version = None
        if not slot.patience.is_spent_by(error):
            return
        self.rejected[error.reason] += 1
        if error.reason == "bad_gzip":
            slot.skips_damage = True
        else:
            slot.advance(self._parallel_files)

    def _finish_file(self, number: int) -> None:
        self._close_reader(number)
        self._position.slots[number].advance(self._parallel_files)
        self._open_ahead()

    def _open_ahead(self) -> None:
        """Ask for the next block of every file that has its turn later. Files that were opened only
        at their turn would each be waited for, one after the other."""
        assert self._files is not None
        for number, slot in enumerate(self._position.slots):
            if self._executor is not None and slot.file < len(self._files):
                self._open(number)

    def _close_reader(self, number: int) -> None:
        if number in self._readers:
            self._readers.pop(number).close()

    def _open(self, number: int) -> MemberReader:
        assert self._files is not None
        slot = self._position.slots[number]
        if number not in self._readers:
            self._readers[number] = MemberReader(
                self._client,
                f"{self._data_url}/{self._files[slot.file]}",
                offset=slot.offset,
                version=slot.version,
                block_bytes=self._block_bytes,
                executor=self._executor,
            )
        return self._readers[number]

    def _reader_of(self, number: int) -> MemberReader:
        """The reader of a slot's file, behind damage that is to be left out."""
        slot, reader = self._position.slots[number], self._open(number)
        if slot.skips_damage:
            reader.skip_damage()
            slot.offset, slot.version, slot.skips_damage = reader.offset, reader.version, False
        return reader

    def _choose_files(self) -> list[str]:
        """The epoch's files in their order, from the listings of the crawls."""
        position = self._position
        if not position.crawls:
            position.crawls = self._newest_crawls()
        chosen: list[str] = []
        for crawl in position.crawls:
            if crawl not in self._listings:
                self._listings[crawl] = self._read_listing(crawl)
            paths = self._listings[crawl]
            first = position.epoch * self._paths_per_crawl
            count = min(self._paths_per_crawl, len(paths))
            chosen += [paths[(first + number) % len(paths)] for number in range(count)]
        return seeded_order(chosen, seed=self._seed, salt=f"epoch {position.epoch}")

    def _newest_crawls(self) -> list[str]:
        reply = self._client.read(self._index_url, max_bytes=MAX_LISTING_BYTES)
        try:  # the index names the newest crawl first
            names = [str(entry["id"]) for entry in json.loads(reply.body)][: self._num_crawls]
        except (ValueError, TypeError, KeyError) as error:
            raise SourceError(
                f"{self._index_url} is no list of crawls", reason="bad_index", transient=True
            ) from error
        if not names:
            raise SourceError(
                f"{self._index_url} names no crawl", reason="bad_index", transient=True
            )
        return names

    def _read_listing(self, crawl: str) -> list[str]:
        """A crawl's files, shuffled; an error if they are others than at the saved position."""
        url = f"{self._data_url}/crawl-data/{crawl}/{self._kind}.paths.gz"
        packed = self._client.read(url, max_bytes=MAX_LISTING_BYTES).body
        inflater = zlib.decompressobj(wbits=31)
        try:
            content = inflater.decompress(packed, MAX_LISTING_BYTES)
            paths = content.decode("ascii").split()
        except (zlib.error, UnicodeDecodeError) as error:
            raise SourceError(f"{url}: {error}", reason="bad_gzip", transient=True) from error
        if not inflater.eof or not paths:
            raise SourceError(f"{url} is not whole", reason="bad_gzip", transient=True)
        digest = hashlib.sha256(content).hexdigest()[:16]
        if self._position.listings.setdefault(crawl, digest) != digest:
            raise SourceError(
                f"the list of files of {crawl} is another than when this run was saved; "
                "start anew with --no-resume",
                reason="changed",
                transient=False,
            )
        return seeded_order(set(paths), seed=self._seed, salt=crawl)
