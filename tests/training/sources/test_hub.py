"""Hub datasets: rows in order, filters, resume anywhere, and one clear line for every mistake."""

from __future__ import annotations

import io
import json

import pytest
from pyarrow import parquet

from tests.fakeworld.clients import drain, make_client
from tests.fakeworld.hub import TOKEN, FakeDataset, FakeHub, make_rows, parquet_bytes
from tests.fakeworld.server import FakeWorld
from training.sources.base import SourceError, SourceExhausted
from training.sources.hub import HubSource, hub_allow, hub_endpoint

ROWS = {
    f"data/train-{number:05}-of-00003.parquet": make_rows(f"f{number}", 25) for number in range(3)
}
FILES = {path: parquet_bytes(rows) for path, rows in ROWS.items()}


@pytest.fixture
def world():
    with FakeWorld() as world:
        yield world


@pytest.fixture
def hub(world):
    hub = FakeHub(world, redirects=True)
    hub.datasets["own/edu"] = FakeDataset(files={**FILES, "README.md": b"# a card"})
    return hub


def make_source(world, dataset="own/edu", **settings):
    defaults = {"name": "fineweb", "endpoint": world.url, "client": make_client()}
    return HubSource(dataset, **{**defaults, **settings})


def texts(source):
    documents, errors = drain(source)
    assert not errors
    return [document.text for document in documents]


def test_rows_in_their_own_order(world, hub):
    source = make_source(world)
    documents, errors = drain(source)
    assert not errors and not source.rejected
    assert [d.text for d in documents] == [row["text"] for rows in ROWS.values() for row in rows]
    assert len({document.id for document in documents}) == 75
    assert {document.source for document in documents} == {"fineweb"}


def test_least_score(world, hub):
    source = make_source(world, min_score=4.0)
    wanted = [row["text"] for rows in ROWS.values() for row in rows if row["score"] >= 4.0]
    assert texts(source) == wanted and source.rejected == {"low_score": 75 - len(wanted)}
    by_id = make_source(world, min_score=20, score_field="id")
    assert texts(by_id) == [row["text"] for rows in ROWS.values() for row in rows[20:]]


def test_several_fields_and_a_template(world, hub):
    plain = make_source(world, text_field=("question", "answer"))
    assert texts(plain)[3] == "f0 3?\n\n9"
    formed = make_source(
        world, text_field=("question", "answer"), template="Q: {question}\nA: {answer}"
    )
    assert texts(formed)[3] == "Q: f0 3?\nA: 9"
    for wrong in ("{question}", "{question} {answer} {id}", "{question.x} {answer}", "{", "{0}{1}"):
        with pytest.raises(ValueError, match="format"):
            make_source(world, text_field=("question", "answer"), template=wrong)


def test_empty_rows_are_counted(world, hub):
    rows = [{"text": "a"}, {"text": None}, {"text": " \n"}, {"text": "b"}]
    hub.datasets["own/gaps"] = FakeDataset(files={"x.parquet": parquet_bytes(rows)})
    source = make_source(world, "own/gaps")
    assert texts(source) == ["a", "b"] and source.rejected == {"empty": 2}


def test_a_seed_draws_an_order_for_every_epoch(world, hub):
    source = make_source(world, shuffle_seed=5)
    epochs = []
    for epoch in range(2):
        source.rewind(epoch=epoch)
        epochs.append([document.id for document in drain(source)[0]])
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    again = make_source(world, shuffle_seed=5)
    assert [document.id for document in drain(again)[0]] == epochs[0]
    assert len({tuple(epochs[0]), tuple(d.id for d in drain(make_source(world))[0])}) == 2


@pytest.mark.parametrize("settings", [{}, {"shuffle_seed": 2, "min_score": 2.0}])
def test_resume_after_any_row_with_the_same_few_requests(world, hub, settings):
    source = make_source(world, **settings)
    states, documents = [source.state_dict()], []
    while True:
        try:
            documents.append(source.next_document())
        except SourceExhausted:
            break
        states.append(json.loads(json.dumps(source.state_dict())))
    assert len(documents) > 30
    for taken, state in enumerate(states):
        resumed = make_source(world, **settings)
        resumed.load_state_dict(state)
        with world.planned(lambda seen: None) as seen:
            if taken < len(documents):
                assert resumed.next_document() == documents[taken]
        # The file list; then, twice each for the redirect, size, footer and the columns of a row
        # group, and as much again where the position is the end of a group or file.
        assert len(seen) <= 1 + 2 * 9
        assert drain(resumed) == (documents[taken + 1 :], [])
        assert resumed.rejected == source.rejected and resumed.identity() == source.identity()


def test_the_cost_of_resuming_does_not_grow(world, hub):
    hub.datasets["own/long"] = FakeDataset(
        files={"x.parquet": parquet_bytes(make_rows("long", 1500), rows_per_group=50)}
    )
    source = make_source(world, "own/long")
    costs = {}
    for taken in range(1500):
        if taken in (60, 1460):
            resumed = make_source(world, "own/long")
            resumed.load_state_dict(source.state_dict())
            with world.planned(lambda seen: None) as seen:
                assert resumed.next_document() == source.next_document()
            costs[taken] = len(seen)
        else:
            source.next_document()
    assert costs[60] == costs[1460]
    assert len(json.dumps(source.state_dict())) < 600


def test_the_revision_is_fixed_for_a_run(world, hub):
    clean = texts(make_source(world))
    source = make_source(world)
    source.next_document()
    state = source.state_dict()
    old = hub.datasets["own/edu"]
    new = FakeDataset(files={"data/train-0.parquet": parquet_bytes(make_rows("new", 5))})
    both = FakeDataset(files=new.files)
    both.at = lambda revision: (
        old.at(revision) if revision == state["revision"] else new.at(revision)
    )
    hub.datasets["own/edu"] = both
    resumed = make_source(world)
    resumed.load_state_dict(state)
    assert texts(resumed) == clean[1:]
    assert texts(make_source(world))[0].startswith("new 0 ")


