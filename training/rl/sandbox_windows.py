"""Isolation on Windows: an AppContainer without any capability, inside a Job Object.

The AppContainer token (low integrity, no capability) has no network, no other process and no file
but those that were granted to all application packages or to this container; the job ends every
process in it when it is closed, admits one process, and limits memory and CPU time. The child is
created suspended, put into the job and only then let run; it inherits three handles and nothing
else. After "AppContainer isolation" and "Job Objects" of the Windows documentation.

The order of calls is proved here by a stand-in for the system (`WindowsApi`); on a real Windows it
has not been run yet. If one call fails, nothing is run: there is no weaker mode.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from training.rl.sandbox_job import (
    ENDED,
    OVERSIZE,
    TIMEOUT,
    Reply,
    SandboxLimits,
    SandboxUnavailable,
    WorkerLost,
)
from training.rl.sandbox_zygote import REPLY_LIMIT_BYTES

CHILD = Path(__file__).resolve().parent / "sandbox_child.py"
CONTAINER = "SIGMA.Sandbox"
GRACE_S = 10.0
_CHUNK = 2**16


class WindowsChild(Protocol):
    """A suspended process in a job, and its two pipes."""

    to_child: BinaryIO
    from_child: BinaryIO

    def resume(self) -> None:
        """Let the child run: until then not one instruction of it has been executed."""
        ...

    def terminate(self) -> None:
        """End every process of the job; returns when none is left. OSError if that fails."""
        ...

    def close(self) -> None:
        """Release pipes and handles; the job ends every process that is still in it."""
        ...


class WindowsApi(Protocol):
    """The few things that are asked of Windows; every method raises OSError when it fails."""

    def prepare_container(self, name: str, readable: list[str]) -> bytes:
        """The container's security identifier; reading of these is granted where we may."""
        ...

    def start(
        self,
        command: list[str],
        *,
        container: bytes,
        memory_bytes: int,
        cpu_s: int,
        environment: dict[str, str],
    ) -> WindowsChild:
        """A suspended child in the container and in a job with these limits, with this environment
        alone."""
        ...


def child_command() -> list[str]:
    """How the child is started; SandboxUnavailable in a frozen program.

    That has no interpreter but itself, and its folder, which the child would have to read, holds
    the user's runs as well.
    """
    if getattr(sys, "frozen", False):
        raise SandboxUnavailable(
            f"{Path(sys.executable).name} has no code tasks: it has no Python to run programs with"
        )
    python = getattr(sys, "_base_executable", None) or sys.executable
    return [python, "-I", "-S", "-B", "-X", "utf8", str(CHILD)]


def readable_folders(command: list[str]) -> list[str]:
    """What the child must be able to read: Python's folder and its own program."""
    return sorted({str(Path(command[0]).parent), sys.base_prefix, str(CHILD)})


class WindowsWorker:
    """Runs one child at a time. Reading and writing are threads: pipes here know no waiting."""

    def __init__(
        self, api: WindowsApi, *, command: list[str], container: bytes, limits: SandboxLimits
    ) -> None:
        self._api, self._command, self._container = api, command, container
        self._limits = limits

    def run(self, payload: bytes, *, limit_s: float) -> Reply:
        """Run one child on `payload`; WorkerLost if it could not be started or ended."""
        begun = time.monotonic()
        try:
            child = self._api.start(
                self._command,
                container=self._container,
                memory_bytes=self._limits.memory_bytes,
                cpu_s=math.ceil(limit_s) + 1,
                environment=_environment(),
            )
        except OSError as error:
            raise WorkerLost(f"the child did not start: {error}") from error
        try:
            outcome, data = _exchange(child, payload, deadline=begun + limit_s)
        except OSError as error:
            raise WorkerLost(f"the child could not be ended: {error}") from error
        finally:
            child.close()
        return Reply(outcome=outcome, elapsed_s=time.monotonic() - begun, data=data)

    def close(self) -> None:
        """Nothing outlives a run."""


def _environment() -> dict[str, str]:
    """What a Windows program cannot start without.

    CreateProcess asks for LOCALAPPDATA in every container (error 203); the user's is not told.
    """
    names = ("SYSTEMROOT", "WINDIR")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"LOCALAPPDATA": kept.get("SYSTEMROOT", "C:\\")}


def _exchange(child: WindowsChild, payload: bytes, *, deadline: float) -> tuple[str, bytes]:
    """Let the child run, feed it, collect its reply; it is dead when this returns or raises."""
    reply, oversize = bytearray(), threading.Event()

    def feed() -> None:
        try:
            with child.to_child as pipe:
                pipe.write(payload)
        except OSError:
            return  # it ended without reading all of it

    def collect() -> None:
        try:
            while part := child.from_child.read(_CHUNK):
                reply.extend(part)
                if len(reply) > REPLY_LIMIT_BYTES:
                    oversize.set()
                    return
        except OSError:
            return  # a broken pipe is the end of the reply

    writer = threading.Thread(target=feed, daemon=True)
    reader = threading.Thread(target=collect, daemon=True)
    try:
        child.resume()
        writer.start()
        reader.start()
        reader.join(max(0.0, deadline - time.monotonic()))
        ran_out = reader.is_alive()
    finally:
        child.terminate()
    for thread in (reader, writer):
        thread.join(GRACE_S)
        if thread.is_alive():
            raise OSError("a pipe stayed open after the job had ended")
    if oversize.is_set():
        return OVERSIZE, bytes(reply[:REPLY_LIMIT_BYTES])
    return (TIMEOUT if ran_out else ENDED), bytes(reply)


class WindowsIsolation:
    """Children in an AppContainer; the container is made, or found, when this is."""

    kind = "appcontainer"

    def __init__(self, limits: SandboxLimits, *, api: WindowsApi | None = None) -> None:
        self.required_locks: set[str] = set()  # all of them are taken around the child
        self._limits = limits
        self._api = api or _system()
        self._command = child_command()
        try:
            folders = readable_folders(self._command)
            self._container = self._api.prepare_container(CONTAINER, folders)
        except OSError as error:
            raise SandboxUnavailable(f"no AppContainer can be had: {error}") from error

    def lock(self, *, limit_s: float) -> dict[str, Any]:
        return {}

    def worker(self) -> WindowsWorker:
        return WindowsWorker(
            self._api, command=self._command, container=self._container, limits=self._limits
        )


def _system() -> WindowsApi:
    if sys.platform == "win32":
        from training.rl.windows_api import SystemApi

        return SystemApi()
    raise SandboxUnavailable("AppContainers exist on Windows only")
