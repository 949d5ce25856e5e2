"""The card and the disk of a run that suite R24 torments: they misbehave by step, data and order.

Imported by the process that trains alone (chaos_life.py): it needs torch, and what supervises must
start as fast as the program does.
"""

from __future__ import annotations

import errno
import os
import time
import zlib
from pathlib import Path

import torch

import training.build
from tests.integration.chaos_life import HOME, PACE
from training.features import FEATURES
from training.features.base import Feature, Schedule
from training.runtime.atomic_io import FileOps

SHORT_FROM_STEP = 40
BAD_BATCH_OF = 997
ERRORS = {"eio": errno.EIO, "disk_full": errno.ENOSPC, "read_only": errno.EROFS}


def take(path: Path) -> str:
    """What a file says, which is gone then; "" without the file."""
    try:
        text = path.read_text(encoding="ascii")
        path.unlink()
    except FileNotFoundError:
        return ""
    return text


class Card(Feature):
    """What the hardware does to a step; `weights` in the folder makes a weight NaN, `bug` fails.

    The pace is kept by the clock of the whole run: what a step computes is part of its time. With
    a file `limit` no step above the number in it begins, and with `last` that one ends the run.
    """

    name = "card"

    def __init__(self) -> None:
        self.home = Path(os.environ[HOME])
        self.pace = float(os.environ[PACE])
        self.steps = (self.home / "steps.log").open("a", buffering=1, encoding="ascii")
        self.output_dir = Path()
        self.begun = self.cpu = 0.0

    @classmethod
    def schedule(cls, config):
        return Schedule()

    @classmethod
    def create(cls, config):
        card = cls()
        card.output_dir = Path(config.run.output_dir)
        return card

    def on_batch(self, ctx):
        if ctx.micro == 0:
            self.wait_for_leave(ctx.step)
            self.begun, self.cpu = time.monotonic(), time.process_time()
        if ctx.step >= SHORT_FROM_STEP and ctx.batch.input_ids.shape[0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory: a card of one row")
        return False

    def on_losses(self, ctx):
        if zlib.crc32(ctx.batch.input_ids.numpy().tobytes()) % BAD_BATCH_OF == 0:
            ctx.losses["lm"] = ctx.losses["lm"] * float("nan")
            ctx.train_loss = ctx.train_loss * float("nan")
        return False

    def after_step(self, ctx):
        time.sleep(max(0.0, self.begun + self.pace - time.monotonic()))
        times = f"{self.begun:.4f} {time.monotonic():.4f} {self.cpu:.2f}"
        self.steps.write(f"{os.getpid()} {ctx.step} {times}\n")
        if take(self.home / "weights"):
            next(ctx.model.parameters()).data.view(-1)[0] = float("nan")
        if take(self.home / "bug"):
            raise RuntimeError("a bug that nobody knew of")
        if self.number("last") == ctx.step:
            (self.output_dir / "STOP").touch()
        return False

    def close(self):
        self.steps.close()

    def wait_for_leave(self, step: int) -> None:
        while (limit := self.number("limit")) is not None and step > limit:
            if (last := self.number("last")) is not None and step <= last:
                return
            time.sleep(0.1)

    def number(self, name: str) -> int | None:
        try:
            return int((self.home / name).read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None


class FaultyOps(FileOps):
    """File operations that fail as the file `storage` says: a kind, and how many calls."""

    def __init__(self, home: Path) -> None:
        self.path = home / "storage"
        self.kind, self.left = "", 0

    def maybe_fail(self) -> None:
        if self.left == 0 and (order := take(self.path)):
            self.kind, _, count = order.partition(" ")
            self.left = int(count)
        if self.left:
            self.left -= 1
            raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]))

    def create(self, path: Path) -> int:
        self.maybe_fail()
        return super().create(path)

    def fsync(self, descriptor: int) -> None:
        self.maybe_fail()
        super().fsync(descriptor)


def build_on_card(config, *, build=training.build.build_trainer):
    trainer = build(config, features=(*FEATURES, Card))
    trainer.services.store._ops = FaultyOps(Path(os.environ[HOME]))
    torch.set_num_threads(1)
    return trainer


def put_in() -> None:
    """Train on this card and disk from now on."""
    training.build.build_trainer = build_on_card
    training.build_data.SPOOL = Path(os.environ[HOME]) / "spool"
