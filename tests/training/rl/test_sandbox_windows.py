"""The Windows sandbox with a stand-in for Windows: order of calls, limits, sizes."""

import ctypes
import io
import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from training.rl import sandbox_windows, windows_api
from training.rl.sandbox import PROBE, Sandbox, open_sandbox
from training.rl.sandbox_child import encode, run_program
from training.rl.sandbox_job import Job, SandboxFailure, SandboxLimits, SandboxUnavailable
from training.rl.sandbox_windows import WindowsIsolation, child_command

LOCKED = b'{"locked": []}\n'


class FakeChild:
    """A child that answers with fixed bytes, or hangs until its job is ended."""

    def __init__(self, calls, answer, *, hangs=False, immortal=False):
        self.calls, self.immortal = calls, immortal
        self.to_child = io.BytesIO()
        reading, self._writing = os.pipe()
        self.from_child = os.fdopen(reading, "rb", 0)
        self._answer, self._hangs = answer, hangs
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._ended = threading.Event()

    def _write(self):
        with os.fdopen(self._writing, "wb", 0) as pipe:
            try:
                pipe.write(self._answer)
            except BrokenPipeError:
                return
            if self._hangs:
                self._ended.wait(60)

    def resume(self):
        self.calls.append("resume")
        self._writer.start()

    def terminate(self):
        self.calls.append("terminate")
        self._ended.set()
        if self.immortal:
            raise OSError("the process is still there")

    def close(self):
        self.calls.append("close")


class FakeWindows:
    def __init__(self, **child):
        self.calls, self.child, self.started = [], child, []

    def prepare_container(self, name, readable):
        self.calls.append(("container", name))
        return b"sid"

    def start(self, command, **settings):
        self.started.append((command, settings))
        self.calls.append("start suspended")
        return FakeChild(self.calls, **self.child)


def run(api, *, limit_s=20.0):
    with Sandbox(WindowsIsolation(SandboxLimits(), api=api), num_workers=1) as sandbox:
        return sandbox.run(Job(program="p", function="f", cases=((1,),)), limit_s=limit_s)


def test_a_child_is_contained_before_it_runs_and_ended_before_it_is_believed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("SYSTEMROOT", "C:\\Windows")
    api = FakeWindows(answer=LOCKED + b'{"value": 1}\n')
    reply = run(api)
    assert reply.lines() == [b'{"value": 1}'] and reply.outcome == "ended"
    expected = ["start suspended", "resume", "terminate", "close"]
    assert api.calls == [("container", "SIGMA.Sandbox"), *expected]
    settings = api.started[0][1]
    assert settings["container"] == b"sid" and settings["cpu_s"] == 21
    assert settings["memory_bytes"] == SandboxLimits().memory_bytes
    assert settings["environment"].keys() <= {"SYSTEMROOT", "WINDIR", "LOCALAPPDATA"}


def test_an_endless_child_is_ended_at_the_limit():
    api = FakeWindows(answer=LOCKED, hangs=True)
    assert run(api, limit_s=0.2).outcome == "timeout"
    assert api.calls[-2:] == ["terminate", "close"]


def test_a_reply_without_end_is_cut():
    reply = run(FakeWindows(answer=LOCKED + b"x" * 2**22))
    assert reply.outcome == "oversize" and len(reply.data) <= 2**20


def test_a_child_that_cannot_be_ended_is_no_verdict():
    with pytest.raises(SandboxFailure, match="could not be ended"):
        run(FakeWindows(answer=LOCKED, immortal=True))


def test_no_container_means_no_sandbox():
    class Refusing(FakeWindows):
        def prepare_container(self, name, readable):
            raise OSError("access denied")

    with pytest.raises(SandboxUnavailable, match="no AppContainer can be had: access denied"):
        WindowsIsolation(SandboxLimits(), api=Refusing(answer=b""))


def test_a_child_that_cannot_be_started_is_tried_again_and_then_a_failure():
    class Broken(FakeWindows):
        def start(self, command, **settings):
            self.calls.append("start")
            raise OSError("no memory")

    api = Broken(answer=b"")
    with pytest.raises(SandboxFailure, match="no memory"):
        run(api)
    assert api.calls.count("start") == 3


def test_a_frozen_program_says_that_it_has_no_code_tasks(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "eco_train.exe"))
    with pytest.raises(SandboxUnavailable, match=r"eco_train\.exe has no code tasks"):
        child_command()


def refusal(*_, **__):
    raise PermissionError(13, "Permission denied")


