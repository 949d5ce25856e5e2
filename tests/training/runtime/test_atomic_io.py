"""Single file operations: short and interrupted writes, Windows' passing errors, atomic replace."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import inspect
import os
from pathlib import Path

import pytest

from tests.training.runtime.faults import OPERATIONS, CountingOps, FailingOps, QuietOps
from training.runtime import atomic_io
from training.runtime.atomic_io import (
    FileOps,
    hash_file,
    make_dirs,
    read_file,
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


def test_the_pauses_end_exactly_at_the_limit() -> None:
    """Doubling from a hundredth of a second, the last one cut to what is left."""
    pauses: list[float] = []

    def call() -> None:
        raise WindowsError32(errno.EACCES, "in use")

    with pytest.raises(WindowsError32):
        retry_transient(call, limit_s=0.1, sleep=pauses.append)
    assert pauses == pytest.approx([0.01, 0.02, 0.04, 0.03])


def test_a_file_can_be_read_changed_and_appended_to(tmp_path: Path) -> None:
    ops, path = FileOps(), tmp_path / "file"
    descriptor = ops.create(path)
    assert ops.write(descriptor, memoryview(b"0123456789")) == 10
    ops.fsync(descriptor)
    ops.close(descriptor)
    descriptor = ops.open_append(path)
    assert ops.size(descriptor) == 10
    ops.truncate(descriptor, 8)
    ops.seek(descriptor, 3)
    assert ops.read(descriptor, 2) == b"34"
    ops.seek(descriptor, 0)
    ops.write(descriptor, memoryview(b"ab"))
    ops.close(descriptor)
    assert path.read_bytes() == b"01234567ab"
    ops.close(ops.open_append(tmp_path / "new"))
    assert (tmp_path / "new").read_bytes() == b""


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o640), (0, 0o666)])
def test_files_are_made_as_the_user_s_mask_wants_them(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        for name, make in (("a", FileOps().create), ("b", FileOps().open_append)):
            os.close(make(tmp_path / name))
            assert (tmp_path / name).stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_reading_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_io, "CHUNK_BYTES", 4)
    (tmp_path / "file").write_bytes(b"0123456789")
    for limit in (1, 4, 6, 8, 10, 99):
        expected = b"0123456789"[:limit]
        assert read_file(FileOps(), tmp_path / "file", limit=limit) == expected
        size, digest = hash_file(FileOps(), tmp_path / "file", limit=limit)
        assert (size, digest) == (len(expected), hashlib.sha256(expected).hexdigest())


def test_what_is_written_comes_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class NotingOps(QuietOps):
        def write(self, descriptor: int, data: memoryview) -> int:
            sizes.append(len(data))
            return super().write(descriptor, data)

    monkeypatch.setattr(atomic_io, "CHUNK_BYTES", 4)
    write_file(NotingOps(), tmp_path / "file", [memoryview(bytes(12)).cast("I"), b"abcde"])
    assert sizes == [4, 4, 4, 4, 1]


@pytest.mark.parametrize("durable", [None, True, False])
def test_only_what_must_last_is_flushed(tmp_path: Path, durable: bool | None) -> None:
    ops = CountingOps()
    setting = {} if durable is None else {"durable": durable}
    replace_file(ops, tmp_path / "file", b"data", **setting)
    flushes = [name for name in ops.calls if name in ("fsync", "drop_cache", "sync_dir")]
    assert flushes == ([] if durable is False else ["fsync", "drop_cache", "sync_dir"])


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="asks a POSIX system")
def test_all_pages_of_a_file_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: asked.append(arguments))
    FileOps().drop_cache(7)
    assert asked == [(7, 0, 0, os.POSIX_FADV_DONTNEED)]  # 0 bytes: to the end


def test_a_mapped_file_is_private_and_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    with FileOps().map_file(tmp_path / "file") as mapped:
        assert bytes(mapped) == b"data"
        mapped[0:1] = b"X"
    assert (tmp_path / "file").read_bytes() == b"data"


class CountingDescriptors(FailingOps):
    """Descriptors that are open, by the operations that succeeded."""

    def __init__(self, fail_at: int) -> None:
        super().__init__(fail_at, OSError(errno.EIO, "broken"))
        self.open: set[int] = set()
        self.asked_to_close: set[int] = set()

    def before(self, name: str, args: tuple) -> None:
        if name == "close":
            self.asked_to_close.add(args[0])
        super().before(name, args)

    def after(self, name: str, args: tuple, result: object) -> None:
        if name in ("create", "open_read") and isinstance(result, int):
            self.open.add(result)


def test_no_descriptor_is_left_open_whatever_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    for index in range(8):
        for work in (
            lambda ops: read_file(ops, tmp_path / "file", limit=9),
            lambda ops: hash_file(ops, tmp_path / "file", limit=9),
            lambda ops: write_file(ops, tmp_path / "new", [b"data"]),
        ):
            ops = CountingDescriptors(index)
            with contextlib.suppress(OSError):
                work(ops)
            (tmp_path / "new").unlink(missing_ok=True)
            assert ops.open == ops.asked_to_close
            if ops.failed == "close":
                for descriptor in ops.open:
                    os.close(descriptor)
