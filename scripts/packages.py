"""The sets of packages that SIGMA runs on, and where an environment keeps its programs.

Apart from environment.py and installer.py because both need them: the first decides, the second
carries out.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

GIGABYTE = 10**9


class SetupError(Exception):
    """Why the environment could not be made, and the mend; together one line."""

    def __init__(self, cause: str, mend: str) -> None:
        super().__init__(f"{cause}: {mend}")
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageSet:
    """One of the sets of packages that SIGMA runs on."""

    name: str
    lockfile: str
    backend: str | None  # what uv calls the PyTorch build, None for the default index's own
    needs_bytes: int  # free space for packages and downloads
    wording: str


CPU = PackageSet(
    name="cpu",
    lockfile="requirements-cpu.txt",
    backend="cpu",
    needs_bytes=3 * GIGABYTE,
    wording="for the CPU",
)
CUDA_LINUX = PackageSet(
    name="cuda-linux",
    lockfile="requirements-cpu.txt",
    backend=None,
    needs_bytes=10 * GIGABYTE,
    wording="for CUDA, several GB",
)
CUDA_WINDOWS = PackageSet(
    name="cuda-windows",
    lockfile="requirements-py313-cu128.txt",
    backend="cu128",
    needs_bytes=10 * GIGABYTE,
    wording="for CUDA 12.8, several GB",
)
PACKAGE_SETS = {packages.name: packages for packages in (CPU, CUDA_LINUX, CUDA_WINDOWS)}


def choose_packages(*, system: str, python: tuple[int, int], driver: bool) -> PackageSet:
    """The set for a machine: `system` as sys.platform, `driver` an NVIDIA driver with a device."""
    if driver and system == "win32" and python == (3, 13):
        return CUDA_WINDOWS
    if driver and system == "linux":
        return CUDA_LINUX
    return CPU


def has_cuda_driver() -> bool:
    """Whether an NVIDIA driver answers and sees a device; needs no toolkit, makes no context."""
    import ctypes

    library = {"win32": "nvcuda.dll", "linux": "libcuda.so.1"}.get(sys.platform)
    if library is None:
        return False
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return False
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return False
    return count.value > 0


def executables_of(venv: Path) -> Path:
    """The folder of the environment's programs."""
    return venv / ("Scripts" if os.name == "nt" else "bin")


def python_of(venv: Path) -> Path:
    """The environment's Python."""
    return executables_of(venv) / ("python.exe" if os.name == "nt" else "python")
