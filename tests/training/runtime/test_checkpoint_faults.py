"""Suites R5 and R7: no failing call costs a healthy checkpoint, and every one is reported."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path

import pytest

from tests.training.runtime.faults import (
    FINGERPRINT,
    MUTATING,
    CountingOps,
    FailingOps,
    QuietOps,
    ShortWriteOps,
    assert_is_example,
    contents,
    example,
    open_store,
    save_steps,
)
from training.runtime.atomic_io import remove_tree
from training.runtime.checkpoint import (
    CheckpointError,
    CheckpointStore,
    IncompatibleCheckpoint,
    UnreadableCheckpoint,
)

ERRORS = (
    errno.EIO,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EMFILE,
    errno.EACCES,
    errno.EINTR,
)


def make_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))  # becomes PermissionError, InterruptedError, ...


@pytest.fixture
def two_saved(ram_path: Path) -> Path:
    """A directory with two checkpoints, to be copied for every trial."""
    save_steps(ram_path / "base", 1, 2, keep=2)
    return ram_path / "base"


def copy_of(directory: Path) -> Path:
    target = directory.with_name("trial")
    shutil.rmtree(target, ignore_errors=True)
    return shutil.copytree(directory, target)


def check_after_failed_save(directory: Path, error: CheckpointError | None) -> None:
    """Whatever happened, a sound step is there, nothing was quarantined, and saving works again."""
    store = open_store(directory, keep=2)
    found = store.load_newest()
    assert found is not None
    assert_is_example(found)
    assert found.step == 3 if error is None else found.step in (2, 3)
    assert store.quarantine_count == 0
    store.save(4, *example(4), block=True)
    again = store.load_newest()
    store.close()
    assert again is not None and again.step == 4


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_every_call_of_a_save_fails_once(two_saved: Path, number: int) -> None:
    """R5 for save and retention: all calls of the third save, which also deletes the first."""
    counting = CountingOps()
    store = open_store(copy_of(two_saved), ops=counting, keep=2)
    store.load_newest()
    start = len(counting.calls)
    store.save(3, *example(3), block=True)
    store.close()
    reported = 0
    for index in range(start, len(counting.calls)):
        directory = copy_of(two_saved)
        ops, caught = FailingOps(index, make_error(number)), None
        store = open_store(directory, ops=ops, keep=2)
        store.load_newest()
        try:
            store.save(3, *example(3), block=True)
        except CheckpointError as error:
            caught, reported = error, reported + 1
            text = str(error)
            assert "\n" not in text and str(directory) in text and len(text) < 500
            assert os.strerror(number) in text or "disk full" in text
        assert ops.failed == counting.calls[index]
        store.close()
        check_after_failed_save(directory, caught)
    assert len(counting.calls) - start > 50
    assert reported > 20


def test_every_write_of_a_save_is_short_once(two_saved: Path) -> None:
    counting = CountingOps()
    store = open_store(copy_of(two_saved), ops=counting)
    store.save(3, *example(3), block=True)
    store.close()
    for index in range(counting.calls.count("write")):
        directory, ops = copy_of(two_saved), ShortWriteOps(index)
        store = open_store(directory, ops=ops)
        store.save(3, *example(3), block=True)
        store.close()
        assert ops.failed
        check_after_failed_save(directory, None)


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_every_call_of_a_load_fails_once(two_saved: Path, number: int) -> None:
    """R5 for load: UNREADABLE stops or changes nothing; the step is never a wrong one."""
    counting = CountingOps()
    store = open_store(copy_of(two_saved), ops=counting)
    store.load_newest()
    store.close()
    stopped = 0
    for index in range(len(counting.calls)):
        directory = copy_of(two_saved)
        before = contents(directory)
        ops = FailingOps(index, make_error(number))
        store = open_store(directory, ops=ops)
        try:
            found = store.load_newest()
        except UnreadableCheckpoint as error:
            stopped += 1
            assert os.strerror(number) in str(error) and str(directory) in str(error)
        else:
            assert found is not None and found.step == 2
            assert_is_example(found)
        store.close()
        assert ops.failed
        assert contents(directory) == before and store.quarantine_count == 0
    assert stopped > 15


@pytest.mark.parametrize("number", ERRORS, ids=lambda number: errno.errorcode[number])
def test_every_call_of_a_quarantine_fails_once(two_saved: Path, number: int) -> None:
    """The newest is damaged: the healthy one stays, whichever call fails on the way."""
    file = two_saved / "checkpoint_step_00000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\x00\xff")
    counting = CountingOps()
    store = open_store(copy_of(two_saved), ops=counting)
    store.load_newest()
    store.close()
    for index in range(len(counting.calls)):
        directory = copy_of(two_saved)
        store = open_store(directory, ops=FailingOps(index, make_error(number)))
        try:
            found = store.load_newest()
            assert found is not None and found.step == 1
        except UnreadableCheckpoint:
            pass
        store.close()
        store = open_store(directory)
        found = store.load_newest()
        store.close()
        assert found is not None and found.step == 1
        assert_is_example(found)


def test_the_checker_sees_a_store_that_quarantines_what_it_cannot_read(
    two_saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: reading errors taken for damage, which costs sound checkpoints."""
    from training.runtime import manifest

    def confuse(ops, directory, *, fingerprint):
        try:
            return manifest._inspect(ops, directory, fingerprint)
        except OSError as error:
            return manifest._corrupt("wrong-hash", str(error))

    monkeypatch.setattr("training.runtime.checkpoint.inspect_checkpoint", confuse)
    with pytest.raises(AssertionError):
        test_every_call_of_a_load_fails_once(two_saved, errno.EIO)


