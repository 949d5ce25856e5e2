"""The mixed stream: many sources, one sequence of tokens, a position that resumes exactly.

Readers (training/stream/prefetch.py) turn sources into shards ahead of time; this module only
draws whose turn it is, reads documents from shards that are there, and packs rows. No batch is
assembled ahead, so the state after a batch is all of the state: per source a shard's beginning and
a place in it, the draw counter, credits, and an offset into the open document. Resuming costs one
shard per source, however far in.

While a source has nothing to give, its draws go to the others (counted), and no draw waits for it
again until it is back. Before the first streamed batch, and when nothing delivers and the user
allows it, the embedded corpus speaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from training.data import TokenCorpus
from training.sources.base import JSON
from training.stream.batch import Batch, to_batch
from training.stream.bootstrap import BOOTSTRAP, BootstrapDocuments
from training.stream.mixture import Mixture
from training.stream.packing import OpenDocument, Row
from training.stream.prefetch import SourceReader
from training.stream.recent_hashes import RecentHashes
from training.stream.report import source_report, stream_metrics
from training.stream.shards import Shard, snapshot_hash
from training.stream.state import SourceCursor, StreamSettings

STATE_FORMAT = 1
POLL_S = 0.05  # between two looks at stalled sources when nothing else is left to do


class MixedStream:
    """Endless batches from several sources. Draws, order and content are those of the state."""

    def __init__(
        self,
        readers: dict[str, SourceReader],
        *,
        mixture: Mixture,
        corpus: TokenCorpus,
        settings: StreamSettings,
        on_close: Callable[[], object] | None = None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.mixture = mixture
        self.cursors = {key: SourceCursor() for key in readers}
        self.bootstrap_tokens = 0
        self.bootstrap_batches = 0
        self.wait_s = 0.0
        self._readers = readers
        self._corpus = corpus
        self._settings = settings
        self._on_close = on_close
        self._now = now
        self._sleep = sleep
        self._bootstrap = BootstrapDocuments(corpus, seed=mixture.seed)
        self._bootstrap_index = 0
        self._recent = RecentHashes(settings.dedup_window)
        self._rows = 0
        self._turn: str | None = None
        self._open: OpenDocument | None = None
        self._to_reopen: dict[str, Any] | None = None
        self._shards: dict[str, Shard] = {}
        self._seen: set[str] = set()  # sources that have delivered in this process
        self._named: set[str] = set()  # sources that start() said do not deliver
        self._messages: list[str] = []
        self._on_bootstrap = False

    def start(self, *, patience_s: float) -> None:
        """Begin to read ahead. ValueError when a source can never deliver (a wrong name, no right
        to read); a source that is merely silent is given `patience_s` to say so."""
        for reader in self._readers.values():
            reader.start()
        deadline = self._now() + patience_s
        for key, reader in self._readers.items():
            reader.await_contact(max(0.0, deadline - self._now()))
            if reader.failure is not None:
                raise ValueError(str(reader.failure))
            if reader.error is not None:
                self._named.add(key)
                self._messages.append(f"source {key} does not deliver yet: {reader.error}")

    def next_batch(self) -> Batch:
        """`batch_size` consecutive rows; of a group of ranks, each takes its part of the rows."""
        settings = self._settings
        before = self.bootstrap_tokens
        rows = [self._read_row() for _ in range(settings.batch_size * settings.world_size)]
        first = settings.rank * settings.batch_size
        own = rows[first : first + settings.batch_size]
        self.bootstrap_batches += self.bootstrap_tokens > before
        return to_batch(
            np.stack([row.inputs for row in own]),
            np.stack([row.labels for row in own]),
            np.stack([row.sources for row in own]),
            end_id=self._corpus.end_id,
            byte_lengths=self._corpus.byte_lengths,
        )

    @property
    def served_tokens(self) -> dict[str, int]:
        """Input tokens handed out so far, by source."""
        return {key: c.tokens for key, c in self.cursors.items()} | {
            BOOTSTRAP: self.bootstrap_tokens
        }

    def position(self) -> dict[str, Any]:
        return {"rows": self._rows, "draws": self.mixture.counter}

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors of what was seen lately; shards that wait are no part of it."""
        reopen = self._to_reopen
        if self._open is not None:
            reopen = {"key": self._open.key, "offset": self._open.offset}
        return {
            **self._identity(),
            "rows": self._rows,
            "counter": self.mixture.counter,
            "credits": dict(self.mixture.credits),
            "weights": dict(self.mixture.weights),
            "turn": self._turn,
            "open": reopen,
            "bootstrap_index": self._bootstrap_index,
            "bootstrap_tokens": self.bootstrap_tokens,
            "bootstrap_batches": self.bootstrap_batches,
            "recent": self._recent.state_dict(),
            "cursors": {key: cursor.state_dict() for key, cursor in self.cursors.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position; ValueError names what differs in another stream's."""
        for name, own in self._identity().items():
            if state.get(name) != own:
                raise ValueError(
                    f"the checkpoint's data stream has {name} {state.get(name)!r}, this run has "
                    f"{own!r}; use the same settings, or start anew with --no-resume"
                )
        self._rows = state["rows"]
        self.mixture.counter = state["counter"]
        self.mixture.credits = dict(state["credits"])
        self.mixture.weights = {key: state["weights"][key] for key in self.mixture.weights}
        self._turn = state["turn"]
        self._open, self._to_reopen = None, state["open"]
        self._bootstrap_index = state["bootstrap_index"]
        self.bootstrap_tokens = state["bootstrap_tokens"]
        self.bootstrap_batches = state["bootstrap_batches"]
        self._recent.load_state_dict(state["recent"])
        self._shards.clear()
        self._seen.clear()
        for key, saved in state["cursors"].items():
            cursor = self.cursors[key] = SourceCursor.from_state(saved)
            self._readers[key].seek(cursor.number, cursor.start)

    def metrics(self) -> dict[str, float]:
        return {
            **stream_metrics(self.cursors, self._readers, served=self.served_tokens),
            "data_wait_s": self.wait_s,
            "bootstrap_batches_used": self.bootstrap_batches,
        }

    def source_report(self) -> dict[str, dict[str, JSON]]:
        """Of every source: documents read and left out by reason, the shard in hand included."""
        return source_report(self.cursors, self._shards)

    def take_messages(self) -> list[str]:
        messages, self._messages = self._messages, []
        return messages

    def shrink_prefetch(self) -> bool:
        return any([reader.shrink_prefetch() for reader in self._readers.values()])

    def close(self) -> None:
        """Stop the readers, each after the read it is in."""
        for reader in self._readers.values():
            reader.close()
        if self._on_close is not None:
            self._on_close()

    def _identity(self) -> dict[str, JSON]:
        return {
            "format": STATE_FORMAT,
            "corpus": self._corpus.fingerprint,
            "tokenizer": self._corpus.tokenizer_sha256,
            "seed": self.mixture.seed,
            "seq_len": self._settings.seq_len,
            "sources": list(self.cursors),
            **self._settings.fingerprint,
        }

    def _read_row(self) -> Row:
        row = Row(self._settings.seq_len)
        while not row.is_full:
            document = self._open = self._open or self._next_document()
            count = row.take(document, end_id=self._corpus.end_id)
            if document.key == BOOTSTRAP:
                self.bootstrap_tokens += count
            else:
                self.cursors[document.key].tokens += count
            if document.is_finished:
                self._close_document(document)
        self._rows += 1
        return row

    def _next_document(self) -> OpenDocument:
        settings = self._settings
        if self._to_reopen is not None and (document := self._reopen()) is not None:
            return document
        if self._rows < settings.bootstrap_batches * settings.batch_size * settings.world_size:
            return self._bootstrap.document(self._bootstrap_index)
        while (key := self._choose()) is not None:
            if (document := self._read(key)) is not None:
                self._say_bootstrap(False)
                return document
        self._say_bootstrap(True)
        return self._bootstrap.document(self._bootstrap_index)

    def _choose(self) -> str | None:
        """The source of the next document; None = the embedded corpus."""
        while True:
            alive = self._candidates()
            available = [
                key for key in alive if not self.cursors[key].stalled or self._is_back(key)
            ]
            if not available:
                if not self._await_any(alive):
                    return None
                continue
            if self._turn in available and self.mixture.has_turn(self._turn):
                return self._turn
            chosen, self._turn = self.mixture.draw(alive, available=available)
            self.cursors[chosen].fallbacks += chosen != self._turn
            self.mixture.grant(self._turn)

    def _candidates(self) -> list[str]:
        """Sources that are not used up; at the start of a run only the ones that come first."""
        alive = [key for key, cursor in self.cursors.items() if not cursor.ended]
        if sum(c.documents for c in self.cursors.values()) >= self._settings.first_documents:
            return alive
        first = [key for key in alive if key in self._settings.first_sources]
        return first if any(not self.cursors[key].stalled for key in first) else alive

    def _is_back(self, key: str) -> bool:
        if self._load_shard(key, wait_s=0.0) is None:
            return False
        self.cursors[key].stalled = False
        self._messages.append(f"source {key} delivers again")
        return True

    def _await_any(self, alive: list[str]) -> bool:
        """Wait until a stalled source is back. False = go on with the embedded corpus."""
        if self._settings.bootstrap_on_failure:
            return False
        start = self._now()
        while alive and self._now() - start < self._settings.start_timeout_s:
            if any(self._is_back(key) for key in alive):
                self.wait_s += self._now() - start
                return True
            alive = [key for key in alive if not self.cursors[key].ended]
            self._sleep(POLL_S)
        raise RuntimeError(
            f"no source delivers ({self._why_not()}); the same command resumes from the last "
            "checkpoint, --on-all-sources-failed bootstrap trains on the embedded text meanwhile"
        )

    def _why_not(self) -> str:
        return "; ".join(
            f"{key}: {cursor.ended or self._readers[key].error or 'silent'}"
            for key, cursor in self.cursors.items()
        )

    def _read(self, key: str) -> OpenDocument | None:
        """The next document of a source that is new; None when it has none now."""
        cursor = self.cursors[key]
        while not cursor.ended:
            patience = self._settings.read_timeout_s
            if key not in self._seen:
                patience = max(patience, self._settings.start_timeout_s)
            shard = self._load_shard(key, wait_s=patience)
            if shard is None:
                self._mark_stalled(key)
                return None
            if cursor.record >= len(shard):
                self._next_shard(key, shard)
            elif self._is_new(key, int(shard.hashes[cursor.record])):
                return self._document(key, shard)
            else:
                cursor.duplicates += 1
                cursor.record += 1
        return None

    def _is_new(self, key: str, value: int) -> bool:
        source = list(self.cursors).index(key)
        return self._recent.is_new(value, source=source, epoch=self.cursors[key].start["epoch"])

    def _document(self, key: str, shard: Shard) -> OpenDocument:
        record = self.cursors[key].record
        source_id = self.mixture.ids.get(key, int(shard.source_ids[record]))
        return OpenDocument(key=key, tokens=shard.document(record), source_id=source_id)

    def _load_shard(self, key: str, *, wait_s: float) -> Shard | None:
        """The shard that is being read; made anew where it has been lost."""
        shard = self._shards.get(key)
        if shard is not None:
            return shard
        cursor, reader = self.cursors[key], self._readers[key]
        before = snapshot_hash(cursor.start)
        started = self._now()
        shard = reader.take(cursor.number, before=before, wait_s=0.0)
        if shard is None and reader.has_made(cursor.number):
            reader.seek(cursor.number, cursor.start)
        if shard is None:
            patience = min(wait_s, self._settings.read_timeout_s)
            shard = reader.take(
                cursor.number, before=before, wait_s=wait_s, failing_wait_s=patience
            )
        self.wait_s += self._now() - started
        if shard is not None:
            self._shards[key] = shard
            self._seen.add(key)
        elif reader.failure is not None:
            cursor.ended = str(reader.failure)
            self._messages.append(f"source {key} is left out: {reader.failure}")
        return shard

    def _mark_stalled(self, key: str) -> None:
        cursor = self.cursors[key]
        if cursor.ended:
            return
        cursor.stalled = True
        cursor.timeouts += 1
        if key in self._seen or key not in self._named:
            error = self._readers[key].error
            self._messages.append(f"source {key} has nothing to give now ({error or 'too slow'})")
        self._seen.add(key)

    def _next_shard(self, key: str, shard: Shard) -> None:
        cursor = self.cursors[key]
        cursor.rejected.update(shard.rejected)
        cursor.documents_read += shard.num_read
        epoch_ends = shard.after["epoch"] != cursor.start["epoch"]
        cursor.number, cursor.record, cursor.start = shard.number + 1, 0, shard.after
        del self._shards[key]
        if epoch_ends:
            if cursor.epoch_documents == 0:
                cursor.ended = "it holds nothing that the other sources do not"
            cursor.epoch_documents = 0
        if shard.after["ended"]:
            cursor.ended = "used up (--source-max-epochs)"
        self._readers[key].release(cursor.number)

    def _close_document(self, document: OpenDocument) -> None:
        self._open = None
        if document.key == BOOTSTRAP:
            self._bootstrap_index += 1
            return
        key, cursor = document.key, self.cursors[document.key]
        cursor.record += 1
        cursor.documents += 1
        cursor.epoch_documents += 1
        self.mixture.pay(key, len(document.tokens))
        if cursor.record >= len(self._shards[key]):
            self._next_shard(key, self._shards[key])
        if 0 < self._settings.max_tokens.get(key, 0) <= cursor.tokens:
            cursor.ended = "its share is used up (max_tokens)"

    def _reopen(self) -> OpenDocument | None:
        """The document that a checkpoint was saved in, from where it had got to."""
        assert self._to_reopen is not None
        key, offset = self._to_reopen["key"], self._to_reopen["offset"]
        if key == BOOTSTRAP:
            document = self._bootstrap.document(self._bootstrap_index)
        else:
            shard = self._load_shard(key, wait_s=self._settings.start_timeout_s)
            if shard is None:
                if not self._settings.bootstrap_on_failure:
                    raise RuntimeError(
                        f"source {key} cannot give the document that the checkpoint was saved in "
                        f"({self._why_not()}); try again when it is back"
                    )
                self._mark_stalled(key)
                self._messages.append(f"the rest of a document of source {key} is left out")
                self.cursors[key].record += 1
                self._to_reopen = None
                return None
            document = self._document(key, shard)
        document.offset, self._to_reopen = offset, None
        return document

    def _say_bootstrap(self, active: bool) -> None:
        if active and not self._on_bootstrap:
            self._messages.append(
                f"no source delivers: training on the embedded text ({self._why_not()})"
            )
        self._on_bootstrap = active
