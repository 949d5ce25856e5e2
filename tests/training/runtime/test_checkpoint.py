"""What a CheckpointStore keeps, deletes, refuses and says, when the system does as it is told."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import random
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.training.runtime.faults import (
    FINGERPRINT,
    FailingOps,
    HookedOps,
    QuietOps,
    assert_is_example,
    contents,
    example,
    open_store,
    save_steps,
)
from training.runtime.checkpoint import (
    CheckpointError,
    CheckpointStore,
    IncompatibleCheckpoint,
    UnreadableCheckpoint,
)
from training.runtime.manifest import decode_manifest, encode_manifest


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.is_dir())


def test_a_saved_step_comes_back_and_the_files_are_what_the_manifest_says(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "ck", max_checkpoints=3, fingerprint=FINGERPRINT)
    assert store.load_newest() is None
    store.save(50, *example(50), block=True)
    found = store.load_newest()
    assert found is not None and found.step == 50 and found.parent is None
    assert_is_example(found)
    assert found.path == tmp_path / "ck" / "checkpoint_step_00000050"
    assert {path.name for path in found.path.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "MANIFEST.json",
    }
    model = safetensors.torch.load_file(found.path / "model.safetensors")
    assert torch.equal(model["embed.weight"], example(50)[0]["model"]["embed.weight"])
    store.close()


def test_the_state_is_copied_at_the_step_boundary(ram_path: Path) -> None:
    """Training goes on while the thread writes: what it changes must not reach the file."""
    gate = threading.Event()

    class WaitingOps(HookedOps):
        def before(self, name: str, args: tuple) -> None:
            if name == "create":
                assert gate.wait(10)

    weight, seen = torch.ones(4), [1]
    store = open_store(ram_path, ops=WaitingOps())
    store.save(1, {"model": {"w": weight}}, {"seen": seen})
    weight.add_(5.0)
    seen.append(2)
    gate.set()
    found = store.load_newest()
    store.close()
    assert found is not None
    assert found.tensors["model"]["w"].tolist() == [1.0] * 4
    assert found.state == {"seen": [1]}


def test_the_next_save_waits_and_reports_the_failure_of_the_last(ram_path: Path) -> None:
    store = open_store(ram_path, ops=FailingOps(-1, OSError()))
    store.save(1, *example(1), block=True)
    ops = store._ops
    ops.fail_at, ops.error = len(ops.calls) + 12, OSError(5, "Input/output error")
    store.save(2, *example(2))  # fails in the thread
    with pytest.raises(CheckpointError, match=r"step 2 could not be saved.*Input/output error"):
        store.save(3, *example(3))
    assert store.last_saved_step == 1
    store.save(3, *example(3))
    store.wait()
    assert store.last_saved_step == 3
    store.close()
    assert names(ram_path) == ["checkpoint_step_00000001", "checkpoint_step_00000003"]


def test_close_reports_a_failure_and_still_gives_the_directory_up(ram_path: Path) -> None:
    store = open_store(ram_path, ops=FailingOps(20, OSError(28, "No space left on device")))
    store.save(1, *example(1))
    with pytest.raises(CheckpointError, match=r"disk full, .* MiB free, .* MiB needed"):
        store.close()
    save_steps(ram_path, 2)
    assert open_store(ram_path).load_newest().step == 2


def test_a_disk_with_less_than_twice_the_last_size_is_refused_before_writing(
    ram_path: Path,
) -> None:
    class SmallDisk(QuietOps):
        free = 10**9

        def free_bytes(self, path: Path) -> int:
            return self.free

    ops = SmallDisk()
    store = open_store(ram_path, ops=ops)
    store.save(1, *example(1), block=True)
    files = [p for p in (ram_path / names(ram_path)[0]).iterdir() if p.name != "MANIFEST.json"]
    ops.free = 2 * sum(file.stat().st_size for file in files) - 1
    with pytest.raises(CheckpointError, match="disk full") as caught:
        store.save(2, *example(2), block=True)
    assert (caught.value.free_bytes, caught.value.needed_bytes) == (ops.free, ops.free + 1)
    assert str(ram_path) in str(caught.value) and "\n" not in str(caught.value)
    assert names(ram_path) == ["checkpoint_step_00000001"]
    ops.free = 10**9
    store.save(2, *example(2), block=True)
    store.close()


@pytest.mark.parametrize("keep", [1, 2, 3, 5])
def test_retention_keeps_the_newest_and_at_least_two(ram_path: Path, keep: int) -> None:
    store = open_store(ram_path, keep=keep)
    for step in range(1, 9):
        store.save(step, *example(step), block=True)
        kept = [int(name[-8:]) for name in names(ram_path)]
        assert kept == list(range(max(1, step - max(2, keep) + 1), step + 1))
    store.close()


def test_nothing_is_deleted_before_two_that_stay_were_verified(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2, 3, keep=5)
    store = open_store(ram_path, keep=2)
    store.save(4, *example(4), block=True)
    assert len(names(ram_path)) == 4  # this process has seen only step 4 to be sound
    store.save(5, *example(5), block=True)
    assert [int(name[-8:]) for name in names(ram_path)] == [4, 5]
    store.close()


def test_newest_is_by_order_of_saving_and_not_by_step(ram_path: Path) -> None:
    """After a rollback or --no-resume the step falls; the old run must not win, or be lost."""
    save_steps(ram_path, 800, 900)
    store = open_store(ram_path)
    store.save(20, *example(20), block=True)
    found = store.load_newest()
    assert found is not None and found.step == 20
    assert store.load_newest(before_step=20) is None
    earlier = store.load_newest(before_step=900)
    assert earlier is not None and earlier.step == 20
    store.close()


def test_a_second_save_of_a_step_does_not_touch_the_first(ram_path: Path) -> None:
    save_steps(ram_path, 5)
    first = (ram_path / "checkpoint_step_00000005" / "MANIFEST.json").read_bytes()
    store = open_store(ram_path)
    tensors, state = example(5)
    store.save(5, tensors, {**state, "again": True}, block=True)
    found = store.load_newest()
    store.close()
    assert found is not None and found.state["again"] and found.step == 5
    assert found.path.name == "checkpoint_step_00000005.1"
    assert (ram_path / "checkpoint_step_00000005" / "MANIFEST.json").read_bytes() == first


def test_parent_is_the_step_that_was_resumed_or_saved_before(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2)
    store = open_store(ram_path)
    store.load_newest(before_step=2)
    store.save(3, *example(3), block=True)
    found = store.load_newest()
    store.close()
    assert found is not None and (found.step, found.parent) == (3, 1)


def test_unfinished_directories_are_swept_and_foreign_ones_are_not(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    (ram_path / "checkpoint_step_00000002").mkdir()
    (ram_path / "checkpoint_step_00000002" / "model.safetensors").write_bytes(b"torn")
    (ram_path / "checkpoint_step_00000002" / "MANIFEST.json.tmp").write_bytes(b"{")
    (ram_path / "checkpoint_step_00000003").mkdir()
    (ram_path / "checkpoint_step_00000003" / "notes.txt").write_bytes(b"mine")
    (ram_path / "samples").mkdir()
    (ram_path / "checkpoint_step_00000009.pt").write_bytes(b"export")
    store = open_store(ram_path)
    found = store.load_newest()
    assert found is not None and found.step == 1 and store.quarantine_count == 0
    assert "checkpoint_step_00000002" in names(ram_path)  # reading alone removes nothing
    store.save(2, *example(2), block=True)
    store.save(3, *example(3), block=True)
    store.close()
    assert (ram_path / "checkpoint_step_00000003" / "notes.txt").read_bytes() == b"mine"
    assert (ram_path / "checkpoint_step_00000009.pt").exists()
    assert (ram_path / "checkpoint_step_00000003.1" / "MANIFEST.json").exists()
    assert (ram_path / "checkpoint_step_00000002" / "MANIFEST.json").exists()


def test_other_settings_are_named_and_nothing_is_touched(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2)
    before = names(ram_path)
    other = {"--d-model": "128", "--seed": "7", "--n-layers": "2"}
    store = CheckpointStore(ram_path, max_checkpoints=2, fingerprint=other, ops=QuietOps())
    with pytest.raises(IncompatibleCheckpoint) as caught:
        store.load_newest()
    assert "--d-model was 64, is now 128" in str(caught.value)
    assert "--n-layers was absent, is now 2" in str(caught.value)
    assert "--seed" not in str(caught.value)
    for step in (3, 4, 5, 6):  # a new run beside them deletes only its own
        store.save(step, *example(step), block=True)
    store.close()
    assert names(ram_path) == [*before, "checkpoint_step_00000005", "checkpoint_step_00000006"]


def test_other_settings_are_noticed_from_the_manifest_without_a_lock(ram_path: Path) -> None:
    """Asked before anything is built: no hash, nothing moved, and what is damaged passed over."""
    other = {"--d-model": "128", "--seed": "7"}
    new = CheckpointStore(ram_path / "new", max_checkpoints=2, fingerprint=other, ops=QuietOps())
    new.check_settings()
    assert names(ram_path) == []
    save_steps(ram_path, 1, 2)
    (ram_path / "checkpoint_step_00000002" / "MANIFEST.json").write_bytes(b"{")
    before = contents(ram_path)
    open_store(ram_path).check_settings()
    store = CheckpointStore(ram_path, max_checkpoints=2, fingerprint=other, ops=QuietOps())
    with pytest.raises(IncompatibleCheckpoint, match=r"00000001 .*--d-model was 64, is now 128"):
        store.check_settings()
    assert contents(ram_path) == before


def test_a_newer_schema_is_incompatible_and_not_damaged(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    file = ram_path / "checkpoint_step_00000001" / "MANIFEST.json"
    body = json.loads(file.read_bytes())["body"] | {"schema": 99, "new": [1]}
    text = json.dumps(body, separators=(",", ":"), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file.write_bytes(f'{{"body":{text},"sha256":"{digest}"}}\n'.encode())
    store = open_store(ram_path)
    with pytest.raises(IncompatibleCheckpoint, match="schema 99"):
        store.load_newest()
    store.close()
    assert names(ram_path) == ["checkpoint_step_00000001"]


def test_a_manifest_is_read_back_and_refused_if_a_space_differs(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    data = (ram_path / "checkpoint_step_00000001" / "MANIFEST.json").read_bytes()
    assert encode_manifest(decode_manifest(data)) == data
    with pytest.raises(ValueError):
        decode_manifest(data.replace(b'"step":1', b'"step": 1'))


def test_state_values_come_back_exactly(ram_path: Path) -> None:
    rng = random.Random(0)
    state = {
        "floats": [rng.uniform(-1e300, 1e300) for _ in range(100)] + [-0.0, 5e-324],
        "not": (math.inf, -math.inf),
        "python": rng.getstate(),
        "numpy": 2**127 + 1,
        "by step": {0: "a", -1: None},
    }
    store = open_store(ram_path)
    store.save(1, {}, state, block=True)
    found = store.load_newest()
    store.close()
    assert found is not None and repr(found.state) == repr(state)


def test_a_tensor_among_the_plain_values_is_refused_by_path(ram_path: Path) -> None:
    store = open_store(ram_path)
    with pytest.raises(ValueError, match=r"features\.ema"):
        store.save(1, {}, {"features": {"ema": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"'\.\./up'"):
        store.save(1, {"../up": {}}, {})
    store.close()
    assert names(ram_path) == []


def test_two_stores_on_one_directory_are_refused(ram_path: Path) -> None:
    store = open_store(ram_path)
    store.load_newest()
    with pytest.raises(RuntimeError, match=f"in use by process {os.getpid()}"):
        open_store(ram_path).save(1, *example(1))
    store.close()
    save_steps(ram_path, 1)


def test_reading_for_inference_needs_no_lock_and_changes_nothing(
    ram_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert CheckpointStore.newest_for_inference(ram_path / "none") is None
    save_steps(ram_path, 1, 2)
    file = ram_path / "checkpoint_step_00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    store = open_store(ram_path)
    store.open()
    with caplog.at_level(logging.WARNING):
        found = CheckpointStore.newest_for_inference(ram_path, groups=frozenset({"model"}))
    store.close()
    assert found is not None and found.step == 1 and set(found.tensors) == {"model"}
    assert "checkpoint_step_00000002 is passed over" in caplog.text
    assert names(ram_path) == ["checkpoint_step_00000001", "checkpoint_step_00000002"]


def test_reading_for_inference_survives_deletion_meanwhile(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2)
    victim = ram_path / "checkpoint_step_00000002"

    class DeletingOps(HookedOps):
        def before(self, name: str, args: tuple) -> None:
            if name == "open_read" and args[0].name == "optimizer.safetensors" and victim.exists():
                for file in sorted(victim.iterdir()):
                    file.unlink()
                victim.rmdir()

    found = CheckpointStore.newest_for_inference(ram_path, ops=DeletingOps())
    assert found is not None and found.step == 1
    assert_is_example(found)


def test_a_checkpoint_that_reads_back_wrong_is_reported_and_older_ones_stay(
    ram_path: Path,
) -> None:
    """Memory or disk that changes bytes between the hash and the medium."""

    class RottingOps(QuietOps):
        rotten = False

        def write(self, descriptor: int, data: memoryview) -> int:
            if self.rotten and len(data) == 60:  # the fp32 embedding
                data = memoryview(bytes(data[:-1]) + bytes([data[-1] ^ 1]))
            return super().write(descriptor, data)

    ops = RottingOps()
    store = open_store(ram_path, ops=ops)
    store.save(1, *example(1), block=True)
    ops.rotten = True
    with pytest.raises(CheckpointError, match=r"reads back corrupt: model\.safetensors"):
        store.save(2, *example(2), block=True)
    ops.rotten = False
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 1
    assert names(ram_path / "quarantine") == ["checkpoint_step_00000002-wrong-hash"]


def test_old_checkpoints_that_cannot_be_deleted_only_warn(
    ram_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class KeepingOps(QuietOps):
        def remove(self, path: Path) -> None:
            raise PermissionError(13, "Permission denied")

    store = open_store(ram_path, ops=KeepingOps(), keep=2)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 5):
            store.save(step, *example(step), block=True)
    store.close()
    assert "could not be deleted: Permission denied" in caplog.text
    assert len(names(ram_path)) == 4


def test_a_damaged_one_that_cannot_be_moved_is_passed_over(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2)
    (ram_path / "checkpoint_step_00000002" / "state.json").unlink()

    class FixedOps(QuietOps):
        def move_dir(self, source: Path, target: Path) -> None:
            raise OSError(30, "Read-only file system")

    store = open_store(ram_path, ops=FixedOps())
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 1


def test_an_unusable_directory_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(tmp_path / "file" / "ck")
    with pytest.raises(CheckpointError, match=r"--checkpoint-dir .* cannot be used"):
        store.load_newest()


def test_unreadable_is_not_taken_for_an_empty_directory(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    store = open_store(ram_path, ops=FailingOps(0, OSError(5, "Input/output error")))
    with pytest.raises(UnreadableCheckpoint, match="Input/output error"):
        store.load_newest()
    store.close()