def test_a_dataset_of_another_format_is_read_as_the_hub_converted_it(world, hub):
    hub.datasets["own/lines"] = FakeDataset(
        files={"train.jsonl": b"{}"},
        converted={
            "default/train/0000.parquet": parquet_bytes(make_rows("one", 5)),
            "default/partial-test/0000.parquet": parquet_bytes(make_rows("two", 3)),
        },
    )
    source = make_source(world, "own/lines")
    first = source.next_document()
    assert first.text.startswith("one 0 ")
    resumed = make_source(world, "own/lines")
    resumed.load_state_dict(source.state_dict())
    assert len(texts(resumed)) == 4
    assert len(texts(make_source(world, "own/lines", split="test"))) == 3
    hub.datasets["own/raw"] = FakeDataset(files={"train.jsonl": b"{}"})
    with pytest.raises(SourceError, match="no parquet files, and the hub has none converted"):
        make_source(world, "own/raw").next_document()


MISTAKES = [
    ("own/nowhere", {}, "no dataset own/nowhere on 127.0.0.1; check its name"),
    ("own/nowhere", {"token": TOKEN}, "no dataset own/nowhere"),
    ("own/gated", {}, "is gated: accept its terms .* put a token into HF_TOKEN"),
    ("own/secret", {}, "no dataset own/secret .* HF_TOKEN"),
    ("own/edu", {"token": "hf_wrong"}, "does not accept the token in HF_TOKEN"),
    ("own/edu", {"text_field": "txt"}, "no field 'txt' of text; it has: text, question, answer"),
    ("own/edu", {"text_field": "id"}, "no field 'id' of text"),
    ("own/edu", {"min_score": 1, "score_field": "text"}, "no field 'text' of numbers"),
    ("own/edu", {"split": "test"}, "no split 'test'; it has: train"),
    ("own/edu", {"config": "big"}, "no configuration 'big'"),
    ("own/edu", {"revision": "v9"}, "no such revision"),
    ("own/edu", {"min_score": 9}, "gave no document; left out: {'low_score': 75}"),
]


@pytest.mark.parametrize(("dataset", "settings", "line"), MISTAKES)
def test_a_mistake_is_one_clear_line(world, hub, dataset, settings, line):
    for name in ("gated", "private"):
        needs = {"gated": "own/gated", "private": "own/secret"}[name]
        hub.datasets[needs] = FakeDataset(files=FILES, needs_token=name)
    with pytest.raises(SourceError, match=line) as caught:
        make_source(world, dataset, **settings).next_document()
    assert not caught.value.transient and "\n" not in str(caught.value)


def test_a_token_opens_what_needs_one_and_is_not_sent_elsewhere(world, hub):
    hub.datasets["own/gated"] = FakeDataset(files=FILES, needs_token="gated")
    with world.planned(lambda seen: None) as seen:
        assert len(texts(make_source(world, "own/gated", token=TOKEN))) == 75
    assert all(request.authorization for request in seen)
    with FakeWorld() as other:
        FakeHub(other).datasets["own/gated"] = hub.datasets["own/gated"]
        plan = lambda seen: None  # noqa: E731
        with world.planned(plan) as seen, other.planned(plan) as elsewhere:
            world.resources.update(moved(hub, other))
            assert make_source(world, "own/gated", token=TOKEN).next_document()
    assert all(request.authorization for request in seen) and elsewhere
    assert not any(request.authorization for request in elsewhere)


def moved(hub, other):
    """Answers that send whoever wants a file to the other server's store."""
    from tests.fakeworld.server import Answer

    sha = hub.datasets["own/gated"].at("main")[0]
    return {
        f"/datasets/own/gated/resolve/{sha}/{path}": lambda handler, path=path: Answer(
            status=302, headers={"Location": f"{other.url}/cdn/own/gated/{sha}/{path}"}
        )
        for path in FILES
    }


def test_a_damaged_row_group_is_left_out_and_nothing_else(world, hub):
    path = "data/train-00001-of-00003.parquet"
    clean, _ = drain(make_source(world))
    damaged = bytearray(FILES[path])
    column = parquet.ParquetFile(io.BytesIO(FILES[path])).metadata.row_group(1).column(0)
    place = column.data_page_offset + column.total_compressed_size // 3
    damaged[place : place + 40] = bytes(40)
    hub.datasets["own/edu"] = FakeDataset(files={**FILES, path: bytes(damaged)})
    source = make_source(world)
    documents, errors = drain(source)
    assert {error.reason for error in errors} == {"bad_parquet"} and len(errors) == 3
    assert source.rejected == {"bad_parquet": 1}
    groups = {d.id.split("#")[1].split(".")[0] for d in clean if path in d.id} - {
        d.id.split("#")[1].split(".")[0] for d in documents if path in d.id
    }
    assert len(groups) == 1
    assert documents == [
        d for d in clean if not (path in d.id and f"#{next(iter(groups))}." in d.id)
    ]


def test_names_and_endpoint(world, monkeypatch):
    for wrong in ("", "a/b/c", "../x", "own/a b", "own/edu?x=1", "http://x/y"):
        with pytest.raises(ValueError, match="owner/name"):
            HubSource(wrong, name="hf")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    assert hub_endpoint() == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", world.url + "/")
    assert hub_endpoint() == world.url
    allow = hub_allow("https://hub.example")
    assert allow("hub.example") and allow("cdn-lfs.hf.co") and not allow("evil.example")
