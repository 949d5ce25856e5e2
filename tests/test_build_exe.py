"""build_exe.bat read step by step: the order, and that no failure is passed over.

The steps are run by a small interpreter with every program played; what the real cmd.exe makes of
the file is the laboratory's to show.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from scripts.installer import UV
from tests.batch_file import BatchRun, run_batch

PROJECT = Path(__file__).parents[1]
BATCH = PROJECT / "build_exe.bat"
TEXT = BATCH.read_bytes().decode("ascii")
VS = r"C:\Program Files\Microsoft Visual Studio\18\Insiders"
VSDEVCMD = rf"{VS}\Common7\Tools\VsDevCmd.bat"
VCVARS = rf"{VS}\VC\Auxiliary\Build\vcvars64.bat"
STEPS = (
    "tasklist /FI",
    "py -3.13 -m venv",
    "sys.version_info",
    "-m pip install --upgrade pip",
    f"-m pip install {UV}",
    'findstr /R "^torch',
    "-m uv pip install",
    "--only-binary :all: --requirement",
    "verify_runtime.py",
    "-m PyInstaller",
    "xcopy",
    "copy /Y",
    "--mode doctor --self-check",
)


def build(
    *,
    fails: str = "",
    running: bool = False,
    there: tuple[str, ...] = (),
    text: str = TEXT,
    code: int = 1,
    **variables: str,
) -> BatchRun:
    """Run the batch file on a played machine where one program fails, if any."""
    files = set(there)

    def answer(program: str) -> int:
        if program.startswith("tasklist"):
            return 0 if running else 1  # find's answer
        if program.startswith("rmdir") and not (fails and fails in program):
            files.discard("_internal")
        return code if fails and fails in program else 0

    return run_batch(text, answer=answer, exists=lambda path: path in files, variables=variables)


def position(run: BatchRun, words: str) -> int:
    found = [i for i, program in enumerate(run.programs) if words in program]
    assert len(found) == 1, (words, run.programs)
    return found[0]


def test_every_step_is_done_once_and_in_order():
    run = build()
    assert run.exit_code == 0
    positions = [position(run, step) for step in STEPS]
    assert positions == sorted(positions)
    assert run.programs[-1] == r".\eco_train.exe --mode doctor --self-check"
    assert run.said[-1].startswith("[build] done: eco_train.exe")


@pytest.mark.parametrize("code", [1, 2, -1073741515], ids=["one", "two", "missing-dll"])
@pytest.mark.parametrize("step", STEPS[1:])
def test_a_failed_step_ends_the_build_with_its_reason(step, code):
    run = build(fails=step, code=code)
    assert run.exit_code == 1
    assert step in run.programs[-1], "something ran after the failure"
    assert run.said[-1].startswith("[build] FAILED: ") and len(run.said[-1]) > 40


def test_the_reasons_differ_so_that_they_tell_the_step():
    reasons = [build(fails=step).said[-1] for step in STEPS[1:] if "copy" not in step]
    assert len(set(reasons)) == len(reasons)


def test_a_step_whose_check_is_deleted_is_seen_by_these_tests():
    """Negative control: without the line after PyInstaller the build would go on."""
    broken, count = re.subn(
        r"(eco_train\.spec\r\n)if %errorlevel% neq 0 goto fail\r\n", r"\1", TEXT
    )
    assert count == 1
    assert "-m PyInstaller" not in build(fails="-m PyInstaller", text=broken).programs[-1]


def test_nothing_is_touched_while_the_program_runs():
    run = build(running=True)
    assert run.exit_code == 1 and len([p for p in run.programs if "mkdir" not in p]) == 1
    assert "eco_train.exe is running" in run.said[-1]


@pytest.mark.parametrize(
    ("there", "loaded"),
    [((VSDEVCMD, VCVARS), "VsDevCmd.bat"), ((VCVARS,), "vcvars64.bat"), ((), None)],
)
def test_visual_studio_is_loaded_where_it_is(there, loaded):
    run = build(there=there)
    calls = [program for program in run.programs if program.startswith("call ")]
    assert run.exit_code == 0 and len(calls) == (loaded is not None)
    if loaded:
        assert f'\\{loaded}"' in calls[0]
        broken = build(there=there, fails=loaded)
        assert broken.exit_code == 1 and loaded in broken.said[-1]
        assert broken.programs[-1] == calls[0]


def test_new_compilers_are_allowed_and_the_users_own_flags_stay():
    variables = build(CUDAFLAGS="-lineinfo").variables
    for name in ("TORCH_NVCC_FLAGS", "CUDAFLAGS", "CMAKE_CUDA_FLAGS"):
        assert variables[name].split()[0] == "--allow-unsupported-compiler"
    assert variables["CUDAFLAGS"].endswith(" -lineinfo")


@pytest.mark.parametrize(
    ("there", "folder"),
    [
        (("libtorch\\lib", "..\\libtorch\\lib"), r"C:\sigma\libtorch"),
        (("..\\libtorch\\lib",), r"C:\sigma\..\libtorch"),
        ((), None),
    ],
)
def test_a_local_libtorch_comes_first_in_every_path(there, folder):
    before = {"PATH": r"C:\Windows (x86)", "LIB": "l", "INCLUDE": "i"}
    run = build(there=there, **before)
    assert run.exit_code == 0
    for name, part in (("PATH", "lib"), ("LIB", "lib"), ("INCLUDE", "include")):
        value = run.variables[name]
        assert value.endswith(before[name])
        if folder is None:
            assert value == before[name]
        else:
            assert value.startswith(rf"{folder}\{part};")


def test_a_prepared_python_is_used_as_it_is():
    run = build(SIGMA_BUILD_PYTHON=r"D:\py\python.exe", SIGMA_BUILD_LOCKFILE="plain.txt")
    assert run.exit_code == 0
    assert not [program for program in run.programs if " install " in program or "venv" in program]
    verify = run.programs[position(run, "verify_runtime.py")]
    assert verify.startswith(r'"D:\py\python.exe" ') and verify.endswith('--lockfile "plain.txt"')


def test_an_existing_environment_is_kept_and_an_old_payload_is_not():
    venv = r"C:\sigma\build\venv\Scripts\python.exe"
    run = build(there=(venv, "_internal"))
    assert run.exit_code == 0
    assert not [program for program in run.programs if "-m venv" in program]
    assert position(run, "rmdir /S /Q _internal") < position(run, "xcopy")
    held = build(there=(venv, "_internal"), fails="rmdir")
    assert held.exit_code == 1 and "rmdir" in held.programs[-1]
    assert "_internal could not be removed" in held.said[-1]


def test_every_file_it_names_is_in_the_project():
    names = re.findall(r"(?:scripts\\[\w\\]+\.\w+|requirements-[\w-]+\.txt)", TEXT)
    assert {name.rpartition("\\")[2] for name in names} == {
        "verify_runtime.py",
        "eco_train.spec",
        "requirements-py313-cu128.txt",
    }
    for name in names:
        assert (PROJECT / name.replace("\\", "/")).is_file(), name


def test_it_is_a_batch_file_that_cmd_can_read():
    content = BATCH.read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") == content.count(b"\r")
    assert max(map(len, content.split(b"\r\n"))) < 8191  # cmd.exe's longest line
    labels = re.findall(r"^:(\w+)\r$", TEXT, re.MULTILINE)
    assert len(set(labels)) == len(labels)
    assert set(re.findall(r"goto (\w+)", TEXT)) == set(labels)


@pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="asks git")
def test_git_keeps_its_line_ends():
    command = ["git", "check-attr", "text", "build_exe.bat"]
    shown = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert shown.strip().endswith("text: unset")
