"""R13: 300 attempts of 12 classes get out of the sandbox 0 times, and out of a plain child >= 95 %.

The second number is the control: an attempt that succeeds nowhere proves nothing about the sandbox.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.training.rl.attempt_actions import CLASSES
from tests.training.rl.attempts import NUM_PER_CLASS, attempts_of
from tests.training.rl.boxes import open_or_skip
from tests.training.rl.scene import CONTROL, Scene
from training.rl.sandbox_job import Job, SandboxLimits

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the Linux sandbox")

ALLOWED = {"processes": 0, "disk": SandboxLimits().scratch_bytes}
NECESSARY_SHARE = 0.95


@pytest.fixture
def scene(tmp_path, monkeypatch):
    folder = tmp_path / "scene"
    folder.mkdir()
    found = Scene(folder)
    monkeypatch.setenv("SIGMA_CANARY", found.canary)
    yield found
    found.close()


def succeeded(kind, said, scene):
    """Whether an attempt got what it wanted, by what it said or by what it changed."""
    traces = scene.traces()
    made = re.search(r"made (\d+)", said)
    claims = made is not None and int(made[1]) > ALLOWED.get(kind, 2**62)
    return bool(traces) or claims or scene.canary in said or scene.canary.encode().hex() in said


def descendants(pid):
    """Numbers of the processes that a zygote still has below it."""
    with open(f"/proc/{pid}/task/{pid}/children") as listing:
        return listing.read().split()


@pytest.mark.parametrize("kind", ["bubblewrap", "landlock"])
def test_no_attempt_gets_out(kind, scene):
    escapes, runs, outcomes = [], 0, set()
    with open_or_skip(kind) as sandbox:
        for name in CLASSES:
            for number, program in enumerate(attempts_of(name)):
                case = (scene.described(number),)
                job = Job(program=program, function="attempt", cases=(case,))
                reply = sandbox.run(job, limit_s=0.5 if name == "time" else 20.0)
                outcomes.add(reply.outcome)
                runs += 1
                left = descendants(sandbox._workers[0].pid)
                if succeeded(name, reply.data.decode("ascii", "replace"), scene) or left:
                    escapes.append((name, number, reply, left))
    print(f"{kind}: {len(escapes)} escapes in {runs} attempts of {len(CLASSES)} classes")
    assert runs == 300 and not escapes, escapes[:3]
    assert "ended" in outcomes and "timeout" in outcomes


def outlives(scene, program, number, folder):
    """Whether a program is still at work after SIGTERM to the process that was started."""
    beat = scene.folder / f"beat{number}"
    control = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CONTROL],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )
    assert control.stdin is not None
    with control.stdin as pipe:
        pipe.write(json.dumps({"program": program, "scene": scene.described(number)}).encode())
    try:
        if not grows(beat):
            return False
        os.kill(control.pid, signal.SIGTERM)
        return grows(beat)
    finally:
        control.kill()
        control.wait()


def grows(path):
    """Whether a file becomes longer by some beats; a program makes 200 of them in four seconds.

    A busy machine may hold its next beats back for long, so it is given as long.
    """
    before = path.stat().st_size if path.exists() else 0
    for _ in range(3000):
        if path.exists() and path.stat().st_size > before + 3:
            return True
        time.sleep(0.02)
    return False


def test_most_attempts_succeed_without_a_sandbox(scene, tmp_path):
    """The control of the suite; the share is printed."""
    won = {}
    for name in CLASSES:
        count = 0
        for number, program in enumerate(attempts_of(name)):
            folder = tmp_path / f"{name}{number}"
            folder.mkdir()
            if name == "time":
                count += outlives(scene, program, number, folder)
            else:
                said = scene.run_unsandboxed(program, number, folder=folder)
                count += succeeded(name, said, scene)
        won[name] = count
    share = sum(won.values()) / (NUM_PER_CLASS * len(CLASSES))
    print(f"unsandboxed, {share:.1%} of the attempts succeed: {won}")
    assert share >= NECESSARY_SHARE, won
