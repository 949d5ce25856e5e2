"""13-gram hashes against a plain definition with sets of tuples."""

import random

import numpy as np

from training.hidden_eval import contaminated_passages, read_manifest
from training.ngrams import NGRAM_WORDS, count_overlaps, index_of, ngram_hashes, words_of
from training.sources.embedded import EmbeddedCorpus
from training.tokenizer import Tokenizer


def tuples_of(text: str) -> list[tuple[str, ...]]:
    words = words_of(text)
    return [tuple(words[i : i + NGRAM_WORDS]) for i in range(len(words) - NGRAM_WORDS + 1)]


def random_text(rng: random.Random, *, words: int, vocabulary: int) -> str:
    def word() -> str:
        return f"{rng.choice(['', 'X', 'ß'])}w{rng.randrange(vocabulary)}"

    return "".join(word() + rng.choice([" ", ", ", "\n"]) for _ in range(words))


def test_hashes_are_equal_exactly_where_the_words_are():
    rng = random.Random(1)
    texts = [random_text(rng, words=rng.randrange(60), vocabulary=2) for _ in range(300)]
    seen: dict[tuple[str, ...], int] = {}
    for text in texts:
        for words, number in zip(tuples_of(text), ngram_hashes(text).tolist(), strict=True):
            assert seen.setdefault(words, number) == number
    assert len(set(seen.values())) == len(seen) > 2000


def test_counts_are_those_of_the_definition():
    rng = random.Random(2)
    texts = [random_text(rng, words=200, vocabulary=2) for _ in range(6)]
    index = index_of(texts[:3])
    forbidden = {words for text in texts[:3] for words in tuples_of(text)}
    for text in texts:
        expected = sum(words in forbidden for words in tuples_of(text))
        assert count_overlaps(text, index) == expected
    assert count_overlaps(texts[0], index) == 188


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not():
    words = [f"word{number}" for number in range(40)]
    index = index_of([" ".join(words)])
    other = "entirely different text around it"
    inside = " ".join(words[7:20])
    assert count_overlaps(f"{other} {inside} {other}", index) == 1
    assert count_overlaps(f"{other}, {inside.upper().replace(' ', '; ')}. {other}", index) == 1
    assert count_overlaps(f"{other} {' '.join(words[7:19])} {other}", index) == 0
    swapped = [*words[8:6:-1], *words[9:20]]
    assert count_overlaps(" ".join(swapped), index) == 0


def test_short_texts_empty_indices_and_broken_characters():
    assert len(ngram_hashes("only a few words")) == 0
    assert count_overlaps("a " * 50, np.empty(0, dtype=np.uint64)) == 0
    assert len(index_of([])) == 0
    assert len(ngram_hashes("half \ud800x " * 20)) == 28


def test_the_shipped_corpus_holds_no_passage_of_the_hidden_evaluation():
    manifest = read_manifest("")
    documents = list(EmbeddedCorpus().documents())
    assert sum(contaminated_passages(manifest, document.text) for document in documents) == 0
    # The check would have seen one: here it is, in the middle of the longest document.
    longest = max(documents, key=lambda document: len(document.text)).text
    prompt = manifest.questions[17].prompt
    middle = longest.index(" ", len(longest) // 2)
    planted = f"{longest[:middle]} {prompt} {longest[middle:]}"
    assert contaminated_passages(manifest, planted) == len(ngram_hashes(prompt)) > 0


def test_a_batch_can_be_checked_after_decoding():
    tokenizer = Tokenizer.from_name("assets-4k")
    manifest = read_manifest("")
    prompt = manifest.questions[3].prompt
    batch = [*tokenizer.encode("Some text before. "), *tokenizer.encode(prompt), tokenizer.end_id]
    assert contaminated_passages(manifest, tokenizer.decode(batch)) == len(ngram_hashes(prompt))
