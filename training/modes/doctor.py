"""`--mode doctor`: is this machine fit for the run that the given flags describe?

Every check answers with what it found and, when that is not good enough, with what to do. A check
fails only for something this configuration needs; everything else is at most a warning.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from training.config.sigma_config import SigmaConfig
from training.modes.checks import Check, check_writable
from training.runtime.directories import (
    CHECKPOINTS_AT_ONCE,
    cache_directory,
    checkpoint_bytes,
    free_bytes,
    training_bytes,
)
from training.runtime.environment import (
    CUDA_LOCKFILE,
    GIB,
    EnvironmentProblem,
    autocast_dtype,
    package_version,
    probe_cuda,
    resolve_device,
    usable_cpus,
)
from training.sources.embedded import ASSETS_DIRECTORY, CORPUS_FILE

PYTHON_VERSIONS = ((3, 11), (3, 13))
OLDEST_TORCH = (2, 10)
REINSTALL = "run python scripts/launch.py train once; it installs what is missing"
MODULES = ("filelock", "jinja2", "numpy", "orjson", "psutil", "rich", "safetensors", "tokenizers")
STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def run(config: SigmaConfig) -> int:
    """Print all checks; 0 unless one failed that the configuration needs, then 1."""
    if config.run.self_check:
        from training.modes import self_check

        checks = self_check.examine(config)
    else:
        checks = examine(config)
    passed = all(check.status != "fail" for check in checks)
    if config.run.json:
        print(json.dumps({"passed": passed, "checks": [asdict(check) for check in checks]}))
    elif sys.stdout.isatty():
        _print_table(checks)
    else:
        for check in checks:
            advice = f" -> {check.advice}" if check.advice else ""
            print(f"{check.status:4} {check.name}: {check.found}{advice}")
    return 0 if passed else 1


def examine(config: SigmaConfig) -> list[Check]:
    """All checks, in the order of a first run; those that need torch are left out without it."""
    checks = [check_python(sys.version_info[:2]), check_packages(), check_torch()]
    needs_torch: tuple[Callable[[SigmaConfig], Check], ...] = (
        check_driver,
        check_device,
        check_precision,
        check_triton,
        check_compiler,
        check_memory,
    )
    if checks[-1].status != "fail":
        checks += [_answer(check, config) for check in needs_torch]
    run_config = config.run
    return [
        *checks,
        check_writable("output directory", "--output-dir", Path(run_config.output_dir)),
        check_writable("checkpoint directory", "--checkpoint-dir", Path(run_config.checkpoint_dir)),
        check_writable("cache directory", "working directory", cache_directory(config)),
        check_disk(config),
        check_assets(config),
    ]


def _answer(check: Callable[[SigmaConfig], Check], config: SigmaConfig) -> Check:
    """What a check finds; one that the device itself refuses has failed, and ends no other.

    To be asked at all, a GPU needs room for a context, which a run that goes on may have taken.
    """
    try:
        return check(config)
    except RuntimeError as error:
        name = check.__name__.removeprefix("check_")
        found = f"cannot be told: {str(error).partition(chr(10))[0]}"
        advice = "end other programs that use the GPU, or start the machine again"
        return Check(name=name, status="fail", found=found, advice=advice)


def check_python(version: tuple[int, int]) -> Check:
    """Whether (major, minor) is a supported version."""
    oldest, newest = PYTHON_VERSIONS
    found = f"{platform.python_version()} ({sys.executable})"
    if oldest <= version <= newest:
        return Check(name="Python", status="ok", found=found)
    advice = f"install Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}"
    return Check(name="Python", status="fail", found=found, advice=advice)


def check_packages() -> Check:
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        found = f"missing: {', '.join(missing)}"
        return Check(name="packages", status="fail", found=found, advice=REINSTALL)
    return Check(name="packages", status="ok", found=f"all {len(MODULES)} are installed")


def check_torch() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:
        found = f"cannot be imported: {str(error).partition(chr(10))[0]}"
        return Check(name="torch", status="fail", found=found, advice=REINSTALL)
    found = f"{torch.__version__}, {torch.get_num_threads()} threads on {usable_cpus()} usable CPUs"
    major, minor = torch.__version__.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        advice = f"update to torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer: {REINSTALL}"
        return Check(name="torch", status="fail", found=found, advice=advice)
    return Check(name="torch", status="ok", found=found)


def check_driver(config: SigmaConfig) -> Check:
    facts = probe_cuda()
    if facts.driver is not None and facts.driver_cuda is not None:
        cuda = ".".join(map(str, facts.driver_cuda))
        return Check(name="driver", status="ok", found=f"NVIDIA {facts.driver}, CUDA {cuda}")
    wanted = config.run.require_cuda or config.run.device.startswith("cuda")
    if facts.available:
        return Check(
            name="driver",
            status="warn",
            found=f"CUDA works, but its version is unknown: {facts.nvml_error}",
            advice="install nvidia-ml-py to see the driver and the GPU's load",
        )
    return Check(
        name="driver",
        status="fail" if wanted else "ok",
        found=f"no NVIDIA driver ({facts.nvml_error})",
        advice="install NVIDIA's driver, or train on the CPU with @profiles/quickstart.txt"
        if wanted
        else "",
    )


def check_device(config: SigmaConfig) -> Check:
    import torch

    try:
        device = resolve_device(config)
    except EnvironmentProblem as problem:
        return Check(name="device", status="fail", found=problem.found, advice=problem.advice)
    if device.type != "cuda":
        return Check(name="device", status="ok", found=f"{device} ({platform.machine()})")
    capability = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    found = f"{device}: {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if not _has_kernels(torch.cuda.get_arch_list(), capability):
        return Check(
            name="device",
            status="fail",
            found=f"{found}; torch has no kernels for sm_{capability[0]}{capability[1]}",
            advice=f"install the torch build of {CUDA_LOCKFILE}",
        )
    return Check(name="device", status="ok", found=found)


def check_precision(config: SigmaConfig) -> Check:
    try:
        device = resolve_device(config)
    except EnvironmentProblem:
        return Check(name="precision", status="warn", found="not checked: there is no device")
    try:
        dtype = autocast_dtype(config, device)
    except EnvironmentProblem as problem:
        return Check(name="precision", status="fail", found=problem.found, advice=problem.advice)
    found = "fp32" if dtype is None else f"{str(dtype).removeprefix('torch.')} autocast"
    return Check(name="precision", status="ok", found=found)


def check_triton(config: SigmaConfig) -> Check:
    """Without it a run fails on CUDA only where --torch-compile asks for it; else it is a
    warning."""
    version = package_version("triton") or package_version("triton-windows")
    if version is not None and importlib.util.find_spec("triton") is not None:
        return Check(name="Triton", status="ok", found=version)
    if not probe_cuda().available:
        return Check(name="Triton", status="ok", found="not installed; the CPU needs none")
    compiles = config.precision.torch_compile
    return Check(
        name="Triton",
        status="fail" if compiles else "warn",
        found="not installed" + ("; --torch-compile needs it" if compiles else ""),
        advice=f"install {CUDA_LOCKFILE}" + (" or add --no-torch-compile" if compiles else ""),
    )


def check_compiler(config: SigmaConfig) -> Check:
    """torch.compile's default back end builds C++ at the first step when it runs on a CPU."""
    name = "C++ compiler"
    needed = config.precision.torch_compile and config.precision.torch_compile_backend == "inductor"
    found = next((c for c in ("cl", "g++", "clang++") if shutil.which(c)), None)
    if found or not needed or probe_cuda().available:
        return Check(name=name, status="ok", found=found or "none; not needed")
    return Check(
        name=name,
        status="fail",
        found="none; --torch-compile on the CPU needs one",
        advice="add --no-torch-compile, or install g++, clang or Visual Studio's build tools",
    )


