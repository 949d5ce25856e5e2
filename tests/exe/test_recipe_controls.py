"""The recipe's parts, each left out once: the frozen probe then fails in the way it prevents."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.windows_lab.controls import BUILDS, CONTROLS, PROJECT, Build, Control, write_build

pytestmark = pytest.mark.exe

BUILD_LIMIT_S = 1200
RUN_LIMIT_S = 300


def on_this_system(control: Control) -> bool:
    return os.name == "nt" or not control.windows_only


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    """The probe's program file for each build, each made once."""
    for module in ("PyInstaller", "triton"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    root = tmp_path_factory.mktemp("controls")
    return {build.name: freeze(build, root / build.name) for build in BUILDS}


def freeze(build: Build, folder: Path) -> Path:
    spec = write_build(build, folder, seen_as=folder.as_posix(), project=PROJECT.as_posix())
    places = [f"--distpath={folder / 'dist'}", f"--workpath={folder / 'work'}"]
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", *places, str(spec)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder / "dist/probe" / ("probe.exe" if os.name == "nt" else "probe")


@pytest.mark.parametrize(
    "control",
    [control for control in CONTROLS if on_this_system(control)],
    ids=lambda control: "-".join((control.build, *control.arguments)),
)
def test_each_part_of_the_recipe_prevents_its_failure(programs, control, tmp_path):
    run = subprocess.run(
        [programs[control.build], *control.arguments],
        cwd=tmp_path,
        # The compiler is on trial here, not its interpreter.
        env={
            **os.environ,
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "TRITON_INTERPRET": "0",
        },
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_LIMIT_S,
    )
    said = run.stdout + run.stderr
    assert control.says in said
    assert (run.returncode == 0) == control.works, said[-2000:]


def test_without_a_cache_folder_of_ours_kernels_land_in_the_users_home(programs, tmp_path):
    """What `prepare_caches` is for; that the program itself keeps to `.runtime_cache` is tested
    with the whole of it (test_frozen_program.py)."""
    home = tmp_path / "home"
    home.mkdir()
    ours = ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_INTERPRET")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    run = subprocess.run(
        [programs["whole"], "kernel"],
        cwd=tmp_path,
        env={**inherited, "HOME": str(home), "USERPROFILE": str(home)},
        capture_output=True,
        encoding="utf-8",
        timeout=RUN_LIMIT_S,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert any((home / ".triton").rglob("*.cubin"))


def test_a_part_that_the_hook_no_longer_names_is_an_error(tmp_path):
    build = Build(name="gone", removed=("what no hook says",))
    with pytest.raises(ValueError, match="exactly once"):
        write_build(build, tmp_path, seen_as="x", project="y")
