"""From a configuration to a mixed stream that reads ahead: pool, stores, readers, mixture."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training.config.data_sections import StreamConfig
from training.config.sigma_config import SigmaConfig
from training.data import TokenCorpus
from training.sources.base import JSON, SOURCE_IDS
from training.sources.registry import (
    HUB_SOURCES,
    SourceSpec,
    language_codes,
    open_source,
    source_specs,
)
from training.stream.batch import closed_on_error
from training.stream.contamination import ContaminationIndex
from training.stream.mixed_stream import MixedStream
from training.stream.mixture import Mixture
from training.stream.near_duplicates import NearDuplicateWindow
from training.stream.pipeline import Check, DocumentPipeline, DuplicateWindow
from training.stream.prefetch import ReaderSettings, SourceReader
from training.stream.quality import LanguageFilter, QualityFilter
from training.stream.shards import SPOOL_FORMAT, MemoryStore, ShardStore, SpoolStore, shard_file
from training.stream.state import StreamSettings, metric_name
from training.tokenizer import Tokenizer

FIRST_OWN_ID = 100  # of sources that are not the first of their kind
BEGINNING_LASTS_S = 7 * 86400.0
MOST_WORKERS = 4  # chosen by themselves; --num-workers may be more
NETWORK_KINDS = (*HUB_SOURCES, "commoncrawl")
# Flags that decide which tokens follow; how fast and from where they come is not among them.
DECIDING = (
    "data_backend", "synthetic_data", "local_path", "pdf_path", "local_ratio", "source_list",
    "mix_strategy", "source_max_epochs", "fineweb_ratio", "fineweb_min_score", "commoncrawl_ratio",
    "commoncrawl_latest_crawls", "commoncrawl_wet_paths_per_crawl", "commoncrawl_records_per_file",
    "commoncrawl_parallel_files", "bootstrap_seed_batches", "startup_hf_only_samples",
    "stream_shuffle_buffer", "dedup_window_size", "dedup_normalize_chars", "near_dedup_window",
    "quality_filter", "languages", "language_model", "contamination_check",
)  # fmt: skip


def deciding_flags(config: SigmaConfig) -> dict[str, str]:
    """What a resumed run must share of the stream's settings, by flag; nothing when embedded."""
    if config.stream.data_backend == "embedded" and not config.stream.synthetic_data:
        return {}
    return {f"--{name.replace('_', '-')}": str(getattr(config.stream, name)) for name in DECIDING}


def open_stream(
    config: SigmaConfig,
    *,
    tokenizer: Tokenizer,
    corpus: TokenCorpus,
    spool_directory: Path,
    evaluation: ContaminationIndex | None = None,
) -> MixedStream:
    """The stream of a backend other than embedded, its sources asked once.

    evaluation: what no document may hold, None where that is not looked for. ValueError in one
    line when a source can never deliver what the flags ask for.
    """
    options, seed = config.stream, config.run.seed
    specs = source_specs(options, seed=seed)
    sources = {spec.key: open_source(spec, config=options) for spec in specs}
    workers = worker_count(options.num_workers)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenize") if workers else None
    pipelines = open_pipelines(config, specs, tokenizer=tokenizer, evaluation=evaluation)
    identities = {key: source.identity() for key, source in sources.items()}
    stores = _open_stores(
        config,
        specs,
        identities=identities,
        decided={"tokenizer": tokenizer.sha256, "evaluation": _digest(evaluation)},
        directory=spool_directory,
    )
    readers = {
        key: SourceReader(
            source,
            key=key,
            pipeline=pipelines[key],
            store=stores[key],
            settings=_reader_settings(config, workers=workers),
            window=_window_factory(options),
            pool=pool,
            threaded=workers > 0,
        )
        for key, source in sources.items()
    }
    stream = MixedStream(
        readers,
        mixture=Mixture(
            seed=seed,
            turn_tokens=config.data.seq_len,
            weights={spec.key: spec.weight for spec in specs},
            strategy=options.mix_strategy,
            ids=source_ids(specs),
        ),
        corpus=corpus,
        settings=_stream_settings(config, specs, evaluation=_digest(evaluation)),
        on_close=None if pool is None else pool.shutdown,
    )
    with closed_on_error(stream):
        stream.start(patience_s=4.0 * options.source_read_timeout_sec)
    return stream


def open_pipelines(
    config: SigmaConfig,
    specs: list[SourceSpec],
    *,
    tokenizer: Tokenizer,
    evaluation: ContaminationIndex | None,
) -> dict[str, DocumentPipeline]:
    """The checks of every source: form, language, and then text of an evaluation."""
    options = config.stream
    languages: list[Check] = []
    if options.language_model:
        languages = [LanguageFilter(language_codes(options)).check]
    return {
        spec.key: DocumentPipeline(
            tokenizer=tokenizer,
            before_window=[
                *([QualityFilter.for_source(spec.kind).check] if options.quality_filter else []),
                *languages,
            ],
            after_window=[] if evaluation is None else [evaluation.check],
            prefix_characters=options.dedup_normalize_chars,
        )
        for spec in specs
    }


