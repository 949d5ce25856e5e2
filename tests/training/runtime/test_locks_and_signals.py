"""One owner per directory; the first signal asks, the second ends; files are served once."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.training.runtime.fake_console import FakeConsole
from tests.training.runtime.faults import CountingOps
from training.runtime.console import ConsoleClose
from training.runtime.locks import RunLock
from training.runtime.signals import StopRequest

HOLD = """
import sys, time
from pathlib import Path
from training.runtime.locks import RunLock
with RunLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
LOOP = """
import sys, time
from pathlib import Path
from training.runtime.signals import StopRequest
with StopRequest(Path(sys.argv[1])) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_second_run_is_told_who_holds_the_directory(tmp_path):
    holder = start(HOLD, tmp_path)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=f"process {holder.pid} on .*--output-dir"):
            RunLock(tmp_path).acquire()
        holder.kill()
        holder.wait()
        with RunLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_a_released_directory_is_free_again(tmp_path):
    for _ in range(3):
        with RunLock(tmp_path):
            pass


def test_another_thread_may_give_a_directory_up(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    thread = threading.Thread(target=lock.release)
    thread.start()
    thread.join()
    with RunLock(tmp_path):
        pass


def test_who_holds_a_directory_need_not_survive_a_power_loss(tmp_path):
    """So no start waits for a disk because of it."""
    lock = RunLock(tmp_path)
    lock._ops = ops = CountingOps()
    with lock:
        assert "replace" in ops.calls
    assert not {"fsync", "sync_dir"} & set(ops.calls)


def test_a_lock_makes_its_directory_durably_and_waits_for_nobody(tmp_path):
    lock = RunLock(tmp_path / "new" / "run")
    lock._ops = ops = CountingOps()
    assert lock._lock.timeout == 0
    with lock:
        assert ops.calls.count("make_dir") == 2


def test_to_ask_whether_a_directory_is_free_takes_and_makes_nothing(tmp_path):
    RunLock(tmp_path / "new").check_free()
    assert not (tmp_path / "new").exists()
    with RunLock(tmp_path):
        with pytest.raises(RuntimeError, match="is in use by process"):
            RunLock(tmp_path).check_free()
    asked = RunLock(tmp_path)
    asked.check_free()  # and keeps nothing, though it still exists
    with RunLock(tmp_path):
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="plays a POSIX file system")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A file that says "taken" would outlive a killed run, so it is no substitute."""
    import fcntl

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(RuntimeError, match="without locks; choose a local directory"):
        RunLock(ram_path).acquire()


def test_a_lock_whose_owner_cannot_be_written_holds(ram_path: Path) -> None:
    (ram_path / "run.lock.json").mkdir()
    with RunLock(ram_path):
        with pytest.raises(RuntimeError, match="has not said who it is"):
            RunLock(ram_path).acquire()
    with RunLock(ram_path):
        pass


def test_an_owner_file_is_named_after_its_lock(ram_path: Path) -> None:
    with RunLock(ram_path, name="other.lock") as lock:
        assert lock.owner_path == ram_path / "other.lock.json"
        assert {"other.lock", "other.lock.json"} <= {p.name for p in ram_path.iterdir()}
        owner = json.loads((ram_path / "other.lock.json").read_text(encoding="utf-8"))
        assert owner["host"] and owner["started_utc"].endswith("+00:00")
        with RunLock(ram_path):
            pass


def test_another_failure_to_lock_is_told_as_it_is(ram_path: Path) -> None:
    (ram_path / "run.lock").mkdir()
    with pytest.raises(OSError, match=r"run\.lock"):
        RunLock(ram_path).acquire()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends_at_once(tmp_path, number):
    child = start(LOOP, tmp_path, 60)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(number)
        assert child.stdout.readline() == "asked\n"
        child.send_signal(number)
        assert child.wait(timeout=10) == 130
    finally:
        child.kill()
        child.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_a_closed_terminal_asks_once_however_often_it_is_said(tmp_path):
    """The shell and the system both send the hangup; the second must not end an unsaved run."""
    own_terminal = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"  # tests by nohup
    child = start(own_terminal + LOOP, tmp_path, 0.5)
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGHUP)
        assert child.stdout.readline() == "asked\n"
        child.send_signal(signal.SIGHUP)
        assert child.wait(timeout=10) == 0
    finally:
        child.kill()
        child.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="plays nohup")
def test_a_run_started_by_nohup_outlives_its_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_request_files_are_served_once(tmp_path):
    with StopRequest(tmp_path) as stop:
        assert not stop.requested and not stop.take_save_request()
        (tmp_path / "SAVE").touch()
        assert stop.take_save_request() and not stop.take_save_request()
        (tmp_path / "STOP").touch()
        assert stop.requested
    with StopRequest(tmp_path) as later:
        assert not later.requested


@pytest.mark.parametrize("ends", ["by a signal", "by itself", "by a failure"])
def test_a_run_that_has_ended_leaves_no_stop_for_the_next(tmp_path, ends):
    """Somebody who asked by a file may not have waited for the end of a long step."""
    try:
        with StopRequest(tmp_path) as stop:
            (tmp_path / "STOP").touch()
            if ends == "by a signal":
                signal.raise_signal(signal.SIGINT)
                assert stop.requested
            if ends == "by a failure":
                raise OSError
    except OSError:
        pass  # what starts it again must not train on against the request
    assert (tmp_path / "STOP").exists() is (ends == "by a failure")


@pytest.mark.skipif(sys.platform == "win32", reason="plays Ctrl+Break by another signal")
def test_ctrl_break_asks_like_ctrl_c(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGUSR1, raising=False)
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest(tmp_path) as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_closing_window_asks_to_stop_and_is_answered_when_the_run_has_ended(tmp_path):
    console, answers = FakeConsole(), []
    stop = StopRequest(tmp_path)
    stop._close = ConsoleClose(stop._receive_close, kernel32=console)
    with stop:
        [handler] = console.handlers
        assert handler(0) == 0 and handler(1) == 0  # Ctrl+C and Ctrl+Break are signals
        assert not stop.requested
        windows = threading.Thread(target=lambda: answers.append(handler(2)))
        windows.start()
        while not stop.requested:
            windows.join(0.01)
        assert windows.is_alive() and not answers  # Windows would end the process now
    windows.join(10)
    assert answers == [1] and console.handlers == []


def test_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(tmp_path):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before
