"""Two ranks over gloo: one manifest over the shards of both, and one step that both resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.runtime.faults import QuietOps
from training.runtime.manifest import read_manifest

ROOT = Path(__file__).parents[3]


class Pair:
    """Two driver processes, told the same or different things, always in step."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "checkpoints"
        command = [sys.executable, "-m", "tests.training.runtime.rank_driver"]
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(home / "rendezvous"), str(self.directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(2)
        ]

    def tell(self, *orders: tuple[str, object]) -> list[dict]:
        """One order to each rank (one alone goes to both); their answers."""
        orders = orders * 2 if len(orders) == 1 else orders
        for process, order in zip(self.processes, orders, strict=True):
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            answers.append(json.loads(process.stdout.readline()))
        return answers

    def names(self) -> list[str]:
        return sorted(p.name for p in self.directory.iterdir() if p.name.startswith("checkpoint_"))


@pytest.fixture
def pair(ram_path: Path) -> Iterator[Pair]:
    pair = Pair(ram_path)
    yield pair
    for process in pair.processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in pair.processes:
        assert process.wait(timeout=120) == 0


def test_two_ranks_save_fail_and_resume_as_one(pair: Pair) -> None:
    assert pair.tell(("load", None)) == [{"step": None}] * 2
    for step in (1, 2, 3):
        assert pair.tell(("save", step)) == [{"saved": step}] * 2
    assert pair.names() == ["checkpoint_step_00000002", "checkpoint_step_00000003"]
    manifest = read_manifest(QuietOps(), pair.directory / "checkpoint_step_00000003")
    assert set(manifest.files) == {
        "model.safetensors",
        "model-rank-00001.safetensors",
        "state.json",
        "state-rank-00001.json",
    }
    assert pair.tell(("load", None)) == [{"step": 3, "exact": True, "quarantined": 0}] * 2

    # One rank that cannot write fails the save of both, and leaves nothing behind.
    pair.tell(("full", False), ("full", True))
    for answer in pair.tell(("save", 4)):
        assert "rank 1: " in answer["error"] and "No space left" in answer["error"]
    assert pair.names() == ["checkpoint_step_00000002", "checkpoint_step_00000003"]
    pair.tell(("full", False))

    # Nor does one that has no memory for its copy leave the other with a step of its own.
    pair.tell(("short", False), ("short", True))
    for answer in pair.tell(("save", 4)):
        assert "rank 1: not enough memory" in answer["error"]

    # One rank that does not see the newest yet: both take the newest that both see.
    pair.tell(("visible", 2), ("visible", 10**9))
    assert pair.tell(("load", None)) == [{"step": 2, "exact": True, "quarantined": 0}] * 2
    pair.tell(("visible", 10**9))
    assert pair.tell(("load", None)) == [{"step": 3, "exact": True, "quarantined": 0}] * 2

    # A shard that is damaged takes the whole checkpoint with it, whoever wrote it.
    shard = pair.directory / "checkpoint_step_00000003" / "model-rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    answers = pair.tell(("load", None))
    assert [answer["step"] for answer in answers] == [2, 2]
    assert all(answer["exact"] for answer in answers)
    assert [answer["quarantined"] for answer in answers] == [1, 0]
    assert pair.tell(("save", 5)) == [{"saved": 5}] * 2
    assert pair.tell(("load", None))[1]["step"] == 5


def test_ranks_that_do_not_agree_are_noticed(pair: Pair) -> None:
    """Negative control: each rank decides by itself what is resumed."""
    for step in (1, 2):
        pair.tell(("save", step))
    pair.tell(("alone", True))
    pair.tell(("visible", 1), ("visible", 10**9))
    assert [answer["step"] for answer in pair.tell(("load", None))] == [1, 2]
