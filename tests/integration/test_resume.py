"""Stopping and resuming changes nothing: weights, optimizer, metrics rows and data to the bit."""

import shutil
from pathlib import Path

import pytest

from tests.integration.runs import (
    REPLAY,
    differences,
    metrics_rows,
    newest_checkpoint,
    stop_after,
    tiny_flags,
    train,
)
from tests.training.runtime.faults import example, open_store, save_steps
from training.features import FEATURES

STEPS = 64
EVERY_STEP = (*REPLAY, "--save-interval", "1")
AT_THE_END = (*REPLAY, "--save-interval", "64")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A 64-step run, with replay besides, that saved at each of its steps."""
    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(tiny_flags(directory, *EVERY_STEP))
    return directory


def test_stopped_and_resumed_at_every_step(uninterrupted, tmp_path):
    """64 lives of one step each, every one ended by a stop request and begun by a resume."""
    directory = tmp_path / "run"
    args = tiny_flags(directory, *EVERY_STEP)
    for step in range(1, STEPS + 1):
        train(args, features=(*FEATURES, stop_after(step, directory)))
        assert newest_checkpoint(directory).name == f"checkpoint_step_{step:08d}"
    assert len(metrics_rows(directory)) == STEPS + 1
    assert differences(uninterrupted, directory) == []


@pytest.mark.parametrize(
    "step",
    [1, 15, 16, 17, 40, 63]
    + [pytest.param(s, marks=pytest.mark.soak) for s in range(2, 63) if s not in (15, 16, 17, 40)],
)
def test_resumed_once_from_any_step(uninterrupted, tmp_path, step):
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    for later in (directory / "checkpoints").glob("checkpoint_step_*"):
        if later.name > f"checkpoint_step_{step:08d}":
            shutil.rmtree(later)
    train(tiny_flags(directory, *AT_THE_END))
    assert differences(uninterrupted, directory) == []
    assert (directory / "metrics.orphan-1.jsonl").exists()


@pytest.mark.parametrize("broken", ["rng", "stream", "optimizer", "features"])
def test_a_state_that_is_not_restored_is_noticed(uninterrupted, tmp_path, monkeypatch, broken):
    """Negative control: leave one part of the state out and the comparison must fail."""
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    for later in (directory / "checkpoints").glob("checkpoint_step_*"):
        if later.name > "checkpoint_step_00000040":
            shutil.rmtree(later)
    target = {
        "rng": "training.sigma_trainer.restore_rng_state",
        "stream": "training.data.TokenStream.load_state_dict",
        "optimizer": "training.optimizer.OptimizerSet.load_state_dict",
        "features": "training.features.base.FeatureSet.load_state_dict",
    }[broken]
    monkeypatch.setattr(target, lambda *args, **kwargs: None)
    train(tiny_flags(directory, *AT_THE_END))
    assert differences(uninterrupted, directory) != []


def test_a_finished_run_resumes_to_itself(uninterrupted, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    train(tiny_flags(directory, *EVERY_STEP))
    assert differences(uninterrupted, directory) == []


def test_no_resume_starts_again(uninterrupted, tmp_path):
    directory = Path(tmp_path / "run")
    shutil.copytree(uninterrupted, directory)
    train(tiny_flags(directory, *EVERY_STEP, "--no-resume", "--steps", "2"))
    assert [row["step"] for row in metrics_rows(directory)] == [0, 1, 2]


def test_a_run_that_starts_anew_never_goes_back_into_the_one_before(ram_path: Path) -> None:
    save_steps(ram_path, 800, 900, keep=2)
    store = open_store(ram_path, keep=2)
    store.start_anew()
    assert store.load_newest() is None
    for step in (1, 900):  # the old 800 and 900 make room
        store.save(step, *example(step), block=True)
    found = store.load_newest(before_step=900)
    assert found is not None and found.step == 1
    found = store.load_newest()
    assert found is not None and found.step == 900 and found.parent == 1
    store.close()
