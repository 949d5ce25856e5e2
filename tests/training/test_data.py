"""The stream serves every window once, knows documents, and resumes at any place to the bit."""

import json

import numpy as np
import pytest
import torch

from tests.training.small_corpus import TOKENIZER, SmallCorpus, assert_same
from training.data import (
    TokenStream,
    permutation,
    tokenize_corpus,
)
from training.sources.base import SOURCE_IDS, in_scoring_order, split_of
from training.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def source():
    return SmallCorpus()


@pytest.fixture(scope="module")
def corpus(source):
    return tokenize_corpus(source, TOKENIZER)


def make_stream(corpus, *, seed=1, batch_size=3, seq_len=32):
    return TokenStream(corpus, seed=seed, batch_size=batch_size, seq_len=seq_len)


def epoch_rows(stream):
    """All rows of the stream's current epoch as (tokens with last label, sources), in order."""
    rows = []
    for _ in range(stream.windows_per_epoch):
        batch = stream.next_batch()
        rows.append((torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1)[0], batch))
    return rows


def test_documents_open_with_the_end_token_and_keep_their_text(source, corpus):
    for side, split in corpus.splits.items():
        documents = [doc for doc in source.documents() if split_of(doc.id) == side]
        if side == "validation":
            documents = in_scoring_order(documents)
        assert split.num_documents == len(documents) > 0
        for index, document in enumerate(documents):
            tokens = split.tokens[split.starts[index] : split.starts[index + 1]]
            assert tokens[0] == corpus.end_id
            assert corpus.end_id not in tokens[1:]
            assert TOKENIZER.decode(tokens) == document.text
            assert split.source_ids[index] == SOURCE_IDS[document.source]


@pytest.mark.parametrize("seq_len", [1, 7, 32, 500])
def test_each_window_is_served_once_per_epoch(corpus, seq_len):
    stream = make_stream(corpus, batch_size=1, seq_len=seq_len)
    rows = epoch_rows(stream)
    assert stream.epoch == 1 and stream.window == 0
    split = corpus.splits["train"]
    order = permutation(split.num_documents, seed=1, epoch=0, stream=0)
    whole = np.concatenate(
        [split.tokens[split.starts[d] : split.starts[d + 1]] for d in order]
        + [np.array([corpus.end_id])]
    )
    expected = sorted(
        tuple(whole[start : start + seq_len + 1].tolist())
        for start in range(0, len(whole) - seq_len, seq_len)
    )
    assert sorted(tuple(tokens.tolist()) for tokens, _ in rows) == expected


def test_labels_are_the_next_tokens(corpus):
    stream = make_stream(corpus)
    for _ in range(20):
        batch = stream.next_batch()
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
        assert batch.source_ids.dtype == torch.int16 and batch.reset_mask.dtype == torch.bool
        assert torch.equal(batch.labels[:, :-1], batch.input_ids[:, 1:])
        assert (batch.labels >= 0).all()


def test_resets_are_exactly_the_opening_tokens_and_sources_change_only_there(corpus):
    stream = make_stream(corpus)
    resets = 0
    for _ in range(30):
        batch = stream.next_batch()
        assert torch.equal(batch.reset_mask, batch.input_ids == corpus.end_id)
        changes = batch.source_ids[:, 1:] != batch.source_ids[:, :-1]
        assert (batch.reset_mask[:, 1:] | ~changes).all()
        resets += int(batch.reset_mask.sum())
    assert resets > 10


def test_source_ids_name_the_document_of_each_token(source, corpus):
    sources = {doc.text.split(":")[0]: SOURCE_IDS[doc.source] for doc in source.documents()}
    checked = 0
    stream = make_stream(corpus, seq_len=128)
    for _ in range(10):
        batch = stream.next_batch()
        for row in range(batch.input_ids.size(0)):
            for start in batch.reset_mask[row].nonzero().flatten().tolist():
                opening = TOKENIZER.decode(batch.input_ids[row, start : start + 12].tolist())
                if ":" in opening:
                    assert batch.source_ids[row, start] == sources[opening.split(":")[0]]
                    checked += 1
    assert checked > 20


