"""Overlays stay within their bounds and survive being written down."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolution.overlays import NEUTRAL, SCHEMA, Overlay, Proposal, distance, draw_overlay


@pytest.mark.parametrize("value", [0.2, 4.1, -1.0, 0.0, float("nan"), float("inf")])
def test_a_value_out_of_bounds_is_refused(value):
    with pytest.raises(ValueError, match="overlay lr_factor"):
        Overlay(lr_factor=value)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="hidden_eval_pass"):
        Overlay.from_dict({"hidden_eval_pass": 1.0})


def test_the_default_changes_nothing():
    assert {name: field.default for name, field in SCHEMA.items()} == NEUTRAL.to_dict()
    assert NEUTRAL.lr_factor == 1.0


@given(st.integers(0, 2**32))
def test_draws_stay_within_the_bounds(seed):
    overlay = draw_overlay(random.Random(seed), names=tuple(SCHEMA))
    assert all(0.0 <= place <= 1.0 for place in overlay.point)
    assert Overlay.from_dict(overlay.to_dict()) == overlay


def test_distance_is_that_of_factors():
    """Twice as fast and half as fast are equally far from unchanged."""
    up, down = Overlay(lr_factor=2.0), Overlay(lr_factor=0.5)
    assert distance(NEUTRAL, up) == pytest.approx(distance(NEUTRAL, down))
    assert distance(Overlay(lr_factor=0.25), Overlay(lr_factor=4.0)) == pytest.approx(1.0)


def test_a_proposal_survives_being_written_down():
    proposal = Proposal(
        what="overlay", old=NEUTRAL, new=Overlay(lr_factor=2.5), reason="why", seed=7
    )
    assert Proposal.from_dict(proposal.to_dict()) == proposal


def test_only_the_fields_that_are_named_are_drawn():
    overlay = draw_overlay(random.Random(1), names=("lr_factor",))
    assert overlay.lr_factor != 1.0 and overlay.ttrl_interval == overlay.ttrl_budget == 1.0
    # The numbers of a run without RL do not depend on which fields there could be.
    assert overlay.lr_factor == draw_overlay(random.Random(1), names=tuple(SCHEMA)).lr_factor
    assert "ttrl" not in str(overlay) and str(NEUTRAL) == "no change"
