"""One life of the run that suite R24 torments: the program itself, with a card that misbehaves.

`python -m tests.integration.chaos_life FLAGS` is `train_sigma.py FLAGS` with two additions, both in
chaos_card.py. A last feature stands for the hardware: a step takes as long as on a device that
computes, more than one row does not fit from some step on, and some batches give a loss that is no
number; all of that is decided by step and data, so that it happens to an unharmed run as well. And
the file operations of the checkpoints fail when the tormentor has put a fault into the folder that
SIGMA_CHAOS_HOME names. For the negative control SIGMA_CHAOS_FORGETS names a function that does
nothing in this life.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys

import train_sigma
from training.runtime.supervisor import MARK

HOME = "SIGMA_CHAOS_HOME"
PACE = "SIGMA_CHAOS_PACE_S"
FORGET = "SIGMA_CHAOS_FORGETS"


if __name__ == "__main__":
    if FORGET in os.environ:
        owner, _, forgotten = os.environ[FORGET].rpartition(".")
        setattr(importlib.import_module(owner), forgotten, lambda *given, **named: None)
    train_sigma.program_command = functools.partial(
        list, [sys.executable, "-m", "tests.integration.chaos_life"]
    )
    if MARK in os.environ or "--supervised" not in sys.argv:
        importlib.import_module("tests.integration.chaos_card").put_in()
    sys.exit(train_sigma.main(sys.argv[1:]))
