"""What each kind of source and their mixture deliver, in tokens, against plain `datasets`.

    python scripts/bench_sources.py FOLDER_OF_TXT --pdf FOLDER_OF_PDF --output FILE

The same texts are read as files, as parquet of a hub, as WET and as WARC of a crawl (hub and crawl
are served on 127.0.0.1 by this very process, whose work is counted with the rest), and PDFs and
generated tasks as they are; every check is on. The plain way, `datasets` streaming and `tokenizers`
with the same packing, has no checks. Work is given in processor seconds, which a busy machine
changes less than the clock; medians of the rounds.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_data import plain_batches
from scripts.soak import code_version, machine_text
from tests.fakeworld.clients import make_client
from tests.fakeworld.crawl import Page, pack, warc_record, wet_record
from tests.fakeworld.hub import FakeDataset, FakeHub, parquet_bytes
from tests.fakeworld.server import FakeWorld
from training.build_data import TOKEN_CACHE, build_evaluation_index
from training.config.cli import parse_args
from training.data import tokenize_corpus
from training.sources.commoncrawl import CommonCrawlSource
from training.sources.embedded import EmbeddedCorpus
from training.sources.hub import HubSource
from training.sources.local import LocalSource
from training.sources.pdf import PdfSource
from training.sources.registry import SourceSpec
from training.sources.synthetic import SyntheticSource
from training.stream import open_stream
from training.stream.shards import MemoryStore, Shard
from training.tokenizer import Tokenizer

FLAGS = (
    "--synthetic-data", "--seq-len", "512", "--batch-size", "8", "--num-workers", "0",
    "--spool-max-mb", "0", "--source-read-timeout-sec", "600", "--stream-shuffle-buffer", "16",
    "--bootstrap-seed-batches", "0",
)  # fmt: skip
FILES = 8
Speed = tuple[float, float]  # tokens per processor second, and per second
CRAWL = "CC-MAIN-2026-46"


def serve(world: FakeWorld, texts: list[str]) -> None:
    """The texts as a hub's dataset and as two crawls."""
    parts = [texts[number::FILES] for number in range(FILES)]
    rows = [[{"text": text} for text in part] for part in parts]
    files = {f"{n}.parquet": parquet_bytes(part, rows_per_group=200) for n, part in enumerate(rows)}
    FakeHub(world).datasets["own/texts"] = FakeDataset(files=files)
    world.resources["/collinfo.json"] = json.dumps([{"id": CRAWL}]).encode()
    for kind, make_record in (("wet", wet_record), ("warc", warc_record)):
        paths = [f"crawl-data/{CRAWL}/{number}.{kind}.gz" for number in range(FILES)]
        for path, part in zip(paths, parts, strict=True):
            pages = [Page(url=f"http://x.example/{n}", text=text) for n, text in enumerate(part)]
            world.resources["/" + path] = pack([make_record(page) for page in pages])
        listing = "".join(f"{path}\n" for path in paths).encode()
        world.resources[f"/crawl-data/{CRAWL}/{kind}.paths.gz"] = gzip.compress(listing, mtime=0)


def makers(world: FakeWorld, texts: Path, pdfs: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """By name: the source's kind, and how it is opened."""

    def crawl(kind: Any) -> CommonCrawlSource:
        return CommonCrawlSource(
            client=make_client(read_timeout_s=60.0),
            crawls=1,
            wet_paths_per_crawl=FILES,
            records_per_file=10**6,
            kind=kind,
            languages=(),
            index_url=world.url + "/collinfo.json",
            data_url=world.url,
        )

    def hub() -> HubSource:
        client = make_client(read_timeout_s=60.0)
        return HubSource("own/texts", name="hf", endpoint=world.url, client=client)

    return {
        "files": ("local", lambda: LocalSource([texts])),
        "hub parquet": ("hf", hub),
        "crawl WET": ("commoncrawl", lambda: crawl("wet")),
        "crawl WARC": ("commoncrawl", lambda: crawl("warc")),
        "PDF": ("pdf", lambda: PdfSource([pdfs])),
        "synthetic": ("synthetic", lambda: SyntheticSource(seed=1)),
    }


def run_stream(chosen: dict[str, tuple[str, Callable[[], Any]]], batches: int) -> Speed:
    """A stream over these sources, equally weighted, from the request for the first batch on.

    What was made and not handed out counts as well, since it was worked for.
    """
    config = parse_args(list(FLAGS))
    tokenizer = Tokenizer.from_name("assets-4k")
    specs = [SourceSpec(key=name, kind=kind, weight=1.0) for name, (kind, _) in chosen.items()]
    made: list[int] = []

    class CountingStore(MemoryStore):
        def put(self, shard: Shard) -> None:
            made.append(len(shard.tokens))
            super().put(shard)

    with (
        tempfile.TemporaryDirectory() as spool,
        mock.patch.object(open_stream, "MemoryStore", CountingStore),
        mock.patch.object(open_stream, "source_specs", lambda *args, **options: specs),
        mock.patch.object(open_stream, "open_source", lambda spec, config: chosen[spec.key][1]()),
    ):
        stream = open_stream.open_stream(
            config,
            tokenizer=tokenizer,
            corpus=tokenize_corpus(EmbeddedCorpus(), tokenizer, cache_dir=TOKEN_CACHE),
            spool_directory=Path(spool),
            evaluation=build_evaluation_index(config),
        )
        made.clear()
        start = _clocks()
        for _ in range(batches):
            stream.next_batch()
        result = _speed(sum(made), start)
        stream.close()
    return result


def run_plainly(folder: Path, batches: int) -> Speed:
    rows = plain_batches(folder, Tokenizer.from_name("assets-4k"))
    start = _clocks()
    return _speed(sum(next(rows).input_ids.numel() for _ in range(batches)), start)


def _clocks() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _speed(tokens: int, start: tuple[float, float]) -> Speed:
    work, clock = (now - then for now, then in zip(_clocks(), start, strict=True))
    return tokens / work, tokens / clock


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pdf", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    texts = [path.read_text(encoding="utf-8") for path in sorted(options.folder.rglob("*.txt"))]
    found: dict[str, list[tuple[float, float]]] = {}
    with FakeWorld() as world:
        serve(world, texts)
        sources = makers(world, options.folder, options.pdf)
        ways: dict[str, Callable[[int], Speed]] = {
            "datasets + tokenizers, plainly": functools.partial(run_plainly, options.folder),
            **{name: functools.partial(run_stream, {name: sources[name]}) for name in sources},
            "all six mixed": functools.partial(run_stream, sources),
        }
        for _ in range(options.rounds):
            for name, run in ways.items():
                found.setdefault(name, []).append(run(options.batches))
                print(name, *(f"{value:,.0f}" for value in found[name][-1]), flush=True)
    report = {
        "what": f"tokens of assets-4k, rows of 512, {options.batches} batches of 8 a round; no "
        "thread, every check on; PDFs are read by a process whose work is not in the figure",
        "tokens_per_cpu_s": {
            name: round(statistics.median(cpu for cpu, _ in values))
            for name, values in found.items()
        },
        "tokens_per_s": {
            name: round(statistics.median(wall for _, wall in values))
            for name, values in found.items()
        },
        "rounds": options.rounds,
        "code": code_version(),
        "machine": machine_text(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
