"""Saves and resumes where memory really is short: this process limits its own for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.training.runtime.faults import example, open_store
from training.runtime.checkpoint import CheckpointError, UnreadableCheckpoint

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory")
SIZE = 64 * 2**20


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """While entered, this process gets so much more address space and nothing beyond it."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    whole = psutil.Process().memory_info().vms + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (whole, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_resume_that_finds_no_memory_says_how_much_it_needs(ram_path: Path) -> None:
    """Room for the file as memory, and not for a copy of what is in it: torch says it its way."""
    store = open_store(ram_path)
    store.save(1, {"model": {"weight": torch.zeros(SIZE, dtype=torch.uint8)}}, {}, block=True)
    with room_for(SIZE + SIZE // 2):
        with pytest.raises(UnreadableCheckpoint, match="needs 64 MiB of memory that is not free"):
            store.load_newest()
    found = store.load_newest()
    assert found is not None and found.tensors["model"]["weight"].numel() == SIZE
    store.close()


def test_a_save_that_is_waited_for_needs_no_memory(ram_path: Path) -> None:
    """The last one of a run, above all of one that ends because memory is short."""
    weight = {"model": {"weight": torch.full((SIZE,), 7, dtype=torch.uint8)}}
    store = open_store(ram_path)
    store.save(1, *example(1), block=True)  # the thread has its memory
    with room_for(SIZE // 2):
        with pytest.raises(CheckpointError, match="not enough memory"):
            store.save(2, weight, {})
        store.save(2, weight, {}, block=True)
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 2
    assert torch.equal(found.tensors["model"]["weight"], weight["model"]["weight"])