def _window_factory(options: StreamConfig) -> Callable[[], DuplicateWindow] | None:
    if options.dedup_window_size == 0 and options.near_dedup_window == 0:
        return None
    return lambda: NearDuplicateWindow(
        window_size=options.dedup_window_size,
        near_window=options.near_dedup_window,
        normalize_chars=options.dedup_normalize_chars,
    )


def source_ids(specs: list[SourceSpec]) -> dict[str, int]:
    """A number per source for `Batch.source_ids`: its kind's, or an own one where two share it."""
    ids: dict[str, int] = {}
    for index, spec in enumerate(specs):
        kind = SOURCE_IDS[spec.kind]
        ids[spec.key] = kind if kind not in ids.values() else FIRST_OWN_ID + index
    return ids


def worker_count(asked: int) -> int:
    """`--num-workers`, or one less than the processors, at least 1 and at most MOST_WORKERS."""
    return asked if asked >= 0 else min(MOST_WORKERS, max(1, (os.cpu_count() or 1) - 1))


def _digest(evaluation: ContaminationIndex | None) -> str:
    return "" if evaluation is None else evaluation.digest


def chunks_in_flight(options: StreamConfig, *, workers: int) -> int:
    """Calls of the tokenizer that a source may have under way: `--prefetch-factor` a worker, and
    no more than hold `--stream-sample-prefetch` documents."""
    most = options.stream_sample_prefetch // options.stream_tokenize_batch_size
    return max(1, min(options.prefetch_factor * workers, most))


def _reader_settings(config: SigmaConfig, *, workers: int) -> ReaderSettings:
    options = config.stream
    return ReaderSettings(
        seed=config.run.seed,
        shard_documents=options.stream_shuffle_buffer,
        chunk_documents=options.stream_tokenize_batch_size,
        chunks_in_flight=chunks_in_flight(options, workers=workers),
        max_epochs=options.source_max_epochs,
    )


def _stream_settings(
    config: SigmaConfig, specs: list[SourceSpec], *, evaluation: str
) -> StreamSettings:
    options = config.stream
    hub = tuple(spec.key for spec in specs if spec.kind in HUB_SOURCES)
    has_network = any(spec.kind in NETWORK_KINDS for spec in specs)
    return StreamSettings(
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        bootstrap_batches=options.bootstrap_seed_batches if has_network else 0,
        first_sources=hub,
        first_documents=options.startup_hf_only_samples if hub else 0,
        dedup_window=options.dedup_window_size,
        read_timeout_s=options.source_read_timeout_sec,
        start_timeout_s=options.first_batch_timeout_sec,
        bootstrap_on_failure=options.on_all_sources_failed == "bootstrap",
        max_tokens={spec.key: spec.max_tokens for spec in specs},
        fingerprint={
            "source settings": {spec.key: spec.identity() for spec in specs},
            "evaluation texts": evaluation,
        },
    )


def _open_stores(
    config: SigmaConfig,
    specs: list[SourceSpec],
    *,
    identities: dict[str, dict[str, JSON]],
    decided: dict[str, JSON],
    directory: Path,
) -> dict[str, ShardStore]:
    options = config.stream
    stores: dict[str, ShardStore] = {
        spec.key: MemoryStore(documents=options.source_prefetch) for spec in specs
    }
    specs = [spec for spec in specs if spec.kind in NETWORK_KINDS]  # own files have no outage
    if options.spool_max_mb == 0 or not specs:
        return stores
    decided = decided | {
        "format": SPOOL_FORMAT,
        "seed": config.run.seed,
        "shard": options.stream_shuffle_buffer,
        "checks": [
            options.dedup_window_size,
            options.dedup_normalize_chars,
            options.near_dedup_window,
            options.quality_filter,
            options.languages,
            options.language_model,
        ],
        "epochs": options.source_max_epochs,
    }
    paths = {}
    for spec in specs:
        own = {"source": spec.identity(), "identity": identities[spec.key]}
        text = json.dumps(decided | own, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        paths[spec.key] = directory / f"{metric_name(spec.key)[:40]}-{digest}"
    limit = options.spool_max_mb << 20
    prune_spool(directory, keep=set(paths.values()), max_bytes=limit)
    for path in paths.values():
        path.mkdir(parents=True, exist_ok=True)
        _forget_old_beginning(path)
    for key, path in paths.items():
        stores[key] = SpoolStore(path, max_bytes=limit // len(specs))
    return stores


def _forget_old_beginning(path: Path) -> None:
    """A new run must not begin with last month's crawls; one that resumes is further on."""
    first = path / shard_file(0)
    with contextlib.suppress(FileNotFoundError):
        if time.time() - first.stat().st_mtime > BEGINNING_LASTS_S:
            first.unlink()


def prune_spool(directory: Path, *, keep: set[Path], max_bytes: int) -> None:
    """Delete spools of other settings, the longest unused first, until the rest fits."""
    if not directory.is_dir():
        return
    sizes = {path: _size(path) for path in directory.iterdir() if path.is_dir()}
    others = sorted((path for path in sizes if path not in keep), key=_last_use)
    for path in others:
        if sum(sizes.values()) <= max_bytes:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]


def _last_use(path: Path) -> float:
    return path.stat().st_mtime


def _size(path: Path) -> int:
    total = 0
    for file in path.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another run may be tidying up as well
            total += file.stat().st_size
    return total