def check_memory(config: SigmaConfig) -> Check:
    """Weights, gradients and optimizer state must fit; activations come on top (see plan)."""
    import psutil
    import torch

    needed = training_bytes(config)
    try:
        device = resolve_device(config)
    except EnvironmentProblem:
        device = torch.device("cpu")
    if device.type == "cuda":
        available, kind = torch.cuda.mem_get_info(device)[0], "GPU memory"
    else:
        available, kind = psutil.virtual_memory().available, "memory"
    found = (
        f"{available / GIB:.1f} GiB of {kind} free; weights, gradients and optimizer "
        f"state take about {needed / GIB:.2f}"
    )
    if needed > available:
        advice = "close other programs or choose a smaller --d-model or --n-layers"
        return Check(name="memory", status="fail", found=found, advice=advice)
    if needed > available // 2:
        advice = "little is left for activations: see --mode plan, lower --batch-size"
        return Check(name="memory", status="warn", found=found, advice=advice)
    return Check(name="memory", status="ok", found=found)


def check_disk(config: SigmaConfig) -> Check:
    """Whether this run's checkpoints find room where they will lie; a warning while single ones
    do."""
    directory = Path(config.run.checkpoint_dir)
    one = checkpoint_bytes(config)
    kept = one * (config.run.max_checkpoints + 1)
    try:
        free = free_bytes(directory)
    except OSError as error:
        found = f"unknown for {directory}: {error.strerror}"
        return Check(name="disk", status="fail", found=found, advice="choose --checkpoint-dir")
    found = (
        f"{free / GIB:.1f} GiB free; {config.run.max_checkpoints} checkpoints and the one "
        f"being written take about {kept / GIB:.2f}"
    )
    if free >= kept:
        return Check(name="disk", status="ok", found=found)
    status = "fail" if free < one * CHECKPOINTS_AT_ONCE else "warn"
    advice = "free space, lower --max-checkpoints or choose another --checkpoint-dir"
    return Check(name="disk", status=status, found=found, advice=advice)


