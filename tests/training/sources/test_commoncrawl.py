"""Common Crawl: which files, in what order, resumed anywhere with the same few requests."""

from __future__ import annotations

import json
import threading

import pytest

from tests.fakeworld.clients import drain, make_client
from tests.fakeworld.crawl import CRAWLS, make_pages, pack, serve_crawl, wet_record
from tests.fakeworld.server import Answer, FakeWorld
from training.sources.base import SOURCE_IDS, SourceError, SourceExhausted
from training.sources.commoncrawl import CommonCrawlSource


@pytest.fixture
def world():
    with FakeWorld() as world:
        yield world


def make_source(world, **settings):
    defaults = {
        "client": make_client(),
        "crawls": 2,
        "wet_paths_per_crawl": 3,
        "records_per_file": 4,
        "seed": 3,
        "index_url": world.url + "/collinfo.json",
        "data_url": world.url,
        "block_bytes": 900,
    }
    return CommonCrawlSource(**{**defaults, **settings})


def path_of(document):
    return document.id.partition("@")[0]


def test_documents_are_the_first_records_of_some_files_of_the_newest_crawls(world):
    pages = serve_crawl(world, files=5, pages=6)
    source = make_source(world, languages=())
    documents, errors = drain(source)
    assert not errors and not source.rejected and SOURCE_IDS[source.name]
    files = list(dict.fromkeys(path_of(document) for document in documents))
    assert sorted(path.split("/")[1] for path in files) == sorted(CRAWLS[:2] * 3)
    assert [document.text for document in documents] == [
        page.text for path in files for page in pages[path][:4]
    ]
    assert len({document.id for document in documents}) == len(documents)


def test_the_seed_draws_other_files(world):
    serve_crawl(world, files=20, pages=1)
    draws = [
        {path_of(document) for document in drain(make_source(world, seed=seed))[0]}
        for seed in range(4)
    ]
    assert len({frozenset(draw) for draw in draws}) == 4


def test_languages_are_those_the_records_name(world):
    pages = serve_crawl(world, files=3, pages=6)
    everything, _ = drain(make_source(world, languages=()))
    source = make_source(world)
    english, _ = drain(source)
    german = [d for d in everything if "deu" in language_of(pages, d.text)]
    assert german and english == [d for d in everything if d not in german]
    assert source.rejected == {"language": len(german)}


def language_of(pages, text):
    return next(page.language for held in pages.values() for page in held if page.text == text)


def test_parallel_files_give_a_record_each_in_turn(world):
    serve_crawl(world, files=4, pages=6)
    one, _ = drain(make_source(world, languages=(), parallel_files=1))
    source = make_source(world, languages=(), parallel_files=3)
    three, errors = drain(source)
    source.close()
    assert not errors and sorted(d.id for d in one) == sorted(d.id for d in three)
    for first in range(0, 12, 3):
        assert len({path_of(document) for document in three[first : first + 3]}) == 3


def test_epochs_take_the_next_files_and_begin_again_at_the_end(world):
    serve_crawl(world, files=6, pages=2, crawls=CRAWLS[:1])
    source = make_source(world, crawls=1, languages=())
    epochs = []
    for epoch in range(3):
        source.rewind(epoch=epoch)
        epochs.append({path_of(document) for document in drain(source)[0]})
    assert not epochs[0] & epochs[1] and len(epochs[0] | epochs[1]) == 6
    assert epochs[2] == epochs[0]


