"""Every kernel compiles for every GPU generation, on a machine without one."""

import json
import os
import subprocess
import sys

import pytest

from scripts.compile_kernels import ARCHITECTURES, TENSOR_CORE
from scripts.environment import ROOT

pytest.importorskip("triton")
MAX_STACK_BYTES = 256  # a thread's; more would mean that a tile does not fit in registers
SHARED_BYTES = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def compile_all(tmp_path_factory, *options):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py"), "--json", *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_all(tmp_path_factory, "--operands", "bf16")


def rows_of(compiled, kernel, use=""):
    wanted = (kernel, use)
    return {row["architecture"]: row for row in compiled if (row["kernel"], row["use"]) == wanted}


def assert_fits_everywhere(compiled):
    for kernel in {(row["kernel"], row["use"]) for row in compiled}:
        rows = rows_of(compiled, *kernel)
        assert sorted(rows) == sorted(ARCHITECTURES)
        for architecture, row in rows.items():
            assert row["code_bytes"] > 0
            assert row["shared_bytes"] <= SHARED_BYTES[architecture], row
            assert row["stack_bytes"] <= MAX_STACK_BYTES, row


def test_every_kernel_for_every_architecture(compiled):
    assert_fits_everywhere(compiled)


@pytest.mark.soak
def test_every_kernel_with_fp32_products_for_every_architecture(tmp_path_factory):
    assert_fits_everywhere(compile_all(tmp_path_factory, "--operands", "fp32"))


def test_the_scan_multiplies_on_tensor_cores_in_bf16(compiled):
    products = [
        *("chunk_scores_kernel", "chunk_states_kernel", "scan_outputs_kernel"),
        *("input_gradient_kernel", "score_gradient_kernel", "shared_gradient_kernel"),
    ]
    for name in products:
        rows = [row for row in compiled if row["kernel"] == name]
        assert rows
        for row in rows:
            assert row["tensor_core"], row
            assert all("f32.bf16.bf16" in used or "f16" in used for used in row["tensor_core"]), row


def test_int8_products_run_on_integer_tensor_cores(compiled):
    for architecture, row in rows_of(compiled, "int8_product_kernel").items():
        wanted = "wgmma.mma_async" if architecture == 90 else "mma"
        used = [name for name in row["tensor_core"] if "s32.s8.s8" in name]
        assert used and all(name.startswith(wanted) for name in used), row
        assert len(used) == len(row["tensor_core"])  # and on nothing else


def test_the_pattern_does_not_take_other_instructions_for_products():
    assert not TENSOR_CORE.findall("fma.rn.f32 %f1; mul.lo.s32; wgmma.fence.sync.aligned;")
    assert TENSOR_CORE.findall("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {")


def test_the_interpreter_is_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "TRITON_INTERPRET" in run.stderr and run.stdout == ""
