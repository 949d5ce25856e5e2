"""What a store does when something fails that it can live with, and what it says of it."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runtime.faults import HookedOps, QuietOps, example, open_store, save_steps
from training.runtime.checkpoint import CheckpointError, UnreadableCheckpoint


class Failing(HookedOps):
    """Operations of `names` on paths that contain `part` fail with `number`."""

    def __init__(self, number: int, part: str, *names: str) -> None:
        self.number, self.part, self.names = number, part, names

    def before(self, name: str, args: tuple[Any, ...]) -> None:
        if name in self.names and self.part in str(args[0]):
            raise OSError(self.number, os.strerror(self.number))


def test_an_unreadable_newest_one_is_not_replaced_by_an_older(ram_path: Path) -> None:
    """To resume an older one would train a stretch anew for a disk that answers a minute later."""
    save_steps(ram_path, 1, 2)
    store = open_store(ram_path, ops=Failing(errno.EIO, "00000002/model", "open_read"))
    with pytest.raises(UnreadableCheckpoint, match=r"00000002 cannot be read: .*Nothing was moved"):
        store.load_newest()
    store.close()
    assert not (ram_path / "quarantine").exists()


def test_why_it_cannot_be_read_is_said_in_the_system_s_words(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    for error, words in ((OSError(errno.EIO, "no answer"), "no answer"), (OSError("odd"), "odd")):

        class Mute(QuietOps):
            def map_file(self, path: Path) -> Any:
                raise error  # noqa: B023

        store = open_store(ram_path, ops=Mute())
        with pytest.raises(UnreadableCheckpoint) as caught:
            store.load_newest()
        store.close()
        path = ram_path / "checkpoint_step_00000001"
        assert str(caught.value) == f"{path} cannot be read: {words}. Nothing was moved"


def test_a_full_disk_is_told_in_figures(ram_path: Path) -> None:
    class Small(QuietOps):
        free = 3 * 2**19

        def free_bytes(self, path: Path) -> int:
            return self.free

    ops = Small()
    store = open_store(ram_path, ops=ops)
    with pytest.raises(CheckpointError) as caught:
        store.save(7, {"model": {"w": torch.zeros(2**18)}}, {}, block=True)
    assert caught.value.needed_bytes is not None
    ops.free = caught.value.needed_bytes  # just enough
    store.save(7, {"model": {"w": torch.zeros(2**18)}}, {}, block=True)
    store.close()
    assert store.last_saved_step == 7
    assert str(caught.value) == (
        f"step 7 could not be saved to {ram_path}: disk full, 1.5 MiB free, 2.0 MiB needed; free "
        "some space or use another --checkpoint-dir. Older checkpoints are kept"
    )


def test_the_failure_of_a_save_is_taken_once_it_is_there(ram_path: Path) -> None:
    gate = threading.Event()

    class Waiting(HookedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> None:
            if name == "create":
                assert gate.wait(60)
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    store = open_store(ram_path, ops=Waiting())
    assert store.take_failure() is None
    store.save(1, *example(1))
    assert store.take_failure() is None  # under way: nobody waits for it
    gate.set()
    assert store._pending is not None
    store._pending.exception(timeout=60)
    failure = store.take_failure()
    assert isinstance(failure, CheckpointError) and "step 1 could not be saved" in str(failure)
    assert store.take_failure() is None
    store.close()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="interrupts itself by an alarm")
def test_an_interrupted_wait_forgets_no_failure(ram_path: Path) -> None:
    gate = threading.Event()

    class Waiting(HookedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> None:
            if name == "create":
                assert gate.wait(60)
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    store = open_store(ram_path, ops=Waiting())
    store.save(1, *example(1))
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            store.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
        gate.set()
    with pytest.raises(CheckpointError, match="step 1 could not be saved"):
        store.wait()
    store.close()


def test_leftovers_that_cannot_be_removed_are_said_and_no_obstacle(
    ram_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = ram_path / "checkpoint_step_00000009"
    left.mkdir()
    (left / "state.json").touch()
    store = open_store(ram_path, ops=Failing(errno.EACCES, "00000009", "remove"))
    with caplog.at_level(logging.WARNING):
        store.save(1, *example(1), block=True)
    store.close()
    assert f"unfinished {left} could not be removed: Permission denied" in caplog.text
    assert store.last_saved_step == 1


@pytest.mark.parametrize("moves", [True, False])
def test_what_becomes_of_a_damaged_one_is_said(
    ram_path: Path, caplog: pytest.LogCaptureFixture, moves: bool
) -> None:
    save_steps(ram_path, 1, 2)
    (ram_path / "checkpoint_step_00000002" / "state.json").unlink()
    names = [] if moves else ["move_dir"]
    store = open_store(ram_path, ops=Failing(errno.EROFS, "00000002", *names))
    with caplog.at_level(logging.WARNING):
        assert store.load_newest() is not None
    store.close()
    why = "(state.json is missing)"
    assert why in caplog.text and store.quarantine_count == 1
    said = "was moved to" if moves else "could not be moved: Read-only file system"
    assert said in caplog.text


def test_a_damaged_one_is_moved_durably(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    (ram_path / "checkpoint_step_00000001" / "state.json").unlink()
    done: list[tuple[str, Path]] = []

    class Recording(HookedOps):
        def before(self, name: str, args: tuple[Any, ...]) -> None:
            if name in ("move_dir", "sync_dir"):
                done.append((name, args[0]))

    store = open_store(ram_path, ops=Recording())
    assert store.load_newest() is None
    store.close()
    moved = done.index(("move_dir", ram_path / "checkpoint_step_00000001"))
    home = ram_path / "quarantine"
    assert done[moved + 1 :] == [("sync_dir", home), ("sync_dir", ram_path)]


def test_the_flushes_of_a_deletion_come_before_its_files_go(ram_path: Path) -> None:
    """Else a power loss could leave the manifest of a checkpoint whose files are gone."""
    done: list[tuple[str, str]] = []

    class Recording(QuietOps):
        def sync_dir(self, path: Path) -> None:
            done.append(("sync", path.name))

        def remove(self, path: Path) -> None:
            super().remove(path)
            done.append((path.name, path.parent.name))

    store = open_store(ram_path, ops=Recording(), keep=2)
    for step in (1, 2, 3):
        store.save(step, *example(step), block=True)
    store.close()
    name = "checkpoint_step_00000001"
    of_it = done[done.index(("MANIFEST.json", name)) :]
    assert of_it[1] == ("sync", name)
    assert {what for what, where in of_it[2:] if where == name} == {
        "model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip


def test_a_directory_that_cannot_be_listed_costs_no_checkpoint(
    ram_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Deaf(QuietOps):
        is_saved = False

        def replace(self, source: Path, target: Path) -> None:
            super().replace(source, target)
            self.is_saved = True

        def list_dir(self, path: Path) -> dict[str, bool]:
            if self.is_saved and path == ram_path:
                raise OSError(errno.EIO, "no answer")
            return super().list_dir(path)

    save_steps(ram_path, 1, 2)
    store = open_store(ram_path, ops=Deaf(), keep=2)
    with caplog.at_level(logging.WARNING):
        store.save(3, *example(3), block=True)
    store.close()
    assert "no old checkpoint was deleted: checkpoints in" in caplog.text
    assert len(list(ram_path.glob("checkpoint_step_*"))) == 3


def test_a_manifest_that_cannot_be_read_does_not_end_all_saving(
    ram_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A bad sector under one checkpoint, for good: the run is worth more than its oldest state."""
    name = "checkpoint_step_00000002"
    save_steps(ram_path, 1, 2)
    bad = Failing(errno.EIO, f"{name}/MANIFEST", "open_read")
    store = open_store(ram_path, ops=bad, keep=2)
    with caplog.at_level(logging.WARNING):
        for step in (3, 4, 5):
            store.save(step, *example(step), block=True)
    store.close()
    left = {path.name for path in ram_path.glob("checkpoint_step_*")}
    assert left == {name, "checkpoint_step_00000004", "checkpoint_step_00000005"}
    assert f"{name} cannot be read now" in caplog.text
    store = open_store(ram_path, ops=bad)
    with pytest.raises(UnreadableCheckpoint, match=f"{name} cannot be read: Input/output error"):
        store.load_newest()  # which one is the newest is not known
    store.close()
    store = open_store(ram_path)
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 5


