"""Suite R1 at the level of file operations, and SIGKILL at random moments of a saving loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks and sends SIGKILL")


def drive(mode: str, directory: Path, *, amount: int = 0, seed: int = 0) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.runtime.kill_driver"]
        + [mode, str(directory), str(amount), str(seed)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kills_at_random_times_lose_no_acknowledged_step(ram_path: Path) -> None:
    result = drive("random", ram_path, amount=150)
    assert result["kills"] == 150
    assert result["saves"] > 150  # the loop got somewhere between the kills


def test_kills_around_every_operation_lose_nothing(ram_path: Path) -> None:
    result = drive("every", ram_path)
    assert result["save"] > 80  # 2 x the mutating operations of a save and its retention
    assert result["quarantine"] > 80


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 11))
def test_many_kills_at_random_times(ram_path: Path, seed: int) -> None:
    assert drive("random", ram_path, amount=1000, seed=seed)["kills"] == 1000
