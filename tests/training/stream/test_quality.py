"""Rules of form and language: each rule has a text that breaks it alone."""

import pytest

from training.sources.base import SOURCE_IDS
from training.sources.embedded import EmbeddedCorpus
from training.stream.quality import LanguageFilter, QualityFilter

PROSE = (
    "The committee met in the old library on a Tuesday, and nobody was surprised when the lamps "
    "went out again. Someone found candles in a drawer that had been stuck since the winter, and "
    "the talk went on about the harbour, its dredging, and the price that a town of this size "
    "should pay to have ships call on it. An engineer who had come by train drew the tides on the "
    "back of an envelope and explained them with great patience to people who fished there."
)
GERMAN = (
    "Der Ausschuss traf sich an einem Dienstag in der alten Bibliothek, und niemand war "
    "\u00fcberrascht, als die Lampen wieder ausgingen. Jemand fand Kerzen in einer Schublade, die "
    "seit dem Winter klemmte, und das Gespr\u00e4ch ging weiter \u00fcber Hafen und Preis."
)
BROKEN = {
    "too_short": "A word.",
    "not_text": PROSE[:200] + "\x01\x02\ufffd" * 10,
    "repeated_lines": ("The same line of words again and again, to the end.\n" * 40),
    "few_words": "The cat that sat with the dog on a mat of straw was happy to see the bird.",
    "word_length": "the and " + "Donaudampfschifffahrtsgesellschaft " * 3 * 20,
    "symbols": " ".join(f"#{word}" for word in PROSE.split()),
    "bullets": "\n".join(f"- {part}" for part in PROSE.split(",")),
    "ellipses": "\n".join(f"{part}..." for part in PROSE.split(",")),
    "few_letters": PROSE + " 12.5 | 99" * 30,
    "no_stop_words": " ".join(w for w in GERMAN.split() if w not in ("the", "and")) * 2,
    "lorem_ipsum": PROSE + " Lorem ipsum dolor sit amet.",
    "repeated_words": " ".join([*PROSE.split()[:20], *("buy cheap watches now",) * 20]),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_each_rule_has_its_text(reason):
    assert QualityFilter(strict=True).check(BROKEN[reason]) == reason


def test_good_prose_passes():
    assert QualityFilter(strict=True).check(PROSE) is None
    assert QualityFilter().check(GERMAN) is None


def test_sources_chosen_by_hand_are_judged_leniently():
    code = "def f(x):\n    return x + 1\n" * 3
    for source in SOURCE_IDS.keys() - {"commoncrawl"}:
        assert QualityFilter.for_source(source).check(code) is None
    assert QualityFilter.for_source("commoncrawl").check(code) == "few_words"
    lenient = ("too_short", "not_text", "repeated_lines")
    for reason, text in BROKEN.items():
        # One line forty times is junk for everybody.
        assert QualityFilter().check(text) == (reason if reason in lenient else None)


def test_real_documentation_mostly_passes():
    """The shipped text is good: the lenient set drops almost nothing of it."""
    texts = [document.text for document in EmbeddedCorpus().documents()]
    kept = sum(QualityFilter().check(text) is None for text in texts)
    assert kept >= 0.995 * len(texts)
    prose = [text for text in texts[::10] if len(text.split()) >= 50]
    kept = sum(QualityFilter(strict=True).check(text) is None for text in prose)
    assert kept >= 0.7 * len(prose)


def test_languages_are_told_apart():
    english, german = LanguageFilter(), LanguageFilter(["deu"])
    assert english.check(PROSE) is None and english.check(GERMAN) == "language"
    assert german.check(GERMAN) is None and german.check(PROSE) == "language"
    assert LanguageFilter(["en", "de"]).check(GERMAN) is None
    # A foreign menu at the top of a long page does not decide.
    assert english.check(GERMAN[:200] + "\n" + PROSE * 6) is None
    assert english.check("\u4e2d\u6587\u7f51\u9875\u5185\u5bb9" * 50) == "language"
    assert english.check("12345 67890 " * 50) == "language"


def test_an_unknown_language_is_named():
    with pytest.raises(ValueError, match="'klingon'"):
        LanguageFilter(["klingon"])
    with pytest.raises(ValueError, match="at least one"):
        LanguageFilter([])
