"""Suite R4: the commit protocol survives every power loss, and eight broken ones are caught."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runtime.faults import (
    FINGERPRINT,
    QuietOps,
    assert_is_example,
    example,
    open_store,
)
from tests.training.runtime.power_loss import MODES, Disk, RecordingOps
from training.runtime import atomic_io, manifest
from training.runtime.checkpoint import CheckpointError, CheckpointStore
from training.runtime.manifest import FileRecord

STEPS = (10, 20, 30, 40)
LOST = "an acknowledged step is lost"
DAMAGED = "a power loss left something that looks damaged"
WRONG = "values that were never saved are loaded"


def record_run(
    root: Path, store_type: type[CheckpointStore], ops: RecordingOps, *, keep: int = 2
) -> list[tuple[Any, ...]]:
    """Save a few steps; the trace of operations, with a mark wherever a save was acknowledged."""
    store = store_type(root, max_checkpoints=keep, fingerprint=FINGERPRINT, ops=ops)
    for step in STEPS:
        try:
            store.save(step, *example(step), block=True)
        except CheckpointError:
            continue
        ops.trace.append(("ack", step))
    store.close()
    return ops.trace


def check_crashes(trace: list[tuple[Any, ...]], root: Path, scratch: Path, *, seed: int = 0) -> int:
    """Crash before every operation in every mode; the number of states that were looked at.

    AssertionError when an acknowledged step cannot be loaded, when what is loaded is not what was
    saved, or when a mere power loss looks like damage.
    """
    disk, rng, states = Disk(root), random.Random(seed), 0
    for event in [*trace, None]:
        for mode in MODES:
            target = scratch / f"state_{states}"
            target.mkdir()
            disk.after_crash(target, mode, rng)
            check_state(target, disk.acknowledged)
            shutil.rmtree(target)
            states += 1
        if event is not None:
            disk.apply(event)
    return states


def check_state(directory: Path, acknowledged: int) -> None:
    store = open_store(directory)
    found = store.load_newest()
    store.close()
    assert (0 if found is None else found.step) >= acknowledged, LOST
    assert store.quarantine_count == 0, DAMAGED
    if found is not None:
        assert_is_example(found)


def check_bit_rot(root: Path, seed: int = 0) -> None:
    """Flip bits of tensor values in the newest checkpoint: the flipped ones must not be loaded."""
    rng = random.Random(seed)
    for _ in range(20):
        newest = max(path for path in root.iterdir() if path.name.startswith("checkpoint_step"))
        file = newest / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1 - rng.randrange(30)] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        found = CheckpointStore.newest_for_inference(root, ops=QuietOps())
        assert found is not None
        tensors, _ = example(found.step)
        for name, tensor in found.tensors["model"].items():
            assert torch.equal(tensor, tensors["model"][name]), WRONG


class FailingFsyncOps(RecordingOps):
    """One fsync fails, as after a medium error: the data stays readable and never arrives."""

    def __init__(self, fail_at: int, *, ignored: bool = False) -> None:
        super().__init__()
        self.fail_at, self.ignored, self.count = fail_at, ignored, -1

    def fsync(self, descriptor: int) -> None:  # type: ignore[override]
        self.count += 1
        if self.count != self.fail_at:
            self.trace.append(("fsync", descriptor))
            return
        self.trace.append(("lose", descriptor))
        if not self.ignored:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


class NoFileFsyncOps(RecordingOps):
    def fsync(self, descriptor: int) -> None: ...  # type: ignore[override]


class NoDirFsyncOps(RecordingOps):
    def sync_dir(self, path: Path) -> None: ...  # type: ignore[override]


class TruncatingOps(RecordingOps):
    """Creates a file over an existing one."""

    def create(self, path: Path) -> int:  # type: ignore[override]
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.trace.append(("create", path, descriptor))
        return descriptor


class InPlaceStore(CheckpointStore):
    """Writes the next step into the directory of the last one."""

    def _make_directory(self, step: int) -> Path:
        target = self.directory / manifest.directory_name(step)
        for name in sorted(self._ops.list_dir(self.directory)):
            if manifest.parse_directory_name(name) is not None:
                self._ops.move_dir(self.directory / name, target)
                return target
        return super()._make_directory(step)


class DeleteFirstStore(CheckpointStore):
    """Makes room before it has something new."""

    def _make_directory(self, step: int) -> Path:
        for name in self._ops.list_dir(self.directory):
            if manifest.parse_directory_name(name) is not None:
                self._ops.remove(self.directory / name / manifest.MANIFEST_NAME)
                atomic_io.remove_tree(self._ops, self.directory / name)
        return super()._make_directory(step)


class MarkerFirstStore(CheckpointStore):
    """Commits the manifest and then writes the files that it lists."""

    def _write_files(self, directory: Path, snapshot: Any) -> dict[str, FileRecord]:
        hidden = directory.parent.parent / f"hidden_{snapshot.step}"
        hidden.mkdir()
        ops, self._ops = self._ops, QuietOps()
        records = super()._write_files(hidden, snapshot)
        self._ops = ops
        return records


def commit_then_write(ops: Any, directory: Path, written: manifest.Manifest) -> None:
    manifest.commit_manifest(ops, directory, written)
    for name in written.files:
        source = directory.parent.parent / f"hidden_{written.step}" / name
        atomic_io.write_file(ops, directory / name, [source.read_bytes()])
    ops.sync_dir(directory)


def write_unflushed(ops: Any, path: Path, parts: Any, *, durable: bool = True) -> tuple[int, str]:
    return atomic_io.write_file(ops, path, parts, durable=False)


def commit_then_flush(ops: Any, directory: Path, written: manifest.Manifest) -> None:
    """Early commit: the rename happens before the data is known to be on the medium."""
    manifest.commit_manifest(ops, directory, written)
    for name in written.files:
        descriptor = os.open(directory / name, os.O_RDWR)
        ops.trace.append(("reopen", directory / name, descriptor))
        ops.fsync(descriptor)
        os.close(descriptor)


def believe_manifest(ops: Any, path: Path, *, limit: int) -> tuple[int, str]:
    record = manifest.read_manifest(ops, path.parent).files[path.name]
    return min(path.stat().st_size, limit), record.sha256


@pytest.mark.parametrize("seed", range(3))
def test_protocol_survives_power_loss_after_every_operation(ram_path: Path, seed: int) -> None:
    root, scratch = ram_path / "run", ram_path / "scratch"
    scratch.mkdir()
    trace = record_run(root, CheckpointStore, RecordingOps())
    assert check_crashes(trace, root, scratch, seed=seed) > 350
    check_bit_rot(root)


@pytest.mark.parametrize("fail_at", [0, 3, 6, 9, 15])
def test_protocol_survives_a_failing_fsync(ram_path: Path, fail_at: int) -> None:
    root, scratch = ram_path / "run", ram_path / "scratch"
    scratch.mkdir()
    trace = record_run(root, CheckpointStore, FailingFsyncOps(fail_at))
    assert [event[0] for event in trace].count("lose") == 1
    assert [event[0] for event in trace].count("ack") == len(STEPS) - 1
    check_crashes(trace, root, scratch)


def test_quarantine_survives_power_loss(ram_path: Path) -> None:
    """A damaged checkpoint is moved away; no crash on the way costs the healthy ones."""
    root, scratch, ops = ram_path / "run", ram_path / "scratch", RecordingOps()
    scratch.mkdir()
    trace = record_run(root, CheckpointStore, ops, keep=3)
    file = root / "checkpoint_step_00000040" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    disk = Disk(root)
    for event in trace:
        disk.apply(event)
    damaged = disk._find(file)
    damaged.cached = damaged.durable = file.read_bytes()
    del trace[:]
    store = open_store(root, ops=ops)
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 30
    rng = random.Random(2)
    for event in [*trace, None]:
        for mode in MODES:
            target = scratch / f"{len(list(scratch.iterdir()))}"
            target.mkdir()
            disk.after_crash(target, mode, rng)
            again = open_store(target)
            loaded = again.load_newest()
            again.close()
            assert loaded is not None and loaded.step == 30
            assert_is_example(loaded)
        if event is not None:
            disk.apply(event)


@pytest.mark.parametrize(
    ("store_type", "make_ops", "patches", "complaint"),
    [
        pytest.param(CheckpointStore, NoFileFsyncOps, {}, DAMAGED, id="no-file-fsync"),
        pytest.param(CheckpointStore, NoDirFsyncOps, {}, LOST, id="no-dir-fsync"),
        pytest.param(
            CheckpointStore,
            RecordingOps,
            {
                "training.runtime.checkpoint.write_file": write_unflushed,
                "training.runtime.checkpoint.commit_manifest": commit_then_flush,
            },
            DAMAGED,
            id="early-commit",
        ),
        pytest.param(
            CheckpointStore,
            RecordingOps,
            {"training.runtime.manifest.hash_file": believe_manifest},
            WRONG,
            id="no-hash",
        ),
        pytest.param(
            MarkerFirstStore,
            RecordingOps,
            {"training.runtime.checkpoint.commit_manifest": commit_then_write},
            DAMAGED,
            id="marker-first",
        ),
        pytest.param(InPlaceStore, TruncatingOps, {}, LOST, id="in-place-write"),
        pytest.param(DeleteFirstStore, RecordingOps, {}, LOST, id="delete-old-first"),
        pytest.param(
            CheckpointStore,
            lambda: FailingFsyncOps(9, ignored=True),
            {},
            f"{LOST}|{DAMAGED}",
            id="ignored-fsync-error",
        ),
    ],
)
def test_broken_protocol_is_caught(
    ram_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    store_type: type[CheckpointStore],
    make_ops: Callable[[], RecordingOps],
    patches: dict[str, Any],
    complaint: str,
) -> None:
    for name, replacement in patches.items():
        monkeypatch.setattr(name, replacement)
    root, scratch = ram_path / "run", ram_path / "scratch"
    scratch.mkdir()
    trace = record_run(root, store_type, make_ops())
    check_state(root, STEPS[-1])  # without a crash nothing is wrong with it
    with pytest.raises(AssertionError, match=complaint):
        check_crashes(trace, root, scratch)
        check_bit_rot(root)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_protocol_survives_power_loss_in_many_states(ram_path: Path, seed: int) -> None:
    root, scratch = ram_path / "run", ram_path / "scratch"
    scratch.mkdir()
    trace = record_run(root, CheckpointStore, RecordingOps())
    assert check_crashes(trace, root, scratch, seed=seed) > 350
