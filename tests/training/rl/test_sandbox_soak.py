"""R15, reduced for every run and in full as a soak: the process stays alive, nothing is left."""

import os
import subprocess
import sys

import pytest

from scripts.soak_sandbox import processes_below, soak
from tests.training.rl.boxes import open_or_skip

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the Linux sandbox")


def check(report, *, runs):
    assert report["runs"] == runs and report["orphans"] == 0 and report["lost_workers"] == 0
    kinds = {name.split()[0] for name in report["outcomes"]}
    assert kinds == {"honest", "hostile", "endless"}
    print({key: report[key] for key in ("runs", "kill_latency_ms", "honest_run_ms", "seconds")})


def test_two_hundred_mixed_programs_leave_nothing():
    open_or_skip().close()
    check(soak(runs=200, seed=0, num_workers=2, time_limit_s=600), runs=200)


@pytest.mark.soak
def test_ten_thousand_mixed_programs_leave_nothing():
    open_or_skip().close()
    report = soak(runs=10_000, seed=0, num_workers=2, time_limit_s=7200)
    check(report, runs=10_000)
    assert report["kill_latency_ms"]["p99"] <= 500


def test_a_process_that_is_left_over_would_be_seen(tmp_path):
    """The control of the counting."""
    before = processes_below(os.getpid())
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as left:
        assert left.pid in processes_below(os.getpid()) and left.pid not in before
        left.communicate(b"\n")
