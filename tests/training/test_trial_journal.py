"""Trials and the research journal over lives in which it is on, off, or gone."""

import json
import random
import shutil
from typing import Any

import pytest

from evolution.overlays import Overlay
from evolution.uroboros import SearchSettings, Uroboros
from research.journal import Journal, read_trials
from training.overlay_trials import OverlayTrials, TrialSettings
from training.trial_journal import TrialJournal


class Life:
    """The trials of one life of a run in `directory`, from the state of the life before."""

    def __init__(self, directory, *, journal, state=None):
        self.directory, self.said = directory, []
        probe: Any = [None]
        self.trials = OverlayTrials(
            Uroboros(SearchSettings()),
            TrialSettings(),
            probe=probe,
            output_dir=directory,
            journal=TrialJournal(Journal(directory / "research")) if journal else None,
            say=self.said.append,
        )
        if state is not None:
            self.trials.load_state_dict(state)

    def begin(self):
        self.trials.search.open_candidate(Overlay(lr_factor=2.0), random.Random(0))
        assert self.trials._register(4, 4)

    def conclude(self):
        self.trials._give_up(8, "dropped", "its arm diverged")

    def end(self):
        state = self.trials.state_dict()
        self.trials.close()
        return state

    def outcomes(self):
        return [trial["outcome"] is not None for trial in read_trials(self.directory / "research")]


@pytest.mark.parametrize("why", ["it was off", "it is gone"])
def test_a_candidate_without_a_page_is_concluded_all_the_same(tmp_path, why):
    first = Life(tmp_path, journal=why == "it is gone")
    first.begin()
    state = first.end()
    shutil.rmtree(tmp_path / "research", ignore_errors=True)
    second = Life(tmp_path, journal=True, state=state)
    second.conclude()
    rows = (tmp_path / "uroboros_patch_history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["event"] for row in rows] == ["dropped"]
    assert "not in the research journal" in second.said[0] and "diverged" in second.said[0]
    second.begin()
    second.conclude()
    assert second.outcomes() == [True] and len(second.said) == 1
    second.end()


def test_a_life_with_the_journal_off_keeps_what_was_written_before(tmp_path):
    first = Life(tmp_path, journal=True)
    first.begin()
    first.conclude()
    first.begin()
    off = Life(tmp_path, journal=False, state=first.end())
    third = Life(tmp_path, journal=True, state=off.end())
    third.conclude()
    assert third.outcomes() == [True, True] and third.said == []
    assert not list((tmp_path / "research").glob("*orphan*"))
    third.end()
