"""What kernel tuners measured, in one JSON file beside the kernel caches, by key.

A file that cannot be read counts as empty: it is measured again. Writing is atomic; of two runs
that write at once the last one wins, which costs trials and nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from training.runtime.atomic_io import FileOps, make_dirs, replace_file

FILE_NAME = "fractal_tiles.json"
FORMAT = 1


class TileCache:
    """path None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def beside_kernels(cls) -> TileCache:
        """Where `prepare_caches` has set up the kernel cache; nowhere if it has not."""
        folder = os.environ.get("TRITON_CACHE_DIR")
        return cls(Path(folder).parent / FILE_NAME if folder else None)

    def read(self, key: str) -> dict[str, Any] | None:
        """The tuner state kept under the key."""
        found = self._entries().get(key)
        return found if isinstance(found, dict) else None

    def write(self, key: str, state: dict[str, Any]) -> None:
        """Keep a tuner's state, other keys' as they are now in the file; OSError where it cannot be
        written."""
        if self.path is None:
            return
        content = {"format": FORMAT, "entries": self._entries() | {key: state}}
        ops = FileOps()
        make_dirs(ops, self.path.parent)
        replace_file(ops, self.path, (json.dumps(content, indent=1) + "\n").encode())

    def _entries(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text("utf-8")) if self.path else {}
        except (OSError, ValueError):
            return {}
        known = isinstance(content, dict) and content.get("format") == FORMAT
        entries = content.get("entries") if known else None
        return entries if isinstance(entries, dict) else {}