@pytest.mark.parametrize("parallel_files", [1, 3])
@pytest.mark.parametrize("kind", ["wet", "warc"])
def test_resume_after_any_document_with_the_same_few_requests(world, kind, parallel_files):
    serve_crawl(world, files=4, pages=5, kind=kind)
    settings = {"kind": kind, "parallel_files": parallel_files}
    source = make_source(world, **settings)
    states = [source.state_dict()]
    documents = []
    while True:
        try:
            documents.append(source.next_document())
        except SourceExhausted:
            break
        states.append(json.loads(json.dumps(source.state_dict())))
    source.close()
    assert len(documents) > 15
    most = []
    for taken, state in enumerate(states):
        resumed = make_source(world, **settings)
        resumed.load_state_dict(state)
        with world.planned(lambda seen: None) as seen:
            if taken < len(documents):
                assert resumed.next_document() == documents[taken]
        most.append(len(seen))
        rest, errors = drain(resumed)
        assert rest == documents[taken + 1 :] and not errors
        assert resumed.rejected == source.rejected
        resumed.close()
    # Two listings, then a block or two per open file with one read ahead, wherever the place is.
    assert max(most[1:]) <= 2 + 3 * parallel_files + (2 if parallel_files > 1 else 4)


def test_the_position_is_small_and_its_cost_does_not_grow(world):
    """The last record of a long file costs what the first one costs."""
    serve_crawl(world, files=1, pages=300, crawls=CRAWLS[:1])
    source = make_source(world, crawls=1, records_per_file=10_000, languages=())
    costs, sizes = {}, {}
    for taken in range(300):
        if taken in (1, 299):
            resumed = make_source(world, crawls=1, records_per_file=10_000, languages=())
            resumed.load_state_dict(source.state_dict())
            with world.planned(lambda seen: None) as seen:
                document = resumed.next_document()
            assert document == source.next_document()
            costs[taken], sizes[taken] = len(seen), len(json.dumps(source.state_dict()))
        else:
            source.next_document()
    assert costs[299] <= costs[1] + 1 and sizes[299] < sizes[1] + 20


def test_a_new_crawl_does_not_move_a_run(world):
    serve_crawl(world)
    source = make_source(world)
    documents, _ = drain(make_source(world))
    assert source.next_document() == documents[0]
    state = source.state_dict()
    serve_crawl(world, crawls=("CC-MAIN-2026-50", *CRAWLS))
    resumed = make_source(world)
    assert resumed.identity() == source.identity()
    resumed.load_state_dict(state)
    assert drain(resumed)[0] == documents[1:]


def test_another_list_of_files_is_an_error(world):
    serve_crawl(world, files=4)
    source = make_source(world)
    source.next_document()
    serve_crawl(world, files=5)
    resumed = make_source(world)
    resumed.load_state_dict(source.state_dict())
    with pytest.raises(SourceError, match="--no-resume") as caught:
        resumed.next_document()
    assert not caught.value.transient


def test_a_damaged_record_is_left_out_when_met_thrice_and_nothing_else(world):
    serve_crawl(world, files=1, pages=8, crawls=CRAWLS[:1])
    settings = {"crawls": 1, "languages": (), "records_per_file": 100}
    clean, _ = drain(make_source(world, **settings))
    path, start = clean[3].id.split("@")
    archive = bytearray(world.resources["/" + path])
    archive[int(start) + 40] ^= 0xFF
    world.resources["/" + path] = bytes(archive)
    source = make_source(world, **settings)
    documents, errors = drain(source)
    assert documents == clean[:3] + clean[4:]
    # Met first in the middle of a block, whose other bytes make it look like another fault.
    assert [(error.reason, error.transient) for error in errors] == [("bad_gzip", True)] * 4
    assert source.rejected == {"bad_gzip": 1}


def test_the_meetings_are_part_of_the_position(world):
    serve_crawl(world, files=1, pages=4, crawls=CRAWLS[:1])
    settings = {"crawls": 1, "languages": ()}
    clean, _ = drain(make_source(world, **settings))
    path, start = clean[1].id.split("@")
    archive = bytearray(world.resources["/" + path])
    archive[int(start) + 40] ^= 0xFF
    world.resources["/" + path] = bytes(archive)
    source = make_source(world, **settings)
    documents = [source.next_document()]
    for _ in range(4):
        with pytest.raises(SourceError, match="checksum"):
            source.next_document()
        state = json.loads(json.dumps(source.state_dict()))
        source = make_source(world, **settings)
        source.load_state_dict(state)
    assert documents + drain(source)[0] == clean[:1] + clean[2:]


