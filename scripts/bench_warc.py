"""A documentation tree crawled by wget into WARC files, and read back through the crawl source.

    python scripts/bench_warc.py --name WHAT --folder FOLDER_OF_HTML --output FILE
    python scripts/bench_warc.py --name WHAT --archives FILE.warc.gz FILE.warc.wet --output FILE

The folder is served on 127.0.0.1, wget follows its links into WARC files as an archive would
(records and compression are wget's), and `CommonCrawlSource` reads them over HTTP ranges.
An independent reader (fastwarc) counts what is there; every page is then either a document or
counted by reason. How well text is extracted is measured against the pages themselves: the share of
the words of their paragraphs that came out, and what of the navigation came with them.

The second form reads archives that others made, each by itself; ones that are not packed are packed
record by record first, as Common Crawl serves them.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import http.server
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.assets_html import extract_blocks
from scripts.soak import code_version, machine_text
from tests.fakeworld.clients import drain, make_client
from tests.fakeworld.server import FakeWorld
from tests.training.sources.test_real_archives import split_records
from training.sources.base import Document, SourceExhausted
from training.sources.commoncrawl import CommonCrawlSource

CRAWL = "CC-MAIN-2026-46"
FILE_BYTES = "400k"  # of a WARC file, so that there are several
ROUNDS = 5
GZIP_MAGIC = b"\x1f\x8b"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files and keeps silent."""

    def log_message(self, format: str, *args: Any) -> None:
        """What is asked for stands in the archive."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def crawl(url: str, folder: Path) -> list[Path]:
    """The WARC files that wget makes of everything below an address."""
    wget = shutil.which("wget")
    if wget is None:
        raise SystemExit("wget is needed: apt-get install wget")
    command = [
        wget, "--recursive", "--level=inf", "--no-parent", "--quiet", "--delete-after",
        "--warc-file=crawl", f"--warc-max-size={FILE_BYTES}", "-e", "robots=off", url,
    ]  # fmt: skip
    run = subprocess.run(command, cwd=folder)
    if run.returncode not in (0, 8):  # 8: a link led nowhere, which is a record like any other
        raise SystemExit(f"wget ended with {run.returncode}")
    return sorted(folder.glob("crawl*.warc.gz"))


def count_records(files: list[Path]) -> tuple[dict[str, int], dict[str, bytes]]:
    """Records by kind as fastwarc sees them, and the HTML pages that were answered, by address."""
    from fastwarc.warc import ArchiveIterator

    counts: Counter[str] = Counter()
    pages: dict[str, bytes] = {}
    for path in files:
        with path.open("rb") as file:
            for record in ArchiveIterator(file):
                kind = record.headers["WARC-Type"]
                counts[kind] += 1
                if kind != "response" or record.http_headers is None:
                    continue
                is_html = record.http_content_type == "text/html"
                if record.http_headers.status_code == 200 and is_html:
                    address = record.headers["WARC-Target-URI"] or ""
                    pages[address.strip("<>")] = record.reader.read()
    return dict(counts), pages


def make_source(
    world: FakeWorld, *, num_files: int, kind: Literal["wet", "warc"], parallel_files: int = 1
) -> CommonCrawlSource:
    """A source that reads all files of the one crawl that a world serves."""
    return CommonCrawlSource(
        client=make_client(read_timeout_s=60.0),
        crawls=1,
        wet_paths_per_crawl=num_files,
        records_per_file=10**6,
        kind=kind,
        languages=(),
        parallel_files=parallel_files,
        index_url=world.url + "/collinfo.json",
        data_url=world.url,
    )


def read(world: FakeWorld, *, num_files: int, parallel_files: int) -> dict[str, Any]:
    """All documents of the archives, with what was left out and how long it took."""
    source = make_source(world, num_files=num_files, kind="warc", parallel_files=parallel_files)
    documents: list[Document] = []
    start, work = time.perf_counter(), time.process_time()
    while True:
        try:
            documents.append(source.next_document())
        except SourceExhausted:
            break
    seconds, cpu_s = time.perf_counter() - start, time.process_time() - work
    source.close()
    return {
        "documents": documents,
        "rejected": dict(source.rejected),
        "seconds": seconds,
        "cpu_s": cpu_s,
    }


def extraction(texts: list[str], pages: dict[str, bytes]) -> dict[str, float]:
    """Of the words of a page's paragraphs, the share in some extracted text, over all pages.

    A text belongs to the page whose words it shares most of; its title names it.
    """
    bags = [Counter(text.split()) for text in texts]
    by_word: dict[str, list[int]] = {}
    for number, bag in enumerate(bags):
        for word in bag:
            by_word.setdefault(word, []).append(number)
    recalls, extra = [], []
    for page in pages.values():
        _, blocks = extract_blocks(page.decode("utf-8", "replace"), main_class=None)
        wanted = Counter(word for block in blocks for word in block.replace("#", " ").split())
        if wanted.total() < 50:
            continue
        shared: Counter[int] = Counter()
        for word in wanted:
            if len(by_word.get(word, ())) < 200:  # rarer words tell pages apart
                shared.update(by_word.get(word, ()))
        if not shared:
            recalls.append(0.0)
            continue
        bag = bags[shared.most_common(1)[0][0]]
        common = (wanted & bag).total()
        recalls.append(common / wanted.total())
        extra.append(1 - common / max(1, bag.total()))
    return {
        "pages_compared": len(recalls),
        "words_found_mean": round(statistics.mean(recalls), 4),
        "words_found_median": round(statistics.median(recalls), 4),
        "words_beyond_the_page_text_mean": round(statistics.mean(extra), 4),
        "pages_with_less_than_half": sum(recall < 0.5 for recall in recalls),
    }


def read_alone(path: Path) -> dict[str, Any]:
    """What one archive gives: every record of the kind that holds text is a document, left out by
    reason, or lost."""
    kind = "wet" if path.suffix == ".wet" else "warc"
    content = path.read_bytes()
    if not content.startswith(GZIP_MAGIC):
        content = b"".join(gzip.compress(record, mtime=0) for record in split_records(content))
    name = f"crawl-data/{CRAWL}/{path.name}"
    with FakeWorld() as world:
        world.resources = {f"/{name}": content}
        world.resources["/collinfo.json"] = json.dumps([{"id": CRAWL}]).encode()
        world.resources[f"/crawl-data/{CRAWL}/{kind}.paths.gz"] = gzip.compress(name.encode())
        source = make_source(world, num_files=1, kind=kind)
        documents, errors = drain(source)
        source.close()
    with tempfile.NamedTemporaryFile(delete=False) as file:
        file.write(content)
    counts, _ = count_records([Path(file.name)])
    os.unlink(file.name)
    wanted = counts.get("conversion" if kind == "wet" else "response", 0)
    return {
        "records_by_fastwarc": counts,
        "documents": len(documents),
        "characters": sum(len(document.text) for document in documents),
        "left_out_by_reason": dict(source.rejected),
        "lost_without_a_reason": wanted - len(documents) - source.rejected.total(),
        "ended_by": [str(error.reason) for error in errors if not error.transient],
        "begins": documents[0].text[:80] if documents else "",
    }


def measure(folder: Path) -> dict[str, Any]:
    """Crawl, read with one and with four files at a time, and compare."""
    with tempfile.TemporaryDirectory() as home, served(folder) as url:
        files = crawl(url, Path(home))
        counts, pages = count_records(files)
        packed = {f"crawl-data/{CRAWL}/{path.name}": path.read_bytes() for path in files}
    with FakeWorld() as world:
        world.resources = {f"/{name}": content for name, content in packed.items()}
        world.resources["/collinfo.json"] = json.dumps([{"id": CRAWL}]).encode()
        listing = "".join(f"{name}\n" for name in packed).encode()
        world.resources[f"/crawl-data/{CRAWL}/warc.paths.gz"] = gzip.compress(listing)
        runs: dict[int, list[dict[str, Any]]] = {1: [], 4: []}
        for _ in range(ROUNDS):
            for number, kept in runs.items():
                kept.append(read(world, num_files=len(packed), parallel_files=number))
    first = runs[1][0]
    texts = [document.text for document in first["documents"]]
    same = all(
        sorted(document.id for document in run["documents"])
        == sorted(document.id for document in first["documents"])
        for kept in runs.values()
        for run in kept
    )
    characters = sum(map(len, texts))
    return {
        "warc_files": len(files),
        "packed_bytes": sum(map(len, packed.values())),
        "records_by_fastwarc": counts,
        "html_pages_answered": len(pages),
        "documents": len(texts),
        "left_out_by_reason": first["rejected"],
        "lost_without_a_reason": counts["response"] - len(texts) - sum(first["rejected"].values()),
        "same_documents_in_every_run": same,
        "characters": characters,
        "texts_with_markup_left": sum("</" in text and "<div" in text for text in texts),
        "extraction": extraction(texts, pages),
        "characters_per_s": {
            f"{number} files": round(characters / statistics.median(r["seconds"] for r in kept))
            for number, kept in runs.items()
        },
        "characters_per_cpu_s": {
            f"{number} files": round(characters / statistics.median(r["cpu_s"] for r in kept))
            for number, kept in runs.items()
        },
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    material = parser.add_mutually_exclusive_group(required=True)
    material.add_argument("--folder", type=Path, help="HTML files to crawl")
    material.add_argument("--archives", type=Path, nargs="+", help="archives to read")
    parser.add_argument("--name", required=True, help="what the material is, with its version")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.folder:
        name = f"{options.name}, crawled by wget, read as WARC over HTTP ranges from 127.0.0.1"
        found = {**measure(options.folder), "rounds": ROUNDS}
    else:
        name = f"{options.name}, each read over HTTP ranges from 127.0.0.1"
        found = {"archives": {path.name: read_alone(path) for path in options.archives}}
    report = {
        "what": name,
        **found,
        "code": code_version(),
        "machine": machine_text(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
