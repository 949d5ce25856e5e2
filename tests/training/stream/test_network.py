"""The stream over a crawl on 127.0.0.1 whose network fails: same tokens, or a halt that says."""

import json

import pytest

from tests.fakeworld.clients import make_client, random_faults
from tests.fakeworld.crawl import serve_crawl
from tests.fakeworld.faults import LYING, PASSING
from tests.fakeworld.server import FakeWorld
from tests.training.fake_sources import FakeClock
from tests.training.mixed import digest, mixed_stream, take
from training.runtime.state_tree import join_state, split_state
from training.sources.commoncrawl import CommonCrawlSource

KINDS = (
    "status_503", "status_429", "refused", "reset_in_body", "truncated_body", "wrong_range",
    "ignored_range", "corrupted", "shifted",
)  # fmt: skip


@pytest.fixture(scope="module")
def world():
    with FakeWorld() as world:
        serve_crawl(world, files=6, pages=30)
        yield world


def sources(world):
    def crawl(parallel_files):
        return CommonCrawlSource(
            client=make_client(read_timeout_s=5.0),
            crawls=2,
            wet_paths_per_crawl=5,
            records_per_file=30,
            parallel_files=parallel_files,
            languages=(),
            seed=3,
            index_url=world.url + "/collinfo.json",
            data_url=world.url,
            block_bytes=900,
        )

    return {"near": crawl(1), "far": crawl(3)}


@pytest.fixture(scope="module")
def expected(world):
    with mixed_stream(sources(world)) as stream:
        states, batches = [], []
        for _ in range(50):
            tensors, plain = split_state(stream.state_dict())
            states.append(join_state(tensors, json.loads(json.dumps(plain))))
            batches.append(stream.next_batch())
    return states, batches


@pytest.mark.parametrize("index", [0, 9, 38])
def test_resume_over_a_crawl(world, expected, index):
    states, batches = expected
    with mixed_stream(sources(world), workers=index % 3) as resumed:
        resumed.load_state_dict(states[index])
        assert digest(take(resumed, 50 - index)) == digest(batches[index:])


@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_the_network_change_no_token(world, kind):
    """One source at a time: a plan fails a request at most twice in a row, as a source allows."""
    assert kind in PASSING or kind in LYING
    for key in ("near", "far"):
        with mixed_stream({key: sources(world)[key]}) as stream:
            clean = digest(take(stream, 40))
        with world.planned(random_faults(kind, seed=5)) as seen:
            with mixed_stream({key: sources(world)[key]}, clock=FakeClock()) as stream:
                assert digest(take(stream, 40)) == clean
                assert stream.metrics()["data_timeouts"] == 0
        assert sum(request.fault is not None for request in seen) > 3


def test_a_network_that_never_answers_is_a_halt_that_names_it(world):
    with world.planned(lambda seen: "status_503"):
        with mixed_stream(sources(world), clock=FakeClock(), start_timeout_s=60.0) as stream:
            with pytest.raises(RuntimeError, match=r"no source delivers .*503"):
                stream.next_batch()
