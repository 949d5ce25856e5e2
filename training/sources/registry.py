"""Which sources a configuration asks for, with which weights, and how each is opened.

`source_specs` is the one place that knows what a backend consists of; `open_source` the one that
knows the classes. Their libraries are imported only when such a source is opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from training.config.data_sections import StreamConfig
from training.config.fields import ConfigError
from training.sources.base import JSON, DocumentSource

FINEWEB = ("HuggingFaceFW/fineweb-edu", "sample-10BT")
COSMOPEDIA = ("HuggingFaceTB/cosmopedia", "web_samples_v2")
HUB_SOURCES = ("fineweb", "cosmopedia", "hf")
HTTP_TIMEOUT_S = 10.0
LIST_KEYS = {
    "hf": {"dataset", "config", "split", "text_field", "fields", "format", "min_score",
           "score_field", "revision"},
    "local": {"path", "text_field"},
    "pdf": {"path"},
}  # fmt: skip
COMMON_KEYS = {"type", "name", "weight", "max_tokens"}


@dataclass(slots=True, kw_only=True, frozen=True)
class SourceSpec:
    """key: the source's name in the mixture and in metrics. kind: a key of SOURCE_IDS.
    options: what `open_source` needs. max_tokens: after which it is used up; 0 = never."""

    key: str
    kind: str
    weight: float
    options: dict[str, JSON] = field(default_factory=dict)
    max_tokens: int = 0

    def identity(self) -> str:
        """A hash of what decides the source's documents, without its weight."""
        own = asdict(self) | {"weight": 0, "max_tokens": 0}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def source_specs(config: StreamConfig, *, seed: int) -> list[SourceSpec]:
    """The sources of a run in the order of their fallback; none for the embedded text.

    ConfigError, in one line, when a backend has nothing to read or a flag has no effect in it.
    """
    own = _own_files(config)
    listed = _listed(config.source_list) if config.source_list else []
    backend = config.data_backend
    if config.synthetic_data:
        if own or listed:
            raise ConfigError(
                f"{_own_flag(config)} has no effect with --synthetic-data; leave one of them out"
            )
        return [SourceSpec(key="synthetic", kind="synthetic", weight=1.0, options={"seed": seed})]
    if (own or listed) and backend == "embedded":
        name = _own_flag(config)
        raise ConfigError(f"{name} has no effect with --data-backend embedded; use local or hybrid")
    if own and backend in ("hf", "commoncrawl"):
        raise ConfigError(
            f"--local-path and --pdf-path are read by --data-backend local or hybrid, not {backend}"
        )
    hub, web = _hub(config, seed=seed), _commoncrawl(config, seed=seed)
    local_share = config.local_ratio if own else 0.0
    web_share = (1.0 - local_share) * config.commoncrawl_ratio
    parts = {
        "embedded": [],
        "local": own,
        "hf": hub,
        "commoncrawl": web,
        "hybrid": [
            *_scaled(hub, 1.0 - local_share - web_share),
            *_scaled(web, web_share),
            *_scaled(own, local_share),
        ],
    }[backend]
    specs = [spec for spec in parts if spec.weight > 0.0] + listed
    if backend != "embedded" and not specs:
        raise ConfigError(
            f"--data-backend {backend} has nothing to read: give --local-path, --pdf-path or "
            "--source-list"
        )
    keys = [spec.key for spec in specs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ConfigError(f"--source-list: the name {min(twice)!r} is given twice")
    return specs


def _own_flag(config: StreamConfig) -> str:
    """The first flag that names own material."""
    if config.source_list:
        return "--source-list"
    return "--local-path" if config.local_path else "--pdf-path"


def open_source(spec: SourceSpec, *, config: StreamConfig) -> DocumentSource:
    """The source itself; ValueError in one line for a mistake of the user."""
    options = dict(spec.options)
    if spec.kind == "synthetic":
        from training.sources.synthetic import SyntheticSource

        return SyntheticSource(**options)
    if spec.kind == "commoncrawl":
        from training.sources.commoncrawl import HOSTS, CommonCrawlSource
        from training.sources.connection import allow_hosts
        from training.sources.net import HttpClient

        client = HttpClient(read_timeout_s=HTTP_TIMEOUT_S, allow=allow_hosts(*HOSTS))
        options["languages"] = tuple(options["languages"])
        return CommonCrawlSource(client=client, **options)
    if spec.kind in HUB_SOURCES:
        from training.sources.hub import HubSource

        if isinstance(options.get("text_field"), list):
            options["text_field"] = tuple(options["text_field"])
        return HubSource(name=spec.kind, token=hub_token(config), **options)
    paths = tuple(Path(path) for path in options.pop("paths"))
    if spec.kind == "pdf":
        from training.sources.pdf import PdfSource

        return PdfSource(paths, **options)
    from training.sources.local import LocalSource

    return LocalSource(paths, **options)


def hub_token(config: StreamConfig) -> str | None:
    """`--hf-token`, else what the named environment variable holds, else None."""
    return config.hf_token or os.environ.get(config.hf_token_env_var) or None


def language_codes(config: StreamConfig) -> tuple[str, ...]:
    """`--languages` one by one."""
    return tuple(code.strip() for code in config.languages.split(",") if code.strip())


def _hub(config: StreamConfig, *, seed: int) -> list[SourceSpec]:
    fineweb, cosmopedia = FINEWEB, COSMOPEDIA
    return [
        SourceSpec(
            key="fineweb",
            kind="fineweb",
            weight=config.fineweb_ratio,
            options={
                "dataset": fineweb[0],
                "config": fineweb[1],
                "min_score": config.fineweb_min_score,
                "score_field": "score",
                "shuffle_seed": seed,
            },
        ),
        SourceSpec(
            key="cosmopedia",
            kind="cosmopedia",
            weight=1.0 - config.fineweb_ratio,
            options={"dataset": cosmopedia[0], "config": cosmopedia[1], "shuffle_seed": seed},
        ),
    ]


def _commoncrawl(config: StreamConfig, *, seed: int) -> list[SourceSpec]:
    options = {
        "crawls": config.commoncrawl_latest_crawls,
        "wet_paths_per_crawl": config.commoncrawl_wet_paths_per_crawl,
        "records_per_file": config.commoncrawl_records_per_file,
        "parallel_files": config.commoncrawl_parallel_files,
        "languages": list(language_codes(config)),
        "seed": seed,
    }
    return [SourceSpec(key="commoncrawl", kind="commoncrawl", weight=1.0, options=options)]


def _own_files(config: StreamConfig) -> list[SourceSpec]:
    specs = []
    for kind, text in (("local", config.local_path), ("pdf", config.pdf_path)):
        paths = [part.strip() for part in text.split(";") if part.strip()]
        if paths:
            specs.append(SourceSpec(key=kind, kind=kind, weight=1.0, options={"paths": paths}))
    return specs


def _scaled(specs: list[SourceSpec], share: float) -> list[SourceSpec]:
    """The same specs with weights that add up to `share`."""
    total = sum(spec.weight for spec in specs) or 1.0
    return [
        SourceSpec(
            key=spec.key,
            kind=spec.kind,
            weight=max(0.0, share) * spec.weight / total,
            options=spec.options,
            max_tokens=spec.max_tokens,
        )
        for spec in specs
    ]


def _listed(name: str) -> list[SourceSpec]:
    """The entries of a `--source-list` file."""
    try:
        entries = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--source-list {name}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"--source-list {name}: no valid JSON ({error})") from None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"--source-list {name} must hold a list of objects, one per source")
    return [_entry(entry, where=f"--source-list {name}, entry {i}") for i, entry in
            enumerate(entries, start=1)]  # fmt: skip


