"""The doctor fails for what the run needs, warns for the rest, and always says what to do."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest

from training.config.cli import parse_args
from training.modes import doctor
from training.modes.checks import Check
from training.modes.doctor import check_python, examine
from training.runtime.environment import CudaFacts

CPU = [
    "--no-require-cuda",
    "--device",
    "cpu",
    "--no-torch-compile",
    "--tokenizer-name",
    "assets-4k",
]
NO_GPU = CudaFacts(
    torch_version="2.13.0+cpu", torch_cuda=None, available=False, nvml_error="no NVML"
)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


@pytest.fixture(autouse=True)
def machine_without_gpu(monkeypatch):
    for module in (doctor, sys.modules["training.runtime.environment"]):
        monkeypatch.setattr(module, "probe_cuda", lambda: NO_GPU)


@pytest.fixture
def config(tmp_path):
    def build(*argv: str):
        dirs = ["--output-dir", f"{tmp_path}/run", "--checkpoint-dir", f"{tmp_path}/ckpt"]
        return parse_args([*CPU, *dirs, *argv])

    return build


def test_a_machine_fit_for_the_run_passes_every_check(config, tmp_path):
    checks = examine(config())
    assert {check.name for check in checks if check.status == "fail"} == set()
    assert [check.name for check in checks][:3] == ["Python", "packages", "torch"]
    assert len({check.name for check in checks}) == len(checks) == 14
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gpu_fails_only_a_run_that_needs_it(config):
    assert by_name(examine(config()))["driver"].status == "ok"
    needed = by_name(examine(config("--require-cuda", "--device", "cuda")))
    for name in ("driver", "device"):
        assert needed[name].status == "fail"
        assert "profiles/quickstart.txt" in needed[name].advice
    assert needed["precision"].status == "warn"


def test_each_unusable_thing_is_named_with_what_to_do(config, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "free_bytes", lambda directory: 1000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    checks = by_name(
        examine(
            config(
                "--output-dir", f"{tmp_path}/file/run",
                "--precision", "bf16",
                "--tokenizer-name", "nowhere.json",
            )
        )
    )  # fmt: skip
    for name, words in {
        "output directory": "is not a directory",
        "disk": "free",
        "memory": "of memory free",
        "precision": "--precision bf16 needs CUDA",
        "assets": "--tokenizer-name nowhere.json",
    }.items():
        assert checks[name].status == "fail", name
        assert words in checks[name].found
        assert checks[name].advice


def test_space_for_two_checkpoints_but_not_all_is_a_warning(config, monkeypatch):
    size = doctor.checkpoint_bytes(config())
    monkeypatch.setattr(doctor, "free_bytes", lambda directory: size * 3)
    check = doctor.check_disk(config())
    assert check.status == "warn" and "--max-checkpoints" in check.advice


def test_a_damaged_asset_is_seen(config, tmp_path, monkeypatch):
    copy = tmp_path / "assets"
    shutil.copytree(doctor.ASSETS_DIRECTORY, copy)
    monkeypatch.setattr(doctor, "ASSETS_DIRECTORY", copy)
    assert doctor.check_assets(config()).status == "ok"
    data = bytearray((copy / doctor.CORPUS_FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / doctor.CORPUS_FILE).write_bytes(data)
    assert "is damaged" in doctor.check_assets(config()).found
    (copy / "MANIFEST.json").unlink()
    assert doctor.check_assets(config()).status == "fail"


def test_a_broken_installation_is_examined_without_torch(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "MODULES", ("json", "surely_not_installed"))
    monkeypatch.setattr(doctor, "free_bytes", lambda directory: 2**50)
    checks = by_name(examine(config()))
    assert checks["packages"].found == "missing: surely_not_installed"
    assert checks["torch"].status == "fail"
    assert "launch.py" in checks["torch"].advice
    assert checks["disk"].status == "ok" and "memory" not in checks


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "fail")],
)
def test_python_versions(version, status):
    assert check_python(version).status == status


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80", "sm_90"], (7, 5), False),
        (["sm_80", "compute_80"], (12, 0), True),
        (["sm_80"], (12, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_120"], (12, 0), True),
    ],
)
def test_kernels_of_a_build_and_the_capability_of_a_gpu(built_for, capability, runs):
    assert doctor._has_kernels(built_for, capability) is runs


def test_compiling_needs_its_tools(config, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.check_compiler(config()).status == "ok"
    check = doctor.check_compiler(config("--torch-compile"))
    assert check.status == "fail" and "--no-torch-compile" in check.advice
    other = config("--torch-compile", "--torch-compile-backend", "eager")
    assert doctor.check_compiler(other).status == "ok"
    monkeypatch.setattr(doctor, "probe_cuda", lambda: replace(NO_GPU, available=True))
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    assert doctor.check_triton(config("--torch-compile")).status == "fail"
    assert doctor.check_triton(config()).status == "warn"


def test_the_result_is_plain_lines_json_or_a_table(config, monkeypatch, capsys):
    found = [
        Check(name="a", status="ok", found="fine"),
        Check(name="b", status="fail", found="[bad]", advice="mend it"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda given: found)
    assert doctor.run(config()) == 1
    assert capsys.readouterr().out == "ok   a: fine\nfail b: [bad] -> mend it\n"
    assert doctor.run(config("--json")) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["passed"] is False
    assert printed["checks"][1] == {
        "name": "b", "status": "fail", "found": "[bad]", "advice": "mend it",
    }  # fmt: skip
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert doctor.run(config()) == 1
    table = capsys.readouterr().out
    assert "[bad]" in table and "mend it" in table
    monkeypatch.setattr(doctor, "examine", lambda given: found[:1])
    assert doctor.run(config("--json")) == 0


def test_a_gpu_without_room_for_a_question_ends_no_other_check(config, monkeypatch):
    """A run that goes on may hold all of its memory; its bug report asks for these checks, too."""

    def check_memory(config):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(doctor, "check_memory", check_memory)
    found = by_name(examine(config()))
    assert found["memory"].status == "fail" and found["memory"].advice
    assert found["memory"].found == "cannot be told: CUDA error: out of memory"
    assert found["disk"].status == "ok" and len(found) == 14
