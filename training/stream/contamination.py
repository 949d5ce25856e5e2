"""Training text that holds text of an evaluation.

The runs of thirteen words of every evaluation text are kept as hashes (Brown et al. 2020, appendix
C), so that forbidden passages can be listed without their text; a document that holds one of them
is contaminated. An evaluation text of eight to twelve words is looked for whole; a shorter one is
no evidence and is only counted.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from training.stream.word_hashes import hash_runs, hash_words, normalize

RUN_WORDS = 13
LEAST_WORDS = 8


def passages_of(texts: Iterable[str]) -> NDArray[np.uint64]:
    """All different hashes of runs of RUN_WORDS words in some texts, sorted: (n,)."""
    parts = [hash_runs(hash_words(normalize(text)), size=RUN_WORDS) for text in texts]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype=np.uint64)


class ContaminationIndex:
    """Runs of words of the evaluation texts, looked up in documents. Safe to share by threads.

    texts: evaluation texts. passages: the same of texts that are only known by `passages_of`.
    num_texts, num_short: evaluation texts, and those too short to look for.
    """

    def __init__(
        self, texts: Iterable[str] = (), *, passages: NDArray[np.uint64] | None = None
    ) -> None:
        self.num_texts = 0
        self.num_short = 0
        collected: dict[int, list[NDArray[np.uint64]]] = {}
        for text in texts:
            words = hash_words(normalize(text))
            self.num_texts += 1
            if len(words) < LEAST_WORDS:
                self.num_short += 1
                continue
            size = min(RUN_WORDS, len(words))
            collected.setdefault(size, []).append(hash_runs(words, size=size))
        if passages is not None and passages.size:
            collected.setdefault(RUN_WORDS, []).append(passages)
        self._runs = {
            size: np.unique(np.concatenate(parts)) for size, parts in sorted(collected.items())
        }

    @property
    def digest(self) -> str:
        """A hash of the index: two runs that agree in it judge alike."""
        content = hashlib.sha256()
        for size, runs in self._runs.items():
            content.update(size.to_bytes(4, "little") + runs.astype("<u8").tobytes())
        return content.hexdigest()

    def count_runs(self, text: str) -> int:
        """Places in a text at which a run of an evaluation text begins."""
        words = hash_words(normalize(text))
        total = 0
        for size, known in self._runs.items():
            found = hash_runs(words, size=size)
            if found.size:
                places = np.minimum(np.searchsorted(known, found), len(known) - 1)
                total += int((known[places] == found).sum())
        return total

    def check(self, text: str) -> str | None:
        """`contaminated` or None."""
        return "contaminated" if self.count_runs(text) else None
