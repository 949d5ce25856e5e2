"""A run's files are read as they are found, finished or not, and curves keep their extremes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.report.record import bin_means, downsample, read_run


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_columns_hold_numbers_and_nan_for_everything_else(tmp_path):
    rows = [
        {"step": 0, "parameters_total": 10},
        {"step": 10, "a": 1.5, "b": None},
        {"step": 20, "a": "text", "b": True},
        {"step": 30, "a": 2, "b": 4.0},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    record = read_run(tmp_path, columns=("a", "b"))
    assert record.steps.tolist() == [0, 10, 20, 30]
    steps, values = record.points("a")
    assert (steps.tolist(), values.tolist()) == ([10, 30], [1.5, 2])
    assert record.points("b")[0].tolist() == [30]
    assert record.known == {"step": 30, "parameters_total": 10, "a": 2, "b": 4.0}
    assert record.samples == [] and record.config == {}


def test_torn_tail_foreign_lines_and_repeated_steps(tmp_path):
    whole = [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}, {"step": 2, "a": 3.0}]
    content = b"".join(json.dumps(row).encode() + b"\n" for row in whole)
    content = b"[1]\n" + content + b'{"note": "no step"}\n\x00\x00\n\xff\xfe\n{"step": 3, "a": 4'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "config.json").write_text("{half", encoding="utf-8")
    write_lines(
        tmp_path / "samples.jsonl",
        [{"step": 2, "text": "old"}, {"step": 1, "text": "b"}, {"step": 2, "text": "new"}],
    )
    record = read_run(tmp_path, columns=("a",))
    assert record.steps.tolist() == [1, 2] and record.columns["a"].tolist() == [1.0, 3.0]
    assert [(sample.step, sample.text) for sample in record.samples] == [(1, "b"), (2, "new")]
    assert record.config == {}


def test_every_cut_of_the_file_can_be_read(tmp_path):
    rows = [{"step": step, "a": step / 7} for step in range(4)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / "metrics.jsonl"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        record = read_run(tmp_path, columns=("a",))
        assert len(record.steps) in (content[:size].count(b"\n"), content[:size].count(b"\n") + 1)


def test_a_directory_without_a_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"--output-dir .* holds no metrics"):
        read_run(tmp_path, columns=())


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400),
    bins=st.integers(1, 40),
)
def test_downsampling_keeps_ends_extremes_and_order(values, bins):
    steps, levels = np.arange(len(values), dtype=float), np.array(values)
    kept_steps, kept = downsample(steps, levels, bins=bins)
    assert len(kept) <= 2 * bins + 2
    assert (np.diff(kept_steps) > 0).all()
    assert np.array_equal(levels[kept_steps.astype(int)], kept)
    assert kept_steps[0] == 0 and kept_steps[-1] == len(values) - 1
    assert kept.min() == levels.min() and kept.max() == levels.max()


def test_a_single_spike_survives_downsampling():
    values = np.zeros(20_000)
    values[12_345] = 9.0
    steps, kept = downsample(np.arange(20_000.0), values, bins=100)
    assert steps[kept.argmax()] == 12_345 and kept.max() == 9.0


def test_bin_means_keep_the_total():
    generator = np.random.default_rng(1)
    values = generator.random((3, 1200))
    centres, means = bin_means(np.arange(1200.0), values, bins=60)
    assert means.shape == (3, 60) and len(centres) == 60
    assert means.mean(axis=1) == pytest.approx(values.mean(axis=1))
    short = bin_means(np.arange(3.0), np.array([[1.0, np.nan, 3.0]]), bins=60)
    assert short[1].tolist() == [[1.0, 0.0, 3.0]]
