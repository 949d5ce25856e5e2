"""Suite R9: launch races have one owner; a killed owner's lock is free, children or not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training.runtime.locks import RunLock
from training.runtime.signals import StopRequest

ROOT = Path(__file__).parents[3]
RACER = """
import sys, time
from pathlib import Path
from training.runtime.locks import RunLock
for line in sys.stdin:
    start, directory = line.split()
    while time.time() < float(start):
        pass
    lock = RunLock(Path(directory))
    try:
        lock.acquire()
    except RuntimeError as error:
        print("refused", error, flush=True)
    else:
        print("owner", flush=True)
        sys.stdin.readline()
        lock.release()
        print("released", flush=True)
        continue
    sys.stdin.readline()
    print("released", flush=True)
"""
PARENT = """
import os, sys, time
from pathlib import Path
from training.runtime.locks import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
if os.fork() == 0:
    print(os.getpid(), flush=True)  # only now what is done after a fork has been done
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def ask(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def race(racers: list[subprocess.Popen[str]], directory: Path) -> list[str]:
    """Answers of processes that try to own a directory in the same instant."""
    begin = time.time() + 0.01
    for racer in racers:
        ask(racer, f"{begin} {directory}")
    answers = [answer(racer) for racer in racers]
    for racer in racers:
        ask(racer, "done")
    assert [answer(racer) for racer in racers] == ["released"] * len(racers)
    return answers


def test_a_race_of_processes_has_one_owner(ram_path: Path) -> None:
    """500 rounds of 2 to 8 processes, most in a directory nobody has made."""
    racers, draw = [start(RACER) for _ in range(8)], random.Random(0)
    try:
        for index in range(500):
            chosen = draw.sample(racers, draw.choice([2, 2, 3, 3, 4, 8]))
            answers = race(chosen, ram_path / f"run_{index % 400}")
            assert answers.count("owner") == 1, answers
            assert sum(text.startswith("refused") for text in answers) == len(chosen) - 1
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()


def test_a_lock_that_does_not_lock_is_noticed(ram_path: Path) -> None:
    """Negative control: with a look before the leap instead of a lock, a race has two owners."""
    look = """
class RunLock(RunLock):
    def acquire(self):
        path = self.directory / "pid"
        if path.exists():
            raise RuntimeError("taken")
        time.sleep(0.002)
        self.directory.mkdir(parents=True, exist_ok=True)
        path.touch()
    def release(self):
        (self.directory / "pid").unlink(missing_ok=True)
for line"""
    racers = [start(RACER.replace("\nfor line", look)) for _ in range(4)]
    try:
        rounds = [race(racers, ram_path / f"run_{index}") for index in range(20)]
    finally:
        for racer in racers:
            racer.kill()
            racer.communicate()
    assert any(answers.count("owner") > 1 for answers in rounds)


@pytest.mark.skipif(sys.platform == "win32", reason="forks and sends SIGKILL")
def test_a_child_that_outlives_a_killed_owner_does_not_hold_the_lock(ram_path: Path) -> None:
    """Data-loading workers are forked while the lock is held."""
    owner = start(PARENT, str(ram_path))
    child = int(answer(owner))
    try:
        with pytest.raises(RuntimeError, match=f"process {owner.pid} on"):
            RunLock(ram_path).acquire()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        os.kill(child, 0)  # it lives on
        with RunLock(ram_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        owner.kill()
        owner.communicate()


def test_the_command_of_the_owner_is_shown_without_its_secrets(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--hf-token", "hf_abcdefgh", "--steps", "5"])
    with RunLock(ram_path):
        with pytest.raises(RuntimeError, match=r"train\.py --hf-token \[redacted\] --steps 5"):
            RunLock(ram_path).acquire()
        owner = json.loads((ram_path / "run.lock.json").read_text(encoding="utf-8"))
        assert owner["pid"] == os.getpid()
    assert not (ram_path / "run.lock.json").exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{}", b'{"pid": 1'])
def test_an_owner_file_that_says_nothing_is_no_obstacle(ram_path: Path, content: bytes) -> None:
    with RunLock(ram_path):
        (ram_path / "run.lock.json").write_bytes(content)
        with pytest.raises(RuntimeError, match="another process that has not said who it is"):
            RunLock(ram_path).acquire()


def test_a_request_file_that_cannot_be_removed_is_served_once(ram_path: Path) -> None:
    """A directory named SAVE cannot be unlinked, like a file on a read-only share."""
    with StopRequest(ram_path) as stop:
        (ram_path / "SAVE").mkdir()
        assert [stop.take_save_request() for _ in range(3)] == [True, False, False]
        os.utime(ram_path / "SAVE", ns=(1, 1))
        assert stop.take_save_request()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_stop_file_does_not_count_as_a_first_signal(ram_path: Path) -> None:
    with StopRequest(ram_path) as stop:
        (ram_path / "STOP").touch()
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # the first signal: must not end the process
        assert stop.requested
