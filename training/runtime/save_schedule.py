"""When a checkpoint is due, and what to do when one could not be written.

A failed save (a full disk, mostly) must cost neither the run nor a whole save interval: training
goes on, the older checkpoints stay, and the save is tried again every half minute with the state
of that moment. Only the last save of a run waits for space, because nothing comes after it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from training.runtime.atomic_io import DISK_FULL
from training.runtime.checkpoint import CheckpointError, CheckpointStore
from training.runtime.run_state import split_run_state

RETRY_S = 30.0
FINAL_WAIT_S = 600.0


class SaveSchedule:
    """Saves to `store` each `interval` steps, on request, and again after a failure.

    say: told in one line why a checkpoint is missing.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        interval: int,
        say: Callable[[str], object],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._store = store
        self._interval = interval
        self._say = say
        self._now = now
        self._sleep = sleep
        self._retry_at: float | None = None

    def is_due(self, step: int, *, requested: bool) -> bool:
        """Whether to save after `step`; takes note of a save that has failed meanwhile."""
        failure = self._store.take_failure()
        if failure is not None:
            self._failed(failure)
        retry = self._retry_at is not None and self._now() >= self._retry_at
        return requested or retry or step % self._interval == 0

    def save(self, step: int, state: dict[str, Any], *, block: bool) -> bool:
        """Start to save; False if that failed and is to be tried again.

        With `block` the save has ended on return, and CheckpointError is raised if it failed.
        """
        tensors, plain = split_run_state(state)
        try:
            self._store.save(step, tensors, plain, block=block)
        except CheckpointError as error:
            if block:
                raise
            self._failed(error)
            return False
        self._retry_at = None
        return True

    def settle(self) -> None:
        """Wait for the save under way; a failure is said, the older checkpoints are there."""
        try:
            self._store.wait()
        except CheckpointError as error:
            self._failed(error)

    def close(self) -> None:
        """Settle and give up the directory; what ended the run is not hidden by a failed save."""
        self.settle()
        self._store.close()

    def save_last(self, save: Callable[[], object]) -> None:
        """Run the final `save`, again while the disk is full; CheckpointError after ten minutes."""
        waited = 0.0
        while True:
            try:
                save()
                return
            except CheckpointError as error:
                if not is_disk_full(error) or waited >= FINAL_WAIT_S:
                    raise
                self._say(
                    f"the last step is not saved yet: {error}; trying again in {RETRY_S:.0f} s, "
                    f"for {(FINAL_WAIT_S - waited) / 60:.0f} more minutes"
                )
            self._sleep(RETRY_S)
            waited += RETRY_S

    def _failed(self, error: CheckpointError) -> None:
        self._retry_at = self._now() + RETRY_S
        self._say(f"checkpoint not written: {error}; trying again in {RETRY_S:.0f} s")


def is_disk_full(error: CheckpointError) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in DISK_FULL
