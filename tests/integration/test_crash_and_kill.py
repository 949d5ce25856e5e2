"""A run that is killed at a random moment ends, after restarts, where an unharmed one ends."""

import os
import random
import shutil
import signal

import pytest

from tests.integration.full_runs import LEFT_OUT, SETTINGS, open_full, write_sources
from tests.integration.lives import begin_life, live_under_fire, reap, tiny_trainer
from tests.integration.runs import differences, newest_checkpoint, tiny_flags, train
from training.build import build_trainer
from training.config.cli import parse_args
from training.features import FEATURES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
FLAGS = ("--steps", "48", "--save-interval", "3", "--max-checkpoints", "4")


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("unharmed") / "run"
    assert reap(begin_life(tiny_trainer(directory, *FLAGS))) == 0
    return directory


def test_fifty_kills_leave_no_trace(unharmed, tmp_path):
    draw, hits, runs = random.Random(0), 0, 0
    while hits < 50:
        directory = tmp_path / f"run{runs}"
        runs += 1
        hits += live_under_fire(tiny_trainer(directory, *FLAGS), draw, kills=50 - hits)
        assert differences(unharmed, directory) == []


def test_the_full_runs_hold_every_feature_but_one(tmp_path):
    """Those that `scripts/soak.py R2` kills a thousand times."""
    sources = write_sources(tmp_path)
    runs = [open_full(name, tmp_path / name, sources) for name in SETTINGS]
    held = {
        feature.name
        for trainer in runs
        for feature in FEATURES
        if feature.schedule(trainer.config) is not None
    }
    assert held == {feature.name for feature in FEATURES} - LEFT_OUT


@pytest.mark.parametrize("broken", ["training.sigma_trainer.restore_rng_state",
                                    "training.data.TokenStream.load_state_dict"])  # fmt: skip
def test_a_life_that_forgets_something_is_noticed(unharmed, tmp_path, monkeypatch, broken):
    """Negative control: a kill of a run that does not restore all of its state leaves a trace."""
    monkeypatch.setattr(broken, lambda *args, **kwargs: None)
    trainer = tiny_trainer(tmp_path / "run", *FLAGS)
    pid = begin_life(trainer)
    saved = tmp_path / "run" / "checkpoints" / "checkpoint_step_00000006" / "MANIFEST.json"
    while not saved.exists():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    reap(pid)
    assert reap(begin_life(trainer)) == 0
    assert differences(unharmed, tmp_path / "run") != []


def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_resumed(unharmed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(unharmed, directory)
    damaged = newest_checkpoint(directory)
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x10
    weights.write_bytes(content)
    trainer = build_trainer(parse_args(tiny_flags(directory, *FLAGS)))
    trainer.fit()
    assert differences(unharmed, directory) == []
    assert [p.name.split("-")[0] for p in (directory / "checkpoints" / "quarantine").iterdir()] == [
        damaged.name
    ]


def test_other_settings_stop_the_resume_and_touch_nothing(unharmed, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(unharmed, directory)
    before = sorted(p.name for p in (directory / "checkpoints").iterdir())
    with pytest.raises(RuntimeError, match="--d-ff"):
        train(tiny_flags(directory, *FLAGS, "--d-ff", "96"))
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == before
