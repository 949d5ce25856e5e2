"""The machine a run stands on: caches, device, precision, seeds, threads, versions, memory.

The one home of every guard that depends on the machine. torch is imported inside the functions:
the caches must be set before its first import, and `--mode doctor` must work without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.config.presets import to_dict, without_secrets
from training.config.sigma_config import SigmaConfig

if TYPE_CHECKING:
    import torch

GIB = 2**30
CACHE_DIRECTORY = Path(".runtime_cache")
QUICKSTART = "profiles/quickstart.txt"
CUDA_LOCKFILE = "requirements-py313-cu128.txt"
PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("numpy", "safetensors", "tokenizers", "transformers")


class EnvironmentProblem(RuntimeError):
    """The machine cannot do what is asked: what was found, and what to do about it, one line."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}; {advice}")
        self.found = found
        self.advice = advice


def prepare_caches(directory: Path = CACHE_DIRECTORY) -> None:
    """Point kernel and compiler caches into `directory`; call before the first torch import.

    What the user has set stays. The folders are made by whoever writes into them first.
    """
    root = directory.absolute()
    os.environ.setdefault("TRITON_CACHE_DIR", str(root / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / "inductor"))
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler would log every session
    # Intel's Fortran runtime, part of torch on Windows, would end the process on Ctrl+C.
    os.environ.setdefault("FOR_DISABLE_CONSOLE_CTRL_HANDLER", "1")


@dataclass(slots=True, kw_only=True, frozen=True)
class CudaFacts:
    """What torch and the driver say about CUDA.

    torch_cuda: CUDA version torch was built for, None in a CPU build. driver, driver_cuda: version
    of the NVIDIA driver and the CUDA version it supports, None when there is none. nvml_error: why
    the driver could not be asked. torch_error: why torch could not start CUDA.
    """

    torch_version: str
    torch_cuda: str | None
    available: bool
    num_devices: int = 0
    driver: str | None = None
    driver_cuda: tuple[int, int] | None = None
    nvml_error: str = ""
    torch_error: str = ""
    visible_devices: str | None = None


def probe_cuda() -> CudaFacts:
    """Ask torch and the driver; never raises for a machine without CUDA."""
    import torch

    driver, driver_cuda, nvml_error = _probe_driver()
    with warnings.catch_warnings():
        # torch warns in several lines what `explain_missing_cuda` says in one.
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
        torch_error = ""
        if not available and torch.version.cuda:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as error:
                torch_error = str(error).partition("\n")[0]
    return CudaFacts(
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        available=available,
        num_devices=torch.cuda.device_count() if available else 0,
        driver=driver,
        driver_cuda=driver_cuda,
        nvml_error=nvml_error,
        torch_error=torch_error,
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
    )


def explain_missing_cuda(facts: CudaFacts) -> str:
    """Why there is no CUDA and what mends it, as the end of a sentence."""
    if facts.torch_cuda is None:
        build = f"torch {facts.torch_version} is built without CUDA"
        if facts.driver is None:
            return f"no NVIDIA driver was found ({facts.nvml_error}), and {build}"
        return f"{build} although driver {facts.driver} is there: install {CUDA_LOCKFILE}"
    if facts.driver is None:
        return f"no NVIDIA driver was found ({facts.nvml_error}): install one from NVIDIA"
    needed = int(facts.torch_cuda.split(".")[0])
    if facts.driver_cuda is not None and facts.driver_cuda[0] < needed:
        supported = ".".join(map(str, facts.driver_cuda))
        return (
            f"driver {facts.driver} is too old: it supports CUDA {supported}, torch "
            f"{facts.torch_version} needs CUDA {facts.torch_cuda}: update the driver"
        )
    if facts.visible_devices is not None and facts.visible_devices.strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU: unset it"
    return f"driver {facts.driver} offers no usable GPU ({facts.torch_error or 'none listed'})"


def resolve_device(config: SigmaConfig) -> torch.device:
    """The device `--device` and `--require-cuda` ask for; EnvironmentProblem if it is not there."""
    import torch

    wanted, required = config.run.device, config.run.require_cuda
    if wanted == "cpu":
        if required:
            raise EnvironmentProblem(
                "--require-cuda (on) and --device cpu contradict each other",
                "add --no-require-cuda to train without CUDA, or drop --device cpu",
            )
        return torch.device("cpu")
    facts = probe_cuda()
    if not facts.available:
        if wanted == "auto" and not required:
            return torch.device("cpu")
        asked = "--require-cuda" if required else f"--device {wanted}"
        raise EnvironmentProblem(
            f"{asked}: this profile needs CUDA, but {explain_missing_cuda(facts)}",
            f"on this machine as it is, run {program_name()} @{QUICKSTART}",
        )
    index = int(wanted.partition(":")[2] or 0)
    if index >= facts.num_devices:
        raise EnvironmentProblem(
            f"--device {wanted}: this machine has {facts.num_devices} CUDA devices",
            f"choose --device cuda:0 to cuda:{facts.num_devices - 1}",
        )
    return torch.device("cuda", index)


