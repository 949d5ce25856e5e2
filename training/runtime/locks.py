"""One process per run directory, by an operating-system lock.

The system gives the lock back when its holder dies, however it dies; a file with a process number
in it would not. Who holds it is written beside the lock, for the message only.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import filelock

from training.runtime.atomic_io import FileOps, make_dirs, read_file, replace_file
from training.runtime.redact import Redactor

RUN_LOCK_NAME = "run.lock"
CHECKPOINT_LOCK_NAME = "checkpoints.lock"
OWNER_LIMIT_BYTES = 2**16
# What a file system says that has none, or a network one whose lock service does not run.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})


class RunLock:
    """Holds `<directory>/<name>` while it is entered; the directory is made if it is missing.

    RuntimeError when another process has it: pid, host, start time and command of that process.
    """

    def __init__(self, directory: Path, *, name: str = RUN_LOCK_NAME) -> None:
        self.directory = directory
        # Runs with output directories of their own may share one of checkpoints by mistake.
        shared = name == CHECKPOINT_LOCK_NAME
        self._flags = "--checkpoint-dir" if shared else "--output-dir and --checkpoint-dir"
        self.owner_path = directory / f"{name}.json"
        # No fall back to a lock that is a mere file: it would outlive a killed holder.
        self._lock = filelock.FileLock(
            directory / name, timeout=0, thread_local=False, fallback_to_soft=False
        )
        self._ops = FileOps()

    def check_free(self) -> None:
        """RuntimeError if another process has it; makes nothing and holds nothing.

        For a start that will be refused anyway, before it builds a model beside the one that
        trains. It decides nothing: whoever acquires the lock has it.
        """
        if Path(self._lock.lock_file).exists():
            self._take()
            self._lock.release()

    def acquire(self) -> None:
        """RuntimeError if the directory is taken or its file system has no locks; OSError else."""
        make_dirs(self._ops, self.directory)
        self._take()
        try:
            replace_file(self._ops, self.owner_path, _describe_self(), durable=False)
        except OSError:
            # A full disk must not stop a run that may be about to free it; the lock itself holds.
            pass

    def _take(self) -> None:
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise RuntimeError(
                f"{self.directory} is in use by {self._describe_owner()}; stop that run first or "
                f"choose another {self._flags}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise RuntimeError(
                f"{self.directory} is on a file system without locks; choose a local directory"
            ) from None

    def release(self) -> None:
        """Remove the note on the holder, then give the lock back; no error if the note is gone
        already."""
        try:
            self.owner_path.unlink()
        except OSError:
            pass
        self._lock.release()

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(read_file(self._ops, self.owner_path, limit=OWNER_LIMIT_BYTES))
            return (
                f"process {owner['pid']} on {owner['host']} since {owner['started_utc']} "
                f"({owner['command']})"
            )
        except (OSError, ValueError, KeyError, TypeError):
            return "another process that has not said who it is"


def _describe_self() -> bytes:
    redactor = Redactor.from_environment(os.environ)
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(redactor.clean_argv(sys.argv)),
    }
    return (json.dumps(owner) + "\n").encode()
