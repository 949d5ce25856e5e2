"""The mixed stream: documents whole, shares kept, a position that resumes to the exact token."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.training.fake_sources import FakeSource
from tests.training.mixed import CORPUS, digest, mixed_stream, take, three_sources
from tests.training.small_corpus import TOKENIZER, assert_same
from training.runtime.state_tree import join_state, split_state
from training.sources.base import SOURCE_IDS, split_of
from training.stream.near_duplicates import NearDuplicateWindow
from training.stream.shards import SpoolStore

WEIGHTS = {"web": 5.0, "edu": 3.0, "files": 2.0}
OPTIONS = {"weights": WEIGHTS, "bootstrap_batches": 2, "dedup_window": 64}


def saved(stream):
    """The state as a checkpoint keeps it."""
    tensors, plain = split_state(stream.state_dict())
    return join_state(tensors, json.loads(json.dumps(plain)))


def documents_of(batches):
    """(source id, text) of every document that begins and ends inside the batches, in order."""
    tokens = torch.cat([batch.input_ids.flatten() for batch in batches]).tolist()
    ids = torch.cat([batch.source_ids.flatten() for batch in batches]).tolist()
    starts = [i for i, token in enumerate(tokens) if token == CORPUS.end_id]
    return [
        (ids[start], TOKENIZER.decode(tokens[start + 1 : stop])) for start, stop in pairwise(starts)
    ]


def test_documents_arrive_whole_once_an_epoch_and_under_their_source():
    sources = three_sources()
    with mixed_stream(sources, weights=WEIGHTS) as stream:
        found = documents_of(take(stream, 150))
    texts = Counter(text for _, text in found)
    by_text = {}
    for source in three_sources().values():
        for epoch in range(40):
            for index in range(source.size):
                document = source.document(epoch, index)
                by_text[document.text] = document
    assert set(texts) <= set(by_text)
    assert max(texts.values()) == 1
    for source_id, text in found:
        assert source_id == SOURCE_IDS[by_text[text].source]
        assert split_of(by_text[text].id) == "train"
    # Every training document of the first epoch of `edu` came before the second one's began to end.
    edu = [text for number, text in found if number == SOURCE_IDS["fineweb"]]
    train = sum(split_of(f"edu/{index}") == "train" for index in range(37))
    assert {text.split()[1] for text in edu[:train]} == {"0"}
    assert {text.split()[1] for text in edu[train : 2 * train]} == {"1"}


def test_rows_are_the_next_tokens_without_a_gap():
    with mixed_stream(three_sources(), **OPTIONS) as stream:
        batches = take(stream, 40)
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    assert torch.equal(labels[:-1], inputs[1:])
    for batch in batches:
        assert torch.equal(batch.reset_mask, batch.input_ids == CORPUS.end_id)
        changes = batch.source_ids[:, 1:] != batch.source_ids[:, :-1]
        assert (batch.reset_mask[:, 1:] | ~changes).all()
        text = TOKENIZER.decode_bytes(batch.labels.flatten().tolist())
        assert batch.num_bytes == len(text)


def test_shares_follow_the_weights():
    with mixed_stream(three_sources(), weights=WEIGHTS) as stream:
        take(stream, 1500)
        served = stream.served_tokens
        metrics = stream.metrics()
    total = sum(served.values())
    for key, weight in WEIGHTS.items():
        assert served[key] / total == pytest.approx(weight / 10, abs=0.02)
        assert metrics[f"data_source_fraction_{key}"] == served[key] / total
    assert served["bootstrap"] == 0 and metrics["data_timeouts"] == metrics["data_fallbacks"] == 0


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_number_of_workers_changes_nothing(workers):
    with mixed_stream(three_sources(), workers=0, **OPTIONS) as stream:
        expected = digest(take(stream, 300))
    with mixed_stream(three_sources(), workers=workers, **OPTIONS) as stream:
        assert digest(take(stream, 300)) == expected


@pytest.mark.parametrize(("before", "after"), [(0, 4), (4, 1), (2, 0), (1, 2)])
def test_resume_after_any_batch_with_any_number_of_workers(before, after):
    """Also at every batch of the bootstrap phase and of the first, small shards."""
    with mixed_stream(three_sources(), workers=before, **OPTIONS) as stream:
        states, batches = [], []
        for _ in range(60):
            states.append(saved(stream))
            batches.append(stream.next_batch())
        ends = saved(stream)
    for index in [*range(12), *range(12, 60, 7)]:
        with mixed_stream(three_sources(), workers=after, **OPTIONS) as resumed:
            resumed.load_state_dict(states[index])
            for batch in batches[index:]:
                assert_same(resumed.next_batch(), batch)
            assert str(saved(resumed)) == str(ends)


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_the_next_thousand_batches_are_identical_from_anywhere(workers):
    with mixed_stream(three_sources(), **OPTIONS) as stream:
        states, batches = [], []
        for _ in range(1400):
            states.append(saved(stream))
            batches.append(stream.next_batch())
    for index in (0, 1, 2, 3, 50, 133, 251, 400):
        with mixed_stream(three_sources(), workers=workers, **OPTIONS) as resumed:
            resumed.load_state_dict(states[index])
            assert digest(take(resumed, 1000)) == digest(batches[index : index + 1000])


def test_a_state_that_forgets_the_open_document_is_noticed():
    """Negative control of the tests above."""
    with mixed_stream(three_sources(), **OPTIONS) as stream:
        take(stream, 21)
        state = saved(stream)
        following = take(stream, 3)
    assert state["open"] is not None
    with mixed_stream(three_sources(), **OPTIONS) as resumed:
        resumed.load_state_dict(state | {"open": None})
        assert digest(take(resumed, 3)) != digest(following)


@pytest.mark.parametrize("distance", [10, 1000])
def test_resume_asks_a_source_for_one_shard_however_far_in(distance):
    def calls_of_a_resume(state):
        sources = three_sources()
        with mixed_stream(sources, **OPTIONS) as stream:
            stream.load_state_dict(state)
            stream.next_batch()
        return max(source.calls for source in sources.values())

    with mixed_stream(three_sources(), **OPTIONS) as stream:
        take(stream, distance)
        state = saved(stream)
    assert calls_of_a_resume(state) <= 2 * 32 + 3  # two shards of 32 documents


def test_a_million_documents_in_costs_what_ten_batches_in_costs():
    """The position is set by hand where no test could walk to."""
    with mixed_stream({"web": FakeSource("commoncrawl", key="web", size=10**9)}) as stream:
        take(stream, 200)
        state = saved(stream)
    cursor = state["cursors"]["web"]
    assert cursor["start"]["source"]["index"] > 0
    cursor["start"]["source"]["index"] = 1_000_000
    cursor["number"] = 31_250
    source = FakeSource("commoncrawl", key="web", size=10**9)
    with mixed_stream({"web": source}) as far:
        far.load_state_dict(state | {"open": None})
        far.next_batch()
    assert source.loads == 1 and source.calls <= 64
    assert source.index >= 1_000_000


def test_the_same_stream_object_can_go_back():
    for workers in (0, 2):
        with mixed_stream(three_sources(), workers=workers, **OPTIONS) as stream:
            take(stream, 30)
            state = saved(stream)
            first = digest(take(stream, 60))
            stream.load_state_dict(state)
            assert digest(take(stream, 60)) == first


def test_ranks_share_the_rows_without_a_gap_or_an_overlap():
    with mixed_stream(three_sources(), batch_size=6, **OPTIONS) as stream:
        whole = [batch.input_ids for batch in take(stream, 20)]
    parts = []
    for rank in range(3):
        with mixed_stream(
            three_sources(), batch_size=2, rank=rank, world_size=3, **OPTIONS
        ) as stream:
            parts.append([batch.input_ids for batch in take(stream, 20)])
    for index, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), batch)


def test_rows_do_not_depend_on_the_batch_size():
    options = {**OPTIONS, "bootstrap_batches": 0}
    with mixed_stream(three_sources(), batch_size=1, **options) as single:
        rows = torch.cat([batch.input_ids for batch in take(single, 60)])
    with mixed_stream(three_sources(), batch_size=4, **options) as four:
        assert torch.equal(torch.cat([batch.input_ids for batch in take(four, 15)]), rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", 0), ("corpus", "0"), ("tokenizer", "0"), ("seed", 9), ("seq_len", 8),
     ("sources", ["web"])],
)  # fmt: skip
def test_a_foreign_state_is_refused_by_name(name, value):
    with mixed_stream(three_sources(), **OPTIONS) as stream:
        state = saved(stream)
        with pytest.raises(ValueError, match=f"has {name} .*--no-resume"):
            stream.load_state_dict(state | {name: value})


def test_other_material_under_the_same_name_is_refused_by_the_source():
    with mixed_stream({"web": FakeSource("local", key="web")}) as stream:
        take(stream, 30)
        state = saved(stream)
    other = FakeSource("local", key="web", size=201)
    with mixed_stream({"web": other}, start_timeout_s=1.0) as stream:
        stream.load_state_dict(state)
        with pytest.raises(RuntimeError, match=r"not the one of the checkpoint.*--no-resume"):
            stream.next_batch()


def test_finite_sources_end_and_the_end_is_part_of_the_state():
    sources = {"a": FakeSource(key="a", size=20), "b": FakeSource("hf", key="b", size=60)}
    options = {"reader": {"max_epochs": 2}}
    with mixed_stream(sources, **options) as stream:
        batches = []
        with pytest.raises(RuntimeError, match="used up"):
            for _ in range(1000):
                batches.append(stream.next_batch())
                if stream.cursors["a"].ended and len(batches) % 5 == 0:
                    state, rest = saved(stream), len(batches)
        found = documents_of(batches)
    for key, size in (("a", 20), ("b", 60)):
        texts = [text for _, text in found if text.startswith(f"{key} ")]
        kept = sum(split_of(f"{key}/{index}") == "train" for index in range(size))
        assert kept - 3 <= len(texts) / 2 <= kept
    with mixed_stream(sources, **options) as resumed:
        resumed.load_state_dict(state)
        assert resumed.cursors["a"].ended
        assert digest(take(resumed, len(batches) - rest)) == digest(batches[rest:])


def test_a_source_with_a_cap_gives_no_more():
    sources = {"a": FakeSource(key="a"), "b": FakeSource("hf", key="b")}
    with mixed_stream(sources, max_tokens={"a": 500}) as stream:
        take(stream, 60)
        assert 500 <= stream.served_tokens["a"] < 700
        assert "max_tokens" in stream.cursors["a"].ended


def test_what_another_source_had_lately_is_left_out():
    """Two sources of the same texts: each text is served once, and again when it is forgotten."""

    def twins():
        first, second = FakeSource("local", key="same"), FakeSource("hf", key="same")
        return {"a": first, "b": second}

    with mixed_stream(twins(), dedup_window=10_000) as stream:
        texts = [text for _, text in documents_of(take(stream, 60))]
        assert len(texts) == len(set(texts))
        assert stream.metrics()["data_dedup_dropped"] > 20
    with mixed_stream(twins(), dedup_window=0) as stream:
        texts = [text for _, text in documents_of(take(stream, 60))]
        assert len(texts) > len(set(texts)) + 20


def test_the_next_epoch_repeats_a_small_source_whatever_the_windows():
    def make():
        source = FakeSource("local", key="small", size=30, words=(20, 60))
        plain = source.document
        source.document = lambda epoch, index: plain(0, index)  # the same texts in every epoch
        return {"small": source}

    window = lambda: NearDuplicateWindow(window_size=500, near_window=500)  # noqa: E731
    with mixed_stream(make(), window=window, dedup_window=500) as stream:
        texts = [text for _, text in documents_of(take(stream, 60))]
        assert max(Counter(texts).values()) >= 3
        assert stream.metrics()["data_dedup_dropped"] == 0


def test_a_source_that_only_repeats_another_ends():
    same = {"a": FakeSource("local", key="x", size=60), "b": FakeSource("hf", key="x", size=60)}
    for source in same.values():
        source.document = lambda epoch, index: same["a"].__class__.document(same["a"], 0, index)
    with mixed_stream(same, dedup_window=500, weights={"a": 1.0, "b": 0.0}) as stream:
        take(stream, 60)
        stream.mixture.weights["b"] = 1.0
        take(stream, 20)
        assert "nothing that the other sources do not" in stream.cursors["b"].ended
        assert not stream.cursors["a"].ended


def test_reweighing_takes_effect_at_the_next_draw_and_survives_a_resume():
    sources = {"a": FakeSource("local", key="a"), "b": FakeSource("hf", key="b")}
    with mixed_stream(sources) as stream:
        stream.mixture.ids = {"a": 9, "b": 11}
        take(stream, 50)
        stream.mixture.reweigh({9: 0.0})
        before = stream.served_tokens
        state = saved(stream)
        following = digest(take(stream, 50))
        gained = stream.served_tokens["a"] - before["a"]
        assert gained < 200  # the rest of the turn
    with mixed_stream(sources) as resumed:
        resumed.load_state_dict(state)
        assert digest(take(resumed, 50)) == following


@pytest.mark.parametrize("spooled", [False, True])
def test_the_window_of_near_duplicates_is_part_of_the_position(spooled, tmp_path):
    """A source that repeats itself, resumed anywhere, leaves out the same documents."""

    def make():
        source = FakeSource("local", key="again", size=400, words=(20, 60))
        plain = source.document
        source.document = lambda epoch, index: replace(
            plain(epoch, index % 30), id=f"again/{index}"
        )
        return {"again": source}

    def spool(key):
        return SpoolStore(tmp_path, max_bytes=10 << 20)

    options = {
        "window": lambda: NearDuplicateWindow(window_size=500, near_window=500),
        "store": spool if spooled else None,
    }
    with mixed_stream(make(), **options) as stream:
        states, batches = [], []
        for _ in range(40):
            states.append(saved(stream))
            batches.append(stream.next_batch())
        assert stream.metrics()["data_dedup_dropped"] > 100
    texts = [text.split(":")[0] for _, text in documents_of(batches)]
    assert len(texts) > len(set(texts)) * 0.9
    for index in range(0, 40, 6):
        if spooled:
            for path in sorted(tmp_path.glob("*.shard"))[index // 6 :: 3]:
                path.unlink()
        with mixed_stream(make(), **options) as resumed:
            resumed.load_state_dict(states[index])
            assert digest(take(resumed, 40 - index)) == digest(batches[index:])


def test_a_spool_changes_nothing_and_a_damaged_one_is_repaired(tmp_path):
    with mixed_stream(three_sources(), **OPTIONS) as stream:
        expected = digest(take(stream, 200))

    def spool(key):
        return SpoolStore(tmp_path / key, max_bytes=10 << 20)

    for key in WEIGHTS:
        (tmp_path / key).mkdir()
    with mixed_stream(three_sources(), store=spool, **OPTIONS) as stream:
        assert digest(take(stream, 200)) == expected
    generator = np.random.default_rng(0)
    for path in sorted(tmp_path.glob("*/*.shard"))[::2]:
        content = bytearray(path.read_bytes())
        content[int(generator.integers(len(content)))] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
    for workers in (0, 2):
        with mixed_stream(three_sources(), store=spool, workers=workers, **OPTIONS) as stream:
            assert digest(take(stream, 200)) == expected
