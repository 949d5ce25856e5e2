"""Isolation on Linux: bubblewrap where user namespaces are to be had, else the kernel's own locks.

Both run the same child, which takes Landlock, seccomp, capabilities and rlimits from itself.
Bubblewrap adds namespaces around it: no network device, no other process, no host file but the
interpreter and the system's libraries, a scratch directory of limited size. Where namespaces are
denied (many containers, hardened kernels) the child's own locks stand alone: then it can write no
file at all, but learns from `stat` whether a path exists. Zygotes start and bury the children.
"""

from __future__ import annotations

import os
import platform
import re
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from training.rl.sandbox_job import (
    ENDED,
    OVERSIZE,
    TIMEOUT,
    Reply,
    SandboxLimits,
    SandboxUnavailable,
    WorkerLost,
)
from training.rl.sandbox_seccomp import CAPSET, seccomp_filter
from training.rl.sandbox_zygote import ANSWER, REQUEST

HERE = Path(__file__).resolve().parent
CHILD, ZYGOTE = HERE / "sandbox_child.py", HERE / "sandbox_zygote.py"
PYTHON_FLAGS = ("-I", "-S", "-B", "-X", "utf8")
SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/usr/lib32", "/lib", "/lib64", "/lib32")
LOADER_FILES = ("/etc/ld.so.cache",)
SCRATCH = "/tmp"
CHILD_INSIDE = "/sandbox_child.py"  # inside, nothing tells where on the host the project lies
NOBODY = "65534"
SCRATCH_SIZE_SINCE = (0, 7)  # the first bubblewrap that can limit a tmpfs
GRACE_S = 10.0  # a zygote that is silent for so long after the limit is replaced
PROBE_LIMIT_S = 20.0
OUTCOMES = (ENDED, TIMEOUT, OVERSIZE)


def interpreter() -> str:
    """The Python under any virtual environment: the child needs none of its packages."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def readable_paths() -> list[str]:
    """What the interpreter needs in order to run and to import the standard library."""
    wanted = [interpreter(), *SYSTEM_LIBRARIES, *LOADER_FILES, sysconfig.get_path("stdlib")]
    wanted += [f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/{sys.platlibdir}"]
    return [path for path in dict.fromkeys(wanted) if os.path.exists(path)]


def lock_settings(limits: SandboxLimits, *, limit_s: float, bubblewrap: str | None) -> dict:
    """What the child takes from itself; ValueError on a machine without a list of calls."""
    machine = platform.machine()
    has_scratch = bubblewrap is not None and can_limit_scratch(bubblewrap)
    return {
        "limits": limits.rlimits(limit_s=limit_s),
        "readable": [*readable_paths(), "/dev/urandom"],
        "writable": ["/dev/null", *([SCRATCH] if has_scratch else [])],
        "landlock_required": bubblewrap is None,
        "seccomp": seccomp_filter(machine).hex(),
        "capset": CAPSET[machine],
    }


def find_bubblewrap() -> str:
    """Path of `bwrap`; SandboxUnavailable if there is none."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxUnavailable("bubblewrap (bwrap) is not installed")
    return found


def can_limit_scratch(bubblewrap: str) -> bool:
    run = subprocess.run([bubblewrap, "--version"], capture_output=True, text=True, timeout=20)
    version = re.search(r"(\d+)\.(\d+)", run.stdout)
    return version is not None and (int(version[1]), int(version[2])) >= SCRATCH_SIZE_SINCE


