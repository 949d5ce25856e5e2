"""One rank of two: does what it is told, in step with the other, and prints a JSON line per order.

Run by test_rank_checkpoint.py as `python -m tests.training.runtime.rank_driver RANK STORE DIR`.
"""

from __future__ import annotations

import errno
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.training.runtime.faults import FINGERPRINT, QuietOps
from training.runtime import rank_checkpoint
from training.runtime.atomic_io import FileOps
from training.runtime.manifest import parse_directory_name
from training.runtime.rank_checkpoint import ProcessGroupRanks, RankCheckpointStore
from training.runtime.restore import CheckpointError


class DrivenOps(QuietOps):
    """Fails to create files on demand, and may not see checkpoints above a step yet."""

    full = False
    visible = 10**9

    def create(self, path: Path) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().create(path)

    def list_dir(self, path: Path) -> dict[str, bool]:
        names = FileOps.list_dir(self, path)
        return {n: d for n, d in names.items() if (parse_directory_name(n) or 0) <= self.visible}


def state_of(rank: int, step: int) -> tuple[dict, dict]:
    tensors = {"model": {"w": torch.full((4,), float(100 * step + rank))}}
    return tensors, {"rank": rank, "step": step}


def obey(store: RankCheckpointStore, ops: DrivenOps, rank: int, order: list) -> dict:
    name, value = order
    if name == "save":
        store.save(value, *state_of(rank, value), block=True)
        return {"saved": store.last_saved_step}
    if name == "load":
        found = store.load_newest()
        if found is None:
            return {"step": None}
        tensors, state = state_of(rank, found.step)
        exact = found.state == state and torch.equal(
            found.tensors["model"]["w"], tensors["model"]["w"]
        )
        return {"step": found.step, "exact": exact, "quarantined": store.quarantine_count}
    if name == "short":
        # The next copy finds no memory.
        take = rank_checkpoint.take_snapshot

        def fail(*_: object, **__: object) -> None:
            rank_checkpoint.take_snapshot = take
            raise MemoryError("not enough memory")

        if value:
            rank_checkpoint.take_snapshot = fail  # type: ignore[assignment]
        return {}
    if name == "alone":
        # The negative control: a rank that asks nobody what it has seen.
        store._together = lambda work: [work()]  # type: ignore[method-assign]
        return {}
    setattr(ops, name, value)
    return {}


def main() -> None:
    rank, rendezvous, directory = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    ops = DrivenOps()
    store = RankCheckpointStore(
        directory,
        max_checkpoints=2,
        fingerprint=FINGERPRINT,
        ranks=ProcessGroupRanks(),
        ops=ops,
    )
    for line in sys.stdin:
        try:
            result = obey(store, ops, rank, json.loads(line))
        except CheckpointError as error:
            result = {"error": str(error)}
        print(json.dumps(result), flush=True)
    store.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
