"""What the mixed stream says of its sources: a metrics row, and a report by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from training.sources.base import JSON
from training.stream.prefetch import SourceReader
from training.stream.shards import Shard
from training.stream.state import SourceCursor, metric_name

DUPLICATE_REASONS = ("exact_duplicate", "near_duplicate")


def stream_metrics(
    cursors: Mapping[str, SourceCursor],
    readers: Mapping[str, SourceReader],
    *,
    served: Mapping[str, int],
) -> dict[str, float]:
    """Columns `data_*`, the same ones in every row of a run."""
    total = max(1, sum(served.values()))
    row: dict[str, float] = {}
    for key, count in served.items():
        row[f"data_source_fraction_{metric_name(key)}"] = count / total
    for key, cursor in cursors.items():
        row[f"data_source_stalled_{metric_name(key)}"] = int(cursor.stalled)
    known = cursors.values()
    return {
        **row,
        "data_dedup_dropped": sum(
            cursor.duplicates + sum(cursor.rejected[reason] for reason in DUPLICATE_REASONS)
            for cursor in known
        ),
        "data_contaminated": sum(cursor.rejected["contaminated"] for cursor in known),
        "data_rejected": sum(cursor.rejected.total() for cursor in known),
        "data_timeouts": sum(cursor.timeouts for cursor in known),
        "data_fallbacks": sum(cursor.fallbacks for cursor in known),
        "data_breaker_trips": sum(reader.breaker.trips for reader in readers.values()),
        "data_queue_depth": sum(reader.store.depth() for reader in readers.values()),
    }


def source_report(
    cursors: Mapping[str, SourceCursor], shards: Mapping[str, Shard]
) -> dict[str, dict[str, JSON]]:
    """Documents read and left out by reason, per source; `shards` are those in hand."""
    report: dict[str, dict[str, JSON]] = {}
    for key, cursor in cursors.items():
        rejected, read = Counter(cursor.rejected), cursor.documents_read
        if (shard := shards.get(key)) is not None:
            rejected.update(shard.rejected)
            read += shard.num_read
        rejected["repeated"] += cursor.duplicates
        report[key] = {
            "documents_read": read,
            "rejected": dict((+rejected).most_common()),
            "stalled": cursor.stalled,
            "ended": cursor.ended,
        }
    return report
