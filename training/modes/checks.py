"""What `--mode doctor` and its self-check report in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from training.runtime.directories import write_problem


@dataclass(slots=True, kw_only=True)
class Check:
    """One finding; `advice` says what to do and is empty when nothing is."""

    name: str
    status: str
    found: str
    advice: str = ""


def check_writable(name: str, flag: str, directory: Path) -> Check:
    """Whether the directory that a flag names can be written to."""
    problem = write_problem(directory)
    if problem:
        found = f"{directory} cannot be written: {problem}"
        return Check(name=name, status="fail", found=found, advice=f"choose another {flag}")
    return Check(name=name, status="ok", found=f"{directory} is writable")
