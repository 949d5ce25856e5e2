"""Members of an archive: exact offsets, damage found, what follows it found again, no bombs."""

from __future__ import annotations

import gzip
import random
import re
import zlib

import pytest

from tests.fakeworld.clients import make_client
from tests.fakeworld.crawl import (
    Page,
    make_pages,
    pack,
    record,
    warc_record,
    wet_record,
)
from tests.fakeworld.server import FakeWorld
from training.sources.base import SourceError
from training.sources.warc import (
    HEAD_BYTES,
    MAX_RECORD_BYTES,
    BadRecord,
    MemberReader,
    open_text_reader,
)

RECORDS = [wet_record(page) for page in make_pages("members", 12)]


@pytest.fixture(scope="module")
def world():
    with FakeWorld() as world:
        world.resources["/archive"] = pack(RECORDS)
        yield world


def open_members(world, path="/archive", *, offset=0, block_bytes=700, **settings):
    return MemberReader(
        make_client(),
        world.url + path,
        offset=offset,
        version=None,
        block_bytes=block_bytes,
        **settings,
    )


def read_all(reader):
    members = []
    while (member := reader.next_member()) is not None:
        members.append(member)
    return members


@pytest.mark.parametrize("block_bytes", [1 << 20, 700, HEAD_BYTES])
def test_members_do_not_depend_on_the_blocks(world, block_bytes):
    members = read_all(open_members(world, block_bytes=block_bytes))
    assert [member.content for member in members[1:]] == RECORDS
    assert [member.start for member in members[1:]] == [member.stop for member in members[:-1]]
    assert members[-1].stop == len(world.resources["/archive"])


def test_any_member_can_be_resumed_at(world):
    members = read_all(open_members(world))
    for number, member in enumerate(members):
        rest = read_all(open_members(world, offset=member.start))
        assert rest == members[number:]


def test_a_bit_that_flipped_is_found_wherever_it_is(world):
    """In a member's header, body or checksum: an error, or (in fields nobody needs) no change."""
    members = read_all(open_members(world))
    third = members[3]
    archive = world.resources["/archive"]
    generator = random.Random(3)
    found = 0
    for _ in range(60):
        place = generator.randrange(third.start, third.stop)
        damaged = bytearray(archive)
        damaged[place] ^= 1 << generator.randrange(8)
        world.resources["/damaged"] = bytes(damaged)
        reader = open_members(world, "/damaged", offset=third.start, block_bytes=1 << 20)
        try:
            assert reader.next_member().content == third.content
        except SourceError as error:
            assert error.reason == "bad_gzip" and reader.offset == third.start
            found += 1
            reader.skip_damage()
            assert reader.offset == members[4].start
    assert found > 50


def test_a_file_that_ends_too_early_says_so(world):
    world.resources["/cut"] = world.resources["/archive"][:-9]
    reader = open_members(world, "/cut")
    for _ in RECORDS:
        reader.next_member()
    with pytest.raises(SourceError, match="ends within a record"):
        reader.next_member()
    reader.skip_damage()
    assert reader.next_member() is None


def test_a_member_that_is_no_record_is_not_taken_for_one_when_looking(world):
    """The magic number inside of a damaged stretch, with and without valid gzip behind it."""
    decoy = b"\x1f\x8b\x08" + bytes(600) + gzip.compress(b"no record at all" * 20)
    whole = pack(RECORDS[:2])
    start = len(pack(RECORDS[:1]))
    world.resources["/decoy"] = whole[:start] + decoy + whole[start:]
    for block_bytes in (1 << 16, *range(HEAD_BYTES, HEAD_BYTES + 20)):  # the magic cut in two
        reader = open_members(world, "/decoy", offset=start, block_bytes=block_bytes)
        with pytest.raises(SourceError):
            reader.next_member()
        reader.skip_damage()
        assert reader.next_member().content == RECORDS[1]
        assert reader.next_member() is None


