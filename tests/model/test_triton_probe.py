"""The probe kernel agrees with its definition, stays inside its vectors, and compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from model.triton_probe import BLOCK, scaled_add, scaled_add_definition

PROJECT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU it is interpreted
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
COMPILED = """
import json, sys
from model.triton_probe import compile_probe
codes = {name: compile_probe(capability=int(name)) for name in sys.argv[1:]}
print(json.dumps({name: [code[:4].hex(), b"scaled_add" in code] for name, code in codes.items()}))
"""


@pytest.mark.parametrize("length", [1, 63, BLOCK, 500])
def test_the_kernel_equals_its_definition_and_stays_inside(length):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(length, generator=generator).to(DEVICE)
    y = torch.randn(length, generator=generator).to(DEVICE)
    around = torch.full((length + 2,), float("nan"), device=DEVICE)
    scaled_add(x, y, scale=0.3, out=around[1:-1])
    expected = scaled_add_definition(x, y, scale=0.3)
    torch.testing.assert_close(around[1:-1], expected, rtol=0.0, atol=1e-6)
    assert around[[0, -1]].isnan().all()


def test_what_it_cannot_take_is_refused():
    four = torch.ones(4, device=DEVICE)
    with pytest.raises(ValueError, match="equal length"):
        scaled_add(four, four, scale=1.0, out=torch.empty(3, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        scaled_add(four, four, scale=1.0, out=torch.empty(8, device=DEVICE)[::2])


def test_it_compiles_to_machine_code_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILED, *map(str, ARCHITECTURES)]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    elf = b"\x7fELF".hex()
    assert json.loads(result.stdout) == {str(name): [elf, True] for name in ARCHITECTURES}
