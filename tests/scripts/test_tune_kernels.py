"""Measuring launch settings: what is chosen, on which products, and never without a GPU."""

import argparse

import pytest
import torch

pytest.importorskip("triton")

import triton

from model.launch import Tiles
from model.launch_table import LaunchTable
from scripts import tune_kernels
from scripts.tune_kernels import Trial, candidates, trials, tune

DEFAULT = Tiles(128, 128, 64, 8, 4)
SMALL = argparse.Namespace(tokens=20, d_model=24, d_expert=16, vocab_size=40, experts=3, top_k=2)


def key_of(trial):
    return trial.key.operation, trial.key.columns, trial.key.depth


def test_the_fastest_is_chosen_and_what_does_not_fit_left_out():
    fastest = candidates(DEFAULT)[3]
    given = []

    def run(tiles):
        given.append(tiles)
        if tiles.n == 256:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")

    trial = Trial(key=None, default=DEFAULT, run=run)
    best, times = tune(trial, lambda call: call() or (1.0 if given[-1] == fastest else 2.0))
    assert best == fastest
    assert times and not any(tiles.n == 256 for tiles in times)


def test_the_heuristic_stays_where_others_are_hardly_faster():
    given = []
    trial = Trial(key=None, default=DEFAULT, run=given.append)
    best, _ = tune(trial, lambda call: call() or (1.0 if given[-1] == DEFAULT else 0.99))
    assert best == DEFAULT


def test_rows_that_are_settled_are_not_varied():
    given = []
    trial = Trial(key=None, default=DEFAULT, run=given.append, fixed_rows=True)
    tune(trial, lambda call: call() or 1.0)
    assert {tiles.m for tiles in given} == {DEFAULT.m} and len(set(given)) > 2


def test_candidates_could_all_stand_in_a_table(tmp_path):
    trial = next(trials(SMALL, torch.device("cpu")))
    for tiles in candidates(DEFAULT):
        table = LaunchTable(tiles={trial.key: tiles})
        assert LaunchTable.parse(table.dump()).tiles == {trial.key: tiles}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is tried")
def test_every_trial_runs_and_finds_its_own_key(monkeypatch, tmp_path):
    """A key that the launcher would not look for would be measured for nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    from model import launch_table

    found = list(trials(SMALL, torch.device("cpu")))
    keys = {trial.key for trial in found}
    assert {key.operation for key in keys} == set(launch_table.OPERATIONS)
    asked = set()
    find = launch_table._find

    def watched(folder, operation, itemsize, capability, *sizes):
        asked.add((operation, itemsize, capability, *sizes))
        return find(folder, operation, itemsize, capability, *sizes)

    monkeypatch.setattr(launch_table, "_find", watched)
    for trial in found:
        trial.run(Tiles(16, 16, 16, 1, 1))
        trial.run(None)
    for key in keys:
        sizes = key.rows, key.columns, key.depth
        assert (key.operation, key.itemsize, key.capability, *sizes) in asked


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert tune_kernels.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
