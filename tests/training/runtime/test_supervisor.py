"""Deaths nobody can catch leave a crash JSON; signals and exit codes stay the child's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.integration.runs import metrics_rows, newest_checkpoint, tiny_flags
from training.config.cli import parse_args
from training.runtime.supervisor import (
    HandedOn,
    describe_death,
    read_oom_kills,
    read_status,
    supervise,
)

ROOT = Path(__file__).parents[3]
FLAGS = ("--supervised", "--steps", "100000", "--save-interval", "2", "--eval-interval", "0",
         "--no-ema-enabled", "--no-curriculum-enabled", "--sample-interval", "0")  # fmt: skip
KILL_ITSELF = "import os; os.kill(os.getpid(), 9)"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def start(directory: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train_sigma.py", *tiny_flags(directory, *FLAGS, *more)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(supervisor: subprocess.Popen[str], step: int) -> None:
    """Read the child's lines, which come through the supervisor's own pipe, up to a step."""
    assert supervisor.stdout is not None
    for line in supervisor.stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(supervisor.communicate()[1])


def child_of(supervisor: subprocess.Popen[str], directory: Path) -> int:
    owner = json.loads((directory / "run.lock.json").read_text(encoding="utf-8"))
    assert owner["pid"] != supervisor.pid
    return owner["pid"]


def test_a_killed_run_leaves_a_report_with_its_last_metrics(tmp_path: Path) -> None:
    supervisor = start(tmp_path / "run")
    wait_for_step(supervisor, 3)
    os.kill(child_of(supervisor, tmp_path / "run"), signal.SIGKILL)
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == 1
    reports = list((tmp_path / "run" / "errors").glob("crash_step_*.json"))
    content = json.loads(reports[0].read_text(encoding="utf-8"))
    assert len(reports) == 1 and str(reports[0]) in errors
    assert "killed by SIGKILL" in content["error"]["message"]
    assert content["step"] == content["last_metrics"]["step"] >= 3


@pytest.mark.parametrize(
    ("number", "whole_group"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, False),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.soak),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.soak),
    ],
)
def test_a_stop_saves_whoever_is_told(
    tmp_path: Path, number: signal.Signals, whole_group: bool
) -> None:
    """Ctrl+C in a terminal reaches both processes; a service manager may tell one or both."""
    directory = tmp_path / "run"
    supervisor = start(directory)
    wait_for_step(supervisor, 3)
    if whole_group:
        os.kill(child_of(supervisor, directory), number)
    supervisor.send_signal(number)
    supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0
    assert not (directory / "errors").exists() and not (directory / "STOP").exists()
    last = metrics_rows(directory)[-1]["step"]
    assert newest_checkpoint(directory).name == f"checkpoint_step_{last:08d}"


@pytest.mark.parametrize("by_nohup", [False, True])
def test_a_stop_that_cannot_be_written_is_sent(tmp_path: Path, by_nohup: bool) -> None:
    """As on a full disk; by a signal that does no harm beside the one of the terminal."""
    (tmp_path / "run").touch()  # a directory cannot be made there
    sent: list[int] = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if by_nohup else signal.SIG_DFL)
    try:
        with HandedOn(tmp_path / "run") as requests:
            requests.child = SimpleNamespace(send_signal=sent.append)  # type: ignore[assignment]
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert sent == [signal.SIGTERM if by_nohup else signal.SIGHUP, signal.SIGTERM]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux to be told")
def test_a_killed_supervisor_does_not_leave_the_run_behind(tmp_path: Path) -> None:
    supervisor = start(tmp_path / "run")
    wait_for_step(supervisor, 2)
    supervisor.kill()
    supervisor.communicate(timeout=60)  # ends once the child has closed the pipe, too
    last = metrics_rows(tmp_path / "run")[-1]["step"]
    assert newest_checkpoint(tmp_path / "run").name == f"checkpoint_step_{last:08d}"


@pytest.mark.parametrize(
    ("flags", "code"), [(("--steps", "2"), 0), (("--d-model", "33"), 2)], ids=["done", "refused"]
)
def test_exit_codes_are_those_of_the_run(tmp_path: Path, flags: tuple[str, ...], code: int) -> None:
    supervisor = start(tmp_path / "run", *flags)
    _, errors = supervisor.communicate(timeout=60)
    assert supervisor.returncode == code
    assert not (tmp_path / "run" / "errors").exists()
    assert (errors.count("error:") == 1) == (code == 2)


@pytest.mark.parametrize("reports", [True, False])
def test_a_death_is_told_with_and_without_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reports: bool
) -> None:
    flags = [] if reports else ["--no-crash-report-enabled"]
    config = parse_args(tiny_flags(tmp_path / "run", *flags))
    assert supervise([sys.executable, "-c", KILL_ITSELF], [], config) == 1
    assert capsys.readouterr().err.count("failed: the training process was killed by SIGKILL") == 1
    assert (tmp_path / "run" / "errors").exists() is reports


def test_how_a_death_is_described() -> None:
    assert describe_death(-9, 0) == "killed by SIGKILL"
    assert describe_death(-9, 1) == "killed by the kernel (SIGKILL): memory ran out"
    assert describe_death(-11, 1) == "killed by SIGSEGV"
    assert describe_death(-64 - 9, 0) == "killed by signal 73"
    assert describe_death(3221225477, 0) == "ended with exit code 0xc0000005"
    assert describe_death(1, 0) == "ended with exit code 1"


def test_kernel_kills_are_counted_where_the_group_tells(tmp_path: Path) -> None:
    (tmp_path / "memory.events").write_text("low 0\noom 4\noom_kill 3\n", encoding="ascii")
    assert read_oom_kills(tmp_path) == 3
    assert read_oom_kills(tmp_path / "missing") >= 0


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_status_that_cannot_be_read_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "status_latest.json").write_bytes(content)
    assert read_status(tmp_path) == {}
    assert read_status(tmp_path / "missing") == {}
