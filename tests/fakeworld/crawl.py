"""A small Common Crawl: an index, listings, and archives with one gzip member per record."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass

from tests.fakeworld.server import FakeWorld

CRAWLS = ("CC-MAIN-2026-46", "CC-MAIN-2026-42", "CC-MAIN-2026-38")  # the newest first
WORDS = "the river of stone and cloud paper garden silver window letter summer bridge".split()


@dataclass(kw_only=True, frozen=True)
class Page:
    """One record of a crawl."""

    url: str
    text: str
    language: str = "eng"
    charset: str = "utf-8"
    status: int = 200
    content_type: str = "text/html"


def make_pages(seed: str, count: int) -> list[Page]:
    """Pages of some paragraphs; about every seventh is German."""
    generator = random.Random(seed)
    pages = []
    for number in range(count):
        lines = [" ".join(generator.choices(WORDS, k=40)) + "." for _ in range(4)]
        language = "deu,eng" if generator.random() < 0.15 else "eng"
        url = f"http://{seed}.example/{number}"
        pages.append(Page(url=url, text="\n".join(lines), language=language))
    return pages


def record(kind: str, headers: dict[str, str], block: bytes) -> bytes:
    """One WARC record, unpacked."""
    named = {
        "WARC-Type": kind,
        "WARC-Date": "2026-11-01T00:00:00Z",
        "WARC-Record-ID": f"<urn:uuid:{random.Random(repr(headers) + kind).getrandbits(128):032x}>",
        **headers,
        "Content-Length": str(len(block)),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return b"WARC/1.0\r\n" + head.encode() + b"\r\n" + block + b"\r\n\r\n"


def wet_record(page: Page) -> bytes:
    """The extracted text of a page."""
    headers = {"WARC-Target-URI": page.url, "Content-Type": "text/plain"}
    if page.language:
        headers["WARC-Identified-Content-Language"] = page.language
    return record("conversion", headers, page.text.encode())


def warc_record(page: Page) -> bytes:
    """A page as it was answered, with boilerplate round its text."""
    paragraphs = "".join(f"<p>{line}</p>" for line in page.text.split("\n"))
    html = (
        f"<html><head><title>A page</title></head><body><nav><a href='/'>Home</a></nav>"
        f"<main><article><h1>Story</h1>{paragraphs}</article></main>"
        "<footer>Imprint</footer></body></html>"
    ).encode(page.charset)
    head = (
        f"HTTP/1.1 {page.status} X\r\nContent-Type: {page.content_type}; charset={page.charset}\r\n"
        f"Content-Length: {len(html)}\r\n\r\n"
    ).encode()
    headers = {"WARC-Target-URI": page.url, "Content-Type": "application/http; msgtype=response"}
    return record("response", headers, head + html)


def pack(records: list[bytes]) -> bytes:
    """An archive: every record a gzip member of its own, after the usual one about the file."""
    about = record("warcinfo", {"Content-Type": "application/warc-fields"}, b"software: test\r\n")
    return b"".join(gzip.compress(content, mtime=0) for content in [about, *records])


def serve_crawl(
    world: FakeWorld,
    *,
    files: int = 4,
    pages: int = 6,
    crawls: tuple[str, ...] = CRAWLS,
    kind: str = "wet",
) -> dict[str, list[Page]]:
    """Put crawls on a server; returns the pages by path of their archive."""
    held: dict[str, list[Page]] = {}
    for crawl in crawls:
        paths = [
            f"crawl-data/{crawl}/segments/1/{kind}/{crawl}-{number:05}.warc.{kind}.gz"
            for number in range(files)
        ]
        for path in paths:
            held[path] = make_pages(path, pages)
            make_record = wet_record if kind == "wet" else warc_record
            world.resources["/" + path] = pack([make_record(page) for page in held[path]])
        listing = gzip.compress("".join(f"{path}\n" for path in paths).encode(), mtime=0)
        world.resources[f"/crawl-data/{crawl}/{kind}.paths.gz"] = listing
    index = [{"id": crawl, "name": crawl, "timegate": "", "cdx-api": ""} for crawl in crawls]
    world.resources["/collinfo.json"] = json.dumps(index).encode()
    return held
