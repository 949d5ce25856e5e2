"""The Windows lockfile is complete and resolves for Windows and Python 3.13 with wheels only.

PyTorch's own index is not asked: the +cu128 builds stand there and nowhere else, so the test
resolves the plain versions of the same numbers, whose requirements are the same but for CUDA's own
libraries, which the Windows wheels carry inside.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
LOCKFILE = PROJECT / "requirements-py313-cu128.txt"
PIN = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*(\+cu128)?")
PROMISED = {
    "torch": "2.10.0+cu128",
    "torchvision": "0.25.0+cu128",
    "torchaudio": "2.10.0+cu128",
    "triton-windows": "3.6.0.post25",
    "transformers": "4.57.6",
    "datasets": "4.3.0",
    "trl": "0.24.0",
    "unsloth": "2025.3.3",
    "unsloth-zoo": "2025.3.1",
}
UNREACHABLE = ("error sending request", "dns error", "Failed to fetch", "Network connectivity")
LIMIT_S = 300


def pins() -> dict[str, str]:
    """Version by package; every line that is neither empty nor a comment must be an exact pin."""
    lines = LOCKFILE.read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    loose = [line for line in wanted if not PIN.fullmatch(line)]
    assert not loose, f"no exact pins: {loose}"
    return dict(line.split("==") for line in wanted)


def resolve(versions: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """What uv makes of these pins for Windows and Python 3.13; skips without uv or the index."""
    if importlib.util.find_spec("uv"):
        command = [sys.executable, "-m", "uv"]
    elif found := shutil.which("uv"):
        command = [found]
    else:
        pytest.skip("needs uv")
    source = folder / "pins.txt"
    lines = [f"{name}=={version.partition('+')[0]}\n" for name, version in versions.items()]
    source.write_text("".join(lines), encoding="utf-8")
    options = "--python-platform x86_64-pc-windows-msvc --python-version 3.13 --only-binary :all:"
    shape = "--no-header --no-annotate --quiet"
    run = subprocess.run(
        [*command, "pip", "compile", str(source), *options.split(), *shape.split()],
        capture_output=True,
        encoding="utf-8",
        timeout=LIMIT_S,
    )
    if any(words in run.stderr for words in UNREACHABLE):
        pytest.skip("the package index does not answer")
    return run


def test_every_promised_version_is_pinned():
    assert PROMISED.items() <= pins().items()


def test_it_resolves_to_itself_and_nothing_more(tmp_path):
    expected = {f"{name}=={version.partition('+')[0]}" for name, version in pins().items()}
    run = resolve(pins(), tmp_path)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == expected


def test_a_conflict_is_found(tmp_path):
    run = resolve({**pins(), "protobuf": "5.29.5"}, tmp_path)
    assert run.returncode != 0
    assert "unsloth" in run.stderr and "protobuf" in run.stderr