def check_assets(config: SigmaConfig) -> Check:
    """The shipped corpus has its published hash, and the tokenizer loads."""
    advice = "restore the folder assets/ from the program's sources"
    try:
        manifest = json.loads((ASSETS_DIRECTORY / "MANIFEST.json").read_text(encoding="utf-8"))
        expected = manifest["files"][CORPUS_FILE]["sha256"]
        actual = hashlib.sha256((ASSETS_DIRECTORY / CORPUS_FILE).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError) as error:
        return Check(name="assets", status="fail", found=f"unreadable: {error}", advice=advice)
    if actual != expected:
        found = f"{CORPUS_FILE} is damaged (sha256 {actual[:12]}, not {expected[:12]})"
        return Check(name="assets", status="fail", found=found, advice=advice)
    try:
        from training.tokenizer import Tokenizer

        tokenizer = Tokenizer.from_name(config.data.tokenizer_name)
    except ImportError as error:
        return Check(name="assets", status="fail", found=str(error), advice=REINSTALL)
    except ValueError as error:
        return Check(
            name="assets", status="fail", found=str(error), advice="change --tokenizer-name"
        )
    found = f"corpus intact, tokenizer of {tokenizer.vocab_size} tokens"
    return Check(name="assets", status="ok", found=found)


def _has_kernels(built_for: list[str], capability: tuple[int, int]) -> bool:
    """Whether a torch build runs on a GPU: cubins serve later minors, PTX all later devices."""
    major, minor = capability
    for arch in built_for:
        kind, _, digits = arch.partition("_")
        digits = "".join(char for char in digits if char.isdigit())
        if not digits:
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if kind == "compute" and built <= (major, minor):
            return True
        if kind == "sm" and built[0] == major and built[1] <= minor:
            return True
    return False


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="SIGMA doctor", title_justify="left")
    for column in ("", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for check in checks:
        cells: list[Any] = [Text(check.status, style=STYLES[check.status])]
        table.add_row(*cells, *(Text(text) for text in (check.name, check.found, check.advice)))
    Console().print(table)
