"""A scratch directory in memory: thousands of trials make and remove directories."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY_DIRECTORY = Path("/dev/shm")


@pytest.fixture
def ram_path() -> Iterator[Path]:
    """An empty directory, in memory where the system has such a place; removed afterwards."""
    home = MEMORY_DIRECTORY if MEMORY_DIRECTORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=home, prefix="sigma_test_") as directory:
        yield Path(directory)
