"""The laboratory's own parts that need no Wine: the proxy's exports, its refusals, its verdicts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from scripts.windows_lab.trials import Laboratory, Trial, TrialFault, attempt, check
from scripts.windows_lab.ucrt_exports import definition

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the laboratory needs a Linux to stand on")

SCRIPT = Path(__file__).parents[2] / "scripts/windows_lab.sh"
EXPORTS = """\
[Ordinal/Name Pointer] Table -- Ordinal Base 1
\t          Ordinal   Hint Name
\t[   0] +base[   1]  0000 _Cbuild
\t[2106] +base[2107]  083a cexp
\t[2107] +base[2108]  083b malloc

\treloc    1 offset    0 [98000] ABSOLUTE
"""
SYMBOLS = "0000000000000010 T ms_cexp\n0000000000000020 T ms_csin\n0000000000000030 t in\n"


def test_the_proxy_has_its_own_functions_and_forwards_all_others():
    assert definition(EXPORTS, SYMBOLS, original="ucrtwine").splitlines() == [
        "LIBRARY ucrtbase.dll",
        "EXPORTS",
        "  _Cbuild = ucrtwine._Cbuild",
        "  cexp = ms_cexp",
        "  malloc = ucrtwine.malloc",
    ]


@pytest.mark.parametrize(("exports", "symbols"), [("", SYMBOLS), (EXPORTS, ""), (SYMBOLS, EXPORTS)])
def test_tables_that_cannot_be_read_are_an_error(exports, symbols):
    with pytest.raises(ValueError, match="no exports"):
        definition(exports, symbols, original="ucrtwine")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--lab DIR is needed"),
        (["--lab", "x", "--stage", "cake"], "--stage is one of"),
        (["--lba", "x"], "unknown argument --lba"),
    ],
)
def test_a_mistake_is_one_line_and_makes_nothing(tmp_path, arguments, says):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    run = subprocess.run([bash, SCRIPT, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2
    assert says in run.stderr and run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_does_not_hold_is_named_and_does_not_stop_the_others(tmp_path, capsys):
    def holds(laboratory, trial):
        check(True, "never said")

    def fails(laboratory, trial):
        check("" != "", "the loss did not fall")

    def is_broken(laboratory, trial):
        (laboratory.runs / "metrics.jsonl").read_text(encoding="utf-8")

    laboratory = Laboratory(root=tmp_path)
    faults = [attempt(trial, laboratory).fault for trial in (holds, fails, is_broken)]
    assert faults[:2] == ["", "TrialFault: the loss did not fall"]
    assert faults[2].startswith("FileNotFoundError")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_an_exit_code_that_was_not_expected_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(Laboratory, "start", lambda self, *command: (1, "one\ntwo\n"))
    trial = Trial(name="any")
    with pytest.raises(TrialFault, match="exit code 1, not 0"):
        Laboratory(root=tmp_path).program(trial, "--help")
    assert trial.said == ["one", "two"] and trial.exit_code == 1
