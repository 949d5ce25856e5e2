"""The commands of launch.py: make the environment ready, then become the program in it.

On Linux and macOS the launcher replaces itself with the program (exec), so that signals, exit code
and terminal are the program's own and a start costs nothing more. Windows has no exec that a
console waits for; there the launcher waits for its child and leaves every Ctrl+C to it, because the
console already gives it to both, and a second one would tell a training run to stop without saving.
"""

from __future__ import annotations

import difflib
import errno
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import NoReturn

from scripts.environment import ROOT, UsageError, ensure_environment
from scripts.packages import SetupError, executables_of, python_of

QUICKSTART = "profiles/quickstart.txt"
COMMANDS = ("train", "test", "exec")
USAGE = f"""\
usage: python scripts/launch.py [--cpu] COMMAND

  train [flags]         train a model; with no @profile among the flags: @{QUICKSTART}
  test [pytest flags]   run the tests
  exec -- CMD ...       run any command inside the environment

  --cpu                 if the environment has to be made: without CUDA, whatever the machine has

The first run makes the environment in .venv and takes a minute or more; later ones start at once.
"""
MOST_TEST_PROCESSES = 4  # each holds the program in memory, about 1 GB
DISK_FULL = (errno.ENOSPC, errno.EDQUOT) if hasattr(errno, "EDQUOT") else (errno.ENOSPC,)


def launch(arguments: list[str]) -> int:
    """Run one launcher command; returns the exit code (0 done, 1 failure, 2 usage, 130 Ctrl+C)."""
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE, end="")
        return 0
    try:
        cpu_only = arguments[:1] == ["--cpu"]
        command, rest = split_command(arguments[1:] if cpu_only else arguments)
        venv = ensure_environment(ROOT, cpu_only=cpu_only)
        argv, folder = command_line(command, rest, venv=venv)
        return run(argv, env=child_environment(venv), folder=folder)
    except UsageError as error:
        return complain(str(error), code=2)
    except SetupError as error:
        return complain(str(error), code=1)
    except OSError as error:
        return complain(explain_os_error(error), code=1)
    except KeyboardInterrupt:
        return complain("stopped before the program began; the same command goes on", code=130)


def complain(message: str, *, code: int) -> int:
    """Write the user's one line and return the exit code."""
    print(f"launch: {message}", file=sys.stderr)
    return code


def explain_os_error(error: OSError) -> str:
    """One line for a failed system call, naming the mend."""
    if error.errno in DISK_FULL:
        return f"the disk is full ({error.filename or ROOT}): free some space and run again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"no permission for {error.filename or ROOT}: "
            "make the folder yours, or copy the project to one that is"
        )
    return f"{error.strerror or error}: {error.filename or ROOT}"


def split_command(arguments: list[str]) -> tuple[str, list[str]]:
    """The launcher's command and what belongs to the program; UsageError when it is not one."""
    if not arguments:
        raise UsageError("no command given: train, test or exec (--help explains them)")
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "it is train, test or exec"
        raise UsageError(f"unknown command `{command}`: {hint}")
    if command == "exec":
        rest = rest[1:] if rest[:1] == ["--"] else rest
        if not rest:
            raise UsageError("`exec --` needs a command to run")
    return command, rest


def command_line(command: str, rest: list[str], *, venv: Path) -> tuple[list[str], Path]:
    """The program's argv, its first part a full path, and the folder to run it in."""
    python = str(python_of(venv))
    here = Path.cwd()
    if command == "test":
        return [python, "-m", "pytest", *(rest or side_by_side())], ROOT
    if command == "train":
        if not any(argument.startswith("@") for argument in rest):
            profile = QUICKSTART if here == ROOT else ROOT / QUICKSTART
            rest = [f"@{profile}", *rest]
        return [python, str(ROOT / "train_sigma.py"), *rest], here
    program = shutil.which(rest[0], path=child_environment(venv)["PATH"])
    if program is None:
        raise UsageError(f"`{rest[0]}` is neither in the environment nor on the PATH")
    return [program, *rest[1:]], here


def side_by_side() -> list[str]:
    """The flags that run all tests in several processes, a file's tests in one of them; files go
    out in their order, which begins with the longest ones, those that freeze the program."""
    processes = min(os.cpu_count() or 1, MOST_TEST_PROCESSES)
    if processes == 1:
        return []
    return ["-n", str(processes), "--dist", "loadfile", "--no-loadscope-reorder"]


def child_environment(venv: Path) -> dict[str, str]:
    """The variables that activating the environment would set."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    env["VIRTUAL_ENV"] = str(venv)
    env["PATH"] = str(executables_of(venv)) + os.pathsep + env.get("PATH", os.defpath)
    return env


def run(argv: list[str], *, env: dict[str, str], folder: Path) -> int:
    """Become the program, or on Windows run it; returns its exit code."""
    if os.name == "nt":
        return run_and_wait(argv, env=env, folder=folder)
    become(argv, env=env, folder=folder)


def become(argv: list[str], *, env: dict[str, str], folder: Path) -> NoReturn:
    """Replace this process by the program."""
    os.chdir(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(argv[0], argv, env)


def run_and_wait(argv: list[str], *, env: dict[str, str], folder: Path) -> int:
    """Run the program as a child that alone answers Ctrl+C; returns its exit code."""
    import subprocess

    signals = [signal.SIGINT]
    if sys.platform == "win32":
        signals.append(signal.SIGBREAK)
    # A handler that does nothing, not SIG_IGN: a child inherits the latter and would be deaf too.
    previous = {number: signal.signal(number, lambda *_: None) for number in signals}
    try:
        code = subprocess.Popen(argv, env=env, cwd=folder).wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code
