"""Runs over own files resumed to the bit; the network off; mistakes refused early."""

import json
from pathlib import Path

import pytest

import train_sigma
from tests.integration.runs import (
    differences,
    metrics_rows,
    stop_after,
    tiny_flags,
    train,
)
from training.features import FEATURES
from training.sources.base import SourceError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    for number in range(90):
        lines = [f"File {number} has a line {line} of its own kind." for line in range(12)]
        (path / f"{number:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return path


def flags(folder, directory, *more):
    return tiny_flags(
        directory, "--data-backend", "local", "--local-path", str(folder), "--steps", "16",
        "--near-dedup-window", "0", "--source-read-timeout-sec", "60",
        "--stream-shuffle-buffer", "16", "--eval-interval", "0", "--bootstrap-seed-batches", "0",
        *more,
    )  # fmt: skip


def test_stopped_runs_with_other_workers_and_another_spool_end_at_the_same_bits(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("training.stream.open_stream.NETWORK_KINDS", ("local",))
    monkeypatch.setattr("training.build.SPOOL", tmp_path / "spool-1")
    train(flags(folder, tmp_path / "whole", "--num-workers", "0"))
    for step, workers, spool in ((3, "2", "64"), (4, "0", "0"), (11, "1", "64"), (16, "4", "64")):
        monkeypatch.setattr("training.build.SPOOL", tmp_path / f"spool-{step}")
        arguments = flags(
            folder, tmp_path / "parts", "--num-workers", workers, "--spool-max-mb", spool
        )
        train(arguments, features=(*FEATURES, stop_after(step, tmp_path / "parts")))
    found = differences(tmp_path / "whole", tmp_path / "parts")
    rows = [metrics_rows(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    # Rows differ in how full the queues were, and in nothing else of the run.
    assert [name for name in found if not name.startswith("row ")] == []


def test_with_the_network_off_a_hybrid_run_trains_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.build.SPOOL", tmp_path / "spool")
    monkeypatch.setattr(
        "training.stream.open_stream.open_source", lambda spec, config: Unreachable(spec)
    )
    arguments = tiny_flags(
        tmp_path / "run", "--data-backend", "hybrid", "--on-all-sources-failed", "bootstrap",
        "--steps", "6", "--bootstrap-seed-batches", "0", "--source-read-timeout-sec", "0.2",
    )  # fmt: skip
    train(arguments)
    last = metrics_rows(tmp_path / "run")[-1]
    assert last["data_source_fraction_bootstrap"] == 1.0
    assert last["bootstrap_batches_used"] == 12 and last["data_timeouts"] == 3
    assert "training on the embedded text" in capsys.readouterr().out


class Unreachable:
    """A source that never answers."""

    def __init__(self, spec):
        self.name, self.rejected = spec.kind, {}

    def identity(self):
        return {"name": self.name}

    def next_document(self):
        raise SourceError(f"{self.name}: unreachable", reason="unreachable", transient=True)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def rewind(self, *, epoch):
        pass

    def close(self):
        pass


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data-backend", "local"], "nothing to read"),
        (["--data-backend", "local", "--local-path", "no-such-folder"], "no-such-folder"),
        (["--local-path", "somewhere"], "no effect with --data-backend embedded"),
    ],
)
def test_mistakes_end_before_anything_is_written(tmp_path, capsys, more, message):
    directory = tmp_path / "run"
    assert train_sigma.main(tiny_flags(directory, *more)) == 2
    assert message in capsys.readouterr().err
    assert not (directory / "metrics.jsonl").exists()
    assert not list(Path(directory).glob("checkpoints/checkpoint_step_*"))


def test_a_checkpoint_of_other_stream_settings_is_refused_by_flag(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("training.build.SPOOL", tmp_path / "spool")
    train(flags(folder, tmp_path / "run", "--steps", "2"))
    with pytest.raises(Exception, match="--stream-shuffle-buffer"):
        train(flags(folder, tmp_path / "run", "--stream-shuffle-buffer", "17"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["stream"]["data_backend"] == "local"
