"""How a start that cannot be, and a run that fails, end: exit code, one line, report, locks."""

import errno
import json
import os
from pathlib import Path

import pytest

import train_sigma
from tests.training.small_run import small_flags
from training.features.ema import EmaFeature
from training.runtime.locks import CHECKPOINT_LOCK_NAME, RunLock
from training.runtime.metrics import MetricsLog

ONE_STEP = ("--steps", "1", "--ema-enabled")


def listing(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


def reports_in(directory: Path) -> list[dict]:
    found = sorted((directory / "errors").glob("crash_step_*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


@pytest.fixture
def trained(tmp_path):
    """The flags of a run of one step, with its checkpoint."""
    flags = small_flags(tmp_path / "run", *ONE_STEP)
    assert train_sigma.main(flags) == 0
    return flags


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seq-len", "8"], "--seq-len was 16, is now 8."),
        (["--d-model", "32"], "--d-model was 16, is now 32."),
    ],
)
def test_other_settings_than_the_checkpoints_are_named(trained, tmp_path, capsys, more, says):
    before = listing(tmp_path)
    capsys.readouterr()
    assert train_sigma.main([*trained, *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ") and says in said
    assert "another --checkpoint-dir, or --no-resume" in said
    assert listing(tmp_path) == before
    assert train_sigma.main([*trained, *more, "--no-resume"]) == 0


@pytest.mark.parametrize("more", [("--lr", "0.5"), ("--steps", "1", "--log-interval", "7")])
def test_a_finished_run_started_again_keeps_its_record(tmp_path, capsys, more):
    """No step is left that other settings could be tried on."""
    flags = small_flags(tmp_path / "run", *ONE_STEP, "--steps", "2")
    assert train_sigma.main(flags) == 0
    kept = [tmp_path / "run" / name for name in ("config.json", "resolved_args.txt")]
    before = [path.read_bytes() for path in kept]
    capsys.readouterr()
    assert train_sigma.main([*flags, *more]) == 0
    assert "; a larger --steps trains on" in "".join(capsys.readouterr())
    assert [path.read_bytes() for path in kept] == before
    assert train_sigma.main([*flags, *more, "--steps", "3"]) == 0
    assert [path.read_bytes() for path in kept] != before


@pytest.mark.parametrize("more", [(), ("--no-resume",), ("--fractal-arch-search", "--ema-enabled")])
def test_a_checkpoint_directory_of_another_run_is_refused(tmp_path, monkeypatch, capsys, more):
    """Before anything is built, and, should both begin at once, before anything is trained."""
    ours, theirs = tmp_path / "ours", tmp_path / "checkpoints"
    flags = [*small_flags(ours, "--optimizer", "muon", *more), "--checkpoint-dir", str(theirs)]
    held = theirs / ("fractal_search" if "--fractal-arch-search" in more else "")
    with RunLock(held, name=CHECKPOINT_LOCK_NAME):
        for late in (False, True):
            if late:
                monkeypatch.setattr(RunLock, "check_free", lambda self: None)
            assert train_sigma.main(flags) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and f"{held} is in use by process {os.getpid()}" in said
            assert said.endswith("stop that run first or choose another --checkpoint-dir\n")
            assert ours.exists() == late and not (ours / "metrics.jsonl").exists()
    assert not (ours / "errors").exists()


def failing(error):
    def close(self):
        raise error

    return close


def test_a_log_that_cannot_be_closed_fails_a_finished_run(tmp_path, monkeypatch, capsys):
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "close", failing(error))
        assert train_sigma.main(small_flags(tmp_path / "run", *ONE_STEP)) == 1
    [report] = reports_in(tmp_path / "run")
    assert os.strerror(errno.EIO) in report["error"]["message"] and report["step"] == 1
    assert "details in" in capsys.readouterr().err
    assert train_sigma.main(small_flags(tmp_path / "run", *ONE_STEP)) == 0  # locks are free


def test_a_feature_that_cannot_be_closed_does_not_keep_the_rest_open(tmp_path, monkeypatch):
    closed, close = [], MetricsLog.close
    monkeypatch.setattr(EmaFeature, "close", failing(RuntimeError("no end")))
    monkeypatch.setattr(MetricsLog, "close", lambda self: (closed.append(self), close(self)))
    assert train_sigma.main(small_flags(tmp_path / "run", *ONE_STEP)) == 1
    assert len(closed) == 2  # rows and samples
    assert "no end" in reports_in(tmp_path / "run")[0]["error"]["message"]
    monkeypatch.undo()
    assert train_sigma.main(small_flags(tmp_path / "run", *ONE_STEP)) == 0


def test_what_fails_at_the_end_does_not_hide_what_ended_the_run(
    tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.setattr(EmaFeature, "after_step", lambda self, ctx: {}["first"])
    monkeypatch.setattr(EmaFeature, "close", failing(ValueError("second")))
    assert train_sigma.main(small_flags(tmp_path / "run", *ONE_STEP)) == 1
    [report] = reports_in(tmp_path / "run")
    assert "'first'" in report["error"]["message"]
    shown = capsys.readouterr().err
    assert "'first'" in shown and "second" not in shown and "ValueError: second" in caplog.text
