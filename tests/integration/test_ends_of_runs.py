"""What a run says and leaves when it ends before its first step, or because its device failed."""

import json

import pytest
import torch

from tests.integration.runs import metrics_rows, tiny_flags, train
from training.build import build_trainer
from training.config.cli import parse_args

FLAGS = ("--steps", "4", "--save-interval", "2", "--eval-interval", "0", "--sample-interval", "0")


def test_a_stop_that_was_asked_for_before_the_start_promises_no_checkpoint(tmp_path, capsys):
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "STOP").touch()
    train(tiny_flags(directory, *FLAGS))
    assert "stopped before anything was saved" in capsys.readouterr().out
    assert not list((directory / "checkpoints").glob("checkpoint_step_*"))
    (directory / "STOP").touch()
    train(tiny_flags(directory, *FLAGS, "--no-resume"))
    train(tiny_flags(directory, *FLAGS))
    (directory / "STOP").touch()
    capsys.readouterr()
    train(tiny_flags(directory, *FLAGS, "--steps", "6"))
    assert "stopped at step 4, saved" in capsys.readouterr().out
    assert [row["step"] for row in metrics_rows(directory)] == [0, 1, 2, 3, 4]


def test_a_failed_device_leaves_a_crash_report(tmp_path):
    """What features counted lies on the device: a meta tensor stands for one that is lost."""
    directory = tmp_path / "run"
    trainer = build_trainer(parse_args(tiny_flags(directory, *FLAGS)))

    def fail(ctx):
        trainer.features._entries[0].pending_calls = torch.empty((), device="meta")
        raise RuntimeError("CUDA error: device-side assert triggered")

    trainer.forward = fail
    with pytest.raises(RuntimeError, match="device-side assert"):
        trainer.fit()
    crash = json.loads(next((directory / "errors").glob("*.json")).read_text(encoding="utf-8"))
    assert "device-side assert" in crash["error"]["message"]
    assert "feature_ema_enabled" in crash["feature_state"]
