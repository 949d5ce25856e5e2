"""What media and power losses do to the files of a run whose process is dead."""

import json
import random
from pathlib import Path


def flip_bit(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def tear_rows(run: Path, draw: random.Random) -> None:
    """Take off a part of what no checkpoint has put on the medium, as a power loss would; where
    there is nothing of the kind, leave the beginning of a row that was being written."""
    path = run / "metrics.jsonl"
    data, safe = path.read_bytes(), synced_bytes(run)
    loose = data[safe:] or data[:400]
    cut = data[:safe] + loose[: draw.randrange(len(loose))]
    path.write_bytes(cut + b"\0" * draw.choice([0, 0, 64]))


def synced_bytes(run: Path) -> int:
    """How much of metrics.jsonl was flushed to disk before the newest checkpoint was committed."""
    newest = max((run / "checkpoints").glob("checkpoint_step_*/MANIFEST.json"), default=None)
    if newest is None:
        return 0
    state = json.loads((newest.parent / "state.json").read_text(encoding="utf-8"))
    return state["run"]["recorder"]["metrics_offset"]