@pytest.mark.parametrize("is_damaged", [True, False])
def test_what_reads_back_wrong_is_set_aside_only_if_it_is_damaged(
    ram_path: Path, is_damaged: bool
) -> None:
    """A disk that does not answer says nothing about what stands on it."""

    class Failing(QuietOps):
        def read(self, descriptor: int, size: int) -> bytes:
            if not is_damaged:
                raise OSError(errno.EIO, "no answer")
            return bytes(len(super().read(descriptor, size)))

    store = open_store(ram_path, ops=Failing())
    with pytest.raises(CheckpointError, match="corrupt" if is_damaged else "unreadable"):
        store.save(1, *example(1), block=True)
    store.close()
    assert store.quarantine_count == is_damaged
    assert (ram_path / "checkpoint_step_00000001").exists() != is_damaged


def test_folders_of_other_names_are_left_alone(ram_path: Path) -> None:
    """Also where they hold nothing but what a checkpoint may hold, or nothing at all."""
    (ram_path / "mine").mkdir()
    (ram_path / "mine" / "model.safetensors").touch()
    (ram_path / "empty").mkdir()
    (ram_path / "checkpoint_step_00000008").touch()  # a file
    save_steps(ram_path, 1)
    assert (ram_path / "mine" / "model.safetensors").exists() and (ram_path / "empty").is_dir()
    assert (ram_path / "checkpoint_step_00000008").is_file()


def test_what_is_no_want_of_memory_is_not_called_one(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("the library is broken")

    save_steps(ram_path, 1)
    store = open_store(ram_path)
    monkeypatch.setattr("training.runtime.restore.read_tensors", broken)
    with pytest.raises(RuntimeError, match=r"^the library is broken$"):
        store.load_newest()
    store.close()
