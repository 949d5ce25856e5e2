"""Near duplicates against the exact Jaccard similarity; the window is bounded and resumable."""

import random
import re

import numpy as np
import pytest

from training.runtime.state_tree import join_state, split_state
from training.sources.embedded import EmbeddedCorpus
from training.stream.near_duplicates import NearDuplicateWindow, signature_of


@pytest.fixture(scope="module")
def documents():
    texts = [document.text for document in EmbeddedCorpus().documents()]
    return [text[:4000] for text in texts if len(text) > 1500][:600]


def edited(text: str, share: float, rng: random.Random) -> str:
    """A copy in which words are replaced at random."""
    words = text.split()
    for place in rng.sample(range(len(words)), int(share * len(words))):
        words[place] = rng.choice(words)
    return " ".join(words)


def runs_of(text: str) -> set[tuple[str, ...]]:
    """The definition: runs of five words of letters and digits, in lower case."""
    words = re.findall(r"[^\W_]+", text.lower())
    return set(zip(*(words[start:] for start in range(5))))


def jaccard(one: str, other: str) -> float:
    a, b = runs_of(one), runs_of(other)
    return len(a & b) / len(a | b)


def test_the_estimate_is_the_jaccard_similarity(documents):
    rng = random.Random(0)
    errors = []
    for text in documents[:80]:
        copy = edited(text, rng.choice((0.01, 0.03, 0.06, 0.1)), rng)
        estimate = float((signature_of(text) == signature_of(copy)).mean())
        errors.append(estimate - jaccard(text, copy))
    # 128 hashes: a standard error of at most 0.044 each, without bias.
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.055


def test_recall_and_precision_against_the_definition(documents):
    """Pairs well above the threshold are found, pairs well below are not."""
    rng = random.Random(1)
    window = NearDuplicateWindow(window_size=0)
    base = [text for text in documents if window.check(text) is None]
    found = {"near": [0, 0], "far": [0, 0]}
    for text in base:
        copy = edited(text, rng.choice((0.005, 0.01, 0.02, 0.15, 0.25)), rng)
        similarity = jaccard(text, copy)
        group = "near" if similarity > 0.8 else "far" if similarity < 0.55 else None
        if group:
            probe = NearDuplicateWindow(window_size=0, near_window=1)
            probe.check(text)
            found[group][0] += probe.check(copy) == "near_duplicate"
            found[group][1] += 1
    assert found["near"][1] > 100 and found["far"][1] > 100
    assert found["near"][0] >= 0.93 * found["near"][1]
    assert found["far"][0] <= 0.02 * found["far"][1]


def test_exact_duplicates_ignore_case_and_punctuation():
    window = NearDuplicateWindow(near_window=0, normalize_chars=40)
    assert window.check("The quick brown fox, it jumps over the lazy dog.") is None
    assert window.check("the QUICK brown-fox it\njumps over the lazy dog") == "exact_duplicate"
    assert window.check("The quick brown fox, it jumps over the lazy dogs' tail") == (
        "exact_duplicate"
    )
    assert window.check("The quick brown fox, it leaps over the lazy dog.") is None


def test_the_windows_forget_what_is_old(documents):
    window = NearDuplicateWindow(window_size=20, near_window=20)
    kept = [text for text in documents[:200] if window.check(text) is None][-60:]
    window = NearDuplicateWindow(window_size=20, near_window=20)
    assert all(window.check(text) is None for text in kept)
    assert all(window.check(text) for text in kept[-20:])
    assert window.check(kept[0]) is None
    assert sum(len(slots) for slots in window._slots[0].values()) == 20


def test_a_resumed_window_decides_alike(documents):
    rng = random.Random(2)
    stream = [
        rng.choice(documents) if rng.random() < 0.6 else edited(rng.choice(documents), 0.02, rng)
        for _ in range(400)
    ]
    whole = NearDuplicateWindow(window_size=64, near_window=48)
    verdicts = [whole.check(text) for text in stream]
    assert {None, "exact_duplicate", "near_duplicate"} == set(verdicts)
    for place in (1, 47, 48, 49, 200, 333):
        first = NearDuplicateWindow(window_size=64, near_window=48)
        for text in stream[:place]:
            first.check(text)
        resumed = NearDuplicateWindow(window_size=64, near_window=48)
        resumed.load_state_dict(join_state(*split_state(first.state_dict())))
        assert [resumed.check(text) for text in stream[place:]] == verdicts[place:]


def test_other_settings_refuse_the_state():
    state = NearDuplicateWindow(window_size=10).state_dict()
    with pytest.raises(ValueError, match="has settings"):
        NearDuplicateWindow(window_size=11).load_state_dict(state)


def test_tiny_and_odd_texts_do_no_harm():
    window = NearDuplicateWindow()
    for text in ("", "word", "\ud800 lone surrogate", "\u4e2d\u6587" * 10, "...!!!", "a b c d"):
        window.check(text)
    assert window.check("word") == "exact_duplicate"