def require_kernel_backend(config: SigmaConfig, device: torch.device) -> None:
    """EnvironmentProblem if `--kernel-backend` cannot run here; there is no silent fallback."""
    if config.precision.kernel_backend != "triton":
        return
    asked = "--kernel-backend triton"
    mend = "drop the flag to compute with torch"
    if package_version("triton") is None and package_version("triton-windows") is None:
        raise EnvironmentProblem(f"{asked}: the package triton is not installed", mend)
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        raise EnvironmentProblem(f"{asked}: Triton needs a GPU and this run is on the CPU", mend)


def require_cuda_graphs(config: SigmaConfig, device: torch.device) -> None:
    """EnvironmentProblem if `--cuda-graphs on` cannot be had from this device."""
    if config.precision.cuda_graphs == "on" and device.type != "cuda":
        found = f"--cuda-graphs on: graphs need a CUDA device and this run is on the {device.type}"
        raise EnvironmentProblem(found, "give --cuda-graphs off, or a --device cuda")


def autocast_dtype(config: SigmaConfig, device: torch.device) -> torch.dtype | None:
    """Autocast type of the forward; None = fp32 without autocast. fp16 needs a GradScaler.

    A CPU computes in fp32: bf16 has no fast path on AVX2.
    """
    import torch

    wanted = config.precision.precision
    if config.precision.no_amp:
        return None
    if device.type != "cuda":
        if wanted != "auto":
            raise EnvironmentProblem(
                f"--precision {wanted} needs CUDA, and the device is {device.type}",
                "use --precision auto (fp32 there)",
            )
        return None
    if wanted == "fp16":
        return torch.float16
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if wanted == "bf16":
        name = torch.cuda.get_device_name(device)
        raise EnvironmentProblem(
            f"--precision bf16: {name} has no bf16", "use --precision auto (fp16 there)"
        )
    return torch.float16


def program_name() -> str:
    """What the user starts: the EXE when packed, else the entry script."""
    return Path(sys.executable).name if getattr(sys, "frozen", False) else "train_sigma.py"


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (torch: of all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def usable_cpus() -> int:
    """CPUs this process may use: affinity mask and container quota, not what the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))


def configure_threads() -> int:
    """Keep torch from running more threads than usable CPUs; OMP_NUM_THREADS wins. Their number."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    return torch.get_num_threads()


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks for reuse; False where the C library is another.

    By default every tensor above 32 MiB is mapped and unmapped anew, and its pages are faulted in
    and cleared at each step: a plain 2048 x 4096 cross entropy then costs 3.6 times as much.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, max_mapped_blocks = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of <malloc.h>
    return bool(libc.mallopt(max_mapped_blocks, 0) and libc.mallopt(trim_threshold, 2**31 - 1))


def versions() -> dict[str, str | None]:
    """Versions of what a result may depend on; None = not installed."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _probe_driver()[0],
        "triton": package_version("triton") or package_version("triton-windows"),
        **{name: package_version(name) for name in PACKAGES},
    }


def package_version(name: str) -> str | None:
    """The installed version by the package's name in the index; None without it. Imports
    nothing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_readings(device: torch.device) -> dict[str, float | None]:
    """Resource columns of a metrics row: memory in GiB, shares in per cent.

    GPU values are 0 when the run uses none, and null where the driver does not tell.
    """
    import psutil
    import torch

    row: dict[str, float | None] = {
        "cpu_percent": psutil.cpu_percent(interval=None),
        "ram_used_percent": psutil.virtual_memory().percent,
        "ram_process_gb": psutil.Process().memory_info().rss / GIB,
        "gpu_mem_alloc_gb": 0.0,
        "gpu_mem_reserved_gb": 0.0,
        "gpu_mem_peak_gb": 0.0,
        "gpu_util_percent": 0.0,
    }
    if device.type == "cuda":
        row["gpu_mem_alloc_gb"] = torch.cuda.memory_allocated(device) / GIB
        row["gpu_mem_reserved_gb"] = torch.cuda.memory_reserved(device) / GIB
        row["gpu_mem_peak_gb"] = torch.cuda.max_memory_allocated(device) / GIB
        row["gpu_util_percent"] = _gpu_utilization(device)
    return row


def config_hash(config: SigmaConfig) -> str:
    """sha256 over every setting but the token, whatever the order of declaration."""
    text = json.dumps(to_dict(without_secrets(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _probe_driver() -> tuple[str | None, tuple[int, int] | None, str]:
    """Driver version, the CUDA version it supports, and why they are unknown."""
    try:
        import pynvml
    except ImportError:
        return None, None, "nvidia-ml-py is not installed, so the driver cannot be asked"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return None, None, str(error)
    try:
        number = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return None, None, str(error)
    finally:
        pynvml.nvmlShutdown()
    text = version.decode() if isinstance(version, bytes) else version
    return text, (number // 1000, number % 1000 // 10), ""


def _gpu_utilization(device: torch.device) -> float | None:
    import torch

    try:
        import pynvml

        return float(torch.cuda.utilization(device))
    except ImportError:
        return None
    except (RuntimeError, pynvml.NVMLError):
        # Not every device tells: a slice of a partitioned GPU (MIG) does not.
        return None
