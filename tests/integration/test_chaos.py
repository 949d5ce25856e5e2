"""Suite R24 in small, and its negative control; the hour itself is `scripts/soak.py R24`."""

import random
import sys

import pytest

from tests.integration.chaos import Life, Tormentor, torment
from tests.integration.chaos_life import FORGET

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]


def seed_that_begins_with(name, home):
    """A seed whose first fault is this one."""
    life = Life(home / "unused", home, pace_s=0.0, flags=())
    for seed in range(1000):
        tormentor = Tormentor(life, random.Random(seed))
        tormentor.shuffle()
        if tormentor.deck[-1] == name:
            return seed
    raise AssertionError(f"no seed begins with {name}")


def test_twelve_faults_leave_no_trace(ram_path):
    facts, failures = torment(ram_path, faults=12, minutes=6.0, pace_s=0.1, seed=1)
    assert failures == [] and sum(facts["faults"].values()) == 12


def test_a_life_that_forgets_is_noticed(ram_path, monkeypatch):
    """Negative control: one kill of a run that does not restore its generators."""
    monkeypatch.setenv(FORGET, "training.sigma_trainer.restore_rng_state")
    seed = seed_that_begins_with("kill", ram_path)
    facts, failures = torment(ram_path, faults=1, minutes=1.0, pace_s=0.1, seed=seed)
    assert facts["processes"] == 2
    assert any("/" in found for found in failures), failures  # a tensor
