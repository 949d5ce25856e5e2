"""Forks children that save under strace: killed at a system call, or watched.

Run as a program by test_strace.py, with torch loaded once for all children. A child stops itself
when all that comes before the save is done; strace attaches to it, and it goes on. Prints a line
of JSON: how many system calls were hit in each suite, or the calls of one save in their order.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from tests.training.runtime.faults import FINGERPRINT, assert_is_example, example, save_steps
from tests.training.runtime.protocol_mutants import MUTANTS
from training.runtime.atomic_io import FileOps
from training.runtime.checkpoint import CheckpointStore

# Creating, opening and closing files lie between these, so each of their states is hit as well.
MUTATING = (
    "mkdir,mkdirat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,rmdir,"
    "ftruncate"
)
KILLED_AT = ("mkdir", "write", "fsync", "rename", "unlink", "rmdir")  # strace counts each alone
WATCHED = f"{MUTATING},openat,close"
SET_PTRACER = 0x59616D61
ANYBODY = ctypes.c_ulong(-1).value


def store_of(directory: Path, *, broken: str = "") -> CheckpointStore:
    store_type, ops = MUTANTS[broken]() if broken else (CheckpointStore, FileOps())
    return store_type(directory, max_checkpoints=2, fingerprint=FINGERPRINT, ops=ops)


def save_third(directory: Path, *, broken: str = "") -> None:
    """The third save, which deletes the first; stops when only that is left to do."""
    store = store_of(directory, broken=broken)
    store.load_newest()
    os.kill(os.getpid(), signal.SIGSTOP)
    store.save(3, *example(3), block=True)
    os.write(1, b"acknowledged\n")
    store.close()


def resume_damaged(directory: Path) -> None:
    store = store_of(directory)
    store.open()
    os.kill(os.getpid(), signal.SIGSTOP)
    store.load_newest()
    store.close()


def fork_stopped(body, directory: Path) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctypes.CDLL(None).prctl(SET_PTRACER, ANYBODY, 0, 0, 0)
            body(directory)
            status = 0
        except BaseException:  # a forked child must never return into the parent's stack
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status), status
    return child


def go_on_traced(child: int, *options: str) -> int:
    """Wait status of a stopped child that continues under strace."""
    command = ["strace", "-f", *options, "-p", str(child)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    assert "attached" in first, first
    os.kill(child, signal.SIGCONT)
    tracer.stderr.read()
    tracer.wait()
    return os.waitpid(child, 0)[1]


def prepare(directory: Path, *, damage: bool) -> Path:
    save_steps(directory, 1, 2, keep=2)
    if damage:
        (directory / "checkpoint_step_00000002" / "state.json").unlink()
    return directory


def kill_at_every_call(home: Path, *, damage: bool) -> int:
    """SIGKILL at the first, second, ... of each kind of call; how many were hit."""
    hit = 0
    for name in KILLED_AT:
        number, killed = 0, True
        while killed:
            number += 1
            directory = prepare(home / f"{name}{number}", damage=damage)
            child = fork_stopped(resume_damaged if damage else save_third, directory)
            inject = f"--inject={name}:signal=KILL:when={number}"
            status = go_on_traced(child, "-e", f"trace={name}", inject, "-o", os.devnull)
            check_survivor(directory, damage=damage)
            killed = os.WIFSIGNALED(status)
            assert killed or os.WEXITSTATUS(status) == 0
            hit += killed
    return hit


def check_survivor(directory: Path, *, damage: bool) -> None:
    store = store_of(directory)
    found = store.load_newest()
    assert found is not None and found.step >= (1 if damage else 2), directory
    assert_is_example(found)
    assert store.quarantine_count <= damage
    store.save(9, *example(9), block=True)
    again = store.load_newest()
    assert again is not None and again.step == 9
    store.close()


def watch(home: Path, broken: str, *options: str) -> list[list[str]]:
    """[call, path, second path] of everything one save did inside its directory, in order."""
    directory, log = prepare(home / f"watched{broken}", damage=False), home / "log"
    child = fork_stopped(functools.partial(save_third, broken=broken), directory)
    go_on_traced(child, "-y", "-s", "64", "-e", f"trace={WATCHED}", *options, "-o", str(log))
    calls = []
    for line in log.read_text(encoding="utf-8").splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)\) += (-?\d+)", line)
        if match is None or match[3].startswith("-"):
            continue
        name, given = match[1], match[2]
        if name == "write" and "acknowledged" in given:
            calls.append(["acknowledged"])
            continue
        if name == "openat" and "O_CREAT" not in given:
            continue
        if name == "openat":
            given = given + f'"{match[0].rpartition("<")[2].rstrip(">")}"'
        paths = re.findall(rf'[<"]({re.escape(str(directory))}[^">]*)[">]', given)
        if paths:
            inside = [os.path.relpath(path, directory) for path in dict.fromkeys(paths)]
            calls.append([name, *inside])
    return calls


if __name__ == "__main__":
    mode, place = sys.argv[1], Path(sys.argv[2])
    if mode == "kill":
        result = {
            "save": kill_at_every_call(place / "save", damage=False),
            "quarantine": kill_at_every_call(place / "quarantine", damage=True),
        }
    else:
        fail_first = ("--inject=fsync:error=EIO:when=1",)
        result = {
            name: watch(place, name, *(fail_first if name.endswith("error") else ()))
            for name in ("", *MUTANTS)
        }
        result["an error"] = watch(place / "failing", "", *fail_first)
    print(json.dumps(result))
