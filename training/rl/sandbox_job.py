"""What goes into a sandbox and what comes out of it, the same on every system."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, Protocol

from training.rl.sandbox_child import encode

PROGRAM_LIMIT_CHARS = 2**20
ENDED, TIMEOUT, OVERSIZE = "ended", "timeout", "oversize"


class SandboxUnavailable(RuntimeError):
    """This machine cannot isolate foreign code, so none is run; the message says why."""


class SandboxFailure(RuntimeError):
    """The sandbox itself failed, again and again, before any foreign code was reached."""


@dataclass(slots=True, kw_only=True, frozen=True)
class SandboxLimits:
    """What one program may use up besides time."""

    memory_bytes: int = 512 * 2**20
    scratch_bytes: int = 16 * 2**20
    open_files: int = 64

    def rlimits(self, *, limit_s: float) -> dict[str, int]:
        """Names of `resource` and their values for a program that has `limit_s` seconds."""
        return {
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_CPU": math.ceil(limit_s) + 1,
            "RLIMIT_FSIZE": self.scratch_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": 1,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
        }


@dataclass(slots=True, kw_only=True, frozen=True)
class Job:
    """One untrusted program, the function of it to call, and the arguments of each call."""

    program: str
    function: str
    cases: tuple[tuple[Any, ...], ...]

    def as_data(self) -> dict[str, Any]:
        """JSON data for the child; TypeError where an argument is not a plain value."""
        return {
            "program": self.program,
            "function": self.function,
            "cases": [encode(list(arguments)) for arguments in self.cases],
        }


@dataclass(slots=True, kw_only=True, frozen=True)
class Reply:
    """What a program left: bytes that anybody may have written, and how it came to an end.

    `elapsed_s` runs from its start until no process of it was left.
    """

    outcome: str
    elapsed_s: float
    data: bytes

    def lines(self) -> list[bytes]:
        """The complete lines; a last one without its end was cut off and does not count."""
        return self.data.split(b"\n")[:-1]


class Worker(Protocol):
    """Runs one child at a time to its end; WorkerLost when that could not be done."""

    def run(self, payload: bytes, *, limit_s: float) -> Reply:
        """Start a child, give it `payload` (see `payload_of`) and wait at most about `limit_s`
        seconds."""
        ...

    def close(self) -> None:
        """End whatever runs; may be called again."""
        ...


class WorkerLost(Exception):
    """A worker died or fell silent over a job; it can be used again."""


def payload_of(job: Job, *, lock: dict[str, Any]) -> bytes:
    """What the child reads."""
    return json.dumps({**job.as_data(), "lock": lock}).encode("ascii")
