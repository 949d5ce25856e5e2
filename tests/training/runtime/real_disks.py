"""Suite R3 on ext4, xfs and btrfs: what a power loss may leave on the medium, mounted again.

Checkpoints are saved on a real file system over a disk that records its blocks. For a power loss
before entry n of the record, every write before the last flush is on the medium; of those since,
the states take all, a random subset, or a subset whose writes are torn at sectors. Each state is
mounted, so that the file system recovers as after a real loss, and the store is opened on it.
After Pillai et al., OSDI 2014, and the crash tests of xfstests with dm-log-writes.

All of it runs as a program of its own, in a mount namespace of its own: a process that copied the
namespace meanwhile (any sandbox does) would hold a file system mounted after it was unmounted here,
and its late writes would land in the next state. It prints one JSON value per state.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.training.runtime.block_recorder import FLUSH, MARK, WRITE, read_log
from tests.training.runtime.faults import (
    FINGERPRINT,
    QuietOps,
    assert_is_example,
    example,
    open_store,
)
from training.runtime.atomic_io import FileOps
from training.runtime.checkpoint import CheckpointStore, UnreadableCheckpoint

ROOT = Path(__file__).parents[3]
SET_FD, CLEAR_FD, SET_STATUS, GET_FREE = 0x4C00, 0x4C01, 0x4C04, 0x4C82
AUTOCLEAR = 4
LOOP_INFO = struct.Struct("<52xI176x")  # struct loop_info64 of <linux/loop.h>, its flags
MODES = ("all", "subset", "torn")
STEPS = range(1, 7)


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    """sector: bytes that are written whole or not at all; torn at 512, the superblocks of ext4 and
    btrfs do not survive, whatever is saved there. share: of the states of a suite, because a mount
    of xfs takes as long as ten of ext4."""

    name: str
    megabytes: int
    make: tuple[str, ...]
    sector: int
    share: float
    options: str = ""


FILE_SYSTEMS = (
    FileSystem(
        name="ext4", megabytes=16, sector=4096, make=("mkfs.ext4", "-q", "-F"),
        share=0.7,
    ),
    FileSystem(
        name="xfs", megabytes=32, sector=512, make=("mkfs.xfs", "-q", "--unsupported"),
        share=0.1,
    ),
    FileSystem(
        name="btrfs", megabytes=40, sector=4096, make=("mkfs.btrfs", "-q", "-f", "--mixed"),
        share=0.2, options="nodiscard",
    ),
)  # fmt: skip


def obstacle(system: FileSystem) -> str:
    """Why this file system cannot be tried here, "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting needs root on Linux"
    if shutil.which("unshare") is None:
        return "no unshare"
    for path in ("/dev/loop-control", "/dev/fuse"):
        if not Path(path).exists():
            return f"no {path}"
    if shutil.which(system.make[0]) is None:
        return f"no {system.make[0]}"
    known = Path("/proc/filesystems").read_text(encoding="ascii").split()
    return "" if system.name in known else f"this kernel has no {system.name}"


@contextmanager
def mounted(disk: Path, at: Path, system: FileSystem) -> Iterator[None]:
    """A disk's file system at a folder; OSError when it cannot be mounted."""
    libc = ctypes.CDLL(None, use_errno=True)
    with loop_device(disk) as device:
        options = system.options.encode()
        if libc.mount(device.encode(), bytes(at), system.name.encode(), 0, options) != 0:
            raise OSError(ctypes.get_errno(), f"{system.name} cannot be mounted")
        try:
            yield
        finally:
            if libc.umount2(bytes(at), 0) != 0:
                raise OSError(ctypes.get_errno(), f"{at} cannot be unmounted")


@contextmanager
def loop_device(disk: Path) -> Iterator[str]:
    backing = os.open(disk, os.O_RDWR)
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        name = f"/dev/loop{fcntl.ioctl(control, GET_FREE)}"
        device = os.open(name, os.O_RDWR)
        try:
            fcntl.ioctl(device, SET_FD, backing)
            try:
                # Also when this process is killed the device lets go of its file.
                fcntl.ioctl(device, SET_STATUS, LOOP_INFO.pack(AUTOCLEAR))
                yield name
            finally:
                fcntl.ioctl(device, CLEAR_FD, 0)
        finally:
            os.close(device)
    finally:
        os.close(control)
        os.close(backing)


