"""A run's records as columns: metrics.jsonl, samples.jsonl and config.json, read leniently.

The report must be buildable while the run goes on and after it died, so an unfinished last line is
no error. Only the columns that are drawn are kept: rows have a hundred fields, runs 20,000 rows.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_NUMBERS = (int, float)  # not their subclass bool; strict JSON has no infinities


@dataclass(slots=True, kw_only=True)
class Sample:
    """Text the model wrote at a step."""

    step: int
    text: str


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """steps (n,) increasing; columns: name -> (n,), NaN where a row had no number.

    known: every field ever seen with its newest value, without those that are null there.
    """

    steps: Floats
    columns: dict[str, Floats]
    known: dict[str, Any]
    samples: list[Sample]
    config: dict[str, Any]

    def points(self, name: str) -> tuple[Floats, Floats]:
        """Steps and values of a column where it has a value."""
        values = self.columns[name]
        present = np.isfinite(values)
        return self.steps[present], values[present]


def read_run(output_dir: Path, *, columns: Collection[str]) -> RunRecord:
    """Read what a run wrote into `output_dir`. Missing samples or settings are empty ones.

    ValueError when there is no metrics.jsonl.
    """
    path = output_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"--output-dir {output_dir} holds no metrics.jsonl; name the directory of a run"
        )
    steps = array("d")
    values = {name: array("d") for name in columns}
    known: dict[str, Any] = {}
    for row in _read_lines(path):
        step = _number(row.get("step"))
        if math.isnan(step):
            continue
        steps.append(step)
        for name, column in values.items():
            column.append(_number(row.get(name)))
        known.update(row)
    order = _newest_of_each(np.array(steps))
    return RunRecord(
        steps=np.array(steps)[order],
        columns={name: np.array(column)[order] for name, column in values.items()},
        known={name: value for name, value in known.items() if value is not None},
        samples=_read_samples(output_dir / "samples.jsonl"),
        config=read_settings(output_dir),
    )


def downsample(steps: Floats, values: Floats, *, bins: int) -> tuple[Floats, Floats]:
    """At most 2 bins + 2 points of a curve that keep both ends and the extremes of every bin."""
    count = len(values)
    if count <= 2 * bins + 2:
        return steps, values
    edges = np.linspace(0, count, bins + 1).astype(int)
    kept = {0, count - 1}
    for first, stop in pairwise(edges):
        part = values[first:stop]
        kept.update((first + int(part.argmin()), first + int(part.argmax())))
    order = np.array(sorted(kept))
    return steps[order], values[order]


def bin_means(steps: Floats, values: Floats, *, bins: int) -> tuple[Floats, Floats]:
    """Means over at most `bins` equal parts, for what is summed on top of each other.

    values (k, n) -> (k, bins); NaN counts as 0.
    """
    filled = np.nan_to_num(values)
    count = len(steps)
    if count <= bins:
        return steps, filled
    edges = np.linspace(0, count, bins + 1).astype(int)
    widths = np.diff(edges)
    means = np.add.reduceat(filled, edges[:-1], axis=1) / widths
    centres = np.add.reduceat(steps, edges[:-1]) / widths
    return centres, means


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def _read_samples(path: Path) -> list[Sample]:
    found: dict[int, Sample] = {}
    for row in _read_lines(path):
        step, text = row.get("step"), row.get("text")
        if isinstance(step, int) and isinstance(text, str):
            found[step] = Sample(step=step, text=text)
    return [found[step] for step in sorted(found)]


def read_settings(output_dir: Path) -> dict[str, Any]:
    """Settings of the run in a directory, section by section; {} where there are none."""
    path = output_dir / "config.json"
    if not path.is_file():
        return {}
    try:
        content = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _newest_of_each(steps: Floats) -> NDArray[np.intp]:
    """Indices that sort `steps`, with the last row of each step only."""
    if len(steps) == 0:
        return np.zeros(0, dtype=np.intp)
    order = np.argsort(steps, kind="stable")
    ordered = steps[order]
    last = np.append(ordered[1:] != ordered[:-1], True)
    return order[last]


def _number(value: Any) -> float:
    """A JSON number as it is, NaN for everything else."""
    return value if type(value) in _NUMBERS else math.nan
