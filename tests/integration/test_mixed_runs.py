"""Runs over own files resumed to the bit; the network off; mistakes refused early."""

import json
import shutil
import threading
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
from training.build import build_trainer
from training.config.cli import parse_args
from training.features import FEATURES
from training.hidden_eval import read_manifest
from training.runtime.locks import RunLock
from training.runtime.report_html import write_report
from training.sources.base import SourceError
from training.sources.embedded import EmbeddedCorpus


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
    monkeypatch.setattr("training.build_data.SPOOL", tmp_path / "spool-1")
    train(flags(folder, tmp_path / "whole", "--num-workers", "0"))
    for step, workers, spool in ((3, "2", "64"), (4, "0", "0"), (11, "1", "64"), (16, "4", "64")):
        monkeypatch.setattr("training.build_data.SPOOL", tmp_path / f"spool-{step}")
        arguments = flags(
            folder, tmp_path / "parts", "--num-workers", workers, "--spool-max-mb", spool
        )
        train(arguments, features=(*FEATURES, stop_after(step, tmp_path / "parts")))
    found = differences(tmp_path / "whole", tmp_path / "parts")
    rows = [metrics_rows(tmp_path / name)[-1] for name in ("whole", "parts")]
    assert rows[0]["train_loss"] == rows[1]["train_loss"]
    # Rows differ in how full the queues were, and in nothing else of the run.
    assert [name for name in found if not name.startswith("row ")] == []


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("source ")]


def test_a_second_start_lets_go_of_its_readers(folder, tmp_path):
    """Left alone they fail aloud, or take the process down with them, as the interpreter ends."""
    trainer = build_trainer(parse_args(flags(folder, tmp_path / "run", "--num-workers", "1")))
    assert readers()
    with RunLock(tmp_path / "run"), pytest.raises(RuntimeError, match="is in use by process"):
        trainer.fit()
    assert not readers()


def test_a_start_that_fails_after_its_sources_have_answered_lets_go_of_them(
    folder, tmp_path, monkeypatch
):
    seen = []

    def refuse(*arguments):
        seen.extend(readers())
        raise RuntimeError("no optimizer")

    monkeypatch.setattr("training.build.build_optimizer", refuse)
    with pytest.raises(RuntimeError, match="no optimizer"):
        build_trainer(parse_args(flags(folder, tmp_path / "run", "--num-workers", "1")))
    assert seen and not readers()


def test_with_the_network_off_a_hybrid_run_trains_and_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("training.build_data.SPOOL", tmp_path / "spool")
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


def test_text_of_an_evaluation_is_left_out_counted_and_reported(folder, tmp_path):
    """A hidden question, a held-out page and a piece of --eval-file among the own files."""
    own, exam = tmp_path / "own", tmp_path / "exam.txt"
    own.mkdir()
    for path in sorted(folder.iterdir())[:20]:
        shutil.copy(path, own)
    exam.write_text(" ".join(f"exam{number}" for number in range(90)), encoding="utf-8")
    question = read_manifest("").questions[5].prompt
    held_out = EmbeddedCorpus().validation_text().decode()[9000:12000]
    for name, planted in (("q", question), ("h", held_out), ("e", exam.read_text()[70:300])):
        text = f"Before it. {planted} And after it stands some more."
        (own / f"planted-{name}.txt").write_text(text, encoding="utf-8")
    more = ("--steps", "50", "--eval-file", str(exam),
            "--num-workers", "0", "--stream-shuffle-buffer", "8")  # fmt: skip
    train(flags(own, tmp_path / "run", *more))
    last = metrics_rows(tmp_path / "run")[-1]
    assert last["data_contaminated"] in (3, 6, 9)  # in every pass over the files
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert f"{last['data_contaminated']} that hold text of an evaluation" in page
    train(flags(own, tmp_path / "off", *more, "--no-contamination-check"))
    assert metrics_rows(tmp_path / "off")[-1]["data_contaminated"] == 0
    with pytest.raises(ValueError, match="evaluation texts"):
        train(flags(own, tmp_path / "run", *more, "--steps", "51", "--eval-file", ""))


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
    monkeypatch.setattr("training.build_data.SPOOL", tmp_path / "spool")
    train(flags(folder, tmp_path / "run", "--steps", "2"))
    with pytest.raises(Exception, match="--stream-shuffle-buffer"):
        train(flags(folder, tmp_path / "run", "--stream-shuffle-buffer", "17"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["stream"]["data_backend"] == "local"


def test_losses_on_real_and_on_generated_text_have_columns_of_their_own(tmp_path):
    few = ("--steps", "2", "--eval-interval", "0")
    train(tiny_flags(tmp_path / "tasks", "--synthetic-data", "--data-backend", "hybrid", *few))
    train(tiny_flags(tmp_path / "text", *few))
    for name, full, empty in (("tasks", "synth", "real"), ("text", "real", "synth")):
        last = metrics_rows(tmp_path / name)[-1]
        assert last[f"train_loss_{full}_data"] == last["train_loss"] > 0
        assert last[f"train_loss_{empty}_data"] is None
