"""Training text that holds text of an evaluation.

The runs of thirteen words of every evaluation text are kept as hashes (Brown et al. 2020, appendix
C); a document that holds one of them is contaminated. An evaluation text of eight to twelve words
is looked for whole; a shorter one is no evidence and is only counted.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from training.word_hashes import hash_runs, hash_words, normalize

RUN_WORDS = 13
LEAST_WORDS = 8


class ContaminationIndex:
    """Runs of words of the evaluation texts, looked up in documents.

    num_texts, num_short: evaluation texts, and those too short to look for. num_documents,
    num_contaminated, num_runs_found: what `check` has seen so far.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.num_texts = 0
        self.num_short = 0
        self.num_documents = 0
        self.num_contaminated = 0
        self.num_runs_found = 0
        collected: dict[int, list[np.ndarray]] = {}
        for text in texts:
            words = hash_words(normalize(text))
            self.num_texts += 1
            if len(words) < LEAST_WORDS:
                self.num_short += 1
                continue
            size = min(RUN_WORDS, len(words))
            collected.setdefault(size, []).append(hash_runs(words, size=size))
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
        """`contaminated` or None; counts."""
        runs = self.count_runs(text)
        self.num_documents += 1
        self.num_runs_found += runs
        self.num_contaminated += runs > 0
        return "contaminated" if runs else None
