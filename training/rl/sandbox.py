"""Runs untrusted programs, one fresh isolated process each, or refuses to start.

There is no weaker mode: without isolation by the operating system the code reward does not exist:
what shares a process with untrusted code can be rewritten by it. What comes back is data that the
program may have forged; `verdict.py` decides what it is worth.
"""

from __future__ import annotations

import json
import queue
import socket
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from training.rl.sandbox_job import (
    ENDED,
    Job,
    Reply,
    SandboxFailure,
    SandboxLimits,
    SandboxUnavailable,
    Worker,
    WorkerLost,
    payload_of,
)

KINDS = {"linux": ("bubblewrap", "landlock"), "win32": ("appcontainer",)}
ATTEMPTS = 3
PROBE_LIMIT_S = 20.0
LEAVE_OUT = "leave code tasks out"
MENDS = {
    "linux": "install bubblewrap and allow user namespaces, or use a kernel with Landlock (5.13 or "
    "newer), or ",
    "win32": "start from source, with Python installed for you or for all users and the service of "
    "the Windows firewall running, or ",
}
# Says what it could do that no program may: read a file of ours, start a process, use the network.
# Windows hands out sockets to everybody and refuses the connection, here to a port of the parent.
PROBE = """
def escapes(path, port):
    import os, socket, sys
    def process():
        if sys.platform == "win32":
            import subprocess
            subprocess.Popen([sys.executable, "-c", ""])
        else:
            os.fork() or os._exit(0)
    def network():
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as opened:
            if sys.platform == "win32":
                opened.settimeout(2)
                opened.connect(("127.0.0.1", port))
    found = []
    for name, act in (
        ("file", lambda: open(path).read(1)),
        ("process", process),
        ("network", network),
        ("write", lambda: open(path + ".probe", "x")),
    ):
        try:
            act()
        except OSError:
            continue
        found.append(name)
    return found
"""


class Isolation(Protocol):
    """How one system starts and locks children."""

    kind: str
    required_locks: set[str]

    def lock(self, *, limit_s: float) -> dict[str, Any]:
        """What a child has to lock itself by, as JSON values, before it runs a program of so many
        seconds."""
        ...

    def worker(self) -> Worker:
        """A worker that has started no process yet; the caller closes it."""
        ...


class Sandbox:
    """A number of workers behind one door; `run` may be called from several threads."""

    def __init__(self, isolation: Isolation, *, num_workers: int) -> None:
        self.kind = isolation.kind
        self.num_runs = 0
        self.num_lost_workers = 0
        self._isolation = isolation
        self._workers = [isolation.worker() for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def run(self, job: Job, *, limit_s: float) -> Reply:
        """Run one program; the reply begins with what the program itself wrote.

        TypeError if an argument is not plain, SandboxFailure if the sandbox does not work.
        """
        payload = payload_of(job, lock=self._isolation.lock(limit_s=limit_s))
        worker = self._idle.get()
        try:
            return self._run_on(worker, payload, limit_s)
        finally:
            self._idle.put(worker)

    def run_many(self, jobs: Iterable[Job], *, limit_s: float) -> list[Reply]:
        """Replies in the order of `jobs`, as many at a time as there are workers."""
        with ThreadPoolExecutor(max_workers=len(self._workers)) as threads:
            return list(threads.map(lambda job: self.run(job, limit_s=limit_s), jobs))

    def close(self) -> None:
        """End all workers, and with them what they run."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run_on(self, worker: Worker, payload: bytes, limit_s: float) -> Reply:
        reason = "no attempt was made"
        for _ in range(ATTEMPTS):
            try:
                reply = worker.run(payload, limit_s=limit_s)
            except WorkerLost as error:
                self.num_lost_workers += 1
                reason = str(error)
                continue
            self.num_runs += 1
            if b"\n" in reply.data:
                return self._without_locks(reply)
            if reply.outcome != ENDED:
                return reply  # too slow to have begun: the program had its time
            reason = "the child ended before it had locked itself"
        raise SandboxFailure(f"the sandbox failed {ATTEMPTS} times: {reason}")

    def _without_locks(self, reply: Reply) -> Reply:
        """The reply after its first line, which the child wrote before any foreign code ran."""
        line, _, rest = reply.data.partition(b"\n")
        message = json.loads(line)
        if "refused" in message:
            raise SandboxUnavailable(f"a lock cannot be had: {message['refused']}")
        taken = {name.split()[0] for name in message["locked"]}
        if missing := self._isolation.required_locks - taken:
            raise SandboxUnavailable(f"locks were not taken: {', '.join(sorted(missing))}")
        return Reply(outcome=reply.outcome, elapsed_s=reply.elapsed_s, data=rest)


def open_sandbox(
    *, num_workers: int = 1, limits: SandboxLimits | None = None, kind: str | None = None
) -> Sandbox:
    """The strongest sandbox of this machine, or the one named `kind`; tried before it is returned.

    SandboxUnavailable, in one line with every reason, if there is none.
    """
    reasons: list[str] = []
    for name in KINDS.get(sys.platform, ()) if kind is None else (kind,):
        sandbox = None
        try:
            sandbox = Sandbox(_isolation(name, limits or SandboxLimits()), num_workers=num_workers)
            _probe(sandbox)
            return sandbox
        except (SandboxUnavailable, SandboxFailure, ValueError, OSError) as error:
            reasons.append(f"{name}: {error}")
            if sandbox is not None:
                sandbox.close()
    why = "; ".join(reasons) or f"{sys.platform} has none that SIGMA knows"
    mend = MENDS.get(sys.platform, "") + LEAVE_OUT
    raise SandboxUnavailable(f"the code reward refuses to start without a sandbox ({why}): {mend}")


def _isolation(kind: str, limits: SandboxLimits) -> Isolation:
    if sys.platform == "linux":
        from training.rl.sandbox_linux import LinuxIsolation

        return LinuxIsolation(kind, limits)
    if sys.platform == "win32":
        from training.rl.sandbox_windows import WindowsIsolation

        return WindowsIsolation(limits)
    raise SandboxUnavailable(f"{sys.platform} has no {kind}")


def _probe(sandbox: Sandbox) -> None:
    """SandboxUnavailable unless a program runs in here and can do nothing it must not."""
    path = str(Path(__file__).resolve())
    with ExitStack() as stack:
        port = 0
        if sys.platform == "win32":
            port = stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        job = Job(program=PROBE, function="escapes", cases=((path, port),))
        reply = sandbox.run(job, limit_s=PROBE_LIMIT_S)
    if reply.lines() != [b'{"value": []}']:
        raise SandboxUnavailable(f"its probe said {reply.data[:200]!r} ({reply.outcome})")
