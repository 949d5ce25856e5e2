"""From documents to batches: a stream whose position is two numbers, and evaluation batches.

Every document is `<|endoftext|>` followed by its tokens, and documents are concatenated; the last
label of all is one more `<|endoftext|>`. So the model is taught where documents end, nothing needs
masking, and a reset at each opening token keeps information from crossing.

An epoch is the training documents in an order drawn for it, cut into windows of `seq_len`, visited
in a second order. Both orders are pure functions of (seed, epoch), so the stream's position is
(epoch, window): resuming is a comparison and two assignments, never a replay. What an epoch's last
partial window would hold is left to the next epoch, whose order differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.sources.base import (
    SOURCE_IDS,
    Document,
    DocumentCorpus,
    Split,
    in_scoring_order,
    split_of,
)
from training.stream.batch import IGNORED_LABEL, Batch, to_batch
from training.stream.token_cache import read_token_file, write_token_file
from training.tokenizer import Tokenizer

STATE_FORMAT = 1
_CACHE_LAYOUT = 2  # part of the cache's name: raise it when order or tokenization change
_DOCUMENTS_PER_CALL = 512  # bounds the memory of one tokenizer call


@dataclass(slots=True, kw_only=True)
class TokenSplit:
    """The documents of one side of the split, concatenated, each with its opening token."""

    tokens: NDArray[np.integer]  # (N,) uint16 or int32
    starts: NDArray[np.int64]  # (documents + 1,); document i is tokens[starts[i]:starts[i + 1]]
    source_ids: NDArray[np.int16]  # (documents,)

    @property
    def num_documents(self) -> int:
        return len(self.source_ids)


@dataclass(slots=True, kw_only=True)
class TokenCorpus:
    """Documents under one tokenizer."""

    splits: dict[Split, TokenSplit]
    fingerprint: str  # of the documents
    tokenizer_sha256: str
    end_id: int
    byte_lengths: NDArray[np.int32]  # (vocab_size,) UTF-8 bytes of each token, 0 for special ones


def tokenize_corpus(
    corpus: DocumentCorpus, tokenizer: Tokenizer, *, cache_dir: Path | None = None
) -> TokenCorpus:
    """Tokenize a corpus, or read the result of an earlier time from `cache_dir`.

    The cache file is named by corpus and tokenizer and carries its own checksum; one that fails it
    is rebuilt.
    """
    arrays = None
    path = None
    if cache_dir is not None:
        key = f"{corpus.fingerprint[:20]}-{tokenizer.sha256[:20]}"
        path = cache_dir / f"{key}-v{_CACHE_LAYOUT}.tokens"
        arrays = read_token_file(path)
    if arrays is None:
        arrays = _tokenize(corpus, tokenizer)
        if path is not None:
            write_token_file(path, arrays)
    sides: tuple[Split, ...] = ("train", "validation")
    splits: dict[Split, TokenSplit] = {
        side: TokenSplit(
            tokens=arrays[f"{side}_tokens"],
            starts=arrays[f"{side}_starts"],
            source_ids=arrays[f"{side}_source_ids"],
        )
        for side in sides
    }
    return TokenCorpus(
        splits=splits,
        fingerprint=corpus.fingerprint,
        tokenizer_sha256=tokenizer.sha256,
        end_id=tokenizer.end_id,
        byte_lengths=tokenizer.token_byte_lengths,
    )


def _tokenize(corpus: DocumentCorpus, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    sides: dict[Split, list[Document]] = {"train": [], "validation": []}
    for document in corpus.documents():
        if document.source not in SOURCE_IDS:
            raise ValueError(
                f"document {document.id}: source {document.source!r} has no id in SOURCE_IDS"
            )
        sides[split_of(document.id)].append(document)
    sides["validation"] = in_scoring_order(sides["validation"])
    arrays: dict[str, np.ndarray] = {}
    for side, documents in sides.items():
        split = _tokenize_split(documents, tokenizer)
        arrays[f"{side}_tokens"] = split.tokens
        arrays[f"{side}_starts"] = split.starts
        arrays[f"{side}_source_ids"] = split.source_ids
    return arrays


def _tokenize_split(documents: list[Document], tokenizer: Tokenizer) -> TokenSplit:
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    pieces: list[np.ndarray] = []
    for first in range(0, len(documents), _DOCUMENTS_PER_CALL):
        texts = [document.text for document in documents[first : first + _DOCUMENTS_PER_CALL]]
        pieces += [
            np.array([tokenizer.end_id, *ids], dtype=dtype) for ids in tokenizer.encode_batch(texts)
        ]
    starts = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=starts[1:])
    return TokenSplit(
        tokens=np.concatenate(pieces) if pieces else np.zeros(0, dtype=dtype),
        starts=starts,
        source_ids=np.array(
            [SOURCE_IDS[document.source] for document in documents], dtype=np.int16
        ),
    )


def permutation(size: int, *, seed: int, epoch: int, stream: int) -> NDArray[np.int64]:
    """An order of range(size) that depends on the arguments alone, not on machine or versions.

    The order sorts splitmix64 outputs (Steele et al. 2014), which are distinct, so no tie is
    possible. numpy's own generators may change their streams between versions; a checkpoint must
    not notice.
    """
    mask = (1 << 64) - 1
    base = np.zeros(1, dtype=np.uint64)
    for value in (seed, epoch, stream):
        base = _splitmix64(base ^ np.uint64(value & mask))
    return np.argsort(_splitmix64(base + np.arange(size, dtype=np.uint64)), kind="stable")


def _splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed = state + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class TokenStream:
    """Endless training batches over a corpus, resumable at every batch to the exact next token."""

    def __init__(self, corpus: TokenCorpus, *, seed: int, batch_size: int, seq_len: int) -> None:
        self._split = corpus.splits["train"]
        self._corpus = corpus
        self.seed = seed
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.windows_per_epoch = len(self._split.tokens) // seq_len
        if self.windows_per_epoch == 0:
            raise ValueError(
                f"--seq-len {seq_len} is longer than the {len(self._split.tokens)} tokens of the "
                "training text"
            )
        self.epoch = 0
        self.window = 0
        self._served = dict.fromkeys(sorted({*self._split.source_ids.tolist()}), 0)
        self._prepared_epoch = -1

    def next_batch(self) -> Batch:
        """The next `batch_size` windows; a batch may span the end of an epoch.

        A call that fails, for want of memory say, leaves the position as it was.
        """
        place = (self.epoch, self.window)
        try:
            batch, sources = self._read_batch()
        except BaseException:
            self.epoch, self.window = place
            raise
        for source, count in zip(*np.unique(sources, return_counts=True)):
            self._served[int(source)] += int(count)
        return batch

    def _read_batch(self) -> tuple[Batch, NDArray[np.int16]]:
        tokens = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        sources = np.empty((self.batch_size, self.seq_len), dtype=np.int16)
        for row in range(self.batch_size):
            tokens[row], sources[row] = self._read_window()
        batch = to_batch(
            tokens[:, :-1],
            tokens[:, 1:],
            sources,
            end_id=self._corpus.end_id,
            byte_lengths=self._corpus.byte_lengths,
        )
        return batch, sources

    @property
    def served_tokens(self) -> dict[str, int]:
        """Input tokens handed out so far, by source name."""
        names = {number: name for name, number in SOURCE_IDS.items()}
        return {names[number]: count for number, count in self._served.items()}

    def state_dict(self) -> dict[str, Any]:
        """The position and what it is a position in; plain JSON values."""
        return {
            **self._identity(),
            "epoch": self.epoch,
            "window": self.window,
            "served_tokens": self.served_tokens,
        }

    @property
    def mixture(self) -> None:
        return None

    def position(self) -> dict[str, Any]:
        return self.state_dict()

    def metrics(self) -> dict[str, float]:
        return {}

    def take_messages(self) -> list[str]:
        return []

    def shrink_prefetch(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing is held open."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; ValueError names what differs in another stream's."""
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise ValueError(
                    f"the checkpoint's data stream has {name} {state.get(name)!r}, this run has "
                    f"{own!r}; use the same settings, or start anew with --no-resume"
                )
        epoch, window, served = state["epoch"], state["window"], state["served_tokens"]
        if epoch < 0 or not 0 <= window < self.windows_per_epoch:
            raise ValueError(
                f"the checkpoint's data position is impossible: epoch {epoch}, window {window}"
            )
        if served.keys() != self.served_tokens.keys():
            raise ValueError(f"the checkpoint's data stream has the sources {sorted(served)}")
        self.epoch = epoch
        self.window = window
        self._served = {SOURCE_IDS[name]: count for name, count in served.items()}

    def _identity(self) -> dict[str, Any]:
        return {
            "format": STATE_FORMAT,
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._corpus.tokenizer_sha256,
            "seed": self.seed,
            "seq_len": self.seq_len,
        }

    def _prepare_epoch(self) -> None:
        split = self._split
        self._order = permutation(split.num_documents, seed=self.seed, epoch=self.epoch, stream=0)
        # Where each shuffled document ends in the epoch's stream: (documents,)
        self._ends = np.cumsum(np.diff(split.starts)[self._order])
        self._windows = permutation(
            self.windows_per_epoch, seed=self.seed, epoch=self.epoch, stream=1
        )
        self._prepared_epoch = self.epoch

    def _read_window(self) -> tuple[NDArray[np.integer], NDArray[np.int16]]:
        """seq_len + 1 tokens from the epoch's stream, and the sources of the first seq_len."""
        if self._prepared_epoch != self.epoch:
            self._prepare_epoch()
        start = int(self._windows[self.window]) * self.seq_len
        stop = start + self.seq_len + 1
        split = self._split
        pieces: list[np.ndarray] = []
        sources: list[np.ndarray] = []
        position = start
        place = int(np.searchsorted(self._ends, start, side="right"))
        while position < stop:
            if place == len(self._ends):  # only the label after the very last token
                pieces.append(np.array([self._corpus.end_id]))
                break
            document = self._order[place]
            first = split.starts[document + 1] - (self._ends[place] - position)
            count = min(int(self._ends[place]), stop) - position
            pieces.append(split.tokens[first : first + count])
            sources.append(np.full(count, split.source_ids[document], dtype=np.int16))
            position += count
            place += 1
        self._advance()
        return np.concatenate(pieces), np.concatenate(sources)[: self.seq_len]

    def _advance(self) -> None:
        self.window += 1
        if self.window == self.windows_per_epoch:
            self.epoch += 1
            self.window = 0


