"""Tiles tried beside training: values untouched, the chosen one survives resumes, one cache."""

import math

import pytest

from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from training.build import build_trainer
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.features import FEATURES
from training.scan_trials import ScanTrials, scan_mixers
from training.tile_cache import TileCache

RUN = ("--steps", "12", "--no-curriculum-enabled", "--eval-interval", "0")
ON = (*RUN, "--fractal-interval-steps", "4")
LATENCY = {(16,): 100.0, (32,): 50.0}  # microseconds


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A cache folder of its own, and a machine whose latencies are known."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache" / "triton"))
    monkeypatch.setattr(ScanTrials, "latency", lambda self, arm: LATENCY[arm])


def chunk_lengths(directory) -> set[float]:
    return {row["mamba_chunk_len"] for row in metrics_rows(directory)[1:]}


def forget(tmp_path) -> None:
    (tmp_path / "cache" / "fractal_tiles.json").unlink()


def test_the_first_run_is_the_run_without_it_and_the_next_takes_the_faster_tile(tmp_path):
    train(tiny_flags(tmp_path / "off", *RUN))
    train(tiny_flags(tmp_path / "first", *ON))
    found = differences(tmp_path / "off", tmp_path / "first")
    assert [name for name in found if not name.startswith(("row", "features"))] == []
    assert chunk_lengths(tmp_path / "first") == {16.0}
    train(tiny_flags(tmp_path / "second", *ON))
    assert chunk_lengths(tmp_path / "second") == {32.0}
    rows = metrics_rows(tmp_path / "second")
    losses = [
        [row["train_loss"] for row in metrics_rows(tmp_path / name)[1:]]
        for name in ("off", "second")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert rows[-1]["fractal_best_latency_us"] == 50.0


def test_trials_are_made_at_their_interval_and_counted(tmp_path):
    train(tiny_flags(tmp_path / "run", *ON))
    rows = metrics_rows(tmp_path / "run")
    tried = [row for row in rows if row.get("fractal_arm_id") is not None]
    assert {row["step"]: row["fractal_arm_id"] for row in tried} == {4: 1, 8: 1, 12: 1}
    assert [row["fractal_trials"] for row in tried] == [2, 3, 4]
    assert rows[-1]["feature_fractal_nas_effective_calls"] == 4  # one at the start
    assert rows[-1]["fractal_rejected_arms"] == 0
    assert {row["step"] for row in rows[1:] if row["phase_fractal_s"] > 0.0} == {4, 8, 12}
    assert 0.0 < rows[-1]["fractal_reward"] <= 1.0


def test_a_resumed_run_keeps_its_tile_whatever_the_cache_says_by_then(tmp_path):
    train(tiny_flags(tmp_path / "learn", *ON))
    train(tiny_flags(tmp_path / "whole", *ON))
    forget(tmp_path)
    train(tiny_flags(tmp_path / "learn again", *ON))
    directory = tmp_path / "stopped"
    train(tiny_flags(directory, *ON), features=(*FEATURES, stop_after(5, directory)))
    forget(tmp_path)
    train(tiny_flags(directory, *ON))
    assert chunk_lengths(directory) == {32.0}
    assert differences(tmp_path / "whole", directory) == []


def test_a_tile_that_computes_something_else_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(ScanTrials, "error", lambda self, arm: 1.0 if arm == (32,) else 0.0)
    train(tiny_flags(tmp_path / "run", *ON))
    rows = metrics_rows(tmp_path / "run")
    assert rows[-1]["fractal_rejected_arms"] == 1
    trials, calls = rows[-1]["fractal_trials"], rows[-1]["feature_fractal_nas_effective_calls"]
    assert calls == 3  # of four tries, the one at the start among them
    assert trials == calls
    train(tiny_flags(tmp_path / "next", *ON))
    assert chunk_lengths(tmp_path / "next") == {16.0}


def test_a_trial_without_memory_ends_nothing_and_counts_nothing(tmp_path, monkeypatch):
    def refuse(self, arm):
        raise MemoryError

    monkeypatch.setattr(ScanTrials, "latency", refuse)
    train(tiny_flags(tmp_path / "run", *ON))
    last = metrics_rows(tmp_path / "run")[-1]
    assert last["step"] == 12 and last["feature_fractal_nas_effective_calls"] == 0


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1, "entries": 3}', '{"format": 9}'])
def test_a_damaged_cache_counts_as_empty(content, tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(content, encoding="utf-8")
    cache = TileCache(path)
    assert cache.read("key") is None
    cache.write("key", {"latencies": []})
    assert TileCache(path).read("key") == {"latencies": []}
    cache.write("other", {})
    assert cache.read("key") is not None
    assert TileCache(None).read("key") is None


def test_an_entry_that_is_no_state_is_measured_anew(tmp_path, caplog):
    flags = tiny_flags(tmp_path / "run", *ON)
    trainer = build_trainer(parse_args(flags))
    mixer = scan_mixers(trainer.model)[0]
    key = ScanTrials(mixer, rows=2, length=32, in_bf16=False).key
    trainer.stream.close()
    TileCache.beside_kernels().write(key, {"latencies": 3})
    train(flags)
    assert "measured anew" in caplog.text
    assert math.isclose(metrics_rows(tmp_path / "run")[-1]["fractal_best_latency_us"], 50.0)


def test_a_fixed_tile_and_a_search_for_it_exclude_each_other():
    with pytest.raises(ConfigError, match="--mamba-block-t fixes"):
        parse_args(["--kernel-backend=triton", "--mamba-block-t=32", "--fractal-interval-steps=50"])