def test_a_bomb_is_passed_over_without_being_unpacked(world):
    assert MAX_RECORD_BYTES < 40 << 20
    compressor = zlib.compressobj(9, zlib.DEFLATED, 31)
    head = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 999999999\r\n\r\n"
    bomb = compressor.compress(head)
    chunk = bytes(1 << 20)
    bomb += b"".join(compressor.compress(chunk) for _ in range(40)) + compressor.flush()
    assert len(bomb) < 1 << 16
    world.resources["/bomb"] = gzip.compress(RECORDS[0]) + bomb + gzip.compress(RECORDS[1])
    reader = open_members(world, "/bomb", block_bytes=1 << 16)
    first, second, third = read_all(reader)
    assert first.content == RECORDS[0] and third.content == RECORDS[1]
    assert second.content is None and second.stop == third.start


def test_text_of_a_wet_record():
    read_text = open_text_reader("wet")
    page = Page(url="http://a.example/", text="Grüße aus Köln\nund mehr", language="deu,eng")
    assert read_text(wet_record(page)) == (page.text, "deu,eng")
    assert read_text(wet_record(Page(url="u", text="x", language=""))) == ("x", "")
    assert read_text(record("warcinfo", {}, b"software: x\r\n")) is None
    with pytest.raises(BadRecord, match="bad_utf8"):
        read_text(record("conversion", {}, b"caf\xe9 and more"))


def test_text_of_a_page():
    read_text = open_text_reader("warc")
    page = Page(url="http://a.example/", text="Grüße aus Köln, " * 12 + "\nzweiter Absatz " * 12)
    for charset in ("utf-8", "latin-1"):
        text, _ = read_text(warc_record(Page(url=page.url, text=page.text, charset=charset)))
        assert "Grüße aus Köln" in text and "zweiter Absatz" in text
        assert "Imprint" not in text and "Home" not in text and "<p>" not in text
    assert read_text(record("request", {}, b"GET / HTTP/1.1\r\n\r\n")) is None


@pytest.mark.parametrize("header", ["Content-Encoding: gzip", "Transfer-Encoding: chunked"])
def test_a_page_stored_unpacked_under_the_headers_of_a_packed_one(header):
    """As in the archives of 2014; a body that is neither as its headers say nor a page is bad."""
    whole = warc_record(make_pages("stored", 1)[0])
    head = header.encode() + b"\r\n"
    expected = open_text_reader("warc")(whole)
    changed = whole.replace(b"Content-Type: text/html", head + b"Content-Type: text/html")
    size = int(re.search(rb"Content-Length: (\d+)", whole)[1])
    changed = changed.replace(b": %d\r\n" % size, b": %d\r\n" % (size + len(head)), 1)
    assert open_text_reader("warc")(changed) == expected
    with pytest.raises(BadRecord, match="bad_record"):
        open_text_reader("warc")(changed.replace(b"<html>", b"\x03html>"))


def test_records_that_share_a_member_are_counted_not_lost():
    pages = [warc_record(page) for page in make_pages("shared", 2)]
    about = record("warcinfo", {}, b"software: x\r\n")
    for content in (b"".join(pages), about + pages[0]):
        with pytest.raises(BadRecord, match="many_records"):
            open_text_reader("warc")(content)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (Page(url="u", text="gone", status=404), "http_status"),
        (Page(url="u", text="%PDF", content_type="application/pdf"), "content_type"),
        (Page(url="u", text="x" * (3 << 20)), "too_large"),
    ],
)
def test_pages_without_text_say_why(page, reason):
    with pytest.raises(BadRecord, match=reason):
        open_text_reader("warc")(warc_record(page))


def test_a_packed_page_that_unpacks_without_end_is_too_large():
    html = gzip.compress(b"<p>" + bytes(50 << 20), mtime=0)
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n"
        b"Content-Length: %d\r\n\r\n" % len(html)
    )
    content = record(
        "response", {"Content-Type": "application/http; msgtype=response"}, head + html
    )
    with pytest.raises(BadRecord, match="too_large"):
        open_text_reader("warc")(content)


def test_any_bytes_give_text_or_a_reason():
    """Records cut and flipped at random: nothing but BadRecord leaves the reader."""
    generator = random.Random(11)
    for kind, make_record in (("wet", wet_record), ("warc", warc_record)):
        read_text = open_text_reader(kind)
        whole = make_record(make_pages("any", 1)[0])
        for _ in range(400):
            damaged = bytearray(whole[: generator.randrange(len(whole))])
            for _ in range(generator.randrange(6)):
                if damaged:
                    damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            try:
                read_text(bytes(damaged))
            except BadRecord as bad:
                assert bad.reason
