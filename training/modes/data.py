"""`--mode data`: what a run would read: decoded batches, shares, speed, and what was left out.

Reads the stream as training would and writes nothing but the spool. The speed is that of the
stream alone, from the first batch on.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import torch

from training.build_data import build_corpus, build_stream, build_tokenizer
from training.config.sigma_config import SigmaConfig
from training.sources.base import SOURCE_IDS
from training.stream.batch import Batch, BatchStream
from training.stream.mixed_stream import MixedStream
from training.tokenizer import Tokenizer

SHOWN_CHARACTERS = 160
ROWS_SHOWN = 2  # per batch


def run(config: SigmaConfig) -> int:
    """Read `--preview-batches` batches and print what is in them."""
    tokenizer = build_tokenizer(config)
    stream = build_stream(config, tokenizer, build_corpus(config, tokenizer))
    try:
        report = preview(stream, tokenizer, batches=config.stream.preview_batches)
    finally:
        stream.close()
    print(json.dumps(report, ensure_ascii=False) if config.run.json else _sentences(report))
    return 0


def preview(stream: BatchStream, tokenizer: Tokenizer, *, batches: int) -> dict[str, Any]:
    """Excerpts, tokens per kind of source, tokens/s, what sources left out, and messages."""
    start = time.perf_counter()
    read = [stream.next_batch() for _ in range(batches)]
    seconds = max(1e-9, time.perf_counter() - start)
    tokens = sum(batch.input_ids.numel() for batch in read)
    names = {number: name for name, number in SOURCE_IDS.items()}
    if stream.mixture is not None:
        names |= {number: key for key, number in stream.mixture.ids.items()}
    counts = Counter(
        {
            names[int(number)]: int(sum((batch.source_ids == number).sum() for batch in read))
            for number in torch.cat([batch.source_ids.unique() for batch in read]).unique()
        }
    )
    report: dict[str, Any] = {
        "excerpts": [entry for batch in read for entry in _excerpts(batch, tokenizer, names)],
        "tokens": tokens,
        "bytes": sum(batch.num_bytes for batch in read),
        "documents": int(sum(batch.reset_mask.sum() for batch in read)),
        "tokens_per_s": tokens / seconds,
        "share": {name: count / tokens for name, count in counts.most_common()},
        "messages": stream.take_messages(),
    }
    if isinstance(stream, MixedStream):
        report["sources"] = stream.source_report()
    return report


def _excerpts(batch: Batch, tokenizer: Tokenizer, names: dict[int, str]) -> list[dict[str, str]]:
    entries = []
    for row in range(min(ROWS_SHOWN, batch.input_ids.size(0))):
        text = tokenizer.decode(batch.input_ids[row].tolist())
        source = names[int(batch.source_ids[row, 0])]
        entries.append({"source": source, "text": text[:SHOWN_CHARACTERS]})
    return entries


def _sentences(report: dict[str, Any]) -> str:
    lines = [
        f"[{entry['source']}] {' '.join(entry['text'].split())}" for entry in report["excerpts"]
    ]
    lines.append(
        f"{report['tokens']:,} tokens ({report['bytes']:,} bytes) of {report['documents']:,} "
        f"documents, {report['tokens_per_s']:,.0f} tokens/s"
    )
    lines += [f"share {share:6.1%}  {name}" for name, share in report["share"].items()]
    for key, source in report.get("sources", {}).items():
        left_out = ", ".join(f"{reason} {count}" for reason, count in source["rejected"].items())
        working = "delivers" if source["documents_read"] else "has had no turn yet"
        state = source["ended"] or ("stalled" if source["stalled"] else working)
        lines.append(
            f"source {key}: {state}; {source['documents_read']:,} documents read, left out: "
            f"{left_out or 'none'}"
        )
    return "\n".join([*lines, *report["messages"]])
