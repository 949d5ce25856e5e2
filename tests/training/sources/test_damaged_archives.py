"""R17: archives damaged in any way give their other records byte for byte, and nothing breaks.

Bytes are changed, cut out, doubled, blanked or inserted anywhere in the packed file, or a record is
damaged before it is packed (the kind of damage that no checksum tells). A record has survived when
its gzip member stands whole in what is left; its text must then be given, in the archive's order.
"""

from __future__ import annotations

import gzip
import json
import random

import pytest

from tests.fakeworld.clients import MAX_PASSING_ERRORS, drain, make_client
from tests.fakeworld.crawl import make_pages, record, warc_record, wet_record
from tests.fakeworld.server import FakeWorld
from training.sources.base import Document, SourceError
from training.sources.commoncrawl import CommonCrawlSource
from training.sources.warc import BadRecord, open_text_reader

CRAWL = "CC-MAIN-2026-46"
MAX_REQUESTS = 400  # what a reader asks for that goes on; one that turns in a circle asks for ever
DECOYS = (b"\x1f\x8b\x08", b"WARC/1.0\r\n", gzip.compress(b"no record" * 9), b"\x00" * 700)


def damage_packed(archive: bytes, rng: random.Random) -> bytes:
    """The file as a bad disk, a broken transfer or a careless tool would leave it."""
    data = bytearray(archive)
    for _ in range(rng.randrange(1, 4)):
        place, size = rng.randrange(len(data)), rng.randrange(1, 900)
        kind = rng.randrange(6)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place : place + size] = rng.randbytes(len(data[place : place + size]))
        elif kind == 2:
            del data[place : place + size]
        elif kind == 3:
            data[place:place] = data[place : place + size]
        elif kind == 4:
            data[place:place] = rng.choice(DECOYS)
        else:
            del data[max(1, place) :]
        data = data or bytearray(b"\x1f")
    return bytes(data)


def damage_record(content: bytes, rng: random.Random) -> bytes:
    """A record that was written wrongly, its checksum with it."""
    data = bytearray(content)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[place] = rng.randrange(256)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 200)]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randrange(1, 60))
        elif kind == 3:
            data = bytearray(bytes(data).replace(b"Content-Length: ", b"Content-Length: -9", 1))
        else:
            data = bytearray(bytes(data).replace(b"\r\n", b"\n", rng.randrange(1, 9)))
    return bytes(data)


def make_archive(kind: str, rng: random.Random) -> tuple[list[bytes], bytes]:
    """The packed records of an archive, and the archive after damage."""
    make_record = wet_record if kind == "wet" else warc_record
    pages = make_pages(f"damaged{rng.randrange(50)}", rng.randrange(3, 9))
    about = record("warcinfo", {"Content-Type": "application/warc-fields"}, b"software: test\r\n")
    members = [gzip.compress(content, mtime=0) for content in [about, *map(make_record, pages)]]
    if rng.random() < 0.7:
        return members, damage_packed(b"".join(members), rng)
    chosen = rng.randrange(1, len(members))
    harmed = gzip.compress(damage_record(gzip.decompress(members[chosen]), rng), mtime=0)
    return members, b"".join([*members[:chosen], harmed, *members[chosen + 1 :]])


def read_archive(
    world: FakeWorld, archive: bytes, *, kind: str, block_bytes: int
) -> tuple[list[Document], list[SourceError], int]:
    """Documents, errors and number of requests of an archive served as a whole crawl."""
    path = f"crawl-data/{CRAWL}/one.{kind}.gz"
    world.resources["/collinfo.json"] = json.dumps([{"id": CRAWL}]).encode()
    world.resources[f"/crawl-data/{CRAWL}/{kind}.paths.gz"] = gzip.compress(path.encode())
    world.resources["/" + path] = archive
    source = CommonCrawlSource(
        client=make_client(read_timeout_s=60.0),
        crawls=1,
        wet_paths_per_crawl=1,
        records_per_file=10**6,
        kind="wet" if kind == "wet" else "warc",
        languages=(),
        index_url=world.url + "/collinfo.json",
        data_url=world.url,
        block_bytes=block_bytes,
    )
    with world.planned(lambda seen: None) as seen:
        documents, errors = drain(source)
    source.close()
    return documents, errors, len(seen)


def text_of(member: bytes, *, kind: str) -> str:
    """What an undamaged member gives; empty for one without text."""
    try:
        found = open_text_reader(kind)(gzip.decompress(member))
    except BadRecord:
        return ""
    return found[0] if found else ""


def faults_of(world: FakeWorld, seed: int) -> list[str]:
    """One trial: what is wrong with how a damaged archive was read."""
    rng = random.Random(seed)
    kind = rng.choice(("wet", "warc"))
    members, archive = make_archive(kind, rng)
    block_bytes = rng.choice((600, 1500, 1 << 16))
    documents, errors, requests = read_archive(world, archive, kind=kind, block_bytes=block_bytes)
    texts = [text_of(member, kind=kind) for member in members]
    survivors = [
        (archive.index(member), text) for member, text in zip(members, texts) if member in archive
    ]
    expected = [text for _, text in sorted(survivors) if text]
    given = iter(document.text for document in documents)
    found = []
    if not all(text in given for text in expected):  # the iterator moves on: order counts
        found.append("a record that survived is missing or out of its order")
    altered = sum(document.text not in texts for document in documents)
    if altered > 1:  # only the one record that was written wrongly may read otherwise
        found.append(f"{altered} texts that no record holds")
    if errors and not errors[-1].transient and (documents or errors[-1].reason != "no_documents"):
        found.append(f"ended by {errors[-1]}")
    if len(errors) >= MAX_PASSING_ERRORS or requests > MAX_REQUESTS:
        found.append(f"no end: {len(errors)} errors, {requests} requests")
    return [f"seed {seed} ({kind}): {what}" for what in found]


@pytest.fixture(scope="module")
def world():
    with FakeWorld() as world:
        yield world


def test_damaged_archives_give_their_other_records(world):
    assert [fault for seed in range(300) for fault in faults_of(world, seed)] == []


@pytest.mark.soak
def test_five_thousand_damaged_archives_give_their_other_records(world):
    assert [fault for seed in range(5000) for fault in faults_of(world, seed)] == []


def test_control_a_reader_that_gives_up_at_damage_is_found_out(world, monkeypatch):
    def give_up(self):
        self.offset += len(self._bytes_at(self.offset))

    monkeypatch.setattr("training.sources.warc.MemberReader.skip_damage", give_up)
    assert [fault for seed in range(40) for fault in faults_of(world, seed)]
