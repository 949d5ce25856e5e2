"""The entry as a new user meets it: mistakes are one line and exit code 2, nothing is written."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import train_sigma
from training.config.sigma_config import ConfigError

PROJECT = Path(__file__).parents[1]
SCRIPT = PROJECT / "train_sigma.py"
TINY = (
    "--no-require-cuda --device cpu --no-torch-compile --tokenizer-name assets-4k --d-model 64 "
    "--n-heads 2 --n-layers 2 --d-ff 96 --rope-dim 8 --kv-latent-dim 16 --mamba-d-state 8 "
    "--mamba-head-dim 32 --seq-len 32"
).split()


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
    )


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stpes", "5"], "error: unknown flag --stpes; did you mean --steps?"),
        (["@nowhere.txt"], "error: there is no file nowhere.txt"),
        (["--steps", "ten"], "error: --steps takes a whole number, not 'ten'"),
        (["@broken.txt"], "error: broken.txt is no UTF-8 text (byte 0xff in line 1): save it"),
        ([*TINY, "--output-dir", "a_file/run"], "a_file is not a directory"),
        ([*TINY, "--checkpoint-dir", "/proc/no/ckpt"], "--checkpoint-dir /proc/no/ckpt cannot be"),
        ([], "profiles/quickstart.txt"),
        (["--require-cuda", *TINY[1:]], "--require-cuda (on) and --device cpu contradict"),
    ],
    ids=["misspelt", "no-file", "ten", "bytes", "file", "read-only", "no-cuda", "contradiction"],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, says):
    if "/proc/no/ckpt" in arguments and not Path("/proc").is_dir():
        pytest.skip("needs a directory nobody can write to")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xff\x00 --steps\n5")
    (tmp_path / "a_file").touch()
    before = listing(tmp_path)
    result = start(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert says in result.stderr
    assert not result.stdout
    assert listing(tmp_path) == before


def test_help_and_usage_errors_need_no_installed_package(tmp_path):
    command = [sys.executable, "-S", "-E", str(SCRIPT)]
    shown = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, check=True)
    assert b"--require-cuda, --no-require-cuda" in shown.stdout
    result = subprocess.run([*command, *TINY], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.endswith("is not installed: start with python scripts/launch.py train\n")
    assert result.stderr.count("\n") == 1


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.runtime.directories.free_bytes", lambda directory: 8 * 2**20)
    assert train_sigma.main(TINY) == 2
    shown = capsys.readouterr().err
    assert "8 MiB free" in shown and "free space or choose another --output-dir" in shown
    assert shown.count("\n") == 1
    assert listing(tmp_path) == []


class FakeTrainer:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def fit(self) -> None:
        if self.error:
            raise self.error


def train_with(monkeypatch, tmp_path, *more, fit_error=None, build_error=None) -> int:
    """Run main up to a trainer that ends as told."""

    def build_trainer(config):
        if build_error:
            raise build_error
        return FakeTrainer(fit_error)

    fake = types.ModuleType("training.build")
    fake.build_trainer = build_trainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "training.build", fake)
    monkeypatch.chdir(tmp_path)
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "kept")
    places = ["--output-dir", "run", "--checkpoint-dir", "run/checkpoints"]
    return train_sigma.main([*TINY, *places, *more])


def test_a_finished_run_is_0(monkeypatch, tmp_path, capsys):
    assert train_with(monkeypatch, tmp_path) == 0
    assert capsys.readouterr().err == ""


def test_a_reported_failure_is_one_line_with_its_path_and_exit_code_1(
    monkeypatch, tmp_path, capsys
):
    error = TypeError("bad\nthing")
    error.crash_report = Path("run/errors/crash_step_00000003.json")  # type: ignore[attr-defined]
    assert train_with(monkeypatch, tmp_path, fit_error=error) == 1
    assert capsys.readouterr().err == (
        f"failed: TypeError: bad thing; details in {error.crash_report}\n"  # type: ignore[attr-defined]
    )


def test_a_failure_whose_report_could_not_be_written_shows_its_traceback(
    monkeypatch, tmp_path, capsys
):
    error = OSError(28, "No space left on device")
    error.crash_report = None  # type: ignore[attr-defined]
    assert train_with(monkeypatch, tmp_path, fit_error=error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "raise self.error" in shown
    assert shown.endswith("No space left on device; no crash report was written\n")


def test_a_refusal_before_the_run_is_exit_code_2(monkeypatch, tmp_path, capsys):
    locked = RuntimeError("another run (process 12) holds run")
    assert train_with(monkeypatch, tmp_path, fit_error=locked) == 2
    assert capsys.readouterr().err == "error: another run (process 12) holds run\n"
    assert train_with(monkeypatch, tmp_path, build_error=ValueError("--x is wrong")) == 2
    assert capsys.readouterr().err == "error: --x is wrong\n"


FAILURES = [
    TypeError("a bug"),
    ModuleNotFoundError("no", name="training.features.gone"),
    NotImplementedError("no kernel"),
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    torch.AcceleratorError("CUDA error: the launch failed"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_before_the_run_is_no_refusal(monkeypatch, tmp_path, capsys, error):
    assert train_with(monkeypatch, tmp_path, build_error=error) == 1
    shown = capsys.readouterr().err
    [path] = (tmp_path / "run" / "errors").glob("crash_step_00000000_*.json")
    assert shown.startswith(f"failed: {type(error).__name__}: ") and shown.count("\n") == 1
    assert shown.endswith(f"details in {path.relative_to(tmp_path)}\n")
    report = json.loads(path.read_text(encoding="utf-8"))["error"]
    assert type(error).__name__ in report["type"] and "raise build_error" in report["traceback"][-2]


def test_a_failure_without_a_report_keeps_its_traceback(monkeypatch, tmp_path, capsys):
    off, error = "--no-crash-report-enabled", TypeError("a bug")
    assert train_with(monkeypatch, tmp_path, off, build_error=error) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "raise build_error" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_of_another_mode_keeps_its_traceback(monkeypatch, tmp_path, error):
    def run(config):
        raise error

    monkeypatch.setattr("training.modes.report.run", run)
    with pytest.raises(type(error)):
        train_sigma.main(["--mode", "report", "--output-dir", str(tmp_path / "run")])
    assert listing(tmp_path) == []


def test_an_interrupt_before_the_run_is_130(monkeypatch, tmp_path):
    assert train_with(monkeypatch, tmp_path, build_error=KeyboardInterrupt()) == 130


def test_a_start_without_arguments_takes_the_args_file_else_a_profile(tmp_path, monkeypatch):
    monkeypatch.setattr(train_sigma, "is_interactive", lambda: False)
    with pytest.raises(ConfigError, match="no arguments"):
        train_sigma.default_arguments(tmp_path)
    (tmp_path / "profiles").mkdir()
    for name in ("a_profile", "quickstart", "z_profile"):
        (tmp_path / "profiles" / f"{name}.txt").touch()
    quickstart = tmp_path / "profiles/quickstart.txt"
    assert train_sigma.default_arguments(tmp_path) == [f"@{quickstart}"]
    (tmp_path / "train_sigma_args.txt").touch()
    assert train_sigma.default_arguments(tmp_path) == [f"@{tmp_path / 'train_sigma_args.txt'}"]


def test_a_person_chooses_or_quits(tmp_path, monkeypatch, capsys):
    (tmp_path / "profiles").mkdir()
    for name in ("other", "quickstart"):
        (tmp_path / "profiles" / f"{name}.txt").write_text(f"# the {name}\n--mode plan\n")
    monkeypatch.setattr(train_sigma, "is_interactive", lambda: True)
    monkeypatch.setattr(train_sigma, "read_line", lambda seconds: "2")
    other = tmp_path / "profiles/other.txt"
    assert train_sigma.default_arguments(tmp_path) == [f"@{other}"]
    assert "the other" in capsys.readouterr().out
    monkeypatch.setattr(train_sigma, "read_line", lambda seconds: "q")
    monkeypatch.setattr(train_sigma, "program_directory", lambda: tmp_path)
    monkeypatch.setattr(train_sigma, "dispatch", lambda config: 99)
    assert train_sigma.main([]) == 0
    monkeypatch.setattr(train_sigma, "read_line", lambda seconds: None)
    assert train_sigma.main([]) == 99


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("typed", "says"), [("q", ""), ("x\nbroken", "unknown flag --stpes")])
def test_the_menu_on_a_real_terminal(tmp_path, typed, says):
    import pty

    shutil.copy(SCRIPT, tmp_path)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/quickstart.txt").write_text("# A first run.\n")
    (tmp_path / "profiles/broken.txt").write_text("--stpes 5\n")
    keyboard, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "train_sigma.py"],
        cwd=tmp_path,
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )
    os.close(terminal)
    os.write(keyboard, f"{typed}\n".encode())
    _, error = child.communicate(timeout=60)
    shown = os.read(keyboard, 65536).decode()
    os.close(keyboard)
    assert "1  quickstart  A first run." in shown and "q  quit" in shown
    assert child.returncode == (2 if says else 0)
    assert says in error


def test_a_frozen_program_looks_beside_its_exe(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "eco_train.exe"))
    assert train_sigma.program_directory() == tmp_path.resolve()


def test_workers_are_caught_first_and_every_import_is_static():
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    guard = tree.body[-1]
    assert isinstance(guard, ast.If)
    assert ast.unparse(guard.body[0]) == "prepare_frozen()"
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"importlib", "__import__", "exec", "eval"}


@pytest.mark.parametrize("mode", ["plan", "doctor", "eval", "generate", "report"])
def test_every_mode_reaches_its_module(mode, monkeypatch):
    module = {"eval": "evaluate"}.get(mode, mode)
    fake = types.ModuleType(f"training.modes.{module}")
    fake.run = lambda config: 40 + len(config.run.mode)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, f"training.modes.{module}", fake)
    monkeypatch.setattr(f"training.modes.{module}", fake, raising=False)
    assert train_sigma.main(["--mode", mode]) == 40 + len(mode)
