"""Kneser-Ney against a slow definition in dictionaries, a count by hand, and normalisation."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import numpy as np
import pytest

from scripts import baseline_ngram
from scripts.baseline_data import served_rows, validation_tokens
from scripts.baseline_ngram import FALLBACK_DISCOUNTS, KneserNey, estimate_discounts
from training.data import TokenCorpus, TokenSplit, TokenStream, validation_batches

END = 0


class DictionaryKneserNey:
    """The textbook formulas, n-gram by n-gram: each row is a list of tokens."""

    def __init__(self, rows: list[list[int]], *, order: int, vocab_size: int) -> None:
        self.order, self.vocab_size = order, vocab_size
        raw = [Counter() for _ in range(order + 1)]
        for row in rows:
            for stop in range(1, len(row) + 1):
                for length in range(1, order + 1):
                    gram = tuple(row[max(0, stop - length) : stop])
                    if len(gram) == length and END not in gram[1:-1]:
                        raw[length][gram] += 1
        self.counts = [Counter() for _ in range(order + 1)]
        for length in range(1, order + 1):
            if length == order:
                self.counts[length] = raw[length]
                continue
            left = defaultdict(set)
            for gram in raw[length + 1]:
                left[gram[1:]].add(gram[0])
            for gram, count in raw[length].items():
                opens = length > 1 and gram[0] == END
                self.counts[length][gram] = count if opens else len(left[gram])
        self.discounts = [self._estimate(counter) for counter in self.counts]

    @staticmethod
    def _estimate(counter: Counter) -> tuple[float, float, float, float]:
        n = [0] + [sum(1 for count in counter.values() if count == k) for k in (1, 2, 3, 4)]
        if 0 in n[1:]:
            return FALLBACK_DISCOUNTS
        y = n[1] / (n[1] + 2 * n[2])
        values = [k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)]
        return 0.0, *(min(max(v, 0.0), k) for k, v in zip((1, 2, 3), values, strict=True))

    def probability(self, history: list[int], token: int) -> float:
        if END in history:
            history = history[len(history) - 1 - history[::-1].index(END) :]
        history = history[-(self.order - 1) :] if self.order > 1 else []
        result = 1.0 / self.vocab_size
        for length in range(1, len(history) + 2):
            context = tuple(history[len(history) - length + 1 :])
            level = self.counts[length]
            followers = {w: level[(*context, w)] for w in range(self.vocab_size)}
            total = sum(followers.values())
            if total == 0:
                continue
            discount = self.discounts[length]
            left = sum(discount[min(count, 3)] for count in followers.values())
            count = followers[token]
            result = (count - discount[min(count, 3)]) / total + left / total * result
        return result


def random_documents(*, seed: int, vocab_size: int, documents: int) -> np.ndarray:
    """Text with repetition: each document follows a noisy cycle over few tokens."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(documents):
        length = int(rng.integers(0, 30))
        cycle = rng.integers(1, vocab_size, size=3)
        noise = rng.integers(1, vocab_size, size=length)
        words = np.where(rng.random(length) < 0.6, np.resize(cycle, length), noise)
        pieces += [np.array([END]), words]
    return np.concatenate(pieces).astype(np.int64)


