"""R18: whatever the network does, a source gives the documents of a clean server, or says why not.

Every fault x 50 seeds that decide when it strikes. Faults on the way (also ones with right headers
and wrong bytes, which the content's checksums find) must cost nothing; after a final answer what
was given before must be the beginning of the clean stream, and the error be of a known reason.
"""

from __future__ import annotations

import functools
import zlib

import pytest

from tests.fakeworld.clients import drain, make_client, random_faults
from tests.fakeworld.crawl import serve_crawl
from tests.fakeworld.faults import FINAL, LYING, PASSING
from tests.fakeworld.hub import FakeDataset, FakeHub, make_rows, parquet_bytes
from tests.fakeworld.server import FakeWorld
from training.sources import warc
from training.sources.base import SourceError
from training.sources.commoncrawl import CommonCrawlSource
from training.sources.hub import HubSource

SEEDS = 50
# Waiting for a time-out takes real time: one strike a run.
SLOW = {"stalled_headers", "stalled_body", "drip", "drip_headers"}
# A final answer for one archive of many is met thrice, then the archive is left out.
OF_ONE_FILE = {"http_404", "http_410"}
FINAL_REASONS = {"http_401", "http_403", *OF_ONE_FILE, "forbidden_host"}


@pytest.fixture(scope="module")
def world():
    with FakeWorld() as world:
        serve_crawl(world, files=3, pages=5)
        files = {
            f"train-{number}.parquet": parquet_bytes(make_rows(f"f{number}", 12), rows_per_group=6)
            for number in range(2)
        }
        FakeHub(world).datasets["own/edu"] = FakeDataset(files=files)
        yield world


def make_crawl(world, *, parallel_files=1, **settings):
    return CommonCrawlSource(
        client=make_client(**settings),
        crawls=1,
        wet_paths_per_crawl=3,
        records_per_file=4,
        parallel_files=parallel_files,
        seed=1,
        index_url=world.url + "/collinfo.json",
        data_url=world.url,
        block_bytes=700,
    )


def make_hub(world, **settings):
    return HubSource("own/edu", name="hf", endpoint=world.url, client=make_client(**settings))


@functools.cache
def clean_documents(world, make_source, settings):
    source = make_source(world, **dict(settings))
    clean, errors = drain(source)
    source.close()
    assert len(clean) > 8 and not errors
    return clean


def check(world, make_source, kind, seed, **settings):
    """One trial; returns whether the fault struck at all."""
    clean = clean_documents(world, make_source, tuple(settings.items()))
    plan = random_faults(kind, seed=seed, most=1 if kind in SLOW else 1000)
    if kind in LYING:  # lists without checksums are sent as they are
        inner = plan
        plan = lambda seen: inner(seen) if seen.range else None  # noqa: E731
    with world.planned(plan) as seen:
        source = make_source(world, **settings)
        documents, errors = drain(source)
        source.close()
    struck = {request.fault for request in seen} - {None}
    trial = f"{kind}, seed {seed}: {[error.reason for error in errors]}"
    if errors and not errors[-1].transient:
        assert kind in FINAL and errors[-1].reason in FINAL_REASONS, trial
        assert documents == clean[: len(documents)], trial
    elif OF_ONE_FILE & source.rejected.keys():
        assert kind in FINAL, trial
        assert all(document in clean for document in documents), trial
    else:
        assert documents == clean, trial
    assert all(request.host.startswith("127.0.0.1:") for request in seen)
    return bool(struck)


@pytest.mark.parametrize("kind", sorted(PASSING | LYING | FINAL))
def test_common_crawl_is_the_clean_stream(world, kind):
    struck = [
        check(world, make_crawl, kind, seed, parallel_files=1 + 2 * (seed % 2))
        for seed in range(SEEDS)
    ]
    assert sum(struck) > 0.9 * SEEDS


@pytest.mark.parametrize("kind", sorted(PASSING | LYING | FINAL))
def test_a_hub_dataset_is_the_clean_stream(world, kind):
    struck = [check(world, make_hub, kind, seed) for seed in range(8)]
    assert sum(struck) >= 5


@pytest.mark.soak
@pytest.mark.parametrize("kind", sorted(PASSING | LYING | FINAL))
def test_a_hub_dataset_is_the_clean_stream_at_length(world, kind):
    struck = [check(world, make_hub, kind, seed) for seed in range(8, 8 + SEEDS)]
    assert sum(struck) > 0.7 * SEEDS  # a short run has few ranges to strike


@pytest.mark.parametrize("kind", ["shifted", "corrupted"])
def test_control_a_reader_without_checksums_is_found_out(world, kind, monkeypatch):
    """Members unpacked by an inflater that is told to ignore what stands at their end."""

    class Careless:
        def __init__(self, wbits):
            self.inner = zlib.decompressobj(wbits)
            self.eof, self.unused_data = False, b""

        def decompress(self, packed, limit=0):
            try:
                content = self.inner.decompress(packed, limit)
            except zlib.error:
                self.eof = True
                return b""
            self.eof, self.unused_data = self.inner.eof, self.inner.unused_data
            return content

    class Zlib:
        error, crc32 = zlib.error, staticmethod(zlib.crc32)
        decompressobj = staticmethod(lambda wbits: Careless(wbits))

    monkeypatch.setattr(warc, "zlib", Zlib)
    with pytest.raises(AssertionError):
        for seed in range(10):
            check(world, make_crawl, kind, seed)


@pytest.mark.parametrize("kind", ["status_503", "refused", "reset_before_headers"])
@pytest.mark.parametrize("make_source", [make_crawl, make_hub])
def test_an_outage_of_any_length_loses_nothing(world, make_source, kind):
    clean, _ = drain(make_source(world))
    source = make_source(world, retries=0)
    first = source.next_document()
    source.load_state_dict(source.state_dict())  # nothing is at hand any more
    with world.planned(lambda seen: kind):
        for _ in range(60):
            with pytest.raises(SourceError) as caught:
                source.next_document()
            assert caught.value.transient
    assert [first, *drain(source)[0]] == clean
    assert not source.rejected.keys() - {"language"}
