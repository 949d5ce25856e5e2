"""The gate before packing: whatever is missing, wrong or broken is named and stops the build."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import verify_runtime
from scripts.verify_runtime import check_coverage, check_import, check_pins, main, read_pins
from training.runtime.needed_modules import NEEDED, NeededModule

PROJECT = Path(__file__).parents[2]
LOCKFILES = ("requirements-py313-cu128.txt", "requirements-cpu.txt")


def needed(module: str, *symbols: str, needs_gpu: bool = False) -> NeededModule:
    return NeededModule(module=module, distribution="pytest", symbols=symbols, needs_gpu=needs_gpu)


def lockfile(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "lock.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def statuses(pins) -> dict[str, str]:
    return {finding.name: finding.status for finding in check_pins(pins)}


def test_a_pin_is_met_by_that_version_and_build_only(tmp_path, monkeypatch):
    versions = {"torch": "2.10.0+cu128", "plain": "1.0", "local": "1.0+cpu", "older": "0.9"}
    monkeypatch.setattr(verify_runtime.importlib.metadata, "version", versions.__getitem__)
    lines = ("torch==2.10.0+cu128", "plain==1.0.0", "local==1.0", "older==1.0")
    expected = {"torch": "ok", "plain": "ok", "local": "ok", "older": "fail"}
    assert statuses(read_pins(lockfile(tmp_path, *lines))) == expected
    versions["torch"] = "2.10.0+cpu"
    assert statuses(read_pins(lockfile(tmp_path, *lines)))["torch"] == "fail"


def test_what_is_not_installed_is_named_with_its_pin(tmp_path):
    [finding] = check_pins(read_pins(lockfile(tmp_path, "surely-not-there==1.2.3  # why")))
    assert finding.status == "fail"
    assert finding.found == "not installed, but the lockfile has ==1.2.3"


def test_a_marker_of_another_machine_is_no_demand(tmp_path):
    lines = ("a==1 ; sys_platform == 'none'", f"b==1 ; sys_platform == '{sys.platform}'")
    assert set(read_pins(lockfile(tmp_path, *lines))) == {"b"}


@pytest.mark.parametrize("line", ["a>=1", "a", "a==1.*", "a==1,!=2", "-r other.txt", "a = 1"])
def test_a_lockfile_that_does_not_pin_is_refused(tmp_path, line, capsys):
    assert main(["--lockfile", str(lockfile(tmp_path, "b==1", line))]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and "line 2" in shown.err


def test_a_missing_lockfile_is_one_line(tmp_path, capsys):
    assert main(["--lockfile", str(tmp_path / "nowhere.txt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", LOCKFILES)
def test_both_lockfiles_pin_what_the_program_needs(name):
    pins = {
        line.partition("==")[0].strip()
        for line in (PROJECT / name).read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    assert check_coverage(pins, NEEDED) == []
    [gap] = check_coverage(pins - {"orjson"}, NEEDED)
    assert (gap.name, gap.status) == ("orjson", "fail")


def test_every_needed_module_is_pinned_for_windows():
    text = (PROJECT / LOCKFILES[0]).read_text(encoding="utf-8")
    for module in NEEDED:
        assert f"\n{module.distribution}==" in text, module.module


@pytest.mark.parametrize(
    ("module", "status", "says"),
    [
        (needed("json", "dumps", "decoder.JSONDecoder"), "ok", "decoder.JSONDecoder"),
        (needed("json", "dumps", "dunps"), "fail", "json has no dunps"),
        (needed("json", "decoder.Nothing"), "fail", "json has no decoder.Nothing"),
        (needed("surely_not_there"), "fail", "No module named 'surely_not_there'"),
        (needed("broken_module"), "fail", "RuntimeError: a DLL is missing"),
        (needed("dying_module"), "fail", "exit code"),
    ],
    ids=["whole", "symbol", "nested", "absent", "raises", "dies"],
)
def test_an_import_is_tried_for_real(module, status, says, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('a DLL is missing')")
    (tmp_path / "dying_module.py").write_text("import os\nos.abort()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = check_import(module)
    assert finding.status == status
    assert says in finding.found


def test_a_hanging_import_is_ended(tmp_path, monkeypatch):
    (tmp_path / "hanging_module.py").write_text("import threading\nthreading.Event().wait()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verify_runtime, "IMPORT_LIMIT_S", 1.0)
    finding = check_import(needed("hanging_module"))
    assert finding.status == "fail" and "no answer" in finding.found


def test_a_module_for_the_gpu_is_seen_without_one_but_must_be_there(tmp_path, monkeypatch):
    fake_torch = "class cuda:\n    is_available = staticmethod(lambda: {})\n"
    (tmp_path / "torch.py").write_text(fake_torch.format(False))
    (tmp_path / "picky_module.py").write_text("raise NotImplementedError('no GPU')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check_import(needed("picky_module", needs_gpu=True)).status == "seen"
    assert check_import(needed("surely_not_there", needs_gpu=True)).status == "fail"
    (tmp_path / "torch.py").write_text(fake_torch.format(True))
    assert "no GPU" in check_import(needed("picky_module", needs_gpu=True)).found


def test_the_report_and_the_exit_code_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify_runtime, "NEEDED", (needed("json", "dumps"),))
    path = lockfile(tmp_path, f"pytest=={pytest.__version__}")
    assert main(["--lockfile", str(path)]) == 0
    assert capsys.readouterr().out.endswith("verify_runtime: all 2 checks passed (lock.txt)\n")
    monkeypatch.setattr(verify_runtime, "NEEDED", (needed("json", "dunps"),))
    assert main(["--lockfile", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "verify_runtime: 1 of 2 checks failed:",
        "fail import json: json has no dunps",
    ]
    assert main(["--lockfile", str(path), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["passed"] is False and len(record["findings"]) == 2


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    path = lockfile(tmp_path, "surely-not-there==1")
    script = PROJECT / "scripts" / "verify_runtime.py"
    result = subprocess.run(
        [sys.executable, str(script), "--lockfile", str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert "fail version surely-not-there" in result.stdout
    assert "fail pin torch: needed, but not in the lockfile" in result.stdout
