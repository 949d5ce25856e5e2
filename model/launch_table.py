"""Measured launch settings, kept in a file beside the other caches and read once.

Without a file, or for a shape it does not name, the heuristics of the launchers hold: nothing is
ever measured while a model trains. `scripts/tune_kernels.py` measures on request and writes it. A
file that is damaged, or that another version of Triton made, is passed over with one message.

The file lies where TRITON_CACHE_DIR's folder lies, so it moves with the caches it belongs to.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from model.launch import Tiles, device_capability, power_of_two

FOLDER_VARIABLE = "TRITON_CACHE_DIR"
FORMAT = 1
FILE_NAME = "launch_table.json"
OPERATIONS = ("int8_product", "weight_gradient", "logits", "scaled_product", "grouped_product")
MAX_WARPS = 16
MAX_STAGES = 8
TILE_RANGE = (16, 512)
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchKey:
    """What a setting is for: operation and its operands' bytes, architecture, and shape bucket.

    Columns and depth belong to a model and are exact; rows are tokens and count as the next power
    of two.
    """

    operation: str
    itemsize: int
    capability: int
    rows: int
    columns: int
    depth: int


@dataclass(slots=True, kw_only=True)
class LaunchTable:
    """Tiles by key."""

    tiles: dict[LaunchKey, Tiles] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """Plain values as the file holds them, stamped with this Triton's version."""
        names = LaunchKey.__slots__
        entries = [
            {name: getattr(key, name) for name in names} | {"tiles": list(tiles)}
            for key, tiles in self.tiles.items()
        ]
        return {"format": FORMAT, "triton": triton.__version__, "entries": entries}

    @classmethod
    def parse(cls, values: Any) -> LaunchTable:
        """ValueError, saying why, for what `dump` of this version would not have made."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}")
        if values.get("triton") != triton.__version__:
            raise ValueError(f"it was made with Triton {values.get('triton')}")
        entries = values.get("entries")
        if not isinstance(entries, list):
            raise ValueError("it has no list of entries")
        table = cls()
        for entry in entries:
            key, tiles = _parse_entry(entry)
            table.tiles[key] = tiles
        return table

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.new")
        draft.write_text(json.dumps(self.dump(), indent=1), encoding="utf-8")
        os.replace(draft, path)

    @classmethod
    def read(cls, path: Path) -> LaunchTable:
        """The file's table; an empty one if there is none, or, with a message, if it is no use."""
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, RecursionError) as problem:
            _LOG.warning(
                "%s is not used: %s; delete it or run scripts/tune_kernels.py", path, problem
            )
            return cls()


def _parse_entry(entry: Any) -> tuple[LaunchKey, Tiles]:
    names = LaunchKey.__slots__
    if not isinstance(entry, dict) or entry.keys() != {*names, "tiles"}:
        raise ValueError("an entry has other names than it should")
    numbers = [entry[name] for name in names if name != "operation"]
    sizes = entry["tiles"]
    if entry["operation"] not in OPERATIONS or not isinstance(sizes, list) or len(sizes) != 5:
        raise ValueError("an entry is for an unknown operation or has no five settings")
    if not all(type(number) is int and number > 0 for number in (*numbers, *sizes)):
        raise ValueError("an entry holds what is not a positive whole number")
    tiles = Tiles(*sizes)
    powers = (tiles.m, tiles.n, tiles.k, tiles.warps)
    low, high = TILE_RANGE
    if (
        any(number & (number - 1) for number in powers)
        or not all(low <= size <= high for size in powers[:3])
        or tiles.warps > MAX_WARPS
        or tiles.stages > MAX_STAGES
    ):
        raise ValueError(f"an entry has impossible settings: {sizes}")
    return LaunchKey(**{name: entry[name] for name in names}), tiles


def table_path(folder: str | None) -> Path | None:
    """Where the table belongs: beside Triton's cache folder, nowhere if none was set up."""
    return Path(folder).parent / FILE_NAME if folder else None


@cache
def _loaded(path: Path) -> LaunchTable:
    return LaunchTable.read(path)


@cache
def _find(
    folder: str | None, operation: str, itemsize: int, capability: int, *sizes: int
) -> Tiles | None:
    path = table_path(folder)
    if path is None:
        return None
    rows, columns, depth = sizes
    key = LaunchKey(
        operation=operation,
        itemsize=itemsize,
        capability=capability,
        rows=rows,
        columns=columns,
        depth=depth,
    )
    return _loaded(path).tiles.get(key)


def measured_tiles(
    operation: str, x: Tensor, shape: tuple[int, int, int], *, itemsize: int = 1
) -> Tiles | None:
    """The table's tiles for an operation on x's device, or None; costs a look-up.

    shape: rows, columns and depth of the product; itemsize: bytes of its floating-point operands,
    1 without any. The file is read once per process.
    """
    rows, columns, depth = shape
    folder = os.environ.get(FOLDER_VARIABLE)
    bucket = power_of_two(max(rows, 1))
    return _find(folder, operation, itemsize, device_capability(x), bucket, columns, depth)
