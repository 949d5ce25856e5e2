"""Suite R10: a signal at any moment of a run ends it within seconds, with its last step saved."""

import os
import random
import signal
import time

import pytest

from tests.integration.lives import begin_life, reap, tiny_trainer
from tests.integration.runs import metrics_rows, newest_checkpoint
from training.runtime.atomic_io import FileOps
from training.runtime.manifest import Verdict, inspect_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="signals forked processes")
FLAGS = (
    "--steps", "100000", "--save-interval", "7", "--max-checkpoints", "2", "--eval-interval", "0",
    "--sample-interval", "0", "--grad-accum-steps", "1", "--seq-len", "8", "--n-layers", "1",
    "--mamba-ratio", "0", "--mamba-chunk-len", "8", "--no-curriculum-enabled",
    "--no-engram-enabled",
)  # fmt: skip
EXIT_WITHIN_S = 10.0


def signal_once(trainer, draw):
    """Exit status and seconds from the signal to the end of one life."""
    (trainer.output_dir / "status_latest.json").unlink(missing_ok=True)
    pid = begin_life(trainer)
    # A step was recorded: the handlers stand. Before that a signal ends the program with 130.
    deadline = time.monotonic() + 120.0
    while not (trainer.output_dir / "status_latest.json").exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.05))
    os.kill(pid, draw.choice([signal.SIGINT, signal.SIGTERM]))
    start = time.monotonic()
    return reap(pid), time.monotonic() - start


def check_runs(home, *, count, seed):
    """Signals to a few runs, most of which resume from where the last one stopped."""
    draw = random.Random(seed)
    trainers = [tiny_trainer(home / f"run{number}", *FLAGS) for number in range(3)]
    for _ in range(count):
        trainer = draw.choice(trainers)
        status, seconds = signal_once(trainer, draw)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        assert seconds < EXIT_WITHIN_S
        check_saved(trainer.output_dir)


def check_saved(directory):
    """The newest checkpoint is sound and is of the last step that was recorded."""
    rows = [row["step"] for row in metrics_rows(directory)]
    if rows[-1] == 0:
        return
    newest = newest_checkpoint(directory)
    assert newest.name == f"checkpoint_step_{rows[-1]:08d}"
    assert inspect_checkpoint(FileOps(), newest, fingerprint=None).verdict is Verdict.VALID


def test_signals_at_random_times(ram_path):
    check_runs(ram_path, count=100, seed=0)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_five_hundred_signals_at_random_times(ram_path, seed):
    check_runs(ram_path, count=100, seed=seed)


def test_a_run_that_does_not_save_at_the_signal_is_noticed(ram_path, monkeypatch):
    """Negative control: the last step is not saved, which is mostly not one of the interval."""
    monkeypatch.setattr("training.sigma_trainer.SigmaTrainer._save_last", lambda self: None)
    with pytest.raises((AssertionError, ValueError)):  # another step is saved, or none is
        check_runs(ram_path, count=20, seed=0)
