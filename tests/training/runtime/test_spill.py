"""Slow steps over a full card are named, and slow steps alone are not."""

import torch

from training.runtime.spill import FULL_SHARE, SAY_AGAIN_S, SpillWatch, watch_for_spill


class Card:
    """Steps of given lengths on a card that is in use to a given share."""

    def __init__(self, share):
        self.share, self.seconds, self.said, self.reads = share, 0.0, [], 0
        self.watch = SpillWatch(read=self.read, say=self.said.append, now=lambda: self.seconds)

    def read(self):
        self.reads += 1
        return self.share

    def steps(self, *lengths):
        for seconds in lengths:
            self.seconds += seconds
            self.watch.check()


def test_steps_that_become_slow_on_a_full_card_are_named_once():
    card = Card(0.99)
    card.steps(*[1.0] * 20, 5.0)
    assert card.said == []  # one slow step may have evaluated
    card.steps(5.0, 5.0, 5.0)
    assert len(card.said) == 1
    assert "5.0 s instead of 1.0 s" in card.said[0] and "99%" in card.said[0]
    card.steps(*[5.0] * int(SAY_AGAIN_S / 5 + 2))
    assert len(card.said) == 2


def test_slow_steps_on_a_card_with_room_are_not_named():
    card = Card(FULL_SHARE - 0.01)
    card.steps(*[1.0] * 20, *[9.0] * 20)
    assert card.said == [] and card.reads > 0


def test_a_full_card_that_is_fast_is_not_even_asked():
    card = Card(1.0)
    card.steps(*[1.0] * 100, 5.0, *[1.0] * 20, 2.5, 2.5)
    assert card.said == [] and card.reads == 0


def test_only_drivers_that_page_are_watched(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    assert watch_for_spill(torch.device("cpu"), print) is None
    assert isinstance(watch_for_spill(torch.device("cuda"), print), SpillWatch)
    monkeypatch.setattr("sys.platform", "linux")
    assert watch_for_spill(torch.device("cuda"), print) is None