class ClosedSocket(socket.socket):
    """What a container without capabilities gets: a socket that connects to nothing."""

    connect = refusal


@pytest.fixture
def probe(monkeypatch, tmp_path):
    """The probe as the child would run it on Windows; called with the holes that are left open."""
    ours = tmp_path / "ours.py"
    ours.write_text("x")

    def run_probe(*holes):
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.delattr(os, "fork", raising=False)
        started = (lambda *_: None) if "process" in holes else refusal
        monkeypatch.setattr(subprocess, "Popen", started)
        if "network" not in holes:
            monkeypatch.setattr(socket, "socket", ClosedSocket)
        path = ours if "file" in holes else tmp_path / "missing" / "ours.py"
        with listener:
            port = listener.getsockname()[1]
            reading, writing = os.pipe()
            job = {"program": PROBE, "function": "escapes", "cases": [encode([str(path), port])]}
            run_program(job, writing)
            os.close(writing)
            with os.fdopen(reading, "rb") as pipe:
                return json.loads(pipe.read())

    listener = socket.create_server(("127.0.0.1", 0))
    return run_probe


def test_the_probe_asks_for_what_a_container_refuses(probe):
    """No fork, and a socket that was merely made is no way out."""
    assert probe() == {"value": []}


@pytest.mark.parametrize(
    ("hole", "found"),
    [("process", ["process"]), ("network", ["network"]), ("file", ["file", "write"])],
)
def test_the_probe_finds_a_hole_in_a_container(probe, hole, found):
    assert probe(hole) == {"value": found}


def test_a_container_that_refuses_all_is_opened_and_another_is_refused(monkeypatch):
    api = FakeWindows(answer=LOCKED + b'{"value": []}\n')
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sandbox_windows, "_system", lambda: api)
    with open_sandbox() as sandbox:
        assert sandbox.kind == "appcontainer"
    api.child["answer"] = LOCKED + b'{"value": ["network"]}\n'
    with pytest.raises(SandboxUnavailable) as refused:
        open_sandbox()
    text = str(refused.value)
    assert "network" in text and "Python" in text and "bubblewrap" not in text


def test_the_child_gets_what_a_container_is_made_of_and_nothing_of_the_user(monkeypatch):
    monkeypatch.setenv("SYSTEMROOT", "C:\\Windows")
    monkeypatch.setenv("LOCALAPPDATA", "C:\\somebody")
    api = FakeWindows(answer=LOCKED)
    run(api)
    assert api.started[0][1]["environment"]["LOCALAPPDATA"] == "C:\\Windows"


@pytest.mark.parametrize("failure", ["denied", "missing", "late"])
def test_a_folder_that_is_not_ours_to_open_is_left_to_the_probe(
    monkeypatch, tmp_path, caplog, failure
):
    """A Python in Program Files is readable in every container and only admins may change it."""
    commands = []

    def icacls(command, **options):
        commands.append(command)
        if failure == "missing":
            raise FileNotFoundError(2, "no icacls")
        if failure == "late":
            raise subprocess.TimeoutExpired(command, 600)
        return subprocess.CompletedProcess(command, 5, "", "Access is denied.")

    monkeypatch.setenv("SYSTEMROOT", "C:\\Windows")
    monkeypatch.setattr(subprocess, "run", icacls)
    windows_api.grant_reading(str(tmp_path), "S-1-15-2-1")
    assert commands[0][1:4] == [str(tmp_path), "/grant", "*S-1-15-2-1:(OI)(CI)(RX)"]
    assert str(tmp_path) in caplog.text


@pytest.mark.skipif(ctypes.sizeof(ctypes.c_void_p) != 8, reason="sizes of 64-bit Windows")
def test_structures_have_the_sizes_that_windows_expects():
    sizes = {
        windows_api.BasicLimits: 64,
        windows_api.ExtendedLimits: 144,
        windows_api.SecurityAttributes: 24,
        windows_api.SecurityCapabilities: 24,
        windows_api.StartupInfo: 112,
        windows_api.ProcessInformation: 24,
    }
    assert {kind: ctypes.sizeof(kind) for kind in sizes} == sizes


def test_the_job_admits_one_process_that_dies_with_it():
    limits = windows_api.job_limits(memory_bytes=2**29, cpu_s=3)
    assert limits.basic.active_processes == 1 and limits.basic.limit_flags & 0x2000
    assert limits.process_memory == limits.job_memory == 2**29
    assert limits.basic.per_job_time == 30_000_000
    assert windows_api.environment_block({"b": "2", "A": "1"}) == "A=1\0b=2\0\0"
