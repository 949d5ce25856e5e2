"""Runs the hidden evaluation beside the training, in a process of its own.

A due step leaves a copy of its weights in `<output_dir>/hidden_eval/`, and the program itself is
started on it (`--mode eval --hidden`), so that questions and answers never enter the process that
trains. Its figures are shown from the next save point on, whenever they arrived: rows are then the
same on a fast and a slow machine, and after a resume.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from training.runtime.checkpoint import CheckpointError, CheckpointStore

COLUMNS = (
    "hidden_eval_pass",
    "hidden_eval_ci_low",
    "hidden_eval_ci_high",
    "hidden_eval_n",
    "hidden_eval_greedy_pass",
)
TIME_LIMIT_S = 1800.0
MARK = "SIGMA_ENDS_WITH_STDIN"
STD_INPUT_HANDLE = -10  # of <processenv.h>
Result = dict[str, Any]


class HiddenEvalProcess:
    """Starts an evaluation at every `every`-th save point and collects its figures.

    command: the program to start for a directory with one checkpoint; it prints a JSON object that
    has COLUMNS. message: shows a line to the user.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        command: Callable[[Path], list[str]],
        message: Callable[[str], object],
        every: int,
        save_interval: int,
        total_steps: int,
    ) -> None:
        self._root = output_dir / "hidden_eval"
        self._command = command
        self._message = message
        self._every = every
        self._save_interval = save_interval
        self._total_steps = total_steps
        self._pending: int | None = None
        self._future: Future[Result | str] | None = None
        self._shown: Result = {"hidden_eval_step": None, **dict.fromkeys(COLUMNS)}
        self._executor: ThreadPoolExecutor | None = None
        self._child = _Child()
        self._has_begun = False

    def is_due(self, step: int) -> bool:
        """Whether `step` ends with a save whose number is a multiple of `every`."""
        saves = step % self._save_interval == 0 or step == self._total_steps
        return saves and math.ceil(step / self._save_interval) % self._every == 0

    def observe(self, step: int, model: nn.Module) -> None:
        """Show what has become visible, start what is due; the last step waits for its own."""
        self._has_begun = True
        last = step == self._total_steps
        if self._pending is not None and (last or step >= self._pending + self._save_interval):
            self._collect()
        if self.is_due(step):
            self._launch(step, model)
            if last and self._pending is not None:
                self._collect()

    def metrics(self) -> Result:
        """The newest visible figures, null before the first and after a failure."""
        return dict(self._shown)

    def state_dict(self) -> dict[str, Any]:
        """The step under way, its result if it has arrived, and the figures shown. Does not
        wait."""
        arrived = None
        if self._future is not None and self._future.done():
            arrived = self._future.result()
        return {"pending": self._pending, "arrived": arrived, "shown": dict(self._shown)}

    def load_state_dict(self, state: dict[str, Any], *, step: int, model: nn.Module) -> None:
        """Go on from a checkpoint of `step`: an evaluation that was under way starts again."""
        self._stop()
        self._has_begun = True
        self._shown = dict(state["shown"])
        pending, arrived = state["pending"], state["arrived"]
        if pending is None:
            return
        if arrived is not None:
            self._pending, self._future = pending, _done(arrived)
        elif pending == step:
            self._launch(step, model)
        elif self._directory(pending).is_dir():
            self._start(pending, None)
        else:
            self._pending, self._future = pending, _done("its weights are no longer there")

    def close(self) -> None:
        """End a running evaluation; its weights stay for a resumed run that waits for it.

        So do those of an earlier life, where this one failed before it knew of them.
        """
        unfinished = self._pending is not None
        self._stop()
        if self._executor is not None:
            self._executor.shutdown()
        if self._has_begun and not unfinished:
            shutil.rmtree(self._root, ignore_errors=True)

    def _launch(self, step: int, model: nn.Module) -> None:
        self._stop()
        shutil.rmtree(self._root, ignore_errors=True)
        store = CheckpointStore(self._directory(step), max_checkpoints=2, fingerprint={})
        try:
            store.save(step, {"model": model.state_dict()}, {})
        except CheckpointError as error:
            self._pending, self._future = step, _done(str(error))
            return
        self._start(step, store)

    def _start(self, step: int, store: CheckpointStore | None) -> None:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, "hidden-eval")
        self._pending = step
        self._child = _Child()
        command = self._command(self._directory(step))
        self._future = self._executor.submit(_evaluate, self._child, command, store)

    def _collect(self) -> None:
        assert self._future is not None and self._pending is not None
        step, result = self._pending, self._future.result()
        self._pending = self._future = None
        self._shown = {"hidden_eval_step": step, **dict.fromkeys(COLUMNS)}
        if isinstance(result, str):
            self._message(f"hidden evaluation of step {step} failed: {result}")
        else:
            self._shown |= {name: result[name] for name in COLUMNS}

    def _stop(self) -> None:
        self._child.kill()
        if self._future is not None:
            self._future.exception()  # the thread has noticed
        self._pending = self._future = None

    def _directory(self, step: int) -> Path:
        return self._root / f"step_{step:08d}"


