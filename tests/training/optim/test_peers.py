"""Step by step against other libraries: torch's own here, the rest as record_peers.py kept them."""

import json
from pathlib import Path

import pytest
import torch

from tests.training.optim.record_peers import KEPT, MAX_SIDE, PROBLEMS, problem, trajectory
from training.optim.adamuon import AdaMuon
from training.optim.adamw import AdamW
from training.optim.lion import Lion
from training.optim.muon import Muon
from training.optim.normuon import NorMuon
from training.optim.soap import Soap

PEERS = json.loads((Path(__file__).parent / "peers.json").read_text(encoding="utf-8"))
OURS = {
    "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
    "muon": lambda p: Muon(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "normuon": lambda p: NorMuon(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adamuon": lambda p: AdaMuon(p, lr=0.02, momentum=0.0, weight_decay=0.1),
    "soap": lambda p: Soap(p, lr=0.01, refresh=3, max_side=MAX_SIDE),
}


def assert_same(found, expected, *, tolerance):
    for step in map(str, KEPT):
        for ours, theirs in zip(found[step], expected[step]):
            torch.testing.assert_close(
                torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=tolerance
            )


@pytest.mark.parametrize("name", OURS)
def test_steps_are_those_of_the_peer(name):
    assert set(PEERS["trajectories"]) == set(OURS)
    # SOAP turns its basis by eigenvectors, which differ more between libraries of linear algebra.
    tolerance = 1e-5 if name == "soap" else 2e-6
    found = trajectory(OURS[name], PROBLEMS.get(name, problem))
    assert_same(found, PEERS["trajectories"][name], tolerance=tolerance)


def test_lion_is_the_peers_to_the_bit():
    assert trajectory(OURS["lion"]) == PEERS["trajectories"]["lion"]


def test_scaled_adamw_follows_torchs():
    """The path of scales and adjustments: the same numbers in another order of operations."""

    def ours(params):
        optimizer = AdamW(params, lr=0.01, weight_decay=0.1)
        optimizer.set_scales({})
        return optimizer

    theirs = trajectory(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1))
    assert_same(trajectory(ours), theirs, tolerance=1e-6)


def test_the_comparison_tells_learning_rates_apart():
    found = trajectory(lambda p: Lion(p, lr=0.0101, weight_decay=0.1))
    with pytest.raises(AssertionError):
        assert_same(found, PEERS["trajectories"]["lion"], tolerance=2e-6)
