"""A JSON file that says what failed, at which step and in which state, without any secret in it.

Written while something is already wrong, so nothing here trusts what it is given: messages may be
huge, objects may refuse to print, containers may contain themselves, memory may be short. Values
of unknown types are named, never asked to describe themselves.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from training.runtime.atomic_io import FileOps, make_dirs, replace_file
from training.runtime.environment import PACKAGES, package_version
from training.runtime.redact import MARK, Redactor, is_secret_name

SCHEMA_VERSION = 1
HEAD_CHARS = 24_000
TAIL_CHARS = 8_000
# A secret that straddles a cut is no longer recognised, so what is near a cut is dropped.
MARGIN_CHARS = 8_192
MAX_ITEMS = 2_000
MAX_VALUES = 20_000
MAX_DEPTH = 12
MAX_FRAMES = -100
MAX_INT_BITS = 256
_FIRST = slice(0, MAX_ITEMS)
VERSIONED = ("torch", *PACKAGES, "triton", "triton-windows")

_TEXT = {"type": "string"}
_OBJECT = {"type": "object"}
_ERROR_FIELDS = {
    "type": _TEXT,
    "message": _TEXT,
    "traceback": {"type": "array", "items": _TEXT},
}
_FIELDS: dict[str, Any] = {
    "schema_version": {"type": "integer"},
    "step": {"type": "integer"},
    "time_utc": _TEXT,
    "pid": {"type": "integer"},
    "error": {
        "type": "object",
        "properties": _ERROR_FIELDS,
        "required": sorted(_ERROR_FIELDS),
        "additionalProperties": False,
    },
    "last_metrics": _OBJECT,
    "feature_state": _OBJECT,
    "memory": _OBJECT,
    "versions": _OBJECT,
    "config_hash": _TEXT,
    "argv": {"type": "array", "items": _TEXT},
}
CRASH_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": _FIELDS,
    "required": sorted(_FIELDS),
    "additionalProperties": False,
}


def write_crash_report(
    output_dir: Path,
    *,
    step: int,
    error: BaseException,
    last_metrics: Mapping[str, Any],
    feature_state: Mapping[str, Any],
    config_hash: str,
    ops: FileOps | None = None,
) -> Path | None:
    """Write `<output_dir>/errors/crash_step_<step>_<time>.json`; its path, or None if it cannot be.

    Never raises for what it is given: the error that is being reported must stay the one seen.
    """
    ops, now = ops or FileOps(), datetime.now(UTC)
    cleaner = _Cleaner(Redactor.from_environment(os.environ))
    report = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "time_utc": now.isoformat(timespec="milliseconds"),
        "pid": os.getpid(),
        "error": _describe_error(error, cleaner),
        "last_metrics": cleaner.clean_mapping(last_metrics),
        "feature_state": cleaner.clean_mapping(feature_state),
        "memory": memory_facts(),
        "versions": _versions(),
        "config_hash": cleaner.clean_text(config_hash),
        "argv": [cleaner.shorten(word) for word in cleaner.redactor.clean_argv(sys.argv)],
    }
    path = output_dir / "errors" / f"crash_step_{step:08d}_{now:%Y%m%dT%H%M%S_%fZ}.json"
    try:
        data = json.dumps(report, indent=2, allow_nan=False).encode()
        make_dirs(ops, path.parent)
        replace_file(ops, path, data + b"\n")
    except (OSError, MemoryError) as problem:
        print(f"no crash report could be written to {path}: {problem}", file=sys.stderr)
        return None
    return path


def memory_facts() -> dict[str, Any]:
    """Memory in bytes: this process, the machine, the control group, and CUDA if it is in use."""
    memory: dict[str, Any] = {}
    try:
        machine = psutil.virtual_memory()
        memory["rss_bytes"] = psutil.Process().memory_info().rss
        memory["machine_total_bytes"] = machine.total
        memory["machine_available_bytes"] = machine.available
    except (psutil.Error, OSError) as problem:
        memory["unknown"] = type(problem).__name__
    for name in ("memory.max", "memory.current"):
        try:
            text = Path("/sys/fs/cgroup", name).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        memory[f"cgroup_{name.partition('.')[2]}_bytes"] = int(text) if text.isdigit() else None
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        memory["cuda"] = [
            {
                "allocated_bytes": torch.cuda.memory_allocated(device),
                "reserved_bytes": torch.cuda.memory_reserved(device),
                "peak_bytes": torch.cuda.max_memory_allocated(device),
            }
            for device in range(torch.cuda.device_count())
        ]
    return memory


class _Cleaner:
    """Turns any value into bounded JSON without secrets."""

    def __init__(self, redactor: Redactor) -> None:
        self.redactor = redactor
        self._values_left = MAX_VALUES

    def clean_mapping(self, values: Any) -> dict[str, Any]:
        cleaned = self.clean(values, depth=0)
        return cleaned if isinstance(cleaned, dict) else {"value": cleaned}

    def clean_text(self, text: str) -> str:
        """Redacted, then cut to head and tail."""
        text = str.__str__(text)
        window = HEAD_CHARS + MARGIN_CHARS
        if len(text) <= 2 * window:
            return self.shorten(self.redactor.clean(text))
        head = self.redactor.clean(text[:window])[:-MARGIN_CHARS][:HEAD_CHARS]
        tail = self.redactor.clean(text[-window:])[MARGIN_CHARS:][-TAIL_CHARS:]
        return f"{head}\n[... {len(text)} characters in all ...]\n{tail}"

    def shorten(self, text: str) -> str:
        if len(text) <= HEAD_CHARS + TAIL_CHARS:
            return text
        return f"{text[:HEAD_CHARS]}\n[... cut ...]\n{text[-TAIL_CHARS:]}"

    def clean(self, value: Any, *, depth: int) -> Any:
        self._values_left -= 1
        if self._values_left < 0:
            return "<more>"
        if value is None or value is True or value is False:
            return value
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            value = value.item()
        # The methods of the built-in types themselves: a subclass may do anything in its own.
        if isinstance(value, str):
            return self.clean_text(value)
        if isinstance(value, int):
            return _plain_int(int.__pos__(value))
        if isinstance(value, float):
            number = float.__pos__(value)
            return number if math.isfinite(number) else float.__repr__(number)
        if isinstance(value, Path):
            return self.clean_text(os.fspath(value))
        if depth < MAX_DEPTH:
            if isinstance(value, dict):
                return self._clean_dict(value, depth)
            if isinstance(value, list):
                return self._clean_items(
                    list.__getitem__(value, _FIRST), list.__len__(value), depth
                )
            if isinstance(value, tuple):
                first = tuple.__getitem__(value, _FIRST)
                return self._clean_items(list(first), tuple.__len__(value), depth)
        return _name_type(value)

    def _clean_items(self, first: list[Any], count: int, depth: int) -> list[Any]:
        items = [self.clean(item, depth=depth + 1) for item in first]
        return items + [f"<{count - len(items)} more>"] if count > len(items) else items

    def _clean_dict(self, values: dict[Any, Any], depth: int) -> dict[str, Any]:
        cleaned: dict[str, Any] = {}
        pairs = list(dict.items(values))
        for key, value in pairs[:MAX_ITEMS]:
            name = self.clean(key, depth=MAX_DEPTH)
            name = name if isinstance(name, str) else json.dumps(name)
            secret = isinstance(key, str) and is_secret_name(key) and not isinstance(value, bool)
            plain = isinstance(value, (str, int, float, bytes))
            cleaned[name] = MARK if secret and plain else self.clean(value, depth=depth + 1)
        if len(pairs) > MAX_ITEMS:
            cleaned["<more>"] = len(pairs) - MAX_ITEMS
        return cleaned


def _describe_error(error: BaseException, cleaner: _Cleaner) -> dict[str, Any]:
    kind = type(error)
    name = f"{kind.__module__}.{kind.__qualname__}"
    try:
        described = traceback.TracebackException(
            kind, error, error.__traceback__, limit=MAX_FRAMES, compact=True
        )
        message = "".join(described.format_exception_only()).strip()
        lines = [line for part in described.format() for line in part.splitlines()]
    except (AttributeError, TypeError, ValueError, RecursionError, MemoryError) as problem:
        # An exception whose own fields are not what the traceback module relies on.
        message = f"{name} (which cannot be described: {type(problem).__name__})"
        lines = traceback.format_tb(error.__traceback__, limit=MAX_FRAMES)
    text = cleaner.clean_text("\n".join(lines))
    return {
        "type": cleaner.clean_text(name),
        "message": cleaner.clean_text(message),
        "traceback": text.splitlines(),
    }


def _versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: package_version(name) for name in VERSIONED},
    }


def _plain_int(number: int) -> int | str:
    bits = number.bit_length()
    return number if bits <= MAX_INT_BITS else f"<int of {bits} bits>"


def _name_type(value: Any) -> str:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return f"<{name} {value.dtype} {tuple(value.shape)}>"
    return f"<{name}>"