class _Child:
    """A process that may be ended from another thread before or while it runs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ended = False

    def run(self, command: list[str]) -> tuple[int, str, str]:
        """Exit code, stdout and stderr; -1 when it was ended or took too long."""
        theirs, ours = os.pipe()  # ours closes when this process ends, however that happens
        try:
            return self._run(command, stdin=theirs)
        finally:
            os.close(theirs)
            os.close(ours)

    def _run(self, command: list[str], *, stdin: int) -> tuple[int, str, str]:
        with self._lock:
            if self._ended:
                return -1, "", "ended"
            self._process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                encoding="utf-8",
                errors="replace",
                env={**os.environ, MARK: "1"},
                # Ctrl+C in the terminal asks the training to stop, not its evaluation.
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        try:
            out, err = self._process.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.communicate()
            return -1, "", f"took longer than {TIME_LIMIT_S:.0f} s"
        return self._process.returncode, out, err

    def kill(self) -> None:
        with self._lock:
            self._ended = True
            if self._process is not None and self._process.poll() is None:
                self._process.kill()


def end_with_trainer() -> None:
    """In an evaluation that a trainer started: end when the trainer does, even by SIGKILL."""
    if os.environ.pop(MARK, None) is None:
        return
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    # On Windows a library that looks at stdin while it is loaded (OpenBLAS, say) would wait for the
    # read below: numpy issue 24290.
    os.dup2(nothing, 0)
    os.close(nothing)
    if sys.platform == "win32":
        import ctypes
        import msvcrt

        # dup2 tells the system only where the EXE shares Python's C runtime, which a frozen one
        # does not.
        handle = ctypes.c_void_p(msvcrt.get_osfhandle(0))
        ctypes.windll.kernel32.SetStdHandle(STD_INPUT_HANDLE, handle)

    def wait() -> None:
        os.read(pipe, 1)
        os._exit(1)

    threading.Thread(target=wait, name="end-with-trainer", daemon=True).start()


def program_command() -> list[str]:
    """How this program is started once more."""
    if getattr(sys, "frozen", False):
        return [sys.executable]
    return [sys.executable, str(Path(__file__).resolve().parent.parent / "train_sigma.py")]


def _evaluate(child: _Child, command: list[str], store: CheckpointStore | None) -> Result | str:
    """The figures, or in one line why there are none; runs in a thread."""
    try:
        if store is not None:
            store.close()
        code, out, err = child.run(command)
    except (CheckpointError, OSError) as error:
        return str(error)
    lines = err.strip().splitlines()
    if code != 0:
        return lines[-1] if lines else f"exit code {code}"
    try:
        figures = json.loads(out)
        return {name: figures[name] for name in COLUMNS}
    except (ValueError, KeyError, TypeError) as error:
        return f"unreadable answer: {error}"


def _done(result: Result | str) -> Future[Result | str]:
    future: Future[Result | str] = Future()
    future.set_result(result)
    return future
