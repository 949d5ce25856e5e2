"""What a training step knows of the adapters per domain: the learner, and what events leave."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.hydra.learner import Hydra
from training.runtime.atomic_io import FileOps, make_dirs, replace_file

_LOG = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class HydraService:
    """real_batches: of a step, how many batches of real data were trained on up to it. timed: the
    span that events are charged to. directory: of the records of merges."""

    learner: Hydra
    real_batches: Callable[[int], int]
    timed: Callable[[], AbstractContextManager[Any]]
    directory: Path
    _waiting: dict[int, bytes] = field(default_factory=dict, init=False)

    def write_merge(self, step: int, record: Mapping[str, Any]) -> None:
        """`merge_step_<step>.json`; a resumed run that merges again writes the same.

        What cannot be written (a full disk) waits for the next merge, or for `close`.
        """
        text = json.dumps({"step": step, **record}, indent=1) + "\n"
        self._waiting[step] = text.encode()
        self._write_waiting()

    def close(self) -> None:
        """Write what waits, as far as the disk takes it, and close the learner."""
        self._write_waiting()
        self.learner.close()

    def _write_waiting(self) -> None:
        ops = FileOps()
        try:
            for step, data in list(self._waiting.items()):
                make_dirs(ops, self.directory)
                replace_file(ops, self.directory / f"merge_step_{step}.json", data)
                del self._waiting[step]
        except OSError as error:
            steps = ", ".join(map(str, self._waiting))
            _LOG.warning("records of the merges at steps %s not written: %s", steps, error.strerror)
