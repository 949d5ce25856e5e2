"""The process beside the training: due steps, when figures show, failures, resume."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from training.hidden_process import COLUMNS, MARK, HiddenEvalProcess, end_with_trainer
from training.runtime.checkpoint import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
ANSWER = dict.fromkeys(COLUMNS, 0.5)
READ_STEP = (
    "import json, pathlib, sys; path = max(pathlib.Path(sys.argv[1]).glob('checkpoint_step_*'));"
    "print(json.dumps(dict.fromkeys(sys.argv[2].split(','), int(path.name[-8:]))))"
)


class Runs:
    """Evaluations that answer with the step of the checkpoint that they were given."""

    def __init__(self, directory, *, every=2, save_interval=4, total_steps=20, code=READ_STEP):
        self.messages = []
        self.started = []
        self.model = torch.nn.Linear(2, 2)
        self._code = code
        self._limits = dict(every=every, save_interval=save_interval, total_steps=total_steps)
        self.directory = directory
        self.process = self.again()

    def again(self):
        return HiddenEvalProcess(
            self.directory, command=self._command, message=self.messages.append, **self._limits
        )

    def _command(self, directory):
        self.started.append(directory.name)
        return [sys.executable, "-S", "-c", self._code, str(directory), ",".join(COLUMNS)]


def run_steps(process, model, steps):
    shown = []
    for step in steps:
        process.observe(step, model)
        shown.append((step, process.metrics()["hidden_eval_step"]))
    return shown


@pytest.mark.parametrize(
    ("every", "save_interval", "total", "due"),
    [
        (2, 20, 100, [40, 80]),
        (1, 50, 120, [50, 100, 120]),
        (2, 100, 250, [200]),
        (3, 100, 250, [250]),
        (2, 100, 3, []),
        (2, 100, 200, [200]),
    ],
)
def test_every_nth_save_is_due_the_last_one_included(tmp_path, every, save_interval, total, due):
    runs = Runs(tmp_path, every=every, save_interval=save_interval, total_steps=total)
    assert [step for step in range(1, total + 1) if runs.process.is_due(step)] == due


def test_figures_show_from_the_next_save_point_on_and_the_last_at_the_end(tmp_path):
    runs = Runs(tmp_path, total_steps=16)
    shown = run_steps(runs.process, runs.model, range(1, 17))
    assert shown == [(s, None if s < 12 else 8 if s < 16 else 16) for s in range(1, 17)]
    assert runs.process.metrics() == {"hidden_eval_step": 16, **dict.fromkeys(COLUMNS, 16)}
    runs.process.close()
    assert not (tmp_path / "hidden_eval").exists() and runs.messages == []


def test_the_evaluated_weights_are_those_of_the_due_step(tmp_path):
    runs = Runs(tmp_path)
    expected = runs.model.weight.detach().clone()
    runs.process.observe(8, runs.model)
    with torch.no_grad():
        runs.model.weight.add_(1.0)  # training goes on while the copy is written
    runs.process.observe(12, runs.model)
    found = CheckpointStore.newest_for_inference(tmp_path / "hidden_eval" / "step_00000008")
    assert found is not None and torch.equal(found.tensors["model"]["weight"], expected)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('boom', file=sys.stderr); sys.exit(1)", "failed: boom"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9"),
        ("print('no json')", "unreadable answer"),
        ("print('{}')", "unreadable answer"),
    ],
)
def test_a_failed_evaluation_is_said_and_shows_nulls(tmp_path, code, message):
    if "kill" in code and sys.platform == "win32":
        pytest.skip("needs signals")
    runs = Runs(tmp_path, code=code)
    run_steps(runs.process, runs.model, range(1, 13))
    assert runs.process.metrics() == {"hidden_eval_step": 8, **dict.fromkeys(COLUMNS)}
    assert len(runs.messages) == 1 and message in runs.messages[0]


def test_a_directory_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "hidden_eval").touch()
    runs = Runs(tmp_path)
    run_steps(runs.process, runs.model, range(1, 13))
    assert "hidden evaluation of step 8 failed" in runs.messages[0]


def plain(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("stop", [8, 9, 11, 12, 13])
def test_a_resumed_run_shows_the_same_figures_at_the_same_steps(tmp_path, stop):
    """The state of any step, taken while the evaluation may or may not have arrived."""
    runs = Runs(tmp_path)
    before = run_steps(runs.process, runs.model, range(1, stop + 1))
    state = plain(runs.process.state_dict())
    runs.process.close()
    resumed = runs.again()
    resumed.load_state_dict(state, step=stop, model=runs.model)
    after = run_steps(resumed, runs.model, range(stop + 1, 21))
    assert before + after == [(s, None if s < 12 else 8 if s < 20 else 16) for s in range(1, 21)]
    assert resumed.metrics()["hidden_eval_pass"] == 16
    resumed.close()


def test_an_evaluation_whose_weights_are_gone_is_said(tmp_path):
    runs = Runs(tmp_path)
    runs.process.observe(8, runs.model)
    state = {"pending": 8, "arrived": None, "shown": runs.process.metrics()}
    runs.process.close()
    elsewhere = Runs(tmp_path / "other")
    elsewhere.process.load_state_dict(state, step=9, model=runs.model)
    elsewhere.process.observe(12, runs.model)
    assert "no longer there" in elsewhere.messages[0]


def test_a_life_that_failed_at_its_start_takes_nothing_from_the_next(tmp_path):
    """It ended before it read of the checkpoint which evaluation that waits for."""
    runs = Runs(tmp_path)
    run_steps(runs.process, runs.model, range(1, 10))
    state = plain(runs.process.state_dict() | {"arrived": None})
    runs.process.close()
    runs.again().close()
    resumed = runs.again()
    resumed.load_state_dict(state, step=9, model=runs.model)
    assert run_steps(resumed, runs.model, range(10, 13))[-1] == (12, 8) and not runs.messages
    resumed.close()
    assert not (tmp_path / "hidden_eval").exists()


def test_closing_ends_a_running_evaluation_at_once(tmp_path):
    """A child that would never end; without the kill this test would not either."""
    runs = Runs(tmp_path, code="import threading; threading.Event().wait()")
    runs.process.observe(8, runs.model)
    closer = threading.Thread(target=runs.process.close, daemon=True)
    closer.start()
    closer.join(timeout=60)
    assert not closer.is_alive()
    assert (tmp_path / "hidden_eval" / "step_00000008").is_dir()  # a resumed run takes it up
    assert runs.messages == []


ORPHAN = """
import os, pathlib, sys, threading
from training.hidden_process import end_with_trainer
end_with_trainer()
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
threading.Event().wait()
"""
TRAINER = """
import sys
from training.hidden_process import _Child
_Child().run([sys.executable, "-c", *sys.argv[1:]])
"""


def is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_evaluation_ends_with_a_trainer_that_is_killed(tmp_path):
    path, deadline = tmp_path / "pid", time.monotonic() + 60
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER, ORPHAN, str(path)], cwd=ROOT)
    try:
        while not path.exists() or not path.read_text():
            assert trainer.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        pid = int(path.read_text())
        assert is_alive(pid)
    finally:
        trainer.kill()
        trainer.wait()
    try:
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(pid)
    finally:
        if is_alive(pid):
            psutil.Process(pid).kill()


def test_without_a_trainer_nothing_watches_the_input(monkeypatch):
    monkeypatch.delenv(MARK, raising=False)
    before = threading.enumerate()
    end_with_trainer()
    assert threading.enumerate() == before
