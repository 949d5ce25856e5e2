"""How much each source should be heard: a factor on its weight, from what it still teaches.

`target_s = clip(signal_s / mean signal, min, max)`, `factor_s <- a factor_s + (1 - a) target_s`.
The signal is made of losses on text before it is trained on: `progress` is how far a slow moving
average lies above a fast one (a source that no longer falls, be it noise or known by heart, teaches
nothing), `excess` the loss above a reference model's (what the reference cannot learn either does
not count), `raw` the loss itself, which rewards noise and is here to compare with.

Sources: Xie et al. 2023 (DoReMi), Albalak et al. 2023 (ODM), Jiang et al. 2024 (ADO).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

FAST_DECAY = 0.9  # per measurement
SLOW_DECAY = 0.98


@dataclass(slots=True)
class _Average:
    """An exponential mean without the bias of its start."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, *, decay: float) -> None:
        self.total = decay * self.total + (1.0 - decay) * value
        self.weight = decay * self.weight + (1.0 - decay)

    @property
    def mean(self) -> float:
        return self.total / self.weight


@dataclass(slots=True, kw_only=True)
class _Record:
    fast: _Average = field(default_factory=_Average)
    slow: _Average = field(default_factory=_Average)
    excess: _Average = field(default_factory=_Average)
    factor: float = 1.0
    signal: float = 0.0


@dataclass(slots=True, kw_only=True)
class SourceFactors:
    """Factors by source, of any sources that were ever observed."""

    signal: str = "progress"
    smoothing: float = 0.9
    least: float = 0.5
    most: float = 3.0
    _records: dict[int, _Record] = field(default_factory=dict)

    def observe(self, source: int, loss: float, *, reference: float | None = None) -> None:
        """A source's mean loss in nats per token, and the reference model's on the same text.

        A loss that is not finite is passed over: an average would never be rid of it.
        """
        if not math.isfinite(loss):
            return
        record = self._records.setdefault(source, _Record())
        record.fast.add(loss, decay=FAST_DECAY)
        record.slow.add(loss, decay=SLOW_DECAY)
        if reference is not None and math.isfinite(reference):
            record.excess.add(loss - reference, decay=FAST_DECAY)

    def update(self, *, shuffle: torch.Generator | None = None) -> dict[int, float]:
        """Move the factors towards their targets; `shuffle` deals the signals out wrongly."""
        sources = sorted(self._records)
        signals = [self._signal_of(self._records[source]) for source in sources]
        if shuffle is not None:
            order = torch.randperm(len(signals), generator=shuffle).tolist()
            signals = [signals[index] for index in order]
        mean = sum(signals) / max(1, len(signals))
        for source, value in zip(sources, signals, strict=True):
            # Where no source has a signal there is nothing to prefer: back towards what was asked.
            target = min(self.most, max(self.least, value / mean)) if mean > 0.0 else 1.0
            record = self._records[source]
            record.signal = value
            record.factor = self.smoothing * record.factor + (1.0 - self.smoothing) * target
        return self.factors

    @property
    def factors(self) -> dict[int, float]:
        return {source: record.factor for source, record in sorted(self._records.items())}

    @property
    def losses(self) -> dict[int, float]:
        return {source: record.fast.mean for source, record in sorted(self._records.items())}

    @property
    def signals(self) -> dict[int, float]:
        """The signals of the newest update."""
        return {source: record.signal for source, record in sorted(self._records.items())}

    def state_dict(self) -> dict[int, Any]:
        """Averages, factor and last signal by source id; plain values."""
        return {
            source: {
                "fast": (record.fast.total, record.fast.weight),
                "slow": (record.slow.total, record.slow.weight),
                "excess": (record.excess.total, record.excess.weight),
                "factor": record.factor,
                "signal": record.signal,
            }
            for source, record in self._records.items()
        }

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Replace what is known of all sources; the settings stay."""
        self._records = {
            source: _Record(
                fast=_Average(*saved["fast"]),
                slow=_Average(*saved["slow"]),
                excess=_Average(*saved["excess"]),
                factor=saved["factor"],
                signal=saved["signal"],
            )
            for source, saved in state.items()
        }

    def _signal_of(self, record: _Record) -> float:
        if self.signal == "raw":
            return record.fast.mean
        if self.signal == "excess":
            return max(0.0, record.excess.mean) if record.excess.weight else 0.0
        return max(0.0, record.slow.mean - record.fast.mean)
