"""The self-check passes for a whole program and names each thing that one may lack."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

from training.config.cli import parse_args
from training.modes import doctor, self_check
from training.modes.checks import Check
from training.runtime.needed_modules import NeededModule

HAS_TRITON = importlib.util.find_spec("triton") is not None
PROJECT = Path(__file__).parents[3]
COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
REPORT = """
from training.modes import self_check
print(json.dumps([dataclasses.asdict(check) for check in self_check.check_triton()]))
"""
NO_GPU = "import training.modes.self_check as s\ns._launches_kernels = lambda: False"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton")


def test_a_whole_program_passes_and_a_gpu_is_no_part_of_it(tmp_path):
    command = [sys.executable, str(PROJECT / "train_sigma.py"), "--mode", "doctor", "--self-check"]
    result = subprocess.run(
        [*command, "--json"], cwd=tmp_path, env=COMPILING, capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stdout + result.stderr
    record = json.loads(result.stdout)
    checks = {check["name"]: check for check in record["checks"]}
    assert record["passed"] is True and len(checks) == len(record["checks"])
    assert "driver" not in checks and "device" not in checks
    assert "tokenizer_4k.json" in checks["assets"]["found"]
    assert {path.name for path in tmp_path.iterdir()} <= {".runtime_cache"}
    if HAS_TRITON:
        compiled = checks["kernels"]["found"]
        assert checks["kernels"]["status"] == "ok"
        assert [name for name in kernel_names() if name not in compiled] == []


def kernel_names() -> list[str]:
    """Every kernel that a launch of ours can name, from the sources."""
    return [
        node.name
        for path in sorted((PROJECT / "model").glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        and node.name.endswith("_kernel")
        and any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    ]


def test_the_flag_is_off_and_the_plain_doctor_examines_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda given: [Check(name="m", status="ok", found="x")])
    assert doctor.run(parse_args(["--mode", "doctor"])) == 0
    assert capsys.readouterr().out == "ok   m: x\n"


def test_missing_modules_and_symbols_are_all_named():
    needed = tuple(
        NeededModule(module=module, distribution="x", symbols=symbols)
        for module, symbols in (
            ("json", ("dumps", "decoder.JSONDecoder")),
            ("surely_not_there", ("a", "b")),
            ("json", ("dunps", "decoder.Nothing")),
        )
    )
    check = self_check.check_symbols("imports", needed)
    assert check.status == "fail" and check.advice
    problems = check.found.split("; ")
    assert [problem.partition(":")[0] for problem in problems] == [
        "surely_not_there",
        "json.dunps",
        "json.decoder.Nothing",
    ]
    assert self_check.check_symbols("imports", needed[:1]).status == "ok"


def test_every_module_of_ours_is_tried_and_a_broken_one_is_named(tmp_path, monkeypatch):
    names = set(self_check.own_modules())
    root = Path(__file__).parents[3]
    for package in ("model", "training"):
        for path in (root / package).rglob("*.py"):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            assert name.removesuffix(".__init__") in names | {package}
    package = tmp_path / "packed"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "whole.py").touch()
    (package / "lost.py").write_text("import surely_not_there")
    (package / "source.py").write_text("raise ValueError('functions need a Python file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(self_check, "OWN_PACKAGES", ("packed", "not_written_yet"))
    check = self_check.check_own_modules()
    assert check.status == "fail"
    assert "packed.lost: ModuleNotFoundError" in check.found
    assert "packed.source: ValueError: functions need a Python file" in check.found
    assert "whole" not in check.found


def test_a_module_may_lack_what_was_left_out_but_not_what_is_half_there(tmp_path, monkeypatch):
    package = tmp_path / "packed_kernels"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "kernels.py").write_text("import left_out_package.language")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(self_check, "OWN_PACKAGES", ("packed_kernels",))
    monkeypatch.setattr(self_check, "LEFT_OUT", ("left_out_package",))
    check = self_check.check_own_modules()
    assert check.status == "ok"
    assert check.found == "0 import; not packed_kernels.kernels for want of left_out_package"
    (tmp_path / "left_out_package").mkdir()
    importlib.invalidate_caches()
    assert self_check.check_own_modules().status == "fail"


def test_the_windows_exe_must_hold_triton(monkeypatch):
    monkeypatch.setattr(self_check, "triton_version", lambda: None)
    assert [check.status for check in self_check.check_triton()] == ["ok"]
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert [check.status for check in self_check.check_triton()] == ["fail"]


def triton_checks(tmp_path: Path, preparation: str, **environment: str) -> dict[str, dict]:
    """What the checks about Triton find in a fresh program after some `preparation`."""
    script = f"import dataclasses, json, sys\n{preparation}\n{REPORT}"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=PROJECT,
        env={**COMPILING, "TRITON_CACHE_DIR": str(tmp_path), **environment},
        capture_output=True,
        encoding="utf-8",
    )
    assert result.returncode == 0, result.stderr
    return {check["name"]: check for check in json.loads(result.stdout.splitlines()[-1])}


@needs_triton
def test_kernels_are_compiled_anew_and_need_no_c_compiler(tmp_path):
    """A missing C compiler is a warning where no kernel will be launched."""
    for _ in range(2):
        checks = triton_checks(tmp_path, NO_GPU, CC=str(tmp_path / "no_compiler"))
        assert checks["C stub"]["status"] == "warn" and checks["kernels"]["status"] == "ok"
        cubins = list(tmp_path.rglob("*.cubin"))
        assert len(cubins) == len(kernel_names())
        assert all(cubin.read_bytes().startswith(b"\x7fELF") for cubin in cubins)
        for cubin in cubins:
            cubin.write_bytes(b"stale")


@needs_triton
def test_lost_back_ends_and_tools_are_failures(tmp_path):
    preparation = """
