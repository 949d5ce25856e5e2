"""Guards, precision, seeds and fingerprints of the machine a run stands on."""

from __future__ import annotations

import mmap
import os
import platform
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from training.config.cli import parse_args
from training.runtime import environment
from training.runtime.environment import (
    CudaFacts,
    EnvironmentProblem,
    autocast_dtype,
    config_hash,
    explain_missing_cuda,
    memory_readings,
    prepare_caches,
    resolve_device,
    seed_everything,
    usable_cpus,
    versions,
)

NO_DRIVER = CudaFacts(
    torch_version="2.13.0+cpu", torch_cuda=None, available=False, nvml_error="not found"
)
WORKING = CudaFacts(
    torch_version="2.10.0+cu128",
    torch_cuda="12.8",
    available=True,
    num_devices=2,
    driver="570.1",
    driver_cuda=(12, 8),
)
GPU_BUILD = replace(WORKING, available=False, num_devices=0)


@pytest.fixture
def facts(monkeypatch):
    return lambda value: monkeypatch.setattr(environment, "probe_cuda", lambda: value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (NO_DRIVER, ["no NVIDIA driver", "torch 2.13.0+cpu is built without CUDA"]),
        (
            replace(NO_DRIVER, driver="570.1", driver_cuda=(12, 8)),
            ["built without CUDA although driver 570.1", "requirements-py313-cu128.txt"],
        ),
        (replace(GPU_BUILD, driver=None, driver_cuda=None), ["no NVIDIA driver", "install one"]),
        (
            replace(GPU_BUILD, driver="470.2", driver_cuda=(11, 4)),
            ["driver 470.2 is too old", "CUDA 11.4", "needs CUDA 12.8", "update the driver"],
        ),
        (replace(GPU_BUILD, visible_devices="-1"), ["CUDA_VISIBLE_DEVICES hides every GPU"]),
        (replace(GPU_BUILD, torch_error="device is busy"), ["no usable GPU (device is busy)"]),
    ],
)
def test_the_reason_for_missing_cuda_is_named(given, says, facts):
    facts(given)
    with pytest.raises(EnvironmentProblem) as problem:
        resolve_device(parse_args([]))
    message = str(problem.value)
    assert "\n" not in message
    assert message.startswith("--require-cuda: this profile needs CUDA")
    assert "profiles/quickstart.txt" in message
    for part in says:
        assert part in message and part in explain_missing_cuda(given)


def test_another_device_with_require_cuda_names_both_flags():
    with pytest.raises(EnvironmentProblem, match=r"--require-cuda .*--device cpu"):
        resolve_device(parse_args(["--device", "cpu"]))


def test_the_device_that_was_asked_for_is_the_one_that_is_used(facts):
    facts(WORKING)
    assert resolve_device(parse_args([])) == torch.device("cuda", 0)
    assert resolve_device(parse_args(["--device", "cuda:1"])) == torch.device("cuda", 1)
    assert resolve_device(parse_args(["--device", "auto"])) == torch.device("cuda", 0)
    cpu = ["--no-require-cuda", "--device", "cpu"]
    assert resolve_device(parse_args(cpu)) == torch.device("cpu")
    with pytest.raises(EnvironmentProblem, match="this machine has 2 CUDA devices"):
        resolve_device(parse_args(["--device", "cuda:2"]))


def test_auto_falls_back_only_when_cuda_is_not_required(facts):
    facts(NO_DRIVER)
    auto = ["--device", "auto"]
    assert resolve_device(parse_args([*auto, "--no-require-cuda"])) == torch.device("cpu")
    with pytest.raises(EnvironmentProblem, match="--require-cuda: "):
        resolve_device(parse_args(auto))
    with pytest.raises(EnvironmentProblem, match="--device cuda: "):
        resolve_device(parse_args(["--no-require-cuda"]))


