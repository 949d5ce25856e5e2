"""States of store, lock and file operations that no injected fault reaches, one by one."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.training.runtime.faults import (
    FINGERPRINT,
    HookedOps,
    QuietOps,
    assert_is_example,
    example,
    open_store,
    save_steps,
)
from training.runtime import atomic_io, checkpoint, manifest, restore
from training.runtime.atomic_io import FileOps, make_dirs, remove_tree
from training.runtime.checkpoint import (
    CheckpointError,
    CheckpointStore,
    IncompatibleCheckpoint,
    UnreadableCheckpoint,
)
from training.runtime.manifest import (
    DamagedManifest,
    Verdict,
    decode_manifest,
    inspect_checkpoint,
)

NAME = "checkpoint_step_00000001"


class StubbornOps(QuietOps):
    """Fails with `error` in the operations of `names`, every time."""

    def __init__(self, error: BaseException, *names: str) -> None:
        for name in names:
            setattr(self, name, self.fail)
        self.error = error

    def fail(self, *args: Any) -> Any:
        raise self.error


def resealed(path: Path, change: Any) -> bytes:
    """A manifest with a changed body and a seal that is right."""
    body = json.loads(path.read_bytes())["body"]
    change(body)
    return manifest._seal(body)


@pytest.mark.parametrize("field", ["step", "sequence", "parent", "fingerprint", "files"])
def test_a_sealed_manifest_without_a_field_is_damaged(ram_path: Path, field: str) -> None:
    save_steps(ram_path, 1)
    with pytest.raises(DamagedManifest, match=r"^lacks a field$"):
        decode_manifest(resealed(ram_path / NAME / "MANIFEST.json", lambda body: body.pop(field)))


@pytest.mark.parametrize("files", [[], {"a": {"length": 1}}, {"a": 3}])
def test_a_sealed_manifest_of_other_records_is_damaged(ram_path: Path, files: Any) -> None:
    save_steps(ram_path, 1)
    path = ram_path / NAME / "MANIFEST.json"
    with pytest.raises(DamagedManifest, match=r"^lacks a field$"):
        decode_manifest(resealed(path, lambda body: body.update(files=files)))


@pytest.mark.parametrize(
    ("data", "what"), [(b"{", "is not JSON"), (b"[" * 10**5, "is not JSON"), (b"[]", "its own")]
)
def test_what_is_no_manifest_is_damaged(data: bytes, what: str) -> None:
    with pytest.raises(DamagedManifest, match=what):
        decode_manifest(data)


def test_the_size_of_a_checkpoint_is_that_of_its_files(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    listed = decode_manifest((ram_path / NAME / "MANIFEST.json").read_bytes())
    files = [p for p in (ram_path / NAME).iterdir() if p.name != "MANIFEST.json"]
    assert listed.num_bytes == sum(p.stat().st_size for p in files) > 0


def test_the_first_save_of_a_step_has_the_plain_name() -> None:
    assert manifest.directory_name(1) == NAME
    assert manifest.directory_name(1, 2) == f"{NAME}.2"


def test_a_folder_without_a_manifest_was_never_finished(ram_path: Path) -> None:
    (ram_path / NAME).mkdir()
    found = inspect_checkpoint(QuietOps(), ram_path / NAME, fingerprint=FINGERPRINT)
    assert (found.verdict, found.reason) == (Verdict.UNCOMMITTED, "no-manifest")


def test_a_candidate_that_vanishes_while_it_is_looked_at_is_passed_over(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2)

    class Vanishing(QuietOps):
        def list_dir(self, path: Path) -> dict[str, bool]:
            if path.name == "checkpoint_step_00000002":
                raise FileNotFoundError(errno.ENOENT, "it was deleted", str(path))
            return super().list_dir(path)

    assert [c.step for c in restore.find_candidates(Vanishing(), ram_path)] == [1]


def test_one_that_loses_its_manifest_meanwhile_is_no_obstacle(ram_path: Path) -> None:
    save_steps(ram_path, 1, 2)

    class Losing(HookedOps):
        def after(self, name: str, args: tuple[Any, ...], result: Any) -> None:
            if name == "close":  # the manifest of a candidate has been read
                (ram_path / "checkpoint_step_00000002/MANIFEST.json").unlink(missing_ok=True)

    store = open_store(ram_path, ops=Losing())
    found = store.load_newest()
    store.close()
    assert found is not None and found.step == 1 and store.quarantine_count == 0


def test_reading_for_inference_says_why_it_cannot(ram_path: Path) -> None:
    assert CheckpointStore.newest_for_inference(ram_path / "nothing") is None
    assert CheckpointStore.newest_for_inference(ram_path) is None
    save_steps(ram_path, 1)
    with pytest.raises(UnreadableCheckpoint, match="cannot be read: no such luck"):
        ops = StubbornOps(OSError(errno.EIO, "no such luck"), "read")
        CheckpointStore.newest_for_inference(ram_path, ops=ops)

    class NoWeights(QuietOps):
        def open_read(self, path: Path) -> int:
            if path.name == "model.safetensors":
                raise OSError(errno.EIO, "a bad sector")
            return super().open_read(path)

    with pytest.raises(UnreadableCheckpoint, match=f"{NAME} cannot be read: a bad sector"):
        CheckpointStore.newest_for_inference(ram_path, ops=NoWeights())
    path = ram_path / NAME / "MANIFEST.json"
    path.write_bytes(resealed(path, lambda body: body.update(schema=99)))
    with pytest.raises(IncompatibleCheckpoint, match=r"cannot be used: .*schema 99"):
        CheckpointStore.newest_for_inference(ram_path)


def test_reading_for_inference_gives_up_where_nothing_stays(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(ram_path, 1)
    looks = []

    def lose(ops: FileOps, path: Path, *, fingerprint: Any) -> manifest.Inspection:
        looks.append(path)
        (path / "MANIFEST.json").rename(ram_path / "kept")
        return inspect_checkpoint(ops, path, fingerprint=fingerprint)

    def find(ops: FileOps, directory: Path) -> list[restore.Candidate]:
        if (ram_path / "kept").exists():
            (ram_path / "kept").rename(ram_path / NAME / "MANIFEST.json")
        return candidates

    candidates = restore.find_candidates(QuietOps(), ram_path)
    monkeypatch.setattr(restore, "inspect_checkpoint", lose)
    monkeypatch.setattr(restore, "find_candidates", find)
    with pytest.raises(UnreadableCheckpoint, match="keep changing; try again"):
        CheckpointStore.newest_for_inference(ram_path)
    assert len(looks) == restore.SCANS


def test_only_directories_with_the_name_of_a_step_are_candidates(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    (ram_path / "checkpoint_step_00000007").write_bytes(b"a file")
    (ram_path / "copy").mkdir()
    (ram_path / "copy" / "MANIFEST.json").write_bytes(b"{}")
    assert [c.step for c in restore.find_candidates(QuietOps(), ram_path)] == [1]


def test_the_newest_of_those_that_are_unusable_comes_first(ram_path: Path) -> None:
    save_steps(ram_path, 3, 8, 1, 6, 2, 7, 5, 4, keep=8)
    for step in (2, 5, 3, 7):
        (ram_path / f"checkpoint_step_{step:08d}" / "MANIFEST.json").write_bytes(b"torn")
    steps = [c.step for c in restore.find_candidates(QuietOps(), ram_path)]
    assert steps == [7, 5, 3, 2, 4, 6, 1, 8]  # by number, then the others by time


def test_short_memory_says_how_much_is_needed(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(ram_path)
    store.save(1, {"model": {"weight": torch.zeros(3 * 2**18)}}, {}, block=True)

    def fail(ops: FileOps, path: Path) -> Any:
        raise MemoryError

    monkeypatch.setattr(restore, "read_tensors", fail)
    with pytest.raises(UnreadableCheckpoint, match="needs 3 MiB of memory that is not free"):
        store.load_newest()
    store.close()


def test_only_the_groups_that_are_asked_for_are_read(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    found = CheckpointStore.newest_for_inference(ram_path, groups=frozenset({"model"}))
    assert found is not None and set(found.tensors) == {"model"} and found.state == example(1)[1]


def test_a_step_that_was_saved_too_often_is_refused(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_REVISIONS", 2)
    save_steps(ram_path, 1, 1)
    store = open_store(ram_path)
    with pytest.raises(CheckpointError, match="2 directories of step 1 exist already"):
        store.save(1, *example(1), block=True)
    store.close()
    assert sorted(p.name for p in ram_path.glob("checkpoint_step_*")) == [NAME, f"{NAME}.1"]


def test_two_damaged_ones_of_one_name_are_both_set_aside(ram_path: Path) -> None:
    for _ in range(3):
        save_steps(ram_path, 1)
        (ram_path / NAME / "state.json").write_bytes(b"{}")
        store = open_store(ram_path)
        assert store.load_newest() is None
        store.close()
    found = sorted(path.name for path in (ram_path / "quarantine").iterdir())
    assert found == [f"{NAME}-wrong-size{tail}" for tail in ("", "-2", "-3")]


@pytest.mark.parametrize("kind", [MemoryError(), OSError(errno.EIO, "no such luck")])
def test_a_failed_save_says_why_even_where_free_space_is_unknown(
    ram_path: Path, kind: BaseException
) -> None:
    failing = ["make_dir"] + ["free_bytes"] * isinstance(kind, OSError)
    store = open_store(ram_path, ops=StubbornOps(kind, *failing))
    with pytest.raises(CheckpointError) as caught:
        store.save(1, *example(1), block=True)
    store.close()
    why = "not enough memory" if isinstance(kind, MemoryError) else "no such luck"
    assert f"step 1 could not be saved to {ram_path}" in str(caught.value)
    assert why in str(caught.value) and "Older checkpoints are kept" in str(caught.value)
    assert (caught.value.free_bytes is None) == isinstance(kind, OSError)
    assert caught.value.needed_bytes and caught.value.path == ram_path


def test_a_full_disk_of_unknown_size_is_said_so(ram_path: Path) -> None:
    store = open_store(
        ram_path, ops=StubbornOps(OSError(errno.ENOSPC, "full"), "free_bytes", "make_dir")
    )
    with pytest.raises(CheckpointError, match=r"disk full, unknown free, 0.0 MiB needed"):
        store.save(1, *example(1), block=True)
    store.close()


def test_a_closed_store_leaves_no_thread_and_no_lock(ram_path: Path) -> None:
    before = set(threading.enumerate())
    store = open_store(ram_path)
    store.save(1, *example(1))
    lock, _executor = store._lock, store._executor  # kept, or their end would do it
    store.close()
    assert set(threading.enumerate()) <= before
    assert lock is not None and not lock._lock.is_locked


def test_to_start_anew_takes_the_directory(ram_path: Path) -> None:
    store = open_store(ram_path / "new")
    store.start_anew()
    assert store.open() is store  # as `with closing(store.open())` wants it
    with pytest.raises(RuntimeError, match="is in use by"):
        open_store(ram_path / "new").open()
    store.close()


def test_a_name_that_was_left_behind_and_is_free_again_counts(ram_path: Path) -> None:
    """`start_anew` leaves checkpoints of a run before this one, not whatever comes to be there."""
    save_steps(ram_path, 1)
    store = open_store(ram_path)
    store.start_anew()
    assert store.load_newest() is None
    remove_tree(QuietOps(), ram_path / NAME)
    store.save(1, *example(1), block=True)
    found = store.load_newest()
    store.close()
    assert found is not None and found.path.name == NAME


def test_a_store_that_was_never_used_closes(ram_path: Path) -> None:
    store = open_store(ram_path / "new")
    store.close()
    store.close()
    assert not (ram_path / "new").exists()


def test_a_group_name_must_be_a_file_name(ram_path: Path) -> None:
    store = open_store(ram_path)
    with pytest.raises(ValueError, match=r"'../up' cannot be a file name"):
        store.save(1, {"../up": {}}, {})
    store.close()


def test_a_file_in_the_place_of_a_directory_is_an_error(ram_path: Path) -> None:
    (ram_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_dirs(FileOps(), ram_path / "file")


def test_a_directory_that_another_made_meanwhile_will_do(ram_path: Path) -> None:
    class Late(QuietOps):
        def make_dir(self, path: Path) -> None:
            super().make_dir(path)
            raise FileExistsError(errno.EEXIST, "another was faster")

    make_dirs(Late(), ram_path / "a" / "b")
    assert (ram_path / "a" / "b").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_to_a_directory_is_not_entered(ram_path: Path) -> None:
    (ram_path / "kept").mkdir()
    (ram_path / "kept" / "file").touch()
    (ram_path / "tree").mkdir()
    (ram_path / "tree" / "link").symlink_to(ram_path / "kept")
    remove_tree(FileOps(), ram_path / "tree")
    assert [p.name for p in ram_path.iterdir()] == ["kept"]
    assert (ram_path / "kept" / "file").exists()


def test_a_tree_is_removed_with_all_below(ram_path: Path) -> None:
    (ram_path / "a" / "b").mkdir(parents=True)
    (ram_path / "a" / "b" / "file").touch()
    remove_tree(FileOps(), ram_path / "a")
    assert list(ram_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_only_a_file_system_that_cannot_flush_directories_is_excused(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    if number == errno.EINVAL:
        FileOps().sync_dir(ram_path)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            FileOps().sync_dir(ram_path)
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_windows_flushes_no_directories_and_a_mac_has_no_cache_to_drop(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_io, "os", SimpleNamespace(name="nt"))
    FileOps().sync_dir(ram_path / "missing")
    FileOps().drop_cache(-1)


@pytest.mark.parametrize("number", [0, errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, errno.EIO])
def test_a_mac_flushes_through_the_cache_of_the_drive(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    flushed = []

    def control(descriptor: int, command: int) -> None:
        if number:
            raise OSError(number, os.strerror(number))
        flushed.append(("fully", descriptor, command))

    monkeypatch.setattr(atomic_io.sys, "platform", "darwin")
    fake = SimpleNamespace(F_FULLFSYNC=51, fcntl=control)
    monkeypatch.setattr(atomic_io, "fcntl", fake, raising=False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(("fsync", descriptor)))
    if number == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            FileOps().fsync(7)
        assert flushed == []
        return
    FileOps().fsync(7)
    assert flushed == ([("fsync", 7)] if number else [("fully", 7, 51)])


def test_a_damaged_one_is_passed_over_by_inference_with_a_word(
    ram_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(ram_path, 1, 2)
    (ram_path / "checkpoint_step_00000002" / "state.json").write_bytes(b"{}")
    with caplog.at_level(logging.WARNING):
        found = CheckpointStore.newest_for_inference(ram_path)
    assert found is not None and found.step == 1
    assert_is_example(found)
    assert "checkpoint_step_00000002 is passed over" in caplog.text