def bubblewrap_command(bubblewrap: str, limits: SandboxLimits) -> list[str]:
    """`bwrap` and its arguments, to be followed by the child's command.

    bwrap's root, /dev and /tmp are memory without a limit unless they are made read-only.
    """
    command = [bubblewrap, "--unshare-all", "--unshare-user", "--die-with-parent"]
    command += ["--new-session", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"]
    command += ["--uid", NOBODY, "--gid", NOBODY]
    # First of all, or it would hide an interpreter that lies beneath it.
    if can_limit_scratch(bubblewrap):
        command += ["--size", str(limits.scratch_bytes)]
    command += ["--tmpfs", SCRATCH]
    for path in sorted(readable_paths()):  # a directory before what lies in it
        if os.path.islink(path) and path in SYSTEM_LIBRARIES:
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind", path, path]
    for device in ("/dev/null", "/dev/urandom"):
        command += ["--dev-bind", device, device]
    if not can_limit_scratch(bubblewrap):
        command += ["--remount-ro", SCRATCH]
    command += ["--ro-bind", str(CHILD), CHILD_INSIDE]
    return [*command, "--remount-ro", "/", "--chdir", SCRATCH, "--"]


def check_bubblewrap(command: list[str]) -> None:
    """SandboxUnavailable with bwrap's own words if it cannot start the interpreter."""
    trial = [*command, interpreter(), *PYTHON_FLAGS, "-c", "pass"]
    try:
        run = subprocess.run(trial, capture_output=True, text=True, timeout=PROBE_LIMIT_S, env={})
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxUnavailable(f"bubblewrap does not start: {error}") from error
    if run.returncode != 0:
        words = run.stderr.strip().splitlines() or [f"exit code {run.returncode}"]
        raise SandboxUnavailable(f"bubblewrap cannot isolate: {words[-1]}")


class ZygoteWorker:
    """A zygote of its own and the pipes to it; starts another one when it is lost."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, payload: bytes, *, limit_s: float) -> Reply:
        """Run one child on `payload`; WorkerLost if the zygote dies or is silent too long."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + limit_s + GRACE_S
        try:
            process.stdin.write(REQUEST.pack(limit_s, len(payload)) + payload)
            process.stdin.flush()
            head = self._read(process.stdout.fileno(), ANSWER.size, deadline)
            outcome, elapsed_s, size = ANSWER.unpack(head)
            data = self._read(process.stdout.fileno(), size, deadline)
        except (OSError, EOFError) as error:
            self.close()
            raise WorkerLost(str(error)) from error
        except BaseException:
            self.close()  # Ctrl+C between question and answer: the next one must not be this one's
            raise
        return Reply(outcome=OUTCOMES[outcome], elapsed_s=elapsed_s, data=data)

    def close(self) -> None:
        """End the zygote; whatever it runs dies with it."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.close()
        except OSError:
            pass
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def pid(self) -> int | None:
        """Process number of the zygote, None before the first run."""
        return self._process.pid if self._process is not None else None

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [interpreter(), *PYTHON_FLAGS, str(ZYGOTE), *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
        return self._process

    @staticmethod
    def _read(descriptor: int, size: int, deadline: float) -> bytes:
        parts: list[bytes] = []
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while size:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not poll.poll(remaining * 1000):
                raise TimeoutError("the zygote is silent")
            part = os.read(descriptor, size)
            if not part:
                raise EOFError("the zygote ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class LinuxIsolation:
    """How children are started and locked on this machine: `kind` is bubblewrap or landlock."""

    def __init__(self, kind: str, limits: SandboxLimits) -> None:
        if getattr(sys, "frozen", False):
            raise SandboxUnavailable("a frozen program has no Python to run programs with")
        self.kind = kind
        self.required_locks = {"rlimits", "capabilities", "seccomp"}
        self._limits = limits
        self._bubblewrap: str | None = None
        self._command = [interpreter(), *PYTHON_FLAGS, str(CHILD)]
        if kind == "bubblewrap":
            self._bubblewrap = find_bubblewrap()
            wrapped = bubblewrap_command(self._bubblewrap, limits)
            check_bubblewrap(wrapped)
            self._command = [*wrapped, interpreter(), *PYTHON_FLAGS, CHILD_INSIDE]
        else:
            self.required_locks.add("landlock")
        self._settings = lock_settings(limits, limit_s=0.0, bubblewrap=self._bubblewrap)

    def lock(self, *, limit_s: float) -> dict[str, Any]:
        return {**self._settings, "limits": self._limits.rlimits(limit_s=limit_s)}

    def worker(self) -> ZygoteWorker:
        return ZygoteWorker(self._command)
