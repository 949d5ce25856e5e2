"""The sandbox runs what it should, ends what it must, and refuses rather than weakens."""

import os
import platform
import shutil
import signal
import sys

import pytest

from tests.training.rl.boxes import open_or_skip
from training.rl import sandbox as sandbox_module
from training.rl import sandbox_linux
from training.rl.sandbox import open_sandbox
from training.rl.sandbox_job import Job, SandboxFailure, SandboxUnavailable
from training.rl.sandbox_seccomp import ALLOWED, seccomp_filter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the Linux sandbox")

LIMIT_S = 20.0


@pytest.fixture(params=["bubblewrap", "landlock"])
def sandbox(request):
    with open_or_skip(request.param, num_workers=2) as opened:
        yield opened


def job(program, *cases):
    return Job(program=program, function="f", cases=cases or ((1,),))


def test_calls_are_answered_in_order_and_output_is_thrown_away(sandbox):
    program = (
        "import sys\nprint('{}')\nprint(1, file=sys.stderr)\ndef f(x):\n print(x)\n return [x]"
    )
    replies = sandbox.run_many([job(program, (n,), ("a",)) for n in range(6)], limit_s=LIMIT_S)
    for number, reply in enumerate(replies):
        first = b'{"value": [{"i": "%s"}]}' % hex(number).encode()
        assert reply.lines() == [first, b'{"value": ["a"]}'] and reply.outcome == "ended"


def test_programs_share_nothing(sandbox):
    leave = "import builtins, os\nbuiltins.left = 1\nos.environ['LEFT'] = '1'\n"
    leave += "try: open('/tmp/left', 'w').write('x')\nexcept OSError: pass\ndef f(x): return x"
    look = "import builtins, os\ndef f(x):\n"
    look += " return [hasattr(builtins, 'left'), 'LEFT' in os.environ, os.path.exists('/tmp/left')]"
    for program in (leave, look, leave, look):
        reply = sandbox.run(job(program), limit_s=LIMIT_S)
    assert reply.lines() == [b'{"value": [false, false, false]}']


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("while True: pass", "timeout"),
        ("def f(x):\n import time\n time.sleep(60)", "timeout"),
        (
            "def f(x):\n while True:\n  try:\n   while True: pass\n  except BaseException: pass",
            "timeout",
        ),
        (
            "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile 1: pass",
            "timeout",
        ),
        ("def f(x): return 'a' * 2 ** 21", "oversize"),
        ("import os\nos._exit(0)", "ended"),
        ("a = [0] * 10 ** 10\ndef f(x): return x", "ended"),
        ("import ctypes\nctypes.string_at(0)", "ended"),
        ("def f(x): return f(x)", "ended"),
    ],
)
def test_a_bad_program_ends_and_the_next_one_runs(sandbox, program, outcome):
    limit_s = 1.0 if outcome == "timeout" else LIMIT_S
    assert sandbox.run(job(program), limit_s=limit_s).outcome == outcome
    good = sandbox.run(job("def f(x): return x + 1"), limit_s=LIMIT_S)
    assert good.lines() == [b'{"value": {"i": "0x2"}}']
    assert sandbox.num_lost_workers == 0


def test_a_killed_zygote_is_replaced_and_its_program_dies(sandbox):
    good = job("def f(x): return x + 1")
    sandbox.run(good, limit_s=LIMIT_S)
    for worker in sandbox._workers:
        if worker.pid is not None:
            os.kill(worker.pid, signal.SIGKILL)
    assert sandbox.run(good, limit_s=LIMIT_S).lines() and sandbox.run(good, limit_s=LIMIT_S).lines()
    assert sandbox.num_lost_workers >= 1


def test_the_allowed_calls_are_the_same_in_both_modes_and_none_makes_a_process(sandbox):
    """The filter is tried from inside: what is not on the list fails, whoever asks."""
    program = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(numbers):
    found = []
    for number in numbers:
        ctypes.set_errno(0)
        if libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6) != -1:
            found.append(number)
        elif ctypes.get_errno() not in (1, 25, 38):
            found.append(number)
    return found
"""
    column = ["x86_64", "aarch64"].index(platform.machine())
    allowed = {numbers[column] for numbers in ALLOWED.values()}
    # fcntl and prlimit64 depend on their arguments; the two probes of x86-64 end the caller.
    special = ((72, 302, 335, 336), (25, 261))[column]
    others = [n for n in range(470) if n not in allowed and n not in special]
    reply = sandbox.run(job(program, (others,)), limit_s=LIMIT_S)
    assert reply.lines() == [b'{"value": []}']


def test_without_tools_or_kernel_support_it_refuses_in_one_line(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(platform, "machine", lambda: "m68k")
    with pytest.raises(SandboxUnavailable) as refusal:
        open_sandbox()
    text = str(refusal.value)
    assert "the code reward refuses to start" in text and "\n" not in text
    assert "bubblewrap (bwrap) is not installed" in text and "m68k" in text


def test_where_namespaces_are_denied_the_kernel_s_locks_are_enough(monkeypatch, tmp_path):
    """A stand-in for bwrap that fails as the real one does there."""
    denied = tmp_path / "bwrap"
    denied.write_text(
        "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
    )
    denied.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(denied))
    with pytest.raises(SandboxUnavailable, match="No permissions"):
        open_sandbox(kind="bubblewrap")
    with open_or_skip() as sandbox:
        assert sandbox.kind == "landlock"


@pytest.mark.parametrize("broken", ["seccomp", "readable", "landlock"])
def test_a_sandbox_with_a_hole_is_not_opened(monkeypatch, broken):
    """Negative controls: a filter that allows all, a readable root, no Landlock."""
    honest = sandbox_linux.lock_settings

    def holed(*args, **kwargs):
        settings = honest(*args, **kwargs)
        if broken == "seccomp":
            settings["seccomp"] = "06000000" + "0000ff7f"  # return SECCOMP_RET_ALLOW
        elif broken == "readable":
            settings["readable"] = ["/"]
        else:
            settings["readable"] = [0]  # no path: the rule cannot be made
        return settings

    open_or_skip("landlock").close()
    monkeypatch.setattr(sandbox_linux, "lock_settings", holed)
    with pytest.raises(SandboxUnavailable):
        open_sandbox(kind="landlock")


def test_a_child_that_never_locks_itself_is_a_failure_not_a_verdict(monkeypatch, tmp_path):
    with open_or_skip("landlock"):
        monkeypatch.setattr(sandbox_linux, "CHILD", tmp_path / "missing.py")
        isolation = sandbox_linux.LinuxIsolation("landlock", sandbox_module.SandboxLimits())
        with sandbox_module.Sandbox(isolation, num_workers=1) as broken:
            with pytest.raises(SandboxFailure, match="3 times"):
                broken.run(job("def f(x): return x"), limit_s=LIMIT_S)


def test_a_frozen_program_does_not_start_itself_again(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(SandboxUnavailable, match="frozen"):
        open_sandbox()


def test_another_system_refuses(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match="darwin has none"):
        open_sandbox()


def test_a_machine_without_a_list_of_calls_is_an_error():
    with pytest.raises(ValueError, match="riscv64"):
        seccomp_filter("riscv64")
    for machine in ("x86_64", "aarch64"):
        assert len(seccomp_filter(machine)) % 8 == 0
