"""The dials of the mixed stream, and where it stands in each of its sources."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from training.sources.base import JSON
from training.stream.prefetch import first_snapshot


@dataclass(slots=True, kw_only=True, frozen=True)
class StreamSettings:
    """bootstrap_batches: how many come from the embedded corpus first. first_sources: the only ones
    of the first `first_documents`. read_timeout_s: wait for a source before it counts as stalled.
    start_timeout_s: wait for its first shard, and for any source before a halt. max_tokens: by
    source, after which it is used up. bootstrap_on_failure: train on the embedded corpus when no
    source delivers, instead of halting. fingerprint: what else must agree to resume."""

    batch_size: int
    seq_len: int
    rank: int = 0
    world_size: int = 1
    bootstrap_batches: int = 0
    first_sources: tuple[str, ...] = ()
    first_documents: int = 0
    dedup_window: int = 0
    read_timeout_s: float = 2.5
    start_timeout_s: float = 240.0
    bootstrap_on_failure: bool = False
    max_tokens: dict[str, int] = field(default_factory=dict)
    fingerprint: dict[str, JSON] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class SourceCursor:
    """Where the stream stands in one source, and what it has had from it."""

    number: int = 0  # of the shard that is being read
    record: int = 0  # of the next document in it
    start: dict[str, JSON] = field(default_factory=first_snapshot)
    stalled: bool = False
    ended: str = ""  # why it gives nothing more
    documents: int = 0  # handed out whole
    epoch_documents: int = 0  # of them, in the present epoch
    documents_read: int = 0  # of the shards that are done, left out ones included
    tokens: int = 0
    timeouts: int = 0  # times it had nothing when its turn came
    fallbacks: int = 0  # turns that another source took
    duplicates: int = 0  # documents that another place of the stream had lately
    rejected: Counter[str] = field(default_factory=Counter)

    def state_dict(self) -> dict[str, JSON]:
        names = [name for name in self.__slots__ if name != "rejected"]
        return {name: getattr(self, name) for name in names} | {"rejected": dict(self.rejected)}

    @classmethod
    def from_state(cls, state: dict[str, JSON]) -> SourceCursor:
        """The cursor that `state_dict` wrote; TypeError where a field is missing or unknown."""
        return cls(**{**state, "rejected": Counter(state["rejected"])})


def metric_name(key: str) -> str:
    """A source's key as part of a metric's name."""
    return "".join(char if char.isalnum() else "_" for char in key.lower()).strip("_")
