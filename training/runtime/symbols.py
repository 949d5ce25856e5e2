"""Start-up check that the installed libraries have what the program will call.

Most imports fail at once when a package is missing; a function that is called for the first time
after an hour, or only at the end, does not. These are looked up before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

INSTALL = "install the versions of the lockfile: python scripts/launch.py train does it"


@dataclass(slots=True, kw_only=True, frozen=True)
class Symbol:
    """An attribute path inside a package, and the part of the program that calls it."""

    package: str
    path: str
    needed_by: str


SYMBOLS = (
    Symbol(package="torch", path="nn.functional.scaled_dot_product_attention", needed_by="MLA"),
    Symbol(package="torch", path="linalg.vecdot", needed_by="the mixture of experts"),
    Symbol(package="torch", path="amp.GradScaler", needed_by="fp16 training"),
    Symbol(package="torch", path="_foreach_lerp_", needed_by="Muon"),
    Symbol(package="torch", path="compile", needed_by="--torch-compile"),
    Symbol(package="tokenizers", path="Tokenizer.encode_batch_fast", needed_by="the data stream"),
    Symbol(package="psutil", path="Process.memory_info", needed_by="the metrics rows"),
    Symbol(package="orjson", path="dumps", needed_by="metrics.jsonl"),
    Symbol(package="filelock", path="FileLock", needed_by="the run lock"),
    Symbol(package="jinja2", path="Environment", needed_by="report.html"),
    Symbol(package="rich", path="live.Live", needed_by="the live display"),
)


def loaded_packages() -> dict[str, ModuleType]:
    """The packages of SYMBOLS; ModuleNotFoundError names a missing one."""
    import filelock
    import jinja2
    import orjson
    import psutil
    import rich.live
    import tokenizers
    import torch

    modules = (filelock, jinja2, orjson, psutil, rich, tokenizers, torch)
    return {module.__name__: module for module in modules}


def check_symbols(packages: Mapping[str, Any] | None = None) -> None:
    """RuntimeError naming package, symbol, what needs it and the mend."""
    try:
        packages = loaded_packages() if packages is None else packages
    except ImportError as error:
        raise RuntimeError(
            f"--strict-runtime-audit: package {error.name} cannot be imported ({error}); {INSTALL}"
        ) from error
    for symbol in SYMBOLS:
        value: Any = packages[symbol.package]
        for name in symbol.path.split("."):
            value = getattr(value, name, None)
        if value is None:
            version = getattr(packages[symbol.package], "__version__", "of unknown version")
            raise RuntimeError(
                f"--strict-runtime-audit: {symbol.package} {version} has no {symbol.path}, which "
                f"{symbol.needed_by} needs; {INSTALL}"
            )
