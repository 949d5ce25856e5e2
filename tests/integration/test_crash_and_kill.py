"""A run that is killed at a random moment ends, after restarts, where an unharmed one ends."""

import os
import random
import shutil
import signal
import time

import pytest
import torch

from tests.integration.runs import differences, newest_checkpoint, tiny_flags, train
from training.build import build_trainer
from training.config.cli import parse_args

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
FLAGS = ("--steps", "48", "--save-interval", "3", "--max-checkpoints", "4")


def train_in_child(args: list[str]) -> int:
    """Fork a process that trains; torch is loaded already, so a life costs its steps only."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            train(args)
            status = 0
        finally:
            os._exit(status)
    return pid


def reap(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def live_under_fire(args: list[str], draw: random.Random, *, kills: int) -> int:
    """Restart the run until it ends by itself, killing it at random moments of its first second.

    At most `kills` kills; returns how many hit it alive.
    """
    hits = 0
    while True:
        pid = train_in_child(args)
        deadline = time.monotonic() + (draw.uniform(0.0, 1.0) if hits < kills else 600.0)
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0
                return hits
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        hits += os.WIFSIGNALED(reap(pid))


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unharmed") / "run"
    assert reap(train_in_child(tiny_flags(directory, *FLAGS))) == 0
    return directory


def test_fifty_kills_leave_no_trace(unharmed, tmp_path):
    draw, hits, runs = random.Random(0), 0, 0
    while hits < 50:
        directory = tmp_path / f"run{runs}"
        runs += 1
        hits += live_under_fire(tiny_flags(directory, *FLAGS), draw, kills=50 - hits)
        assert differences(unharmed, directory) == []


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_resumed(unharmed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(unharmed, directory)
    damaged = newest_checkpoint(directory)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x10
    weights.write_bytes(content)
    trainer = build_trainer(parse_args(tiny_flags(directory, *FLAGS)))
    trainer.fit()
    assert differences(unharmed, directory) == []
    assert [p.name.split("-")[0] for p in (directory / "checkpoints" / "quarantine").iterdir()] == [
        damaged.name
    ]


def test_other_settings_stop_the_resume_and_touch_nothing(unharmed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(unharmed, directory)
    before = sorted(p.name for p in (directory / "checkpoints").iterdir())
    with pytest.raises(RuntimeError, match="--d-ff"):
        train(tiny_flags(directory, *FLAGS, "--d-ff", "96"))
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == before