def validation_batches(
    corpus: TokenCorpus, *, seq_len: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[Batch]:
    """The validation split from its beginning, every token scored once.

    `max_tokens` stops after as many whole windows (one at least). The last window of the split is
    padded with labels of -100, the last batch may have fewer rows.
    """
    yield from split_batches(
        corpus.splits["validation"],
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=max_tokens,
        end_id=corpus.end_id,
        byte_lengths=corpus.byte_lengths,
    )


def text_batches(
    text: str | bytes, *, tokenizer: Tokenizer, seq_len: int, batch_size: int
) -> Iterator[Batch]:
    """Any text as one document of the source `unknown`, in the same form as the validation split.

    ValueError when the text is empty or the tokenizer does not cover exactly its bytes.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if not content:
        raise ValueError("the text is empty: there is nothing to predict")
    tokens = np.array([tokenizer.end_id, *tokenizer.encode(content)], dtype=np.int32)
    covered = int(tokenizer.token_byte_lengths[tokens].sum(dtype=np.int64))
    if covered != len(content):
        raise ValueError(
            f"the tokenizer covers {covered} bytes of a text of {len(content)}: bits per byte "
            "need a lossless one (--tokenizer-name assets)"
        )
    split = TokenSplit(
        tokens=tokens,
        starts=np.array([0, len(tokens)], dtype=np.int64),
        source_ids=np.array([SOURCE_IDS["unknown"]], dtype=np.int16),
    )
    yield from split_batches(
        split,
        seq_len=seq_len,
        batch_size=batch_size,
        end_id=tokenizer.end_id,
        byte_lengths=tokenizer.token_byte_lengths,
    )


def split_batches(
    split: TokenSplit,
    *,
    seq_len: int,
    batch_size: int,
    end_id: int,
    byte_lengths: NDArray[np.int32],
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """The text of a split from its beginning, as `validation_batches` cuts it."""
    total = len(split.tokens)
    num_windows = -(-total // seq_len)
    if max_tokens is not None:
        num_windows = min(num_windows, max(1, max_tokens // seq_len))
    for first in range(0, num_windows, batch_size):
        rows = min(batch_size, num_windows - first)
        start, stop = first * seq_len, (first + rows) * seq_len
        kept = min(stop, total) - start
        inputs = np.full(rows * seq_len, end_id, dtype=np.int64)
        labels = np.full(rows * seq_len, IGNORED_LABEL, dtype=np.int64)
        sources = np.zeros(rows * seq_len, dtype=np.int16)
        inputs[:kept] = split.tokens[start : start + kept]
        labels[: kept - 1] = inputs[1:kept]
        labels[kept - 1] = split.tokens[stop] if stop < total else end_id
        places = np.searchsorted(split.starts, np.arange(start, start + kept), side="right") - 1
        sources[:kept] = split.source_ids[places]
        shape = (rows, seq_len)
        yield to_batch(
            inputs.reshape(shape),
            labels.reshape(shape),
            sources.reshape(shape),
            end_id=end_id,
            byte_lengths=byte_lengths,
        )
