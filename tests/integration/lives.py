"""Lives of a run: forked processes that train until they end, are killed, or are told to stop.

The trainer is built once, before the fork; a life costs its steps only, so many of them fit into a
test. What a build does leaves no trace on disk, so a life begins as a new process would.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.integration.runs import tiny_flags
from training.build import build_trainer
from training.config.cli import parse_args
from training.sigma_trainer import SigmaTrainer

LONGEST_LIFE_S = 600.0


def tiny_trainer(directory: Path, *flags: str) -> SigmaTrainer:
    return build_trainer(parse_args(tiny_flags(directory, *flags)))


def begin_life(trainer: SigmaTrainer) -> int:
    """Process number of a fork that fits this trainer, silently; its exit code is 0 or 1."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            trainer.fit()
            status = 0
        finally:
            os._exit(status)
    return pid


def reap(pid: int) -> int:
    return os.waitpid(pid, 0)[1]


def live_under_fire(
    trainer: SigmaTrainer, draw: random.Random, *, kills: int, within_s: float = 1.0
) -> int:
    """Restart the run until it ends by itself, killing it at random moments of its first seconds.

    At most `kills` kills; returns how many hit it alive.
    """
    hits = 0
    while True:
        pid = begin_life(trainer)
        seconds = draw.uniform(0.0, within_s) if hits < kills else LONGEST_LIFE_S
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0
                return hits
            time.sleep(0.002)
        os.kill(pid, signal.SIGKILL)
        hits += os.WIFSIGNALED(reap(pid))