import triton.backends, triton.compiler.compiler
import training.modes.self_check as s
triton.backends.backends = triton.compiler.compiler.backends = {}
s._launches_kernels = lambda: True
"""
    checks = triton_checks(tmp_path, preparation, CC=str(tmp_path / "no_compiler"))
    assert "NVIDIA's is not among the 0" in checks["Triton back ends"]["found"]
    assert "0 compatible backends" in checks["kernels"]["found"]
    for name in ("Triton back ends", "kernels", "C stub"):
        assert checks[name]["status"] == "fail" and checks[name]["advice"]


@needs_triton
def test_the_interpreter_compiles_nothing_and_that_is_told(tmp_path):
    checks = triton_checks(tmp_path, NO_GPU, TRITON_INTERPRET="1")
    assert checks["kernels"]["status"] == "warn" and "C stub" not in checks


def test_a_damaged_or_missing_asset_is_named(tmp_path, monkeypatch):
    copy = tmp_path / "assets"
    shutil.copytree(self_check.ASSETS_DIRECTORY, copy)
    monkeypatch.setattr(self_check, "ASSETS_DIRECTORY", copy)
    assert self_check.check_assets().status == "ok"
    with (copy / "tokenizer_4k.json").open("ab") as file:
        file.write(b" ")
    assert self_check.check_assets().found == "damaged: tokenizer_4k.json"
    (copy / "corpus.jsonl.xz").unlink()
    assert "corpus.jsonl.xz" in self_check.check_assets().found
    (copy / "MANIFEST.json").unlink()
    assert self_check.check_assets().status == "fail"


def end_at_once(sender, text):
    sys.exit(2)


def answer_for_another(sender, text):
    sender.send((0, text))


@pytest.mark.parametrize(("worker", "code"), [(end_at_once, 2), (answer_for_another, 0)])
def test_a_worker_that_does_not_answer_is_a_failure(worker, code, monkeypatch):
    """A program without freeze_support starts itself again and ends with exit code 2."""
    assert self_check.check_worker().status == "ok"
    monkeypatch.setattr(self_check, "answer_from_worker", worker)
    check = self_check.check_worker()
    assert check.status == "fail"
    assert f"ended with code {code} and without an answer" in check.found


def test_an_output_that_cannot_take_every_character_is_a_failure(monkeypatch):
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(encoding="cp1252"))
    check = self_check.check_output()
    assert check.status == "fail" and "cp1252" in check.found and "PYTHONUTF8" in check.advice


def test_caches_inside_the_packed_folder_are_a_failure(tmp_path, monkeypatch):
    inside, outside = tmp_path / "_internal" / "cache", tmp_path / ".runtime_cache"
    assert self_check.check_cache_place(inside).status == "ok"
    monkeypatch.setattr(sys, "_MEIPASS", str(tmp_path / "_internal"), raising=False)
    assert self_check.check_cache_place(inside).status == "fail"
    assert self_check.check_cache_place(outside).status == "ok"


def test_missing_or_damaged_hidden_questions_are_found(tmp_path):
    assert self_check.check_questions().status == "ok"
    assert self_check.check_questions(tmp_path / "none.json").status == "fail"
    (tmp_path / "half.json").write_text('{"questions": [', encoding="utf-8")
    assert self_check.check_questions(tmp_path / "half.json").status == "fail"
