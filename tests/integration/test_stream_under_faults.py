"""R18 over the whole stream: hub, crawl and own files, filters, windows, spool, start to batch.

What a run reads through `open_stream` on a network that fails must be, token for token, what it
reads on a good one, whatever number of threads reads; after a final answer it ends before training
with a line, or goes on without what is gone and says so.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakeworld.clients import make_client, random_faults
from tests.fakeworld.crawl import serve_crawl
from tests.fakeworld.faults import FINAL, LYING, PASSING
from tests.fakeworld.hub import FakeDataset, FakeHub, make_rows, parquet_bytes
from tests.fakeworld.server import FakeWorld, Plan
from tests.training.mixed import digest, take
from tests.training.small_corpus import TOKENIZER, SmallCorpus
from training.build_data import build_evaluation_index
from training.config.cli import parse_args
from training.config.data_sections import StreamConfig
from training.data import tokenize_corpus
from training.sources.commoncrawl import CommonCrawlSource
from training.sources.hub import HubSource
from training.sources.registry import COSMOPEDIA, FINEWEB, SourceSpec, open_source
from training.stream import breaker, open_stream
from training.stream.mixed_stream import MixedStream

NUM_BATCHES = 60
SEEDS = 50
SLOW = {"stalled_headers", "stalled_body", "drip", "drip_headers"}  # each strike takes real time
KINDS = sorted(PASSING | LYING | FINAL)
CORPUS = tokenize_corpus(SmallCorpus(), TOKENIZER)
FLAGS = (
    "--data-backend", "hybrid", "--local-ratio", "0.2", "--seq-len", "64", "--batch-size", "2",
    "--source-read-timeout-sec", "120", "--stream-shuffle-buffer", "12", "--fineweb-min-score", "1",
    "--commoncrawl-latest-crawls", "2", "--commoncrawl-wet-paths-per-crawl", "3",
    "--commoncrawl-records-per-file", "5", "--bootstrap-seed-batches", "2",
    "--startup-hf-only-samples", "4", "--spool-max-mb", "16", "--fineweb-ratio", "0.5",
)  # fmt: skip


class FailingNetwork:
    """A world that serves all sources of the hybrid stream, and the streams that read from it."""

    def __init__(self, world: FakeWorld, home: Path) -> None:
        self.world = world
        self.home = home
        serve_crawl(world, files=3, pages=6)
        hub = FakeHub(world)
        for (name, config), tag in ((FINEWEB, "f"), (COSMOPEDIA, "c")):
            files = {
                f"{config}/train-{number}.parquet": parquet_bytes(
                    make_rows(f"{tag}{number}", 14), rows_per_group=7
                )
                for number in range(2)
            }
            card = {"configs": [{"config_name": config, "data_files": f"{config}/*"}]}
            hub.datasets[name] = FakeDataset(files=files, card=card)
        (home / "own").mkdir()
        rng = random.Random(0)
        for number in range(20):
            text = " ".join(rng.choices("the page of a book and its cover".split(), k=80))
            (home / "own" / f"{number:02}.txt").write_text(f"{number} {text}", encoding="utf-8")
        self.evaluation = build_evaluation_index(parse_args([]))
        self.clean = self.read(lambda seen: None, workers=0)[0]

    def open_source(self, spec: SourceSpec, *, config: StreamConfig):
        options = dict(spec.options)
        if spec.kind == "commoncrawl":
            return CommonCrawlSource(
                client=make_client(),
                index_url=self.world.url + "/collinfo.json",
                data_url=self.world.url,
                block_bytes=900,
                **options,
            )
        if spec.kind in ("fineweb", "cosmopedia"):
            client = make_client()
            return HubSource(name=spec.kind, endpoint=self.world.url, client=client, **options)
        return open_source(spec, config=config)

    @contextmanager
    def stream(self, *, workers: int, parallel_files: int = 1) -> Iterator[MixedStream]:
        config = parse_args(
            [*FLAGS, "--local-path", str(self.home / "own"), "--num-workers", str(workers),
             "--commoncrawl-parallel-files", str(parallel_files)]
        )  # fmt: skip
        with tempfile.TemporaryDirectory(dir=self.home) as spool, pytest.MonkeyPatch.context() as m:
            m.setattr(open_stream, "open_source", self.open_source)
            m.setattr(breaker, "RETRY_S", 0.0)
            m.setattr(breaker, "FIRST_PAUSE_S", 0.01)
            stream = open_stream.open_stream(
                config,
                tokenizer=TOKENIZER,
                corpus=CORPUS,
                spool_directory=Path(spool),
                evaluation=self.evaluation,
            )
            try:
                yield stream
            finally:
                stream.close()

    def read(self, plan: Plan, *, workers: int) -> tuple[list[str], MixedStream, set[str | None]]:
        """Digests of the batches under a plan, the closed stream, and the faults that struck."""
        with self.world.planned(plan) as seen, self.stream(workers=workers) as stream:
            batches = [digest([batch]) for batch in take(stream, NUM_BATCHES)]
        hosts = {request.host.partition(":")[0] for request in seen}
        assert hosts == {"127.0.0.1"}
        return batches, stream, {request.fault for request in seen} - {None}

    def faults_of(self, kind: str, seed: int) -> tuple[list[str], bool]:
        """One trial: what is wrong with the stream under a fault, and whether it struck."""
        plan = random_faults(kind, seed=seed, most=1 if kind in SLOW else 1000)
        if kind in LYING:  # lists without checksums are sent as they are
            inner = plan
            plan = lambda seen: inner(seen) if seen.range else None  # noqa: E731
        trial = f"{kind}, seed {seed}"
        try:
            batches, stream, struck = self.read(plan, workers=seed % 3)
        except ValueError as error:
            return ([] if kind in FINAL else [f"{trial}: refused with {error}"]), True
        if batches == self.clean:
            return [], bool(struck)
        place = sum(1 for _ in take_equal(batches, self.clean))
        if kind in FINAL and is_told(stream):
            return [], True
        return [f"{trial}: batch {place} differs; {stream.source_report()}"], bool(struck)


def take_equal(ours: list[str], theirs: list[str]) -> Iterator[str]:
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            return
        yield one


def is_told(stream: MixedStream) -> bool:
    """Whether the stream says that a source is gone, or counts files that are."""
    report = stream.source_report().values()
    gone = any(set(source["rejected"]) & {"http_404", "http_410"} for source in report)
    said = any("is left out" in message for message in stream.take_messages())
    return gone or (said and any(source["ended"] for source in report))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    with FakeWorld() as world:
        yield FailingNetwork(world, tmp_path_factory.mktemp("network"))


def test_all_sources_speak_and_are_read_to_several_files(network):
    with network.stream(workers=0) as stream:
        take(stream, NUM_BATCHES)
        assert all(cursor.tokens > 500 for cursor in stream.cursors.values())
        assert 2 <= stream.bootstrap_batches <= 3
        assert stream.source_report()["fineweb"]["rejected"]


@pytest.mark.parametrize("kind", KINDS)
def test_faults_change_no_token_of_the_whole_stream(network, kind):
    found, struck = zip(*(network.faults_of(kind, seed) for seed in range(1, 2)))
    assert [fault for faults in found for fault in faults] == [] and any(struck)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_faults_change_no_token_of_the_whole_stream_at_length(network, kind):
    found, struck = zip(*(network.faults_of(kind, seed) for seed in range(SEEDS)))
    assert [fault for faults in found for fault in faults] == []
    assert sum(struck) > 0.7 * SEEDS


@pytest.mark.parametrize("kind", ["corrupted", "shifted"])
def test_control_a_stream_that_gives_up_at_once_is_found_out(network, monkeypatch, kind):
    monkeypatch.setattr("training.sources.remote.MAX_MEETINGS", 1)
    assert any(network.faults_of(kind, seed)[0] for seed in range(6))
