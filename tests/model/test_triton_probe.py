"""The probe kernel agrees with its definition, stays inside its vectors, and compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
PROJECT = Path(__file__).parents[2]
INTERPRETED = """
import torch
from model.triton_probe import BLOCK, scaled_add, scaled_add_definition

generator = torch.Generator().manual_seed(5)
for length in (1, 63, BLOCK, 500):
    x = torch.randn(length, generator=generator)
    y = torch.randn(length, generator=generator)
    around = torch.full((length + 2,), float("nan"))
    scaled_add(x, y, scale=0.3, out=around[1:-1])
    expected = scaled_add_definition(x, y, scale=0.3)
    torch.testing.assert_close(around[1:-1], expected, rtol=0.0, atol=1e-6)
    assert around[[0, -1]].isnan().all(), "wrote outside its vector"
for out in (torch.empty(3), torch.empty(8)[::2]):
    try:
        scaled_add(torch.ones(4), torch.ones(4), scale=1.0, out=out)
    except ValueError as error:
        print(error)
"""


def test_the_interpreted_kernel_equals_its_definition(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "equal length" in result.stdout and "contiguous" in result.stdout


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_it_compiles_to_machine_code_without_a_gpu(capability, tmp_path, monkeypatch):
    from model.triton_probe import compile_probe

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compile_probe(capability=capability)
    assert code.startswith(b"\x7fELF") and b"scaled_add_kernel" in code
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
