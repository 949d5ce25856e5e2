"""Samples and rows: they outlast a full disk, and tell one history over resumes and roll-backs."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from training.context import StepContext
from training.runtime.atomic_io import FileOps
from training.runtime.clock import PhaseClock
from training.runtime.recorder import RunRecorder


class SilentDisplay:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def sample(self, text: str) -> None:
        self.shown.append(text)

    def update(self, row: dict) -> None: ...

    def close(self) -> None: ...


def make_recorder(directory: Path) -> RunRecorder:
    return RunRecorder(
        directory,
        display=SilentDisplay(),  # pyright: ignore[reportArgumentType]
        device=torch.device("cpu"),
        tokens_per_step=8,
        ema_beta=0.9,
    )


def sampled_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()]


def test_on_a_full_disk_samples_wait_and_are_written_later(tmp_path, monkeypatch, caplog):
    recorder = make_recorder(tmp_path)
    recorder.open(metrics_offset=None)
    recorder.write_sample(2, "one")

    def refuse(self, descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(FileOps, "write", refuse)
        for step in (4, 6):
            recorder.write_sample(step, "two")
        recorder.state_dict()
    assert len(caplog.records) == 1 and "disk full" in caplog.text
    assert sampled_steps(tmp_path / "samples.jsonl") == [2]
    recorder.write_sample(8, "thr\u00e9e\u2028")
    recorder.close()
    assert sampled_steps(tmp_path / "samples.jsonl") == [2, 4, 6, 8]
    assert recorder.display.shown == ["one", "two", "two", "thr\u00e9e\u2028"]


@pytest.mark.parametrize("known", [0, 10**6], ids=["new", "resumed"])
def test_samples_behind_the_step_a_run_goes_on_from_become_orphans(tmp_path, known):
    recorder = make_recorder(tmp_path)
    recorder.open(metrics_offset=None)
    state = recorder.state_dict()
    for step in (2, 4, 6):
        recorder.write_sample(step, "a")
    recorder.rewind(state, step=4)
    recorder.write_sample(6, "b")
    recorder.close()
    assert sampled_steps(tmp_path / "samples.jsonl") == [2, 4, 6]
    assert sampled_steps(tmp_path / "samples.orphan-1.jsonl") == [6]
    again = make_recorder(tmp_path)
    again.open(metrics_offset=known or None, step=2 if known else 0)
    again.close()
    assert sampled_steps(tmp_path / "samples.jsonl") == ([2] if known else [])
    assert sampled_steps(tmp_path / "samples.orphan-2.jsonl") == ([4, 6] if known else [2, 4, 6])


def test_the_speed_after_a_roll_back_is_that_of_the_steps_since(tmp_path, monkeypatch):
    """Not that of one step: the row before was of a later step."""
    seconds = [0.0]
    monkeypatch.setattr("training.runtime.recorder.time.perf_counter", lambda: seconds[0])
    recorder = make_recorder(tmp_path)
    recorder.open(metrics_offset=None)
    recorder.write_start_row(0, {})

    def train(step: int, *, until: int) -> None:
        for number in range(step + 1, until + 1):
            seconds[0] += 2.0
            ctx = StepContext(step=number, total_steps=99, model=None, optimizer=None)
            ctx.train_loss = ctx.grad_norm = torch.ones(())
            recorder.observe(ctx)
            if number % 10 == 0:
                recorder.write_row(ctx, PhaseClock(torch.device("cpu")), {})

    train(0, until=10)
    saved = recorder.state_dict()
    train(10, until=23)
    recorder.rewind(saved, step=10)
    train(10, until=30)
    recorder.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 10, 20, 30]
    assert [row["effective_step_time_s"] for row in rows[1:]] == [2.0, 2.0, 2.0]
    assert [row["tokens_per_s_ema"] for row in rows[1:]] == [4.0, 4.0, 4.0]
