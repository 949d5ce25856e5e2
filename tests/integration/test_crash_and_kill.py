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


def kill_repeatedly(args, *, kills: int, seed: int) -> int:
    """Kill the run `kills` times at random moments of its life; how many of them hit it alive."""
    draw, hits, longest = random.Random(seed), 0, 1.0
    for _ in range(kills):
        started = time.monotonic()
        pid = train_in_child(args)
        deadline = started + draw.uniform(0.0, longest)
        while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.002)
        try:
            os.kill(pid, signal.SIGKILL)
            hits += os.WIFSIGNALED(reap(pid))
        except (ProcessLookupError, ChildProcessError):
            longest = max(0.3, time.monotonic() - started)
    return hits


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unharmed") / "run"
    assert reap(train_in_child(tiny_flags(directory, *FLAGS))) == 0
    return directory


@pytest.mark.parametrize("seed", range(5))
def test_fifty_kills_leave_no_trace(unharmed, tmp_path, seed):
    """Ten kills per run, five runs; each run is then let go to its end."""
    directory = tmp_path / "run"
    args = tiny_flags(directory, *FLAGS)
    hits = kill_repeatedly(args, kills=10, seed=seed)
    assert reap(train_in_child(args)) == 0
    assert differences(unharmed, directory) == []
    assert hits >= 3, "the kills came too late to prove anything"


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
