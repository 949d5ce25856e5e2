"""Factors compose within bounds, proposals are checked, and one experiment runs at a time."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.arbitration import ExperimentToken
from training.run_policy import LR, Knob, Proposal, RunPolicy


def policy(**knobs):
    found = RunPolicy(knobs or {LR: Knob(lowest=0.5, highest=1.8)})
    for name in ("rule", "search"):
        found.enroll(name)
    return found


def move(found, name, new, *, by):
    proposal = found.propose(name, new, by=by, reason="because")
    return proposal is not None and found.apply(proposal)


@given(st.lists(st.tuples(st.sampled_from(["rule", "search"]), st.floats(0.1, 9.0)), max_size=20))
def test_the_value_is_the_clipped_product_of_the_last_factors(changes):
    found, last = policy(), {"rule": 1.0, "search": 1.0}
    for by, factor in changes:
        before = found.multiplier(LR)
        assert move(found, LR, factor, by=by) == (found.multiplier(LR) != before)
        last[by] = factor
    expected = min(1.8, max(0.5, last["rule"] * last["search"]))
    assert found.multiplier(LR) == pytest.approx(expected, rel=1e-15)


def test_a_knob_that_is_not_there_turns_nothing():
    found = policy(ttrl_interval=Knob(lowest=0.25, highest=2.0))
    assert move(found, "ttrl_interval", 1.5, by="search")
    assert found.multiplier("ttrl_interval") == 1.5
    assert not move(found, "ttrl_interval", 1.5, by="search")  # it is there already
    assert found.present((LR, "ttrl_interval")) == ("ttrl_interval",)
    assert found.multiplier(LR) == 1.0


def test_proposals_that_cannot_be_made_are_refused():
    found = policy()
    good = found.propose(LR, 1.1, by="rule", reason="because", seed=7)
    assert good is not None and good == Proposal(
        what=LR, by="rule", old=1.0, new=1.1, reason="because", seed=7
    )
    assert found.apply(good)
    with pytest.raises(ValueError, match="does not have"):
        found.apply(good)  # made for a factor that is no more
    with pytest.raises(ValueError, match="no width"):
        found.apply(Proposal(what="width", by="rule", old=1.0, new=2.0, reason=""))
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            found.apply(Proposal(what=LR, by="rule", old=1.1, new=bad, reason=""))
    assert found.multiplier(LR) == 1.1


def test_what_is_restored_is_what_the_run_has():
    found = policy()
    move(found, LR, 1.3, by="rule")
    move(found, LR, 0.9, by="search")
    assert found.token.take("search", step=4) and not found.token.take("rule", step=5)
    state = json.loads(json.dumps(found.state_dict()))
    same = policy()
    same.load_state_dict(state)
    assert same.multiplier(LR) == found.multiplier(LR) and same.state_dict() == state
    other = RunPolicy({LR: Knob(lowest=0.5, highest=1.8)})
    other.enroll("rule")  # the search is off now: neither its factor nor its experiment is left
    other.load_state_dict(state)
    assert other.multiplier(LR) == 1.3 and other.token.take("rule", step=9)
    RunPolicy().load_state_dict(state)


def test_experiments_alternate_and_one_alone_goes_on():
    token = ExperimentToken()
    assert token.take("search", step=1) and token.take("search", step=2)
    assert not token.take("fork", step=3)
    token.give_back("search")
    assert not token.take("search", step=9)  # the fork has waited
    assert token.take("fork", step=9) and not token.take("search", step=10)
    token.give_back("fork")
    assert token.take("search", step=21)
    token.give_back("search")
    assert token.take("search", step=29)  # nobody waits


def test_changes_are_made_at_boundaries_only():
    token = ExperimentToken()
    assert token.is_boundary(3)
    token.take("search", step=4)
    assert token.is_boundary(4)  # the experiment begins with what is changed here
    assert not token.is_boundary(5) and not token.is_boundary(11)
    token.give_back("search")
    assert token.is_boundary(12)


def test_leaving_the_line_and_what_is_not_held():
    token = ExperimentToken()
    token.take("search", step=1)
    token.take("fork", step=1)
    token.give_back("fork")
    token.give_back("search")
    assert token.take("search", step=2)
    with pytest.raises(RuntimeError, match="search holds"):
        token.give_back("fork")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
def test_nobody_who_waits_is_overtaken_twice(events):
    token, overtaken, held_by = ExperimentToken(), {}, None
    for step, (name, gives_back) in enumerate(events):
        if gives_back:
            if token.holder == name:
                token.give_back(name)
                held_by = None
            continue
        had = token.holder
        if token.take(name, step=step):
            assert held_by in (None, name)
            if had is None:
                overtaken.pop(name, None)
                overtaken = {other: count + 1 for other, count in overtaken.items()}
            held_by = name
        else:
            overtaken.setdefault(name, 0)
        assert all(count <= 2 for count in overtaken.values())
