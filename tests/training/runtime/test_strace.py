"""Suite R1 at the level of system calls: their order as strace sees it, SIGKILL at each of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.rl.boxes import TOOLS_REQUIRED
from tests.training.runtime.protocol_mutants import MUTANTS

ROOT = Path(__file__).parents[3]
NEW, TEMPORARY = "checkpoint_step_00000003", "MANIFEST.json.tmp"
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")

Calls = list[list[str]]


def drive(mode: str, directory: Path) -> Any:
    if shutil.which("strace") is None and os.environ.get(TOOLS_REQUIRED) != "1":
        pytest.skip("no strace")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.runtime.strace_driver", mode, str(directory)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calls]:
    """The system calls of a save, by broken protocol ("" = the real one)."""
    return drive("watch", tmp_path_factory.mktemp("strace"))


def place(calls: Calls, *call: str, after: int = -1) -> int:
    """Where a call is first made after another one; AssertionError if it is not."""
    for number, made in enumerate(calls):
        if number > after and made == list(call):
            return number
    raise AssertionError(f"{call} is not made after call {after}")


def last(calls: Calls, *call: str) -> int:
    return max((number for number, made in enumerate(calls) if made == list(call)), default=-1)


def check_order(calls: Calls) -> None:
    """Steps 2 to 10 of the protocol of saving, as the system was asked for them."""
    made = place(calls, "mkdir", NEW)
    flushed = made
    for file in FILES:
        path = f"{NEW}/{file}"
        created = place(calls, "openat", path, after=made)
        assert calls[created - 1][0] != "rename"
        assert last(calls, "write", path) > created
        flushed = max(flushed, place(calls, "fsync", path, after=last(calls, "write", path)))
    names = place(calls, "fsync", NEW, after=flushed)
    marked = place(calls, "openat", f"{NEW}/{TEMPORARY}", after=names)
    temporary = f"{NEW}/{TEMPORARY}"
    written = last(calls, "write", temporary)
    assert written > marked
    durable = place(calls, "fsync", temporary, after=written)
    commit = place(calls, "rename", temporary, f"{NEW}/MANIFEST.json", after=durable)
    parent = place(calls, "fsync", ".", after=place(calls, "fsync", NEW, after=commit))
    # Read back: each file is opened again, and so closed again, before anything older goes.
    read = max(place(calls, "close", f"{NEW}/{file}", after=parent) for file in FILES)
    deleted = [number for number, call in enumerate(calls) if call[0] in ("unlink", "rmdir")]
    assert calls[deleted[0]] == ["unlink", "checkpoint_step_00000001/MANIFEST.json"]
    assert deleted[0] > read
    assert place(calls, "acknowledged") > read
    changed = {call[1].partition("/")[0] for call in calls if call[0] in ("write", "rename")}
    assert changed == {NEW}


def test_a_save_asks_for_its_steps_in_their_order(watched: dict[str, Calls]) -> None:
    check_order(watched[""])


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != "ignored-fsync-error"])
def test_each_broken_protocol_is_seen(watched: dict[str, Calls], name: str) -> None:
    assert ["acknowledged"] in watched[name]  # it runs, and nobody complains
    with pytest.raises(AssertionError):
        check_order(watched[name])


def test_after_a_failed_fsync_nothing_is_committed(watched: dict[str, Calls]) -> None:
    """EIO from the first fsync: no commit, no word of success, no second fsync of that file."""
    calls = watched["an error"]
    assert ["acknowledged"] not in calls and all(call[0] != "rename" for call in calls)
    assert not any(call[0] == "fsync" and call[1].startswith(NEW) for call in calls)
    broken = watched["ignored-fsync-error"]
    assert ["acknowledged"] in broken and any(call[0] == "rename" for call in broken)


def test_sigkill_at_every_mutating_system_call_loses_nothing(ram_path: Path) -> None:
    hit = drive("kill", ram_path)
    assert hit["save"] > 20 and hit["quarantine"] >= 5, hit
