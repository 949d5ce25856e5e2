"""Evaluation batches score every token once; the token cache never lies."""

import logging

import numpy as np
import pytest
import torch

from tests.training.small_corpus import TOKENIZER, SmallCorpus, assert_same
from training.data import (
    IGNORED_LABEL,
    text_batches,
    tokenize_corpus,
    validation_batches,
)
from training.sources.base import Document, in_scoring_order, split_of
from training.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def source():
    return SmallCorpus()


@pytest.fixture(scope="module")
def corpus(source):
    return tokenize_corpus(source, TOKENIZER)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 3), (16, 1), (33, 4), (10_000, 2)])
def test_validation_scores_every_token_once_and_its_bytes_exactly(
    source, corpus, seq_len, batch_size
):
    batches = list(validation_batches(corpus, seq_len=seq_len, batch_size=batch_size))
    counted = torch.cat([b.labels[b.labels != IGNORED_LABEL] for b in batches])
    split = corpus.splits["validation"]
    expected = [*split.tokens[1:].tolist(), corpus.end_id]
    assert counted.tolist() == expected
    text = "".join(
        document.text
        for document in in_scoring_order(
            doc for doc in source.documents() if split_of(doc.id) == "validation"
        )
    )
    assert TOKENIZER.decode(counted.tolist()) == text
    assert sum(batch.num_bytes for batch in batches) == len(text.encode())


def test_validation_rows_are_consecutive_with_known_resets_and_sources(corpus):
    batches = list(validation_batches(corpus, seq_len=16, batch_size=4))
    inputs = torch.cat([batch.input_ids for batch in batches]).flatten()
    labels = torch.cat([batch.labels for batch in batches]).flatten()
    resets = torch.cat([batch.reset_mask for batch in batches]).flatten()
    sources = torch.cat([batch.source_ids for batch in batches]).flatten()
    split = corpus.splits["validation"]
    total = len(split.tokens)
    assert inputs[:total].tolist() == split.tokens.tolist()
    assert resets[:total].nonzero().flatten().tolist() == split.starts[:-1].tolist()
    expected = np.repeat(split.source_ids, np.diff(split.starts))
    assert sources[:total].tolist() == expected.tolist()
    assert (labels[total:] == IGNORED_LABEL).all() and len(labels) - total < 16
    assert all(batch.input_ids.shape == (4, 16) for batch in batches[:-1])


def test_validation_is_deterministic_and_a_limit_takes_its_beginning(corpus):
    whole = list(validation_batches(corpus, seq_len=16, batch_size=2))
    again = list(validation_batches(corpus, seq_len=16, batch_size=2))
    for left, right in zip(whole, again, strict=True):
        assert_same(left, right)
    limited = list(validation_batches(corpus, seq_len=16, batch_size=2, max_tokens=70))
    assert sum(batch.input_ids.numel() for batch in limited) == 64
    for left, right in zip(limited, whole):
        assert_same(left, right)
    smallest = list(validation_batches(corpus, seq_len=16, batch_size=2, max_tokens=1))
    assert [batch.input_ids.shape for batch in smallest] == [(1, 16)]


def test_text_batches_equal_the_validation_of_a_corpus_of_that_one_text():
    document = next(
        Document(id=f"one/{number}", source="unknown", text="Über alles. " * 40)
        for number in range(1000)
        if split_of(f"one/{number}") == "validation"
    )

    class OneText:
        fingerprint = "1"

        def documents(self):
            return iter([document])

    corpus = tokenize_corpus(OneText(), TOKENIZER)
    expected = list(validation_batches(corpus, seq_len=24, batch_size=3))
    for text in (document.text, document.text.encode()):
        batches = list(text_batches(text, tokenizer=TOKENIZER, seq_len=24, batch_size=3))
        for left, right in zip(batches, expected, strict=True):
            assert_same(left, right)


def test_text_batches_count_bytes_that_are_not_text():
    content = b"\xff\xfe\x00 binary \xc3\x28" * 30
    batches = list(text_batches(content, tokenizer=TOKENIZER, seq_len=50, batch_size=2))
    assert sum(batch.num_bytes for batch in batches) == len(content)


def test_empty_text_is_refused():
    with pytest.raises(ValueError, match="empty"):
        next(text_batches(b"", tokenizer=TOKENIZER, seq_len=8, batch_size=1))


def test_cache_gives_the_same_tokens_without_reading_the_documents(tmp_path, corpus):
    source = SmallCorpus()
    first = tokenize_corpus(source, TOKENIZER, cache_dir=tmp_path)
    second = tokenize_corpus(source, TOKENIZER, cache_dir=tmp_path)
    assert source.reads == 1
    for side, split in corpus.splits.items():
        for cached in (first.splits[side], second.splits[side]):
            np.testing.assert_array_equal(cached.tokens, split.tokens)
            np.testing.assert_array_equal(cached.starts, split.starts)
            np.testing.assert_array_equal(cached.source_ids, split.source_ids)


def test_damaged_cache_is_rebuilt_with_one_line(tmp_path, caplog):
    source = SmallCorpus()
    tokenize_corpus(source, TOKENIZER, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        rebuilt = tokenize_corpus(source, TOKENIZER, cache_dir=tmp_path)
    assert source.reads == 2 and len(caplog.records) == 1
    assert path.read_bytes() == whole
    assert rebuilt.splits["train"].num_documents > 0


def test_cache_is_kept_apart_by_corpus_and_tokenizer(tmp_path):
    tokenize_corpus(SmallCorpus(seed=0), TOKENIZER, cache_dir=tmp_path)
    tokenize_corpus(SmallCorpus(seed=1), TOKENIZER, cache_dir=tmp_path)
    tokenize_corpus(SmallCorpus(seed=0), Tokenizer.from_name("assets-32k"), cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_unknown_source_is_named():
    class Odd:
        fingerprint = "2"

        def documents(self):
            return iter([Document(id="a", source="nowhere", text="x")])

    with pytest.raises(ValueError, match="nowhere"):
        tokenize_corpus(Odd(), TOKENIZER)
