"""File operations that count, record, fail or kill, and a tiny training state to save."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from training.runtime.atomic_io import FileOps
from training.runtime.checkpoint import Checkpoint, CheckpointStore

MUTATING = (
    "make_dir",
    "create",
    "open_append",
    "write",
    "truncate",
    "fsync",
    "drop_cache",
    "close",
    "sync_dir",
    "replace",
    "move_dir",
    "remove",
    "remove_dir",
)
READING = ("open_read", "read", "seek", "size", "list_dir", "free_bytes", "map_file")
OPERATIONS = MUTATING + READING
FINGERPRINT = {"--d-model": "64", "--seed": "7"}


class QuietOps(FileOps):
    """The real operations but for the flushing, which only a power loss would show."""

    transient_wait_s = 0.0

    def fsync(self, descriptor: int) -> None:
        os.fstat(descriptor)

    def sync_dir(self, path: Path) -> None:
        os.stat(path)

    def drop_cache(self, descriptor: int) -> None:
        os.fstat(descriptor)


class HookedOps(QuietOps):
    """Calls `before` and `after` around every operation."""

    def before(self, name: str, args: tuple[Any, ...]) -> None: ...

    def after(self, name: str, args: tuple[Any, ...], result: Any) -> None: ...


def _hooked(name: str) -> Any:
    def call(self: HookedOps, *args: Any) -> Any:
        self.before(name, args)
        result = getattr(QuietOps, name)(self, *args)
        self.after(name, args, result)
        return result

    return call


for _name in OPERATIONS:
    setattr(HookedOps, _name, _hooked(_name))


class CountingOps(HookedOps):
    """Remembers the name of every operation in `calls`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        self.calls.append(name)


class FailingOps(CountingOps):
    """Raises `error` in the call number `fail_at`; later calls work again."""

    def __init__(self, fail_at: int, error: BaseException) -> None:
        super().__init__()
        self.fail_at, self.error, self.failed = fail_at, error, ""

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        super().before(name, args)
        if len(self.calls) - 1 == self.fail_at:
            self.failed = name
            raise self.error


class ShortWriteOps(CountingOps):
    """Writes one byte only in the write call number `fail_at`."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.fail_at, self.failed = fail_at, ""

    def write(self, descriptor: int, data: memoryview) -> int:  # type: ignore[override]
        self.calls.append("write")
        if self.calls.count("write") - 1 == self.fail_at:
            self.failed = "write"
            data = data[:1]
        return QuietOps.write(self, descriptor, data)


class KillingOps(HookedOps):
    """Kills its own process before or after the mutating operation number `kill_at`."""

    def __init__(self, kill_at: int, *, afterwards: bool) -> None:
        self.kill_at, self.afterwards, self.seen = kill_at, afterwards, -1

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name in MUTATING:
            self.seen += 1
            self._kill(not self.afterwards)

    def after(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name in MUTATING:
            self._kill(self.afterwards)

    def _kill(self, here: bool) -> None:
        if here and self.seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def example(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """Tensors and state that differ in every value from step to step."""
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(3, 5, generator=generator)
    tensors = {
        "model": {"embed.weight": weights, "head.weight": weights, "half": weights.half()},
        "optimizer": {"state.0.exp_avg": torch.randn(7, generator=generator)},
    }
    state = {"step": step, "loss": 1.0 / (step + 3), "stream": {"epoch": step // 4, "seen": [step]}}
    return tensors, state


def assert_is_example(checkpoint: Checkpoint) -> None:
    tensors, state = example(checkpoint.step)
    assert checkpoint.state == state
    assert checkpoint.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert checkpoint.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert torch.equal(checkpoint.tensors[group][name], tensor)


def open_store(directory: Path, *, ops: FileOps | None = None, keep: int = 3) -> CheckpointStore:
    return CheckpointStore(
        directory, max_checkpoints=keep, fingerprint=FINGERPRINT, ops=ops or QuietOps()
    )


def save_steps(directory: Path, *steps: int, keep: int = 3) -> None:
    """Put checkpoints of these steps into a directory."""
    store = open_store(directory, keep=keep)
    for step in steps:
        store.save(step, *example(step), block=True)
    store.close()


def contents(directory: Path) -> dict[str, bytes]:
    """Every file under the checkpoint directories with its bytes."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and not path.name.startswith("checkpoints.lock")
    }
