"""eco_train frozen on this system with torch inside, and run as a user would."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.runs import metrics_rows, tiny_flags

pytestmark = pytest.mark.exe

PROJECT = Path(__file__).parents[2]
BUILD_LIMIT_S = 3000
RUN_LIMIT_S = 600


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The frozen program's file; frozen once."""
    if importlib.util.find_spec("PyInstaller") is None:
        pytest.skip("needs PyInstaller")
    root = tmp_path_factory.mktemp("frozen")
    places = [f"--distpath={root / 'dist'}", f"--workpath={root / 'work'}"]
    spec = PROJECT / "scripts/freeze/eco_train.spec"
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", *places, str(spec)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert run.returncode == 0, run.stderr[-3000:]
    return root / "dist/eco_train" / ("eco_train.exe" if os.name == "nt" else "eco_train")


def start(
    program: Path, *arguments: str, cwd: Path, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run the program; variables of the environment are set, or taken away by None."""
    # Without the interpreter's own variables: the program must stand alone.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [program, *arguments],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_LIMIT_S,
    )


def test_it_finds_itself_whole(program, tmp_path):
    flags = ("--mode", "doctor", "--self-check", "--json", "--device", "cpu", "--no-require-cuda")
    run = start(program, *flags, cwd=tmp_path)
    answer = json.loads(run.stdout)
    failed = [entry for entry in answer["checks"] if entry["status"] == "fail"]
    assert run.returncode == 0 and failed == []
    assert {"imports", "own modules", "assets", "worker"} <= {c["name"] for c in answer["checks"]}


def losses(directory: Path) -> dict[int, float]:
    """Training loss by step, of the rows that have one."""
    rows = metrics_rows(directory)
    return {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}


def test_it_trains_to_the_same_losses_as_its_sources(program, tmp_path):
    frozen, source = tmp_path / "frozen", tmp_path / "source"
    run = start(program, *tiny_flags(frozen), "--steps", "6", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    command = [sys.executable, str(PROJECT / "train_sigma.py"), *tiny_flags(source), "--steps", "6"]
    subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        capture_output=True,
    )
    assert list(losses(frozen)) == [1, 2, 3, 4, 5, 6]
    assert losses(frozen) == losses(source)


def test_it_goes_on_where_its_checkpoint_stands(program, tmp_path):
    directory = tmp_path / "run"
    for steps in ("2", "4"):
        run = start(program, *tiny_flags(directory), "--steps", steps, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    assert list(losses(directory)) == [1, 2, 3, 4]
    assert "resumed from step 2 " in run.stdout


def test_a_mistake_is_exit_code_2_and_writes_nothing(program, tmp_path):
    run = start(program, "--stpes", "5", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr == "error: unknown flag --stpes; did you mean --steps?\n"
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_a_crash_report(program, tmp_path):
    directory = tmp_path / "run"
    (directory / "samples.jsonl").mkdir(parents=True)
    sampling = ("--sample-interval", "2", "--sample-prompt", "a", "--steps", "4")
    run = start(program, *tiny_flags(directory), *sampling, cwd=tmp_path)
    assert run.returncode == 1
    reports = list((directory / "errors").glob("crash_*.json"))
    assert len(reports) == 1 and reports[0].name in run.stderr
    assert json.loads(reports[0].read_text(encoding="utf-8"))["error"]["message"]


def test_kernels_are_kept_beside_the_outputs(program, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    flags = ("--mode", "doctor", "--self-check", "--json", "--device", "cpu", "--no-require-cuda")
    own = {name: None for name in ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET")}
    run = start(program, *flags, cwd=tmp_path, HOME=str(home), USERPROFILE=str(home), **own)
    assert run.returncode == 0, run.stderr[-2000:]
    assert any((tmp_path / ".runtime_cache").rglob("*.cubin"))
    assert not any(home.rglob("*.cubin"))


def test_nothing_is_written_into_the_program(program, tmp_path):
    folder = program.parent
    before = sorted(folder.rglob("*"))
    run = start(program, *tiny_flags(tmp_path / "run"), "--steps", "1", cwd=tmp_path)
    assert run.returncode == 0
    assert sorted(folder.rglob("*")) == before
