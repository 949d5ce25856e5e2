"""One source read ahead: its documents become shards, whatever the network does meanwhile.

The reader's whole state is where its next shard begins, so it can be sent anywhere (`seek`) and
every failure is only time: a document that could not be read is asked for again, behind a circuit
breaker. With a thread it works on its own; without one (`--num-workers 0`) `take` does the work.
"""

from __future__ import annotations

import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace

from training.sources.base import JSON, DocumentSource, SourceError, SourceExhausted
from training.stream.breaker import CircuitBreaker
from training.stream.pipeline import DocumentPipeline, DuplicateWindow, ShardBuilder
from training.stream.shards import Shard, ShardStore, snapshot_hash

FIRST_SHARD_DOCUMENTS = 16
FLAGS = {"local": "--local-path: ", "pdf": "--pdf-path: "}
IDLE_S = 0.5  # how long an idle thread sleeps at most before it looks again
POLL_S = 0.05
# How long a reader that is a shard ahead rests, in times of its work: training needs the cores.
REST = 3.0
CLOSE_S = 3.0  # how long the end of a run waits for a read


@dataclass(slots=True, kw_only=True, frozen=True)
class ReaderSettings:
    """shard_documents, shard_characters: size of a shard once it has grown.
    chunk_documents: documents per call of the tokenizer. chunks_in_flight: in the pool at a time.
    max_epochs: passes over a finite source; 0 = no end."""

    seed: int
    shard_documents: int = 1024
    shard_characters: int = 8 << 20
    chunk_documents: int = 64
    chunks_in_flight: int = 4
    max_epochs: int = 0


def first_snapshot() -> dict[str, JSON]:
    """Where every source begins."""
    return {"source": None, "epoch": 0, "kept": 0, "window": None, "identity": None, "ended": False}


