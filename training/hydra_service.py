"""What a training step knows of the adapters per domain: the learner, and what events leave."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.hydra.learner import Hydra
from training.runtime.atomic_io import FileOps, make_dirs, replace_file


@dataclass(slots=True, kw_only=True)
class HydraService:
    """real_batches: of a step, how many batches of real data were trained on up to it. timed: the
    span that events are charged to. directory: of the records of merges."""

    learner: Hydra
    real_batches: Callable[[int], int]
    timed: Callable[[], AbstractContextManager[Any]]
    directory: Path

    def write_merge(self, step: int, record: Mapping[str, Any]) -> None:
        """`merge_step_<step>.json`; a resumed run that merges again writes the same."""
        ops = FileOps()
        make_dirs(ops, self.directory)
        text = json.dumps({"step": step, **record}, indent=1) + "\n"
        replace_file(ops, self.directory / f"merge_step_{step}.json", text.encode())
