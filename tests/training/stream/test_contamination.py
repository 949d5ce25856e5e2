"""Planted evaluation text is found wherever it stands; other text is not."""

import random
import re

import pytest

from training.sources.base import split_of
from training.sources.embedded import EmbeddedCorpus
from training.stream.contamination import ContaminationIndex, passages_of
from training.stream.word_hashes import hash_runs, hash_words, normalize


@pytest.fixture(scope="module")
def documents():
    return [d for d in EmbeddedCorpus().documents() if len(d.text) > 2000][:400]


def grams(text: str, size: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"[^\W_]+", text.lower())
    return set(zip(*(words[start:] for start in range(size))))


def test_the_verdict_is_that_of_the_definition(documents):
    """Sets of tuples of words are the oracle, over real text that shares some runs."""
    held_out = [d.text for d in documents if split_of(d.id) == "validation"]
    index = ContaminationIndex(held_out)
    known = set().union(*(grams(text) for text in held_out))
    verdicts = []
    for document in documents:
        expected = bool(known & grams(document.text))
        assert (index.check(document.text) == "contaminated") == expected
        verdicts.append(expected)
    assert 0 < sum(verdicts) < len(verdicts)


def test_planted_runs_are_found_and_shorter_ones_are_not():
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(5000)]
    evaluation = [" ".join(rng.choices(vocabulary, k=60)) for _ in range(200)]
    index = ContaminationIndex(evaluation)
    for _ in range(300):
        source = rng.choice(evaluation).split()
        start = rng.randrange(len(source) - 13)
        filler = rng.choices(vocabulary, k=300)
        for size, verdict in ((13, "contaminated"), (12, None)):
            planted = ", ".join(source[start : start + size]).upper()
            text = " ".join([*filler[:150], f'"{planted}"\n', *filler[150:]])
            assert index.check(text) == verdict and index.count_runs(text) == size - 12


def test_short_evaluation_texts_are_looked_for_whole():
    index = ContaminationIndex(["What is the sum of nine and thirteen point five?", "2 + 2?"])
    assert (index.num_texts, index.num_short) == (2, 1)
    assert index.check("Q: what is the sum of nine and thirteen point five A:") == "contaminated"
    assert index.check("what is the sum of nine and thirteen point six") is None
    assert index.check("2 + 2?") is None and index.check("") is None


def test_texts_known_by_their_passages_alone_are_found_as_well():
    rng = random.Random(1)
    texts = [" ".join(f"word{rng.randrange(900)}" for _ in range(30)) for _ in range(20)]
    whole, hashed = ContaminationIndex(texts), ContaminationIndex(passages=passages_of(texts))
    assert whole.digest == hashed.digest and hashed.num_texts == 0
    both = ContaminationIndex(texts[:5], passages=passages_of(texts[5:]))
    assert both.digest == whole.digest
    assert all(both.count_runs(text) == 18 for text in texts)
    assert passages_of([]).size == passages_of(["too short for a run"]).size == 0
    assert ContaminationIndex(passages=passages_of([])).check("word " * 40) is None


def test_the_digest_tells_indexes_apart():
    one = ContaminationIndex(["a b c d e f g h i j k l m n", "o p q r s t u v w x y z a b"])
    same = ContaminationIndex(["o p q r s t u v w x y z a b", "A, b c d e f g h i j k l m n!"])
    other = ContaminationIndex(["a b c d e f g h i j k l m o"])
    assert one.digest == same.digest != other.digest


def test_hashes_are_the_same_for_ever_and_do_not_collide():
    """Saved windows and digests depend on these values."""
    words = hash_words("alpha beta \u4e2d\u6587 alpha")
    assert words[0] == words[3] and len(set(words.tolist())) == 3
    assert hex(int(words[0])) == "0x5e6b1bc1bbd2dcf"
    assert normalize("  A_b--C\u00c9 7\n") == "a b c\u00e9 7"
    assert len(hash_runs(words, size=5)) == 0 and len(hash_runs(words, size=4)) == 1
    many = hash_words(" ".join(f"w{number}" for number in range(200_000)))
    assert len(set(many.tolist())) == 200_000
    runs = hash_runs(many, size=3)
    assert len(set(runs.tolist())) == len(runs)
    assert hash_runs(many[:3], size=3) != hash_runs(many[[0, 2, 1]], size=3)
