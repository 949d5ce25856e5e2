"""Saves and resumes where memory really is short.

Each in a process of its own: one that has done much before has freed memory to hand out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from training.runtime.environment import PROJECT_ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its memory")


def live(life: str, directory: Path) -> None:
    command = [sys.executable, "-m", "tests.training.runtime.short_memory_life", life, directory]
    run = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def test_a_resume_that_finds_no_memory_says_how_much_it_needs(ram_path: Path) -> None:
    live("resume", ram_path)


def test_a_save_that_is_waited_for_needs_no_memory(ram_path: Path) -> None:
    live("save", ram_path)