def test_a_missing_file_is_left_out_and_an_outage_leaves_nothing_out(world):
    serve_crawl(world, files=3)
    clean, _ = drain(make_source(world))
    missing = path_of(clean[0])
    with world.planned(lambda seen: "status_404" if missing in seen.path else None):
        source = make_source(world)
        documents, errors = drain(source)
    assert documents == [document for document in clean if path_of(document) != missing]
    assert source.rejected["http_404"] == 1 and {e.reason for e in errors} == {"http_404"}
    source = make_source(world)
    documents = [source.next_document()]
    with world.planned(lambda seen: "status_503"):
        for _ in range(30):
            source._let_go()
            with pytest.raises(SourceError, match="503"):
                source.next_document()
    assert documents + drain(source)[0] == clean


def test_nothing_to_be_had_is_one_clear_line(world):
    serve_crawl(world, files=1, pages=3, crawls=CRAWLS[:1])
    with pytest.raises(SourceError, match=r"no document in 1 files; left out: {'language': ") as c:
        make_source(world, crawls=1, languages=("fra",)).next_document()
    assert not c.value.transient
    world.resources["/collinfo.json"] = b"<html>no index</html>"
    with pytest.raises(SourceError, match="no list of crawls"):
        make_source(world).next_document()
    with pytest.raises(ValueError, match="--commoncrawl-latest-crawls"):
        make_source(world, crawls=0)


def test_a_bomb_among_records_is_counted(world):
    serve_crawl(world, files=1, pages=2, crawls=CRAWLS[:1])
    path = next(path for path in world.resources if path.endswith(".warc.wet.gz"))
    pages = make_pages("bomb", 2)
    bomb = wet_record(pages[0]).replace(b"\r\n\r\n", b"\r\n\r\n" + bytes(20 << 20), 1)
    world.resources[path] = pack([wet_record(pages[0]), bomb, wet_record(pages[1])])
    source = make_source(world, crawls=1, languages=(), block_bytes=1 << 16)
    documents, errors = drain(source)
    assert [document.text for document in documents] == [page.text for page in pages]
    assert not errors and source.rejected == {"too_large": 1}


def test_parallel_files_are_asked_for_at_once(world):
    """No file's first block is answered before those of all others are asked for."""
    serve_crawl(world, files=4, pages=6, crawls=CRAWLS[:1])
    meeting = threading.Barrier(4)

    def wait_for_the_others(content):
        def answer(handler):
            if handler.headers["Range"].startswith("bytes=0-"):
                meeting.wait(60)
            return Answer(body=content)

        return answer

    for path, content in list(world.resources.items()):
        if path.endswith(".warc.wet.gz"):
            world.resources[path] = wait_for_the_others(content)
    client = make_client(read_timeout_s=60.0)
    source = make_source(world, client=client, parallel_files=4, wet_paths_per_crawl=4, crawls=1)
    assert source.next_document().text
    source.close()


def test_no_block_is_fetched_that_a_file_does_not_need(world):
    """With the few records per file that are the rule, a block too many is a third of the load."""
    serve_crawl(world, files=4, pages=40, crawls=CRAWLS[:1])
    settings = {"languages": (), "wet_paths_per_crawl": 4, "crawls": 1, "records_per_file": 12}
    requests = {}
    for parallel_files in (1, 4):
        with world.planned(lambda seen: None) as seen:
            documents, _ = drain(
                make_source(world, parallel_files=parallel_files, block_bytes=2000, **settings)
            )
        assert len(documents) == 48
        requests[parallel_files] = sum(request.range is not None for request in seen)
    assert requests[1] <= requests[4] <= requests[1] + 1
