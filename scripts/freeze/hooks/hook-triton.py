"""What Triton needs in a frozen program: its source, its backends, a C compiler and Python.h.

Restates the community's hook and takes its place: that one asks for a distribution named `triton`,
so with `triton-windows` it leaves out every backend. Triton reads the source of kernels and of its
own library, finds its backends by entry points, and at the first launch compiles a C stub against
Python.h with the TinyCC that triton-windows brings (training/runtime/frozen.py says where it is).
"""

import sys
import sysconfig
from pathlib import Path

from PyInstaller.compat import is_win
from PyInstaller.utils.hooks import collect_data_files, collect_dynamic_libs, copy_metadata


def python_headers() -> list[tuple[str, str]]:
    """Headers, and on Windows the import library, where sysconfig looks for them when frozen."""
    base = Path(sys.base_prefix)
    headers = Path(sysconfig.get_path("include"))
    collected = [(str(headers), str(headers.relative_to(base)))]
    if is_win:
        library = f"python{sysconfig.get_config_var('py_version_nodot')}.lib"
        collected.append((str(base / "libs" / library), "libs"))
    return collected


module_collection_mode = {
    "triton": "pyz+py",
    "triton.runtime.jit": "py",
    "triton.compiler": "py",
    "triton.language": "py",
}
hiddenimports = [
    f"triton.backends.{backend}{part}"
    for backend in ("nvidia", "amd")
    for part in ("", ".compiler", ".driver")
]
binaries = collect_dynamic_libs("triton")
datas = [
    *collect_data_files("triton.backends"),
    *copy_metadata("triton-windows" if is_win else "triton"),
    *python_headers(),
]
if is_win:
    datas += collect_data_files("triton.runtime", subdir="tcc")
