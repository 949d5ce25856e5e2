"""The virtual environment `.venv`: which packages it needs, whether it is whole, how it is made.

An environment counts as whole only by its stamp, which is written last: the Python it was made
with, the folder it stands in (its scripts hold absolute paths) and the hash of the lockfile.
Without that stamp it may have been cut off anywhere, and pip takes a half-copied package for an
installed one, so it is made again. One launch at a time may do so; the lock is the operating
system's and dies with its holder, so no stale one can stay behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from scripts.packages import (
    CPU,
    PACKAGE_SETS,
    PackageSet,
    SetupError,
    choose_packages,
    has_cuda_driver,
    python_of,
)

ROOT = Path(__file__).resolve().parent.parent
STAMP = "sigma-setup.json"


class UsageError(Exception):
    """A mistake in the command, as one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What a finished environment was made of."""

    python: str
    folder: str
    packages: str
    lockfile_sha256: str


def expected_stamp(packages: PackageSet, *, root: Path) -> Stamp:
    """The stamp of an environment that is right for this Python, folder and lockfile."""
    try:
        content = (root / packages.lockfile).read_bytes()
    except FileNotFoundError:
        raise SetupError(f"{packages.lockfile} is missing", "fetch the project again") from None
    return Stamp(
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        folder=os.path.realpath(root / ".venv"),
        packages=packages.name,
        lockfile_sha256=hashlib.sha256(content.replace(b"\r\n", b"\n")).hexdigest(),
    )


def read_stamp(venv: Path) -> Stamp | None:
    """The stamp of a finished environment, None when there is none that can be read."""
    try:
        return Stamp(**json.loads((venv / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_stamp(venv: Path, stamp: Stamp) -> None:
    """Mark the environment as finished."""
    part = venv / (STAMP + ".part")
    part.write_text(json.dumps(asdict(stamp)), encoding="utf-8")
    os.replace(part, venv / STAMP)


def has_interpreter(venv: Path) -> bool:
    """Whether the environment's Python is there, and the one it was made from."""
    if not os.path.exists(python_of(venv)):  # unlike Path.exists, False where access is denied
        return False
    try:
        lines = (venv / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    homes = [
        line.partition("=")[2].strip() for line in lines if line.split("=")[0].strip() == "home"
    ]
    return bool(homes) and Path(homes[0]).is_dir()


def reason_to_rebuild(venv: Path, *, found: Stamp | None, expected: Stamp) -> str | None:
    """Why an existing environment has to be made from nothing; None when it has not."""
    if not has_interpreter(venv):
        return "its Python is gone"
    if found is None:
        return "it was not finished"
    if found.python != expected.python:
        return f"it was made with Python {found.python} and this is {expected.python}"
    if found.folder != expected.folder:
        return "it was made in another folder"
    if found.packages != expected.packages:
        return f"it holds the packages {PACKAGE_SETS[found.packages].wording}"
    return None


def wanted_packages(found: Stamp | None, *, cpu_only: bool) -> PackageSet:
    """The set to run on: the one that is installed unless the machine now offers more.

    A CUDA environment serves a machine without a device as well, and `cpu_only` only decides what
    a new one is made of: neither is a reason to make a finished one again.
    """
    held = PACKAGE_SETS.get(found.packages) if found else None
    if held is not None and (cpu_only or held is not CPU):
        return held
    python = (sys.version_info[0], sys.version_info[1])
    driver = not cpu_only and has_cuda_driver()
    return choose_packages(system=sys.platform, python=python, driver=driver)


def ensure_environment(root: Path, *, cpu_only: bool = False) -> Path:
    """Make `.venv` under `root` whole, or find it so; returns its folder.

    Raises SetupError with one line for the user, OSError where the system refuses a file.
    """
    venv = root / ".venv"
    if is_ready(venv, root=root, cpu_only=cpu_only):
        return venv
    with setup_lock(root / ".runtime_cache" / "setup.lock") as handle:
        if not is_ready(venv, root=root, cpu_only=cpu_only):  # another launch may have finished it
            make_ready(venv, root=root, cpu_only=cpu_only, lock=handle)
    return venv


def is_ready(venv: Path, *, root: Path, cpu_only: bool) -> bool:
    """Whether the environment can be used as it is; the whole cost of an ordinary start."""
    found = read_stamp(venv)
    if found is None or not has_interpreter(venv):
        return False
    return found == expected_stamp(wanted_packages(found, cpu_only=cpu_only), root=root)


def make_ready(venv: Path, *, root: Path, cpu_only: bool, lock: BinaryIO) -> None:
    """Create or update the environment, saying what happens; the caller holds the lock."""
    from scripts.installer import Installer, say  # an ordinary start does without its imports

    found = read_stamp(venv) if venv.exists() else None
    packages = wanted_packages(found, cpu_only=cpu_only)
    if found is not None and found.packages not in PACKAGE_SETS:
        found = None
    expected = expected_stamp(packages, root=root)
    installer = Installer(venv, root=root, packages=packages, lock=lock)
    (venv / STAMP).unlink(missing_ok=True)
    if not venv.exists():
        say(f"first run: making .venv with the packages {packages.wording}")
        installer.create()
    elif reason := reason_to_rebuild(venv, found=found, expected=expected):
        say(f"making .venv again ({reason}) with the packages {packages.wording}")
        installer.create()
    else:
        say(f"{packages.lockfile} has changed: updating .venv")
    installer.install()
    write_stamp(venv, expected)


@contextlib.contextmanager
def setup_lock(path: Path, *, poll_s: float = 0.2) -> Iterator[BinaryIO]:
    """Hold the project's set-up lock; waits, and says so once, while another launch has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "r+b", buffering=0) as handle:
        told = False
        while not try_lock(handle):
            if not told:
                handle.seek(0)
                holder = handle.read(32).decode("ascii", "replace").strip() or "unknown"
                message = f"another launch (process {holder}) is setting up: waiting for it"
                print(f"launch: {message}", file=sys.stderr, flush=True)
                told = True
            time.sleep(poll_s)
        handle.seek(0)
        handle.truncate()
        handle.write(f"{os.getpid()}\n".encode("ascii"))
        yield handle


def try_lock(handle: BinaryIO) -> bool:
    """Take the lock on an open file if it is free; closing the file gives it back."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # Far behind the process id, which others want to read: Windows locks are mandatory.
            handle.seek(1 << 20)
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True