def record(
    home: Path, system: FileSystem, ops: FileOps
) -> tuple[Path, list[tuple[int, int, bytes]]]:
    """Save on a fresh file system; its first image, and what was written to the disk after it."""
    disk, first, log, at = (home / name for name in ("disk", "first", "log", "mount"))
    at.mkdir()
    with disk.open("wb") as file:
        file.truncate(system.megabytes * 2**20)
    subprocess.run([*system.make, str(disk)], check=True, stdout=subprocess.DEVNULL)
    shutil.copyfile(disk, first)
    recorder = subprocess.Popen(
        [sys.executable, "-m", "tests.training.runtime.block_recorder", str(disk), str(log)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert recorder.stdin is not None and recorder.stdout is not None
    try:
        assert recorder.stdout.readline() == "ready\n"
        with mounted(disk, at, system):
            store = CheckpointStore(at / "run", max_checkpoints=2, fingerprint=FINGERPRINT, ops=ops)
            for step in STEPS:
                store.save(step, *example(step), block=True)
                print(step, file=recorder.stdin, flush=True)
                assert recorder.stdout.readline() == "noted\n"
            store.close()
    finally:
        recorder.stdin.close()
        recorder.wait()
        ctypes.CDLL(None).umount2(bytes(disk), 0)
    return first, list(read_log(log))


class Medium:
    """An image that is brought forward along a record, and the states it may be left in."""

    def __init__(self, home: Path, first: Path, entries: list[tuple[int, int, bytes]]) -> None:
        self.durable, self.state, self.at = home / "durable", home / "state", home / "mount"
        self.entries, self.place, self.acknowledged = entries, 0, 0
        self.pending: list[tuple[int, bytes]] = []
        subprocess.run(["cp", "--sparse=always", str(first), str(self.durable)], check=True)

    def advance(self) -> None:
        """Past one more entry of the record."""
        kind, offset, data = self.entries[self.place]
        self.place += 1
        if kind == WRITE:
            self.pending.append((offset, data))
        elif kind == MARK:
            self.acknowledged = offset
        elif kind == FLUSH:
            apply(self.durable, self.pending)
            self.pending.clear()

    def lose_power(self, mode: str, sector: int, rng: random.Random) -> None:
        """Write one of the states that the medium may be in to `state`."""
        chosen = self.pending
        if mode != "all":
            chosen = [write for write in chosen if rng.random() < 0.5]
        if mode == "torn":
            chosen = [part for write in chosen for part in tear(*write, sector, rng)]
        command = ["cp", "--sparse=always", "--reflink=auto", str(self.durable), str(self.state)]
        subprocess.run(command, check=True)
        apply(self.state, chosen)


def tear(offset: int, data: bytes, sector: int, rng: random.Random) -> Iterator[tuple[int, bytes]]:
    """Half of all writes whole, of the others some sectors."""
    if rng.random() < 0.5:
        yield offset, data
        return
    start = 0
    while start < len(data):
        size = sector - (offset + start) % sector
        if rng.random() < 0.5:
            yield offset + start, data[start : start + size]
        start += size


def apply(image: Path, writes: list[tuple[int, bytes]]) -> None:
    with image.open("r+b") as file:
        for offset, data in writes:
            file.seek(offset)
            file.write(data)


def check_state(medium: Medium, system: FileSystem) -> str:
    """What is wrong with a state, "" if nothing is."""
    try:
        with mounted(medium.state, medium.at, system):
            return check_store(medium.at / "run", medium.acknowledged)
    except OSError as error:
        return f"after {medium.place} entries: {error.strerror}"


def check_store(directory: Path, acknowledged: int) -> str:
    if not directory.is_dir():
        return f"step {acknowledged} is lost with its folder" if acknowledged else ""
    store = open_store(directory)
    try:
        found = store.load_newest()
    except UnreadableCheckpoint as error:
        return str(error)
    finally:
        store.close()
    step = 0 if found is None else found.step
    if step < acknowledged:
        return f"step {acknowledged} was acknowledged, {step} is found"
    if store.quarantine_count:
        return "a power loss left something that looks damaged"
    if found is not None:
        with suppress(AssertionError):
            assert_is_example(found)
            return ""
        return f"step {step} holds values that were never saved"
    return ""


def states(
    home: Path, system: FileSystem, *, seed: int, every: int, flushed: bool
) -> Iterator[str]:
    """Save once, then lose power before every `every`-th entry in each mode; what is wrong."""
    rng = random.Random(seed)
    first, entries = record(home, system, FileOps() if flushed else QuietOps())
    medium = Medium(home, first, entries)
    while True:
        if medium.place % every == 0:
            for mode in MODES:
                medium.lose_power(mode, system.sector, rng)
                yield check_state(medium, system)
        if medium.place == len(entries):
            return
        medium.advance()


def try_states(
    home: Path, system: FileSystem, *, seed: int, every: int = 1, flushed: bool = True
) -> Iterator[str]:
    """`states` in a process of its own; RuntimeError when that fails. `home` must be empty."""
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", __name__]
    arguments = [str(home), system.name, str(seed), str(every), str(int(flushed))]
    with subprocess.Popen(
        [*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
        except GeneratorExit:
            process.terminate()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{system.name}, seed {seed}: ended with {process.returncode}")


if __name__ == "__main__":
    place, chosen, seed_text, every_text, flushed_text = sys.argv[1:]
    tried = states(
        Path(place),
        next(system for system in FILE_SYSTEMS if system.name == chosen),
        seed=int(seed_text),
        every=int(every_text),
        flushed=bool(int(flushed_text)),
    )
    for result in tried:
        print(json.dumps(result), flush=True)