def test_probing_never_raises_and_agrees_with_torch():
    assert environment.probe_cuda().available == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("flags", "bf16", "expected"),
    [
        ("--precision auto", True, torch.bfloat16),
        ("--precision auto", False, torch.float16),
        ("--precision fp16", True, torch.float16),
        ("--precision bf16", True, torch.bfloat16),
        ("--precision bf16 --no-amp", True, None),
    ],
)
def test_precision_on_cuda(flags, bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    config = parse_args(flags.split())
    assert autocast_dtype(config, torch.device("cuda", 0)) is expected


def test_what_a_device_cannot_compute_is_refused(monkeypatch):
    cpu = torch.device("cpu")
    assert autocast_dtype(parse_args([]), cpu) is None
    assert autocast_dtype(parse_args(["--precision", "bf16", "--no-amp"]), cpu) is None
    with pytest.raises(EnvironmentProblem, match="--precision bf16 needs CUDA"):
        autocast_dtype(parse_args(["--precision", "bf16"]), cpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GTX 1080")
    with pytest.raises(EnvironmentProblem, match="GTX 1080 has no bf16"):
        autocast_dtype(parse_args(["--precision", "bf16"]), torch.device("cuda", 0))


def test_caches_go_where_they_are_told_unless_the_user_chose(tmp_path, monkeypatch):
    for name in ("TRITON_CACHE_DIR", "FOR_DISABLE_CONSOLE_CTRL_HANDLER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    prepare_caches(tmp_path / "cache")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    assert os.environ["FOR_DISABLE_CONSOLE_CTRL_HANDLER"] == "1"  # else Ctrl+C would not save
    assert list(tmp_path.iterdir()) == []


def test_the_advice_names_what_the_user_starts(monkeypatch):
    assert environment.program_name() == "train_sigma.py"
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", "/sigma/eco_train.exe")
    assert environment.program_name() == "eco_train.exe"


def test_seeding_repeats_every_generator():
    def draw(seed: int) -> tuple[float, float, float]:
        seed_everything(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(2**63 - 1)
    assert draw(2**63 - 1) == first
    assert all(a != b for a, b in zip(draw(1), first))


def test_the_config_hash_changes_with_every_setting_and_only_then():
    assert config_hash(parse_args([])) == config_hash(parse_args(["--steps", "2000"]))
    variants = [[], ["--steps", "3"], ["--ema-enabled"], ["--engram-orders", "2,3"]]
    assert len({config_hash(parse_args(argv)) for argv in variants}) == len(variants)


def test_memory_readings_follow_the_process():
    before = memory_readings(torch.device("cpu"))
    # Mapped, not taken from the heap: there it could be memory that an earlier test has freed.
    held = mmap.mmap(-1, 2**28)
    held.write(b"\1" * 2**28)
    after = memory_readings(torch.device("cpu"))
    assert after["ram_process_gb"] - before["ram_process_gb"] > 0.2
    assert 0.0 < after["ram_used_percent"] <= 100.0
    assert after["gpu_mem_alloc_gb"] == after["gpu_mem_peak_gb"] == 0.0
    assert before.keys() == after.keys()
    held.close()


def test_versions_name_what_is_installed():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["numpy"] == np.__version__
    assert environment.package_version("no-such-distribution-here") is None


def test_usable_cpus_obey_a_container_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(environment, "Path", lambda path: quota)
    for text, expected in (("max 100000", 8), ("250000 100000", 2), ("1000 100000", 1), ("", 8)):
        quota.write_text(text)
        assert usable_cpus() == expected


HELD_AFTER_FREEING = """
import sys, torch
from training.runtime.environment import keep_freed_memory, memory_readings
cpu = torch.device("cpu")
if sys.argv[1] == "keep":
    keep_freed_memory()
memory_readings(cpu)
before = memory_readings(cpu)["ram_process_gb"]
block = torch.ones(2**26)  # 256 MiB
del block
print(memory_readings(cpu)["ram_process_gb"] - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
@pytest.mark.parametrize(("how", "held_gb"), [("keep", 0.25), ("give back", 0.0)])
def test_freed_memory_is_kept_only_when_asked(how, held_gb):
    """In a process of its own: what a heap does depends on all that happened in it before."""
    command = [sys.executable, "-c", HELD_AFTER_FREEING, how]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(result.stdout) == pytest.approx(held_gb, abs=0.05)