def random_difference(rng: random.Random) -> dict[str, str]:
    changed = dict(FINGERPRINT)
    kind = rng.randrange(3)
    if kind == 0:
        changed[rng.choice(list(changed))] = str(rng.random())
    elif kind == 1:
        changed[f"--new-{rng.randrange(100)}"] = "1"
    else:
        del changed[rng.choice(list(changed))]
    return changed


def test_failures_that_are_no_damage_never_quarantine(two_saved: Path) -> None:
    """R7: 500 resumes that fail for another reason; every file is where and what it was."""
    rng, before = random.Random(0), contents(two_saved)
    counting = CountingOps()
    store = open_store(two_saved, ops=counting)
    store.load_newest()
    store.close()
    outcomes = dict.fromkeys((IncompatibleCheckpoint, UnreadableCheckpoint, ImportError), 0)
    for trial in range(500):
        fingerprint, error = dict(FINGERPRINT), None
        if trial % 5 < 2:
            fingerprint = random_difference(rng)
        else:
            error = rng.choice(
                [MemoryError(), ImportError("no module"), make_error(errno.EMFILE)]
                + [make_error(errno.ENOMEM), make_error(errno.ETIMEDOUT)]
            )
        maps = [i for i, name in enumerate(counting.calls) if name == "map_file"]
        place = rng.choice(maps) if not isinstance(error, OSError) else 0
        if isinstance(error, OSError):
            place = rng.choice([i for i, n in enumerate(counting.calls) if n != "close"])
        ops = QuietOps() if error is None else FailingOps(place, error)
        store = CheckpointStore(two_saved, max_checkpoints=2, fingerprint=fingerprint, ops=ops)
        with pytest.raises(tuple(outcomes)) as caught:
            store.load_newest()
        outcomes[caught.type] += 1
        store.close()
        assert store.quarantine_count == 0
    assert contents(two_saved) == before
    assert min(outcomes.values()) >= 20 and sum(outcomes.values()) == 500


class FillingOps(QuietOps):
    """A disk with room for `left` more bytes."""

    left = 10**9

    def write(self, descriptor: int, data: memoryview) -> int:
        if self.left <= 0:
            raise make_error(errno.ENOSPC)
        written = super().write(descriptor, data[: self.left])
        self.left -= written
        return written


class DeletesFirst(CheckpointStore):
    """Makes room before it has something new."""

    def _make_directory(self, step: int) -> Path:
        for path in sorted(self.directory.glob("checkpoint_step_*")):
            remove_tree(self._ops, path)
        return super()._make_directory(step)


def save_while_the_disk_fills(
    directory: Path, *, store_type: type[CheckpointStore] = CheckpointStore
) -> tuple[int, int]:
    """500 saves with a sound step at every instant; the last saved step, and how many failed."""
    rng, ops, saved, failed = random.Random(1), FillingOps(), 2, 0
    store = store_type(directory, max_checkpoints=2, fingerprint=FINGERPRINT, ops=ops)
    store.load_newest()
    for step in range(3, 503):
        ops.left = rng.randrange(2500)
        try:
            store.save(step, *example(step), block=True)
            saved = step
        except CheckpointError as error:
            failed += 1
            assert error.free_bytes is not None and error.needed_bytes
        found = CheckpointStore.newest_for_inference(directory)
        assert found is not None and found.step == saved
        assert_is_example(found)
    store.close()
    return saved, failed


def test_disk_full_at_every_moment_of_many_saves(two_saved: Path) -> None:
    """R22: a disk that fills after some bytes."""
    saved, failed = save_while_the_disk_fills(two_saved)
    assert failed > 125 and saved > 400
    left = [path for path in two_saved.iterdir() if path.is_dir()]
    assert len(left) == 2, "unfinished saves leave nothing behind"


def test_a_store_that_makes_room_first_is_noticed_on_a_full_disk(two_saved: Path) -> None:
    """Negative control of R22."""
    with pytest.raises(AssertionError):
        save_while_the_disk_fills(two_saved, store_type=DeletesFirst)


def test_mutating_calls_are_those_a_save_makes(two_saved: Path) -> None:
    """Guards the other suites: the calls they enumerate are all there."""
    counting = CountingOps()
    store = open_store(copy_of(two_saved), ops=counting, keep=2)
    store.load_newest()
    store.save(3, *example(3), block=True)
    store.close()
    unused = {"open_append", "truncate", "move_dir"}
    assert set(MUTATING) - set(counting.calls) == unused
