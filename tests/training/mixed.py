"""Small mixed streams over fake sources."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tests.training.fake_sources import FakeSource
from tests.training.small_corpus import TOKENIZER, SmallCorpus
from training.data import tokenize_corpus
from training.stream.mixed_stream import MixedStream
from training.stream.mixture import Mixture
from training.stream.pipeline import DocumentPipeline
from training.stream.prefetch import ReaderSettings, SourceReader
from training.stream.shards import MemoryStore
from training.stream.state import StreamSettings

CORPUS = tokenize_corpus(SmallCorpus(), TOKENIZER)
SEED = 5


def three_sources(**options):
    return {
        "web": FakeSource("commoncrawl", key="web", **options),
        "edu": FakeSource("fineweb", key="edu", size=37, **options),
        "files": FakeSource("local", key="files", size=5, words=(100, 400), **options),
    }


@contextmanager
def mixed_stream(
    sources,
    *,
    weights=None,
    workers=0,
    store=None,
    strategy="weighted",
    clock=None,
    reader=None,
    pipeline=None,
    window=None,
    seed=SEED,
    **settings,
):
    """A stream over `sources` (key -> source); closed at the end."""
    options = {"batch_size": 2, "seq_len": 64, "read_timeout_s": 60.0} | settings
    time = {} if clock is None else {"now": clock, "sleep": clock.sleep}
    pool = ThreadPoolExecutor(workers) if workers else None
    readers = {
        key: SourceReader(
            source,
            key=key,
            pipeline=pipeline or DocumentPipeline(tokenizer=TOKENIZER),
            store=store(key) if store else MemoryStore(documents=64),
            settings=ReaderSettings(
                **({"seed": seed, "shard_documents": 32, "chunk_documents": 5} | (reader or {}))
            ),
            window=window,
            pool=pool,
            threaded=workers > 0,
            **time,
        )
        for key, source in sources.items()
    }
    stream = MixedStream(
        readers,
        mixture=Mixture(
            seed=seed,
            turn_tokens=options["seq_len"],
            weights=weights or dict.fromkeys(sources, 1.0),
            strategy=strategy,
        ),
        corpus=CORPUS,
        settings=StreamSettings(**options),
        **time,
    )
    try:
        yield stream
    finally:
        stream.close()
        if pool is not None:
            pool.shutdown()


def digest(batches):
    """A hash of everything in the batches."""
    found = hashlib.sha256()
    for batch in batches:
        for tensor in (batch.input_ids, batch.labels, batch.reset_mask, batch.source_ids):
            found.update(tensor.numpy().tobytes())
        found.update(str(batch.num_bytes).encode())
    return found.hexdigest()


def take(stream, count):
    return [stream.next_batch() for _ in range(count)]
