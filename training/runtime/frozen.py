"""What a program frozen by PyInstaller must put right before anything else runs.

A frozen program starts itself again for every worker, ignores PYTHONUTF8, and has no installed
Python around it: Triton looks for a C compiler and the CUDA headers under a site-packages folder
that a bundle lacks, and Inductor would start `sys.executable` as if it were a Python interpreter.
The bundled tools win over CC and CUDA_PATH of the machine: the program depends on nothing that
happens to be installed. The kernel caches are `environment.prepare_caches`'s, frozen or not.

Not frozen, only the console's encoding is touched.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from pathlib import Path

COMPILER = Path("triton/runtime/tcc/tcc.exe")  # TinyCC, part of triton-windows
CUDA_TOOLS = Path("triton/backends/nvidia")  # bin/ptxas.exe, include/cuda.h, lib/x64/cuda.lib


def prepare_frozen() -> None:
    """The program's first statement; in a worker of a frozen program it does not return."""
    use_utf8_output()
    multiprocessing.freeze_support()
    bundle = bundle_directory()
    if bundle is not None:
        os.environ.update(bundled_tools(bundle))


def use_utf8_output() -> None:
    """UTF-8 whatever the console's code page; a pipe shows every line when it is written."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)


def bundle_directory() -> Path | None:
    """Folder of the frozen program's modules and data; None when not frozen."""
    folder = getattr(sys, "_MEIPASS", None)
    return Path(folder) if getattr(sys, "frozen", False) and folder else None


def bundled_tools(bundle: Path) -> dict[str, str]:
    """Environment variables that lead to the tools inside `bundle`; those it lacks are left out."""
    variables = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
    if (bundle / COMPILER).is_file():
        variables["CC"] = str(bundle / COMPILER)
    if (bundle / CUDA_TOOLS / "bin").is_dir():
        variables["CUDA_PATH"] = str(bundle / CUDA_TOOLS)
    return variables