def _entry(entry: dict[str, JSON], *, where: str) -> SourceSpec:
    kind = "local" if entry.get("type") == "text" else entry.get("type")
    if kind not in LIST_KEYS:
        raise ConfigError(
            f"{where}: type must be hf, local, text or pdf, not {entry.get('type')!r}"
        )
    if unknown := sorted(set(entry) - LIST_KEYS[kind] - COMMON_KEYS):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r} for type {entry['type']}")
    needed = "dataset" if kind == "hf" else "path"
    if not isinstance(entry.get(needed), str) or not entry[needed]:
        raise ConfigError(f"{where}: needs {needed!r}")
    weight, max_tokens = entry.get("weight", 1.0), entry.get("max_tokens", 0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ConfigError(f"{where}: weight must be a number above 0, not {weight!r}")
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
        raise ConfigError(f"{where}: max_tokens must be a whole number, not {max_tokens!r}")
    options = {key: value for key, value in entry.items() if key not in COMMON_KEYS}
    if "fields" in options:
        options["text_field"] = options.pop("fields")
    if "format" in options:
        options["template"] = options.pop("format")
    if "path" in options:
        options["paths"] = [options.pop("path")]
    key = entry.get("name") or entry[needed]
    return SourceSpec(
        key=str(key), kind=kind, weight=float(weight), options=options, max_tokens=max_tokens
    )