class SourceReader:
    """Makes the shards of one source in order and puts them into its store.

    failure: why nothing will ever come any more. error: the newest failure of a read.
    contacted: set once a shard with a document in it, or a failure, was seen.
    """

    def __init__(
        self,
        source: DocumentSource,
        *,
        key: str,
        pipeline: DocumentPipeline,
        store: ShardStore,
        settings: ReaderSettings,
        window: Callable[[], DuplicateWindow] | None = None,
        pool: Executor | None = None,
        threaded: bool = False,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self.key = key
        self.source = source
        self.store = store
        self.breaker = CircuitBreaker()
        self.failure: SourceError | None = None
        self.error: SourceError | None = None
        self.contacted = threading.Event()
        self._pipeline = pipeline
        self._settings = settings
        self._new_window = window
        self._pool = pool
        self._threaded = threaded
        self._now = now
        self._sleep = sleep
        self._stream = zlib.crc32(key.encode())
        self._changed = threading.Condition()
        self._request: tuple[int, dict[str, JSON]] | None = (0, first_snapshot())
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._crash: BaseException | None = None
        self._number = 0
        self._released = 0  # the shard that the stream reads
        self._snapshot = first_snapshot()
        self._source_at: dict[str, JSON] | None = None  # snapshot at which source and window stand
        self._builder: ShardBuilder | None = None
        self._identity: dict[str, JSON] = {}
        self._window: DuplicateWindow | None = None
        self._rejected_before: Counter[str] = Counter()

    def seek(self, number: int, snapshot: dict[str, JSON]) -> None:
        """Make the shards from `number` on, which begins at `snapshot`."""
        # What was read ahead of another place must not fill the store that this one needs.
        self.store.release(number)
        with self._changed:
            self._request = (number, snapshot)
            self._released = number
            self.failure = None
            self._changed.notify_all()

    def take(
        self, number: int, *, before: str, wait_s: float, failing_wait_s: float = 0.0
    ) -> Shard | None:
        """Shard `number`, waiting at most `wait_s`, or `failing_wait_s` while the circuit is open:
        a source that is known to fail is not worth a long wait."""
        self.start()
        begin = self._now()
        deadline = begin + wait_s
        while True:
            if self._crash is not None:
                raise RuntimeError(f"the reader of source {self.key} failed") from self._crash
            shard = self.store.load(number, before=before)
            if shard is not None or self.failure is not None:
                return shard
            pause = IDLE_S if self._threaded else self.step()
            left = deadline - self._now()
            failing = self.breaker.is_open and self._now() - begin >= failing_wait_s
            if left <= 0.0 or failing:
                return self.store.load(number, before=before)
            if self._threaded:
                with self._changed:
                    self._changed.wait(min(left, POLL_S))
            elif pause > 0.0:
                self._sleep(min(pause, left))

    def has_made(self, number: int) -> bool:
        """Whether shard `number` was made: then it is in the store, or lost."""
        with self._changed:
            return self._request is None and self._number > number

    def await_contact(self, patience_s: float) -> None:
        """Wait until the source has given a document that is kept, or failed."""
        if self._threaded:
            self.contacted.wait(patience_s)
            return
        deadline = self._now() + patience_s
        while not self.contacted.is_set() and self._now() < deadline:
            self.step()

    def release(self, number: int) -> None:
        """Shards before `number` will not be asked for again."""
        self.store.release(number)
        with self._changed:
            self._released = number
            self._changed.notify_all()

    def shrink_prefetch(self) -> bool:
        """Half as much read ahead and tokenized at once; False when it is the least already.

        What is made stays the same; shards that wait are not dropped, but not replaced either.
        """
        in_flight = self._settings.chunks_in_flight
        self._settings = replace(self._settings, chunks_in_flight=max(1, in_flight // 2))
        return self.store.shrink() or in_flight > 1

    def step(self) -> float:
        """Do one unit of work; seconds until the next one can do more (0 = at once)."""
        with self._changed:
            if self._request is not None:
                (self._number, self._snapshot), self._request = self._request, None
                self._builder, self._source_at = None, None
        if self.failure is not None or self._snapshot["ended"]:
            return IDLE_S
        if self._builder is None and self._pass_stored():
            return 0.0
        if self._builder is None and not self.store.has_room(self._number):
            return IDLE_S
        if (pause := self.breaker.wait_s(self._now())) > 0.0:
            return pause
        try:
            self._advance()
        except SourceError as error:
            self._note(error)
            return 0.0 if self.failure else self.breaker.wait_s(self._now())
        self.breaker.succeed()
        return 0.0

    def close(self) -> None:
        """Stop the thread and close the source, once; a read that hangs is left to its end."""
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(CLOSE_S)
            if self._thread.is_alive():
                return
        self.source.close()

    def start(self) -> None:
        """Begin to read ahead, if this reader has a thread."""
        if self._threaded and self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name=f"source {self.key}", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping:
                started = time.perf_counter()
                pause = self.step()
                if pause == 0.0 and self._number > self._released + 1:
                    pause = REST * (time.perf_counter() - started)
                with self._changed:
                    if pause > 0.0 and self._request is None and not self._stopping:
                        self._changed.wait(min(pause, IDLE_S))
        except RuntimeError:
            # An end that did not wait for a long read has shut the pool down meanwhile.
            if not self._stopping:
                raise
        finally:
            with self._changed:
                self._crash = sys.exception()
                self.contacted.set()
                self._changed.notify_all()

    def _pass_stored(self) -> bool:
        """Skip the shard that is due if the store has it, from an earlier life or the spool."""
        shard = self.store.load(self._number, before=snapshot_hash(self._snapshot))
        if shard is None:
            return False
        self._publish(shard)
        return True

    def _advance(self) -> None:
        """Read one document, or finish the shard."""
        if self._builder is None:
            self._open_source()
        assert self._builder is not None
        try:
            document = self.source.next_document()
        except SourceExhausted:
            self.source.rewind(epoch=self._snapshot["epoch"] + 1)
            self._finish(epoch_ends=True)
            return
        self._builder.add(document)
        if self._builder.is_full:
            self._finish(epoch_ends=False)

    def _open_source(self) -> None:
        """Begin a shard, with source and window where it begins."""
        if self._source_at is not self._snapshot:
            self._place_source(self._snapshot)
            self._source_at = self._snapshot
        self._rejected_before = Counter(self.source.rejected)
        settings = self._settings
        self._builder = ShardBuilder(
            self._pipeline,
            number=self._number,
            documents=min(settings.shard_documents, FIRST_SHARD_DOCUMENTS << min(self._number, 20)),
            characters=settings.shard_characters,
            chunk_size=settings.chunk_documents,
            pool=self._pool,
            chunks_in_flight=settings.chunks_in_flight,
        )

    def _place_source(self, snapshot: dict[str, JSON]) -> None:
        self._identity = self.source.identity()
        if snapshot["identity"] not in (None, self._identity):
            raise SourceError(
                f"source {self.key} is not the one of the checkpoint (files, dataset revision or "
                "crawls differ); restore it, or start anew with --no-resume",
                reason="other_source",
                transient=False,
            )
        if snapshot["source"] is None:
            self.source.rewind(epoch=0)
        else:
            self.source.load_state_dict(snapshot["source"])
        if self._new_window is not None:
            self._window = self._new_window()
            if snapshot["window"] is not None:
                self._window.load_state_dict(snapshot["window"])

    def _finish(self, *, epoch_ends: bool) -> None:
        assert self._builder is not None
        settings, snapshot = self._settings, self._snapshot
        rejected = Counter(self.source.rejected)
        rejected.subtract(self._rejected_before)
        shard = self._builder.finish(
            before=snapshot_hash(snapshot),
            window=self._window,
            seed=settings.seed,
            stream=self._stream,
            shuffle=settings.shard_documents > 1,
            rejected=+rejected,
        )
        epoch, kept = snapshot["epoch"], snapshot["kept"] + len(shard)
        if epoch_ends and kept == 0:
            raise SourceError(
                f"{FLAGS.get(self.key, '')}source {self.key} holds no usable document "
                f"({_counts(shard.rejected)}); give it other text, or --no-quality-filter if it is "
                "as it should be",
                reason="no_document",
                transient=False,
            )
        shard.after = {
            "source": self.source.state_dict(),
            "epoch": epoch + epoch_ends,
            "kept": 0 if epoch_ends else kept,
            "window": None if self._window is None or epoch_ends else self._window.state_dict(),
            "identity": self._identity,
            "ended": epoch_ends and 0 < settings.max_epochs <= epoch + 1,
        }
        self._builder = None
        self._source_at = shard.after
        if epoch_ends and self._new_window is not None:
            self._window = self._new_window()  # a new epoch is meant to repeat the last one
        self.store.put(shard)
        self._publish(shard)

    def _publish(self, shard: Shard) -> None:
        with self._changed:
            self._number, self._snapshot = shard.number + 1, shard.after
            if len(shard):
                self.contacted.set()
            self._changed.notify_all()

    def _note(self, error: SourceError) -> None:
        self.error = error
        self.breaker.fail(self._now())
        if not error.transient:
            self.failure = error
        with self._changed:
            self.contacted.set()
            self._changed.notify_all()


def _counts(rejected: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in rejected.items()) or "it is empty"
