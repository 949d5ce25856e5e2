"""Start-up check that the installed libraries have what the program will call.

Most imports fail at once when a package is missing; a function that is called for the first time
after an hour, or only at the end, does not. These are looked up before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.runtime.needed_modules import PROGRAM

INSTALL = "install the versions of the lockfile: python scripts/launch.py train does it"


def loaded_modules() -> dict[str, Any]:
    """The modules of PROGRAM by name; ImportError names a missing one."""
    import filelock
    import jinja2
    import numpy
    import orjson
    import psutil
    import pynvml
    import rich.console
    import rich.live
    import tokenizers
    import torch
    import torch.utils.checkpoint

    modules = (filelock, jinja2, numpy, orjson, psutil, pynvml, tokenizers, torch)
    inner = (rich.console, rich.live, torch.utils.checkpoint)
    return {module.__name__: module for module in (*modules, *inner)}


def check_symbols(modules: Mapping[str, Any] | None = None) -> None:
    """RuntimeError naming distribution, symbol and the mend."""
    try:
        modules = loaded_modules() if modules is None else modules
    except ImportError as error:
        raise RuntimeError(
            f"--strict-runtime-audit: package {error.name} cannot be imported ({error}); {INSTALL}"
        ) from error
    for needed in PROGRAM:
        for symbol in needed.symbols:
            value: Any = modules[needed.module]
            for name in symbol.split("."):
                value = getattr(value, name, None)
            if value is None:
                version = getattr(modules[needed.module], "__version__", "of unknown version")
                raise RuntimeError(
                    f"--strict-runtime-audit: {needed.module} {version} has no {symbol}; {INSTALL}"
                )
