"""Single file operations: short and interrupted writes, Windows' passing errors, atomic replace."""

from __future__ import annotations

import errno
import hashlib
import inspect
from pathlib import Path

import pytest

from tests.training.runtime.faults import OPERATIONS, CountingOps, FailingOps, QuietOps
from training.runtime.atomic_io import (
    FileOps,
    make_dirs,
    replace_file,
    retry_transient,
    write_all,
    write_file,
)


class WindowsError32(OSError):
    """A sharing violation as Windows reports it."""

    winerror = 32


def test_every_operation_can_be_made_to_fail() -> None:
    members = inspect.getmembers(FileOps, inspect.isfunction)
    public = {name for name, _ in members if not name.startswith("_")}
    assert public == set(OPERATIONS)


def test_transient_windows_errors_are_retried_with_growing_pauses() -> None:
    pauses: list[float] = []
    attempts = iter([WindowsError32(), WindowsError32(), None])

    def call() -> str:
        if error := next(attempts):
            raise error
        return "done"

    assert retry_transient(call, sleep=pauses.append) == "done"
    assert pauses == [0.01, 0.02]


def test_transient_windows_errors_end_after_the_limit() -> None:
    pauses: list[float] = []

    def call() -> None:
        raise WindowsError32()

    with pytest.raises(WindowsError32):
        retry_transient(call, limit_s=30.0, sleep=pauses.append)
    assert sum(pauses) == pytest.approx(30.0)


def test_other_errors_are_not_retried() -> None:
    def call() -> None:
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        retry_transient(call, sleep=lambda _: pytest.fail("slept"))


class OneByteOps(QuietOps):
    """Accepts one byte per write and is interrupted before every other one."""

    interrupted = False

    def write(self, descriptor: int, data: memoryview) -> int:
        self.interrupted = not self.interrupted
        if self.interrupted:
            raise InterruptedError(errno.EINTR, "interrupted")
        return super().write(descriptor, data[:1])


def test_short_and_interrupted_writes_write_everything(tmp_path: Path) -> None:
    parts = [b"first ", memoryview(b"second"), b""]
    size, digest = write_file(OneByteOps(), tmp_path / "file", parts)
    assert (tmp_path / "file").read_bytes() == b"first second"
    assert size == 12
    assert digest == hashlib.sha256(b"first second").hexdigest()


def test_a_write_that_accepts_nothing_is_an_error(tmp_path: Path) -> None:
    class NothingOps(QuietOps):
        def write(self, descriptor: int, data: memoryview) -> int:
            return 0

    with pytest.raises(OSError, match="no byte"):
        write_all(NothingOps(), 1, b"data")


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_file(FileOps(), tmp_path / "file", [b"new"])
    assert (tmp_path / "file").read_bytes() == b"old"


def test_replace_shows_old_or_new_contents_whatever_fails(ram_path: Path) -> None:
    counting = CountingOps()
    (ram_path / "status").write_bytes(b"old")
    replace_file(counting, ram_path / "status", b"new")
    for index in range(len(counting.calls)):
        (ram_path / "status").write_bytes(b"old")
        ops = FailingOps(index, OSError(errno.EIO, "broken"))
        with pytest.raises(OSError, match="broken"):
            replace_file(ops, ram_path / "status", b"new")
        assert (ram_path / "status").read_bytes() in (b"old", b"new")
        assert ops.failed
    replace_file(FileOps(), ram_path / "status", b"newest")  # over the leftover of a failure
    assert [path.name for path in ram_path.iterdir()] == ["status"]


def test_directories_are_flushed_from_the_first_existing_one(tmp_path: Path) -> None:
    flushed: list[Path] = []

    class NotingOps(QuietOps):
        def sync_dir(self, path: Path) -> None:
            flushed.append(path)

    make_dirs(NotingOps(), tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    make_dirs(NotingOps(), tmp_path / "a" / "b")
    assert len(flushed) == 2