def test_num_bytes_is_the_text_of_the_labels(corpus):
    stream = make_stream(corpus)
    for _ in range(10):
        batch = stream.next_batch()
        assert batch.num_bytes == len(TOKENIZER.decode_bytes(batch.labels.flatten().tolist()))


def test_resume_at_every_position_continues_to_the_bit(corpus):
    stream = make_stream(corpus, batch_size=5)
    batches, states = [], []
    for _ in range(2 * stream.windows_per_epoch // 5 + 2):
        states.append(json.loads(json.dumps(stream.state_dict())))
        batches.append(stream.next_batch())
    assert stream.epoch == 2
    for index in range(len(states)):
        resumed = make_stream(corpus, batch_size=5)
        resumed.load_state_dict(states[index])
        assert_same(resumed.next_batch(), batches[index])
        if index + 1 < len(states):
            assert resumed.state_dict() == states[index + 1]


def test_the_same_stream_object_can_go_back(corpus):
    stream = make_stream(corpus)
    state = stream.state_dict()
    first = stream.next_batch()
    for _ in range(stream.windows_per_epoch):
        stream.next_batch()
    stream.load_state_dict(state)
    assert_same(stream.next_batch(), first)


def test_the_state_is_not_shared_with_the_stream(corpus):
    stream = make_stream(corpus)
    state = stream.state_dict()
    kept = json.dumps(state)
    stream.next_batch()
    assert json.dumps(state) == kept


def test_rows_do_not_depend_on_the_batch_size(corpus):
    single, triple = make_stream(corpus, batch_size=1), make_stream(corpus, batch_size=3)
    for _ in range(single.windows_per_epoch // 2):
        rows = torch.cat([single.next_batch().input_ids for _ in range(3)])
        assert torch.equal(rows, triple.next_batch().input_ids)


def test_a_far_position_needs_no_way_to_it(corpus, monkeypatch):
    reached = make_stream(corpus, batch_size=4)
    for _ in range(3 * reached.windows_per_epoch // 4 + 1):
        reached.next_batch()
    jumped = make_stream(corpus, batch_size=4)
    jumped.load_state_dict(jumped.state_dict() | {"epoch": reached.epoch, "window": reached.window})
    assert_same(jumped.next_batch(), reached.next_batch())

    drawn = []

    def record(size, *, seed, epoch, stream):
        drawn.append(epoch)
        return permutation(size, seed=seed, epoch=epoch, stream=stream)

    monkeypatch.setattr("training.data.permutation", record)
    far = make_stream(corpus, batch_size=4)
    far.load_state_dict(far.state_dict() | {"epoch": 1000, "window": 5})
    far.next_batch()
    assert drawn == [1000, 1000]


def test_a_batch_may_span_epochs(corpus):
    stream = make_stream(corpus, batch_size=2)
    stream.load_state_dict(stream.state_dict() | {"window": stream.windows_per_epoch - 1})
    spanning = stream.next_batch()
    assert (stream.epoch, stream.window) == (1, 1)
    single = make_stream(corpus, batch_size=1)
    single.load_state_dict(single.state_dict() | {"window": single.windows_per_epoch - 1})
    assert torch.equal(spanning.input_ids[:1], single.next_batch().input_ids)
    assert torch.equal(spanning.input_ids[1:], single.next_batch().input_ids)


def test_seeds_and_epochs_order_the_text_differently(corpus):
    first = torch.stack([tokens for tokens, _ in epoch_rows(make_stream(corpus, batch_size=1))])
    other = torch.stack(
        [tokens for tokens, _ in epoch_rows(make_stream(corpus, seed=2, batch_size=1))]
    )
    stream = make_stream(corpus, batch_size=1)
    epoch_rows(stream)
    second = torch.stack([tokens for tokens, _ in epoch_rows(stream)])
    same = torch.stack([tokens for tokens, _ in epoch_rows(make_stream(corpus, batch_size=1))])
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first, second)


def visited_windows(corpus, *, seed, epoch):
    """Which window of the epoch's stream each row is, in the order of the rows."""
    stream = make_stream(corpus, seed=seed, batch_size=1)
    stream.load_state_dict(stream.state_dict() | {"epoch": epoch})
    rows = [tuple(tokens.tolist()) for tokens, _ in epoch_rows(stream)]
    split = corpus.splits["train"]
    order = permutation(split.num_documents, seed=seed, epoch=epoch, stream=0)
    whole = np.concatenate([split.tokens[split.starts[d] : split.starts[d + 1]] for d in order])
    places = {
        tuple(whole[start : start + 32].tolist()): start // 32 for start in range(0, len(whole), 32)
    }
    return [places[row[:32]] for row in rows]


def test_windows_are_visited_in_an_order_of_their_own(corpus):
    orders = [visited_windows(corpus, seed=s, epoch=e) for s, e in ((1, 0), (1, 1), (2, 0))]
    assert all(sorted(order) == list(range(len(order))) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert tuple(range(len(orders[0]))) not in {tuple(order) for order in orders}


@pytest.mark.parametrize("other", [{"seed": 7}, {"seq_len": 64}])
def test_the_state_of_another_stream_is_refused(corpus, other):
    with pytest.raises(ValueError, match=f"has {next(iter(other))} .*--no-resume"):
        make_stream(corpus).load_state_dict(make_stream(corpus, **other).state_dict())


def test_the_state_of_another_corpus_or_tokenizer_is_refused(corpus):
    for foreign, name in (
        (tokenize_corpus(SmallCorpus(seed=1), TOKENIZER), "corpus"),
        (tokenize_corpus(SmallCorpus(), Tokenizer.from_name("assets-32k")), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=f"has {name} "):
            make_stream(corpus).load_state_dict(make_stream(foreign).state_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [("format", 0), ("corpus", "0" * 64), ("tokenizer", "ab"), ("seed", 7), ("seq_len", 64)],
)
def test_a_foreign_state_is_refused_by_name(corpus, name, value):
    stream = make_stream(corpus)
    stream.next_batch()
    before = stream.state_dict()
    with pytest.raises(ValueError, match=f"has {name} .*--no-resume"):
        stream.load_state_dict(before | {name: value})
    assert stream.state_dict() == before


@pytest.mark.parametrize(("epoch", "window"), [(-1, 0), (0, -1), (0, 10**9)])
def test_an_impossible_position_is_refused(corpus, epoch, window):
    stream = make_stream(corpus)
    with pytest.raises(ValueError, match="impossible"):
        stream.load_state_dict(stream.state_dict() | {"epoch": epoch, "window": window})


def test_served_tokens_count_every_input_by_source(corpus):
    stream = make_stream(corpus, batch_size=1)
    rows = epoch_rows(stream)
    assert sum(stream.served_tokens.values()) == len(rows) * 32
    for name, count in stream.served_tokens.items():
        assert count == sum(int((b.source_ids == SOURCE_IDS[name]).sum()) for _, b in rows)


def test_rows_longer_than_the_text_are_refused(corpus):
    with pytest.raises(ValueError, match="--seq-len"):
        make_stream(corpus, seq_len=10**6)


def test_permutation_is_a_fixed_pure_function():
    drawn = permutation(10, seed=3, epoch=2, stream=1)
    # Written down: a checkpoint made today must find its data order on every later version.
    assert drawn.tolist() == [7, 5, 4, 6, 2, 9, 8, 0, 1, 3]
    for size in (0, 1, 2, 1000):
        assert sorted(permutation(size, seed=9, epoch=0, stream=0).tolist()) == list(range(size))
    for other in ({"seed": 4}, {"epoch": 3}, {"stream": 0}):
        arguments = {"seed": 3, "epoch": 2, "stream": 1} | other
        assert permutation(10, **arguments).tolist() != drawn.tolist()


def test_permutation_spreads_evenly():
    places = np.array(
        [permutation(16, seed=s, epoch=e, stream=0).argmin() for s in range(40) for e in range(40)]
    )
    counts = np.bincount(places, minlength=16)
    # 1,600 draws over 16 places: chi-square of 15 degrees of freedom, 0.1 % level.
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 37.7
