"""What a process of its own does whose memory is short (test_short_memory.py)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from tests.training.runtime.faults import example, open_store
from training.runtime.checkpoint import CheckpointError, UnreadableCheckpoint

SIZE = 64 * 2**20


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """While entered, this process gets so much more address space and nothing beyond it."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    whole = psutil.Process().memory_info().vms + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (whole, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def failure(act: Callable[[], object], kind: type[Exception]) -> str:
    """What `act` raises; nothing where it does not."""
    try:
        act()
    except kind as error:
        return str(error)
    return ""


def resume(directory: Path) -> None:
    """Room for the file as memory, and not for a copy of what is in it: torch says it its way."""
    store = open_store(directory)
    store.save(1, {"model": {"weight": torch.zeros(SIZE, dtype=torch.uint8)}}, {}, block=True)
    with room_for(SIZE + SIZE // 2):
        told = failure(store.load_newest, UnreadableCheckpoint)
    assert "needs 64 MiB of memory that is not free" in told, told
    found = store.load_newest()
    assert found is not None and found.tensors["model"]["weight"].numel() == SIZE
    store.close()


def save(directory: Path) -> None:
    """The last one of a run, above all of one that ends because memory is short."""
    weight = {"model": {"weight": torch.full((SIZE,), 7, dtype=torch.uint8)}}
    store = open_store(directory)
    store.save(1, *example(1), block=True)  # the thread has its memory
    with room_for(SIZE // 2):
        told = failure(lambda: store.save(2, weight, {}), CheckpointError)
        assert "not enough memory" in told, told
        store.save(2, weight, {}, block=True)
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 2
    assert torch.equal(found.tensors["model"]["weight"], weight["model"]["weight"])


if __name__ == "__main__":
    {"resume": resume, "save": save}[sys.argv[1]](Path(sys.argv[2]))
