"""The siege of a training run's verifier: it ends as it should, and names a wrong verdict."""

import sys

import pytest

from scripts import soak_rl
from tests.training.rl import programs
from tests.training.rl.boxes import open_or_skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs a sandbox that was proved")


def test_a_wrong_verdict_is_the_one_fault_of_a_run_whose_sandbox_is_killed(tmp_path, monkeypatch):
    """The control: an honest program among those that must fail."""
    open_or_skip().close()
    honest = programs.honest_programs("sum_of_squares")[0]
    monkeypatch.setattr(programs, "HACKS", (*programs.HACKS[:9], honest))
    monkeypatch.setattr(soak_rl, "KILL_EVERY", 1)
    report = soak_rl.soak(tmp_path, runs=40, seed=0, minutes=10.0, limit_ms=60_000, suites=["R14"])
    assert len(report["faults"]) == 1, report["faults"]
    (fault,) = report["faults"]
    assert fault.startswith("R14 hack Judgement(passed=True") and "return sum(n * n" in fault
    assert report["programs"] == 40 and report["outcomes"]["R14 honest passed"] == 30
    assert report["outcomes"]["R14 hack passed"] == 1
    assert report["outcomes"]["sandbox killed"] == 1
    assert report["trainer"]["steps"] == 1 and report["processes_after_closing"] == 0
