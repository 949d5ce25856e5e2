"""Suite R24 in small, and its negative control; the hour itself is `scripts/soak.py R24`."""

import random
import sys

import pytest

from tests.integration.chaos import Life, Tormentor, torment
from tests.integration.chaos_damage import tear_rows
from tests.integration.chaos_life import FORGET
from tests.integration.runs import metrics_rows, tiny_flags, train
from training.runtime.metrics import MetricsLog

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")


def seed_that_begins_with(name, home):
    """A seed whose first fault is this one."""
    life = Life(home / "unused", home, pace_s=0.0, flags=())
    for seed in range(1000):
        tormentor = Tormentor(life, random.Random(seed))
        tormentor.shuffle()
        if tormentor.deck[-1] == name:
            return seed
    raise AssertionError(f"no seed begins with {name}")


def test_a_torn_file_keeps_every_row_of_the_newest_checkpoint(ram_path):
    """What a power loss may take ends where a checkpoint has flushed; the repair finds the rest."""
    run = ram_path / "run"
    train(tiny_flags(run, "--steps", "2", "--save-interval", "2"))
    path, saved = run / "metrics.jsonl", metrics_rows(run)
    flushed = path.read_bytes()
    for seed in range(40):
        path.write_bytes(flushed + b'{"step":3,"lr":0.1}\n' * (seed % 2))
        tear_rows(run, random.Random(seed))
        assert path.read_bytes() != flushed or seed % 2
        MetricsLog(path).close()
        rows = metrics_rows(run)  # a row that only lacks its newline counts as written
        assert rows[: len(saved)] == saved and len(rows) <= len(saved) + seed % 2


@pytest.mark.soak
def test_twelve_faults_leave_no_trace(ram_path):
    facts, failures = torment(ram_path, faults=12, minutes=6.0, pace_s=0.1, seed=1)
    assert failures == [] and sum(facts["faults"].values()) == 12


@pytest.mark.soak
def test_a_life_that_forgets_is_noticed(ram_path, monkeypatch):
    """Negative control: one kill of a run that does not restore its generators."""
    monkeypatch.setenv(FORGET, "training.sigma_trainer.restore_rng_state")
    seed = seed_that_begins_with("kill", ram_path)
    facts, failures = torment(ram_path, faults=1, minutes=1.0, pace_s=0.1, seed=seed)
    assert facts["processes"] == 2
    assert any("/" in found for found in failures), failures  # a tensor