def test_bigram_counted_by_hand():
    # <end> a b a b a c <end>, vocabulary {end, a, b, c} = {0, 1, 2, 3}.
    tokens = np.array([0, 1, 2, 1, 2, 1, 3, 0])
    model = KneserNey(tokens, order=2, vocab_size=4, end_id=END)
    # Distinct predecessors: a has {end, b}, b {a}, c {a}, end {c}: 2, 1, 1, 1 of 5.
    # Too few counts to estimate discounts: 0.5, 1, 1.5 for counts 1, 2, 3+.
    freed = (1.0 + 0.5 + 0.5 + 0.5) / 5
    unigram = {0: 0.5 / 5 + freed / 4, 1: 1.0 / 5 + freed / 4, 2: 0.5 / 5 + freed / 4}
    # After a: b twice, c once; the discounts 1 + 0.5 of 3 go to the unigrams.
    after_a = model.distribution([1])
    assert after_a[2] == pytest.approx((2 - 1.0) / 3 + 1.5 / 3 * unigram[2], rel=1e-12)
    assert after_a[3] == pytest.approx((1 - 0.5) / 3 + 1.5 / 3 * unigram[2], rel=1e-12)
    assert after_a[0] == pytest.approx(1.5 / 3 * unigram[0], rel=1e-12)
    assert model.distribution([])[1] == pytest.approx(unigram[1], rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("row_length", [None, 17])
def test_equals_the_dictionary_definition(order, row_length):
    tokens = random_documents(seed=order, vocab_size=9, documents=40)
    if row_length:
        tokens = tokens[: len(tokens) // row_length * row_length]
    rows = tokens.reshape(-1, row_length).tolist() if row_length else [tokens.tolist()]
    slow = DictionaryKneserNey(rows, order=order, vocab_size=9)
    fast = KneserNey(tokens, order=order, vocab_size=9, end_id=END, row_length=row_length)
    held_out = random_documents(seed=100 + order, vocab_size=9, documents=8)
    expected = [
        slow.probability(held_out[:place].tolist(), int(held_out[place]))
        for place in range(len(held_out))
    ]
    assert fast.probabilities(held_out) == pytest.approx(expected, rel=1e-12)


def test_discounts_by_the_formula():
    counts = np.repeat([1, 2, 3, 4, 9], [10, 4, 3, 2, 5])
    ratio = 10 / 18
    expected = (0.0, 1 - 2 * ratio * 0.4, 2 - 3 * ratio * 0.75, 3 - 4 * ratio * 2 / 3)
    assert estimate_discounts(counts) == pytest.approx(expected, rel=1e-12)
    assert estimate_discounts(np.array([1, 1, 2])) == FALLBACK_DISCOUNTS


def test_probabilities_sum_to_one_in_any_context():
    tokens = random_documents(seed=7, vocab_size=50, documents=300)
    model = KneserNey(tokens, order=5, vocab_size=60, end_id=END)  # tokens 50-59 never seen
    rng = np.random.default_rng(8)
    contexts = [tokens[place : place + 4].tolist() for place in rng.integers(0, 3000, size=30)]
    contexts += [rng.integers(0, 60, size=int(rng.integers(0, 7))).tolist() for _ in range(30)]
    for context in contexts:
        distribution = model.distribution(context)
        assert distribution.min() > 0.0
        assert distribution.sum() == pytest.approx(1.0, abs=1e-12)


def test_nothing_before_a_document_is_used():
    tokens = random_documents(seed=9, vocab_size=12, documents=200)
    model = KneserNey(tokens, order=5, vocab_size=12, end_id=END)
    one = model.probabilities(np.array([END, 3, 4, 5, END, 6, 7]))
    other = model.probabilities(np.array([END, 9, 9, 2, END, 6, 7]))
    assert np.array_equal(one[5:], other[5:])
    # Control: inside a document the past does matter.
    same_document = model.probabilities(np.array([END, 9, 9, 2, 1, 6, 7]))
    assert not np.array_equal(one[5:], same_document[5:])


def test_no_count_spans_two_rows():
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    apart = KneserNey(rows.reshape(-1), order=2, vocab_size=8, end_id=END, row_length=3)
    joined = KneserNey(rows.reshape(-1), order=2, vocab_size=8, end_id=END)
    assert apart.distribution([3])[4] == pytest.approx(apart.distribution([])[4])
    assert joined.distribution([3])[4] > joined.distribution([])[4]


def test_more_context_predicts_second_order_text_better():
    rng = np.random.default_rng(11)
    successor = rng.integers(1, 20, size=(20, 20))
    tokens = [END, 1]
    for surprise in rng.random(8000):
        expected = successor[tokens[-2], tokens[-1]]
        tokens.append(int(expected if surprise < 0.7 else rng.integers(1, 20)))
    train, held_out = np.array(tokens[:6000]), np.array(tokens[6000:])
    losses = [
        -np.log(
            KneserNey(train, order=order, vocab_size=20, end_id=END).probabilities(held_out)
        ).mean()
        for order in (1, 2, 3, 5)
    ]
    # The source's own entropy rate, from its definition: 0.7 + 0.3 / 19 for the expected token.
    likely, others = 0.7 + 0.3 / 19, 0.3 / 19
    entropy = -likely * np.log(likely) - 18 * others * np.log(others)
    assert losses[0] > losses[1] > losses[2] > entropy
    assert losses[3] < entropy + 0.35  # longer contexts than the source has cost little


def small_corpus() -> TokenCorpus:
    splits = {}
    for side, seed, documents in (("train", 1, 60), ("validation", 2, 9)):
        tokens = random_documents(seed=seed, vocab_size=20, documents=documents)
        starts = np.append(np.flatnonzero(tokens == END), len(tokens))
        splits[side] = TokenSplit(
            tokens=tokens.astype(np.uint16),
            starts=starts,
            source_ids=np.zeros(len(starts) - 1, dtype=np.int16),
        )
    byte_lengths = np.full(20, 3, dtype=np.int32)
    byte_lengths[END] = 0
    return TokenCorpus(
        splits=splits,
        fingerprint="f",
        tokenizer_sha256="t",
        end_id=END,
        byte_lengths=byte_lengths,
    )


def test_served_rows_are_the_networks_batches_in_their_order():
    corpus = small_corpus()
    rows = served_rows(corpus, num_tokens=64, seed=5, batch_size=3, seq_len=16)
    stream = TokenStream(corpus, seed=5, batch_size=3, seq_len=16)
    first, second = stream.next_batch(), stream.next_batch()
    assert rows.shape == (4, 17)
    assert np.array_equal(rows[:3, :-1], first.input_ids.numpy())
    assert np.array_equal(rows[:3, 1:], first.labels.numpy())
    assert np.array_equal(rows[3, :-1], second.input_ids[0].numpy())
    epoch = served_rows(corpus, num_tokens=10**9, seed=5, batch_size=3, seq_len=16)
    assert len(epoch) == stream.windows_per_epoch


def test_validation_tokens_are_the_split_with_its_bytes():
    corpus = small_corpus()
    tokens, num_bytes = validation_tokens(corpus, seq_len=16, batch_size=2, max_tokens=None)
    split = corpus.splits["validation"].tokens
    assert np.array_equal(tokens[:-1], split) and tokens[-1] == END
    assert num_bytes == 3 * int((split != END).sum())
    part, part_bytes = validation_tokens(corpus, seq_len=16, batch_size=2, max_tokens=48)
    batches = validation_batches(corpus, seq_len=16, batch_size=2, max_tokens=48)
    assert len(part) == 49 and part_bytes == sum(batch.num_bytes for batch in batches)


def test_command_reports_what_it_measured(monkeypatch, tmp_path, capsys):
    class FakeTokenizer:
        vocab_size, end_id = 20, END

    corpus = small_corpus()
    monkeypatch.setattr(baseline_ngram, "load_corpus", lambda name: (FakeTokenizer(), corpus))
    output = tmp_path / "rows.jsonl"
    assert baseline_ngram.main(["--seq-len", "16", "--order", "3", "--output", str(output)]) == 0
    row = json.loads(output.read_text())
    model = KneserNey(
        corpus.splits["train"].tokens.astype(np.int64), order=3, vocab_size=20, end_id=END
    )
    tokens, num_bytes = validation_tokens(corpus, seq_len=16, batch_size=8, max_tokens=None)
    bits = -np.log2(model.probabilities(tokens)[1:]).sum()
    assert row["bpb"] == pytest.approx(bits / num_bytes)
    assert row["eval_tokens"] == len(tokens) - 1 and row["eval_bytes"] == num_bytes
    assert json.loads(capsys.readouterr().out) == row
    assert baseline_ngram.main(["--order", "0"]) == 2
    assert "--order" in capsys.readouterr().err
