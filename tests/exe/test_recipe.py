"""The recipe of the frozen program, read without PyInstaller: what it packs and what it leaves."""

from __future__ import annotations

import ast
import runpy
import shutil
import sys
import types
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
SPEC = PROJECT / "scripts/freeze/eco_train.spec"
# The model's face to transformers, and what stands behind `--grpo-backend trl` and `--mode export`,
# are for people who have Python. The frozen program does not import the first, and says of the
# others what is missing.
NOT_IN_THE_PROGRAM = {
    "model/hf.py",
    "training/modes/export.py",
    "training/rl/trl_backend.py",
    "training/rl/trl_classes.py",
    "training/rl/trl_sigma.py",
    "training/rl/unsloth_bridge.py",
}


class Step:
    """Stands for one of PyInstaller's steps and keeps what it was told."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options = arguments, options
        self.pure = self.scripts = self.binaries = self.datas = []


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """What the recipe leaves in its namespace when it is run into `tmp_path`."""
    hooks = types.ModuleType("PyInstaller.utils.hooks")
    hooks.copy_metadata = lambda name: [(name, f"{name}.dist-info")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "PyInstaller.utils.hooks", hooks)
    (tmp_path / "eco_train").mkdir()
    given = {"SPECPATH": str(SPEC.parent), "DISTPATH": str(tmp_path)}
    steps = dict.fromkeys(("Analysis", "PYZ", "EXE", "COLLECT"), Step)
    return runpy.run_path(str(SPEC), init_globals={**given, **steps})


def imported_packages(path: Path) -> set[str]:
    """First parts of the names that a file imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


def product_files() -> list[Path]:
    files = [path for name in ("model", "training") for path in (PROJECT / name).rglob("*.py")]
    return [
        path for path in files if path.relative_to(PROJECT).as_posix() not in NOT_IN_THE_PROGRAM
    ]


def test_nothing_that_the_program_imports_is_left_out(recipe):
    excluded = set(recipe["UNUSED"])
    clashes = {
        path.relative_to(PROJECT).as_posix(): sorted(excluded & imported_packages(path))
        for path in product_files()
        if excluded & imported_packages(path)
    }
    assert clashes == {}
    assert imported_packages(PROJECT / "model/hf.py") & excluded == {"transformers"}


def test_it_is_one_folder_with_a_console_and_without_compression(recipe):
    program = recipe["program"].options
    assert program["console"] and program["exclude_binaries"] and not program["upx"]
    assert program["name"] == "eco_train"


def test_assets_and_the_source_of_kernels_go_in(recipe):
    options = recipe["analysis"].options
    assert (str(PROJECT / "assets"), "assets") in options["datas"]
    assert options["module_collection_mode"]["model"] == "pyz+py"
    assert [path.name for path in map(Path, options["hookspath"])] == ["hooks"]


def test_every_data_file_beside_the_code_is_packed():
    """A file that the code reads from its own folder; forgotten, the EXE refuses to train."""
    shipped = {
        path.relative_to(PROJECT).as_posix()
        for folder in ("model", "training", "evolution", "research")
        for path in (PROJECT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    spec = (PROJECT / "scripts/freeze/eco_train.spec").read_text(encoding="utf-8")
    assert shipped, "the rule has lost its subject"
    assert [path for path in shipped if path.rpartition("/")[2] not in spec] == []


def test_profiles_lie_beside_the_program(recipe, tmp_path):
    """Not in `_internal`, where nobody looks; a double-click reads them there."""
    del recipe
    beside = tmp_path / "eco_train"
    for name in ("train_sigma_args.txt", "profiles/quickstart.txt"):
        assert (beside / name).read_bytes() == (PROJECT / name).read_bytes()
    shutil.rmtree(beside)
