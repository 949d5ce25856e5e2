"""Texts seen before, exactly or nearly, within a window of the last ones.

Exact: a hash of the first characters of the text, normalised (lower case, letters and digits only).
Near: MinHash over runs of five words (Broder 1997) found through bands of a locality-sensitive
index (Leskovec, Rajaraman, Ullman, ch. 3): sixteen bands of eight hashes bring up a pair of Jaccard
similarity s with probability 1 - (1 - s^8)^16, and a byte kept of each of the 128 hashes estimates
s with a standard error of 0.04, which decides. Both windows are rings of arrays: memory and saved
state are bounded, and equal states decide equally ever after.
"""

import hashlib
from collections import deque
from typing import Any

import numpy as np
import torch

from training.stream.word_hashes import hash_runs, hash_words, mix, normalize

RUN_WORDS = 5
NUM_BANDS = 16
BAND_ROWS = 8
NUM_HASHES = NUM_BANDS * BAND_ROWS
SIMILARITY = 0.7
NEAR_WINDOW = 16384
MAX_WORDS = 20_000
_BLOCK_RUNS = 2048


def signature_of(text: str) -> np.ndarray | None:
    """The MinHash values of a text, (128,) uint64; None below five words."""
    runs = np.unique(hash_runs(hash_words(normalize(text))[:MAX_WORDS], size=RUN_WORDS))
    if not runs.size:
        return None
    salts = mix(np.arange(1, NUM_HASHES + 1, dtype=np.uint64))
    factors = salts | np.uint64(1)
    lowest = np.full(NUM_HASHES, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(runs), _BLOCK_RUNS):
        block = runs[None, start : start + _BLOCK_RUNS] ^ salts[:, None]
        block *= factors[:, None]
        # The high bits of a product are the mixed ones; folding makes the order depend on them.
        block ^= block >> np.uint64(32)
        block *= factors[:, None]
        np.minimum(lowest, block.min(axis=1), out=lowest)
    return lowest


class NearDuplicateWindow:
    """Exact duplicates among the last `window_size` kept texts, near ones among the last
    `near_window`; 0 turns a part off.

    normalize_chars: characters of the normalised text that the exact part compares.
    similarity: estimated Jaccard similarity from which a text counts as a near duplicate.
    """

    def __init__(
        self,
        *,
        window_size: int = 65536,
        near_window: int = NEAR_WINDOW,
        normalize_chars: int = 4096,
        similarity: float = SIMILARITY,
    ) -> None:
        if min(window_size, near_window) < 0 or normalize_chars < 1 or not 0 < similarity <= 1:
            raise ValueError("windows must be 0 or more, characters above 0, similarity in (0, 1]")
        self.window_size = window_size
        self.near_window = near_window
        self.normalize_chars = normalize_chars
        self.similarity = similarity
        self._order: deque[int] = deque()
        self._exact: set[int] = set()
        self._bands = np.zeros((near_window, NUM_BANDS), dtype=np.uint32)
        self._marks = np.zeros((near_window, NUM_HASHES), dtype=np.uint8)
        self._next = 0  # kept signatures so far; its rest by the window is the next slot
        self._slots: list[dict[int, list[int]]] = [{} for _ in range(NUM_BANDS)]

    def check(self, text: str) -> str | None:
        """`exact_duplicate`, `near_duplicate`, or None: then the text joins the windows."""
        key = self._exact_key(text) if self.window_size else None
        if key is not None and key in self._exact:
            return "exact_duplicate"
        signature = signature_of(text) if self.near_window else None
        if signature is not None:
            bands, marks = _condense(signature)
            if self._is_near(bands, marks):
                return "near_duplicate"
            self._remember(bands, marks)
        if key is not None:
            self._remember_exact(key)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Both windows: hashes in order as tensors, about 200 bytes for each text held."""
        held = min(self._next, self.near_window)
        exact = np.array(self._order, dtype=np.uint64).view(np.int64)
        return {
            "settings": self._settings(),
            "num_kept": self._next,
            "exact": torch.from_numpy(exact.copy()),
            "bands": torch.from_numpy(self._bands[:held].view(np.int32).copy()),
            "marks": torch.from_numpy(self._marks[:held].copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved window. ValueError when it was made with other settings."""
        if state["settings"] != self._settings():
            raise ValueError(
                f"the saved deduplication window has settings {state['settings']}, "
                f"this run {self._settings()}; use the same --dedup-* flags or --no-resume"
            )
        exact = state["exact"].numpy().view(np.uint64).tolist()
        self._order, self._exact = deque(exact), set(exact)
        self._next = state["num_kept"]
        held = min(self._next, self.near_window)
        self._bands[:] = 0
        self._marks[:] = 0
        self._bands[:held] = state["bands"].numpy().view(np.uint32)
        self._marks[:held] = state["marks"].numpy()
        self._slots = [{} for _ in range(NUM_BANDS)]
        oldest = self._next - held
        for number in range(oldest, self._next):
            self._index(number % self.near_window)

    def _settings(self) -> list[float]:
        return [self.window_size, self.near_window, self.normalize_chars, self.similarity]

    def _exact_key(self, text: str) -> int:
        prefix = normalize(text)[: self.normalize_chars].encode("utf-8", "replace")
        return int.from_bytes(hashlib.blake2b(prefix, digest_size=8).digest(), "little")

    def _remember_exact(self, key: int) -> None:
        self._order.append(key)
        self._exact.add(key)
        if len(self._order) > self.window_size:
            self._exact.discard(self._order.popleft())

    def _is_near(self, bands: np.ndarray, marks: np.ndarray) -> bool:
        slots: set[int] = set()
        for band, key in enumerate(bands.tolist()):
            slots.update(self._slots[band].get(key, ()))
        if not slots:
            return False
        found = self._marks[sorted(slots)]
        equal = (found == marks).mean(axis=1)
        # Two different hashes share their byte once in 256.
        return bool(((equal - 1 / 256) / (1 - 1 / 256)).max() >= self.similarity)

    def _remember(self, bands: np.ndarray, marks: np.ndarray) -> None:
        slot = self._next % self.near_window
        if self._next >= self.near_window:
            self._unindex(slot)
        self._bands[slot], self._marks[slot] = bands, marks
        self._index(slot)
        self._next += 1

    def _index(self, slot: int) -> None:
        for band, key in enumerate(self._bands[slot].tolist()):
            self._slots[band].setdefault(key, []).append(slot)

    def _unindex(self, slot: int) -> None:
        for band, key in enumerate(self._bands[slot].tolist()):
            members = self._slots[band][key]
            members.remove(slot)
            if not members:
                del self._slots[band][key]


def _condense(signature: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A key for each band, (16,) uint32, and a byte for each hash, (128,) uint8."""
    rows = signature.reshape(NUM_BANDS, BAND_ROWS)
    keys = np.zeros(NUM_BANDS, dtype=np.uint64)
    for row in range(BAND_ROWS):
        keys = mix(keys ^ rows[:, row])
    marks = (mix(signature) >> np.uint64(56)).astype(np.uint8)
    return (keys >> np.uint64(32)).astype(np.uint32), marks
