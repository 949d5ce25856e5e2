"""Files for the tests of local sources: the same documents in every format, bombs, small PDFs."""

import gzip
import json
import lzma
import random
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from training.sources.base import Document, SourceExhausted

WORDS = (
    "the quick brown fox of \u00fcmlaut \u4e2d\u6587 jumps over a lazy dog 42 \U0001f600".split()
)


def make_texts(count: int, *, seed: int, longest: int = 200) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{number}: " + " ".join(rng.choices(WORDS, k=rng.randrange(5, longest)))
        for number in range(count)
    ]


def to_lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text, "n": 1}).encode() + b"\n" for text in texts)


def in_frames(data: bytes, pack, *, size: int) -> bytes:
    return b"".join(pack(data[start : start + size]) for start in range(0, len(data), size))


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def write_formats(folder: Path, texts: list[str]) -> None:
    """The texts as JSON lines in every packing, with frames that cut records, and as parquet."""
    lines = to_lines(texts)
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "c.jsonl.gz").write_bytes(in_frames(lines, gzip.compress, size=5000) + bytes(64))
    (folder / "d.jsonl.zst").write_bytes(zstd(lines))
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"abcde"
    framed = in_frames(lines, lambda part: zstd(part) + skippable, size=7001)
    (folder / "e.jsonl.zst").write_bytes(framed)
    (folder / "f.jsonl.xz").write_bytes(lzma.compress(lines))
    (folder / "g.ndjson").write_bytes(lines.replace(b"\n", b"\r\n")[:-2])
    table = pa.table({"text": texts, "n": list(range(len(texts)))})
    pq.write_table(table, folder / "h.parquet", row_group_size=77)
    pq.write_table(table, folder / "i.parquet", use_dictionary=False, compression="zstd")


def drain(source, count: int = 10**9) -> list[Document]:
    found: list[Document] = []
    try:
        while len(found) < count:
            found.append(source.next_document())
    except SourceExhausted:
        pass
    return found


def gzip_bomb(fill: bytes, *, members: int, megabytes: int, head: bytes = b"") -> bytes:
    """Members that unpack to `megabytes` each; a thousand times what they weigh."""
    one = gzip.compress(fill * ((megabytes << 20) // len(fill)), compresslevel=9)
    return (gzip.compress(head) if head else b"") + one * members


def zstd_bomb(fill: bytes, *, frames: int, megabytes: int, head: bytes = b"") -> bytes:
    one = zstd(fill * ((megabytes << 20) // len(fill)))
    return (zstd(head) if head else b"") + one * frames


def xz_bomb(fill: bytes, *, megabytes: int, head: bytes = b"") -> bytes:
    packed = lzma.compress(fill * ((megabytes << 20) // len(fill)), preset=0)
    return (lzma.compress(head) if head else b"") + packed


def repeated_value_parquet(path: Path, *, megabytes: int, rows: int) -> None:
    """One value that a dictionary page holds once and the rows refer to `rows` times."""
    value = pa.array(["x" * (megabytes << 20)])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, type=pa.int32()), value)
    limit = 1 << 30
    pq.write_table(pa.table({"text": column}), path, dictionary_pagesize_limit=limit)


def zero_page_parquet(path: Path, *, megabytes: int) -> None:
    """A page that unpacks to `megabytes` from a few kilobytes."""
    table = pa.table({"text": ["\0" * (megabytes << 20)]})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)


def make_pdf(pages: list[list[str]], *, pack: bool = True) -> bytes:
    """A PDF with lines of Latin text, one list a page."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    numbers = [4 + 2 * index for index in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in numbers)
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode())
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Courier >>")
    for number, lines in zip(numbers, pages):
        shown = "".join(
            f"({line.replace(chr(92), '').replace('(', '').replace(')', '')}) Tj T*\n"
            for line in lines
        )
        stream = f"BT /F1 9 Tf 11 TL 40 760 Td\n{shown}ET".encode("latin-1")
        coding = b" /Filter /FlateDecode" if pack else b""
        body = zlib.compress(stream) if pack else stream
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % (number + 1)
        )
        objects.append(b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(body), coding, body))
    return _assemble(objects)


def _assemble(objects: list[bytes]) -> bytes:
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, content in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (
        len(objects) + 1,
        start,
    )
    return bytes(out)
