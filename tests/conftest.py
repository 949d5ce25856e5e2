"""Settings and fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples in every run: a failure must be one that can be looked at again.
hypothesis.settings.register_profile("fixed", derandomize=True)
hypothesis.settings.load_profile("fixed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it runs in the background so, and a test's programs would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():  # read when a kernel is defined, so before any of them
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Which functions a device context covers is noted when the first one is entered: later, a test that
# puts another function in the place of torch.empty might be the one.
with torch.device("meta"):
    torch.empty(0)

MEMORY_DIRECTORY = Path("/dev/shm")


torch.set_num_threads(1)  # what a module's fixtures make is made before those of a test


@pytest.fixture(autouse=True)
def one_thread_per_test() -> None:
    """Tiny products gain nothing from threads, and bit-for-bit tests must not depend on them."""
    torch.set_num_threads(1)


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """An empty directory, in memory where the system has such a place; removed afterwards.

    Thousands of trials make and remove directories.
    """
    home = MEMORY_DIRECTORY if MEMORY_DIRECTORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=home, prefix="sigma_test_") as directory:
        yield Path(directory)
