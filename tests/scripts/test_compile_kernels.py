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


@pytest.fixture(scope="module")
def compiled_in_fp32(tmp_path_factory):
    return compile_all(tmp_path_factory, "--operands", "fp32")


def rows_of(compiled, kernel):
    """Every build of a kernel, for every architecture."""
    return [row for row in compiled if row["kernel"] == kernel]


def assert_fits_everywhere(compiled):
    found = [(row["kernel"], row["use"], row["architecture"]) for row in compiled]
    kinds = {build[:2] for build in found}
    assert sorted(found) == sorted((*kind, number) for kind in kinds for number in ARCHITECTURES)
    for row in compiled:
        assert row["code_bytes"] > 0
        assert row["shared_bytes"] <= SHARED_BYTES[row["architecture"]], row
        assert row["stack_bytes"] <= MAX_STACK_BYTES, row


def test_every_kernel_for_every_architecture(compiled):
    assert_fits_everywhere(compiled)


@pytest.mark.soak
def test_every_kernel_with_fp32_products_for_every_architecture(compiled_in_fp32):
    assert_fits_everywhere(compiled_in_fp32)


def test_the_scan_multiplies_on_tensor_cores_in_bf16(compiled):
    products = [
        *("chunk_scores_kernel", "chunk_states_kernel", "scan_outputs_kernel"),
        *("input_gradient_kernel", "score_gradient_kernel", "shared_gradient_kernel"),
    ]
    for name in products:
        rows = rows_of(compiled, name)
        assert rows
        for row in rows:
            assert row["tensor_core"], row
            assert all("f32.bf16.bf16" in used or "f16" in used for used in row["tensor_core"]), row


@pytest.mark.parametrize("kernel", ["int8_product_kernel", "grouped_int8_product_kernel"])
def test_int8_products_run_on_integer_tensor_cores(compiled, kernel):
    rows = rows_of(compiled, kernel)
    assert rows
    for row in rows:
        wanted = "wgmma.mma_async" if row["architecture"] == 90 else "mma"
        used = [name for name in row["tensor_core"] if "s32.s8.s8" in name]
        assert used and all(name.startswith(wanted) for name in used), row
        assert len(used) == len(row["tensor_core"])  # and on nothing else


def test_logits_in_bf16_are_formed_on_tensor_cores(compiled):
    instructions = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for row in rows_of(compiled, "logit_gradient_kernel"):
        wanted = instructions.get(row["architecture"], "mma.sync")
        assert any(name.startswith(wanted) for name in row["tensor_core"]), row


@pytest.mark.soak
def test_logits_in_fp32_are_not_rounded_to_fit_a_tensor_core(compiled_in_fp32):
    for row in rows_of(compiled_in_fp32, "logit_gradient_kernel"):
        assert row["tensor_core"] == []


def test_the_pattern_does_not_take_other_instructions_for_products():
    assert not TENSOR_CORE.findall("fma.rn.f32 %f1; mul.lo.s32; wgmma.fence.sync.aligned;")
    assert TENSOR_CORE.findall("mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {")


def test_the_interpreter_is_refused():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "compile_kernels.py")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "TRITON_INTERPRET" in run.stderr and run.stdout == ""
