"""Every kernel compiles for every GPU generation, on a machine without one."""

import json
import os
import subprocess
import sys

import pytest

from scripts.compile_kernels import ARCHITECTURES, TENSOR_CORE
from scripts.environment import ROOT

pytest.importorskip("triton")
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), "--json"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def rows_of(compiled, kernel):
    """Architecture and row of every build of a kernel."""
    return [(row["architecture"], row) for row in compiled if row["kernel"] == kernel]


def test_every_kernel_for_every_architecture(compiled):
    for kernel in {row["kernel"] for row in compiled}:
        rows = rows_of(compiled, kernel)
        assert {architecture for architecture, _ in rows} == set(ARCHITECTURES)
        for architecture, row in rows:
            assert row["code_bytes"] > 0
            assert row["shared_bytes"] <= SHARED_BYTES[architecture]


@pytest.mark.parametrize("kernel", ["int8_product_kernel", "grouped_int8_product_kernel"])
def test_int8_products_run_on_integer_tensor_cores(compiled, kernel):
    rows = rows_of(compiled, kernel)
    assert len(rows) >= len(ARCHITECTURES)
    for architecture, row in rows:
        wanted = "wgmma.mma_async" if architecture == 90 else "mma"
        used = [name for name in row["tensor_core"] if "s32.s8.s8" in name]
        assert used and all(name.startswith(wanted) for name in used), row
        assert len(used) == len(row["tensor_core"])  # and on nothing else


def test_logits_in_bf16_are_formed_on_tensor_cores(compiled):
    instructions = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for architecture in ARCHITECTURES:
        rows = [row for row in compiled if row["architecture"] == architecture]
        used = [row["tensor_core"] for row in rows if row["kernel"] == "logit_gradient_kernel"]
        assert any(name.startswith(instructions.get(architecture, "mma.sync")) for name in used[0])
        assert used[1] == []  # fp32 is not rounded to fit one


def test_the_pattern_does_not_take_other_instructions_for_products():
    assert not TENSOR_CORE.findall("fma.rn.f32 %f1; mul.lo.s32; wgmma.fence.sync.aligned;")
    assert TENSOR_CORE.findall("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {")


def test_the_interpreter_is_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "TRITON_INTERPRET" in run.stderr and run.stdout == ""
