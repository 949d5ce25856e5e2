"""Suite R11: whatever a crash left of metrics.jsonl, a resumed run ends with each step once."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.runtime.faults import FailingOps, QuietOps
from training.runtime.metrics import TAIL_BYTES, MetricsLog, write_status

STEPS = 12


def make_row(step: int, *, size: int = 0) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 / (step + 1), "text": "Grüße 語" + "é" * size}


def write_rows(path: Path, steps: range, *, size: int = 0) -> list[int]:
    """Append rows; the offset behind each of them."""
    log, offsets = MetricsLog(path), []
    for step in steps:
        log.append(make_row(step, size=size))
        offsets.append(log.offset)
    log.close()
    return offsets


def read_steps(path: Path) -> list[int]:
    """Steps of a file that must hold nothing but whole rows."""
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line)["step"] for line in data.decode().splitlines()]


@pytest.fixture(autouse=True)
def quiet_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


@pytest.mark.parametrize("size", [0, TAIL_BYTES], ids=["short rows", "rows beyond the window"])
@pytest.mark.parametrize(
    "tail", [b"", b"\0" * 17, b"\0" * 5000, b"\xc3"], ids=["cut", "nul", "many nul", "half utf-8"]
)
def test_a_file_cut_at_every_byte_of_its_last_row(ram_path: Path, tail: bytes, size: int) -> None:
    path = ram_path / "metrics.jsonl"
    offsets = write_rows(path, range(STEPS), size=size)
    whole = path.read_bytes()
    cuts = range(offsets[-2], offsets[-1] + 1)
    for cut in cuts if size == 0 else [*cuts[:12], *cuts[12:-12:20011], *cuts[-12:]]:
        path.write_bytes(whole[:cut] + tail)
        log = MetricsLog(path)
        left = read_steps(path)
        assert log.offset == path.stat().st_size
        assert left in (list(range(STEPS)), list(range(STEPS - 1)))
        # A whole row is never given up, even without its newline; one grown together with other
        # bytes is no row.
        whole_from = offsets[-1] - (0 if tail.strip(b"\0") else 1)
        assert (len(left) == STEPS) == (cut >= whole_from)
        for step in range(len(left), STEPS + 1):
            log.append(make_row(step))
        log.close()
        assert read_steps(path) == list(range(STEPS + 1))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"\0" * 100, b"not json", b'{"step": ', b"[1, 2]\n", b"\xff\xfe\n\xfd", b"7\n"],
    ids=["empty", "newline", "nul", "text", "torn", "list", "not utf-8", "number"],
)
def test_a_file_without_any_row_becomes_empty(ram_path: Path, content: bytes) -> None:
    path = ram_path / "metrics.jsonl"
    path.write_bytes(content)
    write_rows(path, range(2))
    assert read_steps(path) == [0, 1]


def test_random_resumes_keep_one_history_and_lose_no_row(ram_path: Path) -> None:
    """Rows written, cut back to a checkpoint, torn, repaired, rewritten; 60 times."""
    rng, path = random.Random(0), ram_path / "metrics.jsonl"
    log, offsets, written = MetricsLog(path), [0], 0
    for _ in range(60):
        for _ in range(rng.randrange(6)):
            log.append(make_row(len(offsets) - 1))
            offsets.append(log.offset)
            written += 1
        if rng.random() < 0.5:  # the process dies while it writes a row
            log.close()
            path.write_bytes(path.read_bytes() + b'{"step":' + rng.randbytes(rng.randrange(9)))
            log = MetricsLog(path)
            assert log.offset == offsets[-1]
        back = rng.randrange(len(offsets))
        log.resume(offsets[back])
        del offsets[back + 1 :]
        assert read_steps(path) == list(range(back))
    log.close()
    orphans = sum(len(read_steps(orphan)) for orphan in ram_path.glob("metrics.orphan-*.jsonl"))
    assert orphans + len(offsets) - 1 == written


def test_an_offset_inside_a_row_moves_the_whole_row(ram_path: Path) -> None:
    path = ram_path / "metrics.jsonl"
    offsets = write_rows(path, range(3))
    log = MetricsLog(path)
    orphan = log.resume(offsets[1] - 4)
    log.close()
    assert read_steps(path) == [0]
    assert orphan is not None and read_steps(orphan) == [1, 2]


def test_an_offset_behind_the_end_keeps_what_is_there(ram_path: Path) -> None:
    path = ram_path / "metrics.jsonl"
    offsets = write_rows(path, range(3))
    log = MetricsLog(path)
    assert log.resume(offsets[-1] + 100) is None
    log.close()
    assert read_steps(path) == [0, 1, 2]
    assert [p.name for p in ram_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("size", [0, TAIL_BYTES // 2], ids=["short rows", "rows of many windows"])
def test_rows_behind_lost_ones_are_not_kept_twice(ram_path: Path, size: int) -> None:
    """A checkpoint of step 3 knows more bytes than a medium kept, a later life wrote 4 and 5 in
    their place and died: the next one must not write 4 beside what is there."""
    path = ram_path / "metrics.jsonl"
    known = write_rows(path, range(4), size=size)[3]
    os.truncate(path, known - 3)
    log = MetricsLog(path)
    assert log.resume(known, last_step=3) is None
    for life in range(3):
        for step in range(4, 6):
            log.append(make_row(step))
        log.close()
        log = MetricsLog(path)
        orphan = log.resume(known, last_step=3)
        assert orphan is not None and read_steps(orphan) == [4, 5]
        assert read_steps(path) == [0, 1, 2], life
    log.close()


def test_what_is_no_row_ends_the_search_for_later_steps(ram_path: Path) -> None:
    path = ram_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n[9]\n{"loss":1}\n{"step":"x"}\n{"step":7}\n')
    log = MetricsLog(path)
    log.resume(log.offset, last_step=1)
    log.close()
    assert path.read_bytes().endswith(b'{"step":"x"}\n')


def test_a_row_is_one_write(ram_path: Path) -> None:
    writes: list[bytes] = []

    class NotingOps(QuietOps):
        def write(self, descriptor: int, data: memoryview) -> int:
            writes.append(bytes(data))
            return super().write(descriptor, data)

    log = MetricsLog(ram_path / "metrics.jsonl", ops=NotingOps())
    log.append({"step": 0, "nan": math.nan, "deep": [{"inf": -math.inf}], "np": np.float32(0.5)})
    log.close()
    assert writes == [b'{"step":0,"nan":null,"deep":[{"inf":null}],"np":0.5}\n']


def test_values_json_has_no_word_for_are_refused_and_leave_no_trace(ram_path: Path) -> None:
    log = MetricsLog(ram_path / "metrics.jsonl")
    with pytest.raises(TypeError):
        log.append({"step": 0, "bad": {1, 2}})
    log.append({"step": 0})
    log.close()
    assert read_steps(ram_path / "metrics.jsonl") == [0]


def test_on_a_full_disk_rows_wait_and_are_written_later(ram_path: Path) -> None:
    class FullOps(QuietOps):
        full = False

        def write(self, descriptor: int, data: memoryview) -> int:
            if self.full:
                super().write(descriptor, data[: len(data) // 2])  # half a row gets in
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(descriptor, data)

    ops, path = FullOps(), ram_path / "metrics.jsonl"
    log = MetricsLog(path, ops=ops)
    log.append(make_row(0))
    ops.full = True
    for step in (1, 2, 3):
        log.append(make_row(step))
        log.fsync()
        assert read_steps(path) == [0] and log.offset == path.stat().st_size
    ops.full = False
    log.append(make_row(4))
    log.close()
    assert read_steps(path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("room", [True, False], ids=["what is cut", "none"])
def test_on_a_full_disk_a_run_still_goes_back(
    ram_path: Path, caplog: pytest.LogCaptureFixture, room: bool
) -> None:
    class FullOps(QuietOps):
        left = 0  # bytes that the disk still takes

        def write(self, descriptor: int, data: memoryview) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = data[: self.left]
            self.left -= len(data)
            return super().write(descriptor, data)

        def truncate(self, descriptor: int, size: int) -> None:
            if room:
                self.left += self.size(descriptor) - size
            super().truncate(descriptor, size)

    ops, path = FullOps(), ram_path / "metrics.jsonl"
    offsets = write_rows(path, range(5))
    log = MetricsLog(path, ops=ops)
    ops.left = 10  # a part of the rows gets in, and is no orphan
    with caplog.at_level(logging.WARNING):
        orphan = log.resume(offsets[2], last_step=2)
    assert read_steps(path) == [0, 1, 2] and ("were cut and lost" in caplog.text) is not room
    assert sorted(ram_path.iterdir()) == ([path, orphan] if room else [path])
    assert orphan is None or read_steps(orphan) == [3, 4]
    ops.left = 10_000
    log.append(make_row(3))
    log.close()
    assert read_steps(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EIO])
def test_an_orphan_of_an_earlier_life_is_never_touched(ram_path: Path, number: int) -> None:
    path, earlier = ram_path / "metrics.jsonl", ram_path / "metrics.orphan-1.jsonl"
    earlier.write_bytes(b"mine\n")
    failed = set()
    for fail_at in range(30):
        path.unlink(missing_ok=True)
        offsets = write_rows(path, range(4))
        ops = FailingOps(-1, OSError(number, os.strerror(number)))
        log = MetricsLog(path, ops=ops)
        ops.fail_at = len(ops.calls) + fail_at
        with contextlib.suppress(OSError):
            log.resume(offsets[1], last_step=None)
        failed.add(ops.failed)
        ops.fail_at = -1
        log.close()
        assert earlier.read_bytes() == b"mine\n"
    assert {"create", "write", "fsync", "truncate"} <= failed


def test_a_file_of_gigabytes_is_moved_in_pieces(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ram_path / "metrics.jsonl"
    write_rows(path, range(2000), size=1000)
    content = path.read_bytes()
    monkeypatch.setattr("training.runtime.metrics.CHUNK_BYTES", 2**14)
    tracemalloc.start()
    try:
        log = MetricsLog(path)
        orphan = log.resume(0)
        log.close()
        assert tracemalloc.get_traced_memory()[1] < len(content) / 4
    finally:
        tracemalloc.stop()
    assert path.read_bytes() == b"" and orphan is not None and orphan.read_bytes() == content


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_rows_that_cannot_be_read_stay_where_they_are(ram_path: Path, number: int) -> None:
    path = ram_path / "metrics.jsonl"
    offsets = write_rows(path, range(4))
    log = MetricsLog(path)

    class Unreadable(QuietOps):
        def read(self, descriptor: int, size: int) -> bytes:
            raise OSError(number, os.strerror(number))

    log._ops = Unreadable()
    with pytest.raises(OSError, match=os.strerror(number)):
        log.resume(offsets[1], last_step=None)
    assert read_steps(path) == [0, 1, 2, 3] and list(ram_path.iterdir()) == [path]
    log.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_another_failing_write_is_raised_and_leaves_whole_rows(ram_path: Path, number: int) -> None:
    path = ram_path / "metrics.jsonl"
    write_rows(path, range(2))
    ops = FailingOps(-1, OSError(number, os.strerror(number)))
    log = MetricsLog(path, ops=ops)
    ops.fail_at = len(ops.calls)
    with pytest.raises(OSError, match=os.strerror(number)):
        log.append(make_row(2))
    assert ops.failed == "write" and read_steps(path) == [0, 1]
    log.append(make_row(3))
    log.close()
    assert read_steps(path) == [0, 1, 2, 3]


def test_a_status_that_cannot_be_written_leaves_the_old_one(ram_path: Path) -> None:
    path = ram_path / "status_latest.json"
    assert write_status(path, {"step": 1})
    for fail_at in range(5):
        ops = FailingOps(fail_at, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        assert write_status(path, {"step": 2}, ops=ops) is (not ops.failed)
        if not ops.failed:
            break
        assert json.loads(path.read_bytes()) == {"step": 1}
    assert write_status(path, {"step": 3, "loss": math.nan})
    assert json.loads(path.read_bytes()) == {"step": 3, "loss": None}


@pytest.mark.parametrize("rows", [range(0), range(4)])
def test_lines_that_somebody_else_wrote_are_set_aside(ram_path: Path, rows: range) -> None:
    path = ram_path / "metrics.jsonl"
    write_rows(path, rows)
    foreign = b"epoch,loss\n" + b"1,2.5\n" * 40_000
    with path.open("ab") as file:
        file.write(foreign)
    MetricsLog(path).close()
    assert read_steps(path) == [*rows]
    assert path.with_name("metrics.orphan-1.jsonl").read_bytes() == foreign
