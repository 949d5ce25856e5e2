"""The paired gate: exact, at its level under repeated looks, with power, and with controls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from training.hydra.gate import Decision, GateSettings, PairedGate, compare, exact_p

ITEMS, LOOKS, TRIALS = 200, 25, 400


def drawn(rng, chances):
    return (rng.random(len(chances)) < chances).tolist()


def decisions(rng, *, shift=0.0, drift=0.0, gate=None):
    """Decisions of up to 25 looks at one best version, until one is not to keep.

    Every item has a chance of its own. drift: share of the items whose answer by the present
    version is drawn anew between two looks, so that looks resemble each other; 0 = all of them.
    """
    gate = gate or PairedGate(GateSettings())
    chances = rng.beta(1.5, 1.5, ITEMS)
    shifted = np.clip(chances - shift, 0.0, 1.0)
    best, current = drawn(rng, chances), drawn(rng, shifted)
    for _ in range(LOOKS):
        look = gate.look(current, best)
        yield look.decision
        if look.decision is not Decision.KEEP:
            return
        fresh = drawn(rng, shifted)
        if drift:
            renewed = rng.random(ITEMS) < drift
            current = [new if now else old for new, old, now in zip(fresh, current, renewed)]
        else:
            best, current = drawn(rng, chances), fresh


def last_of(trial, **options):
    return list(decisions(np.random.default_rng([7, trial]), **options))[-1]


def ended(kind, *, trials=100, **options):
    """Share of trials that end so."""
    return sum(last_of(trial, **options) is kind for trial in range(trials)) / trials


@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_of_two_equal_versions_none_is_undone_or_promoted_too_often(drift):
    ends = [last_of(trial, drift=drift) for trial in range(TRIALS)]
    assert len(ends) - ends.count(Decision.KEEP) <= 0.05 * TRIALS


def test_a_test_that_spends_nothing_fails_there():
    """Negative control: 5 % at every look is far more than 5 % in all."""

    class Peeking(PairedGate):
        def look(self, current, best):
            self.num_looks = 0
            found = compare(current, best)
            decision = (
                Decision.ROLL_BACK if found.p_value <= 0.05 and found.drop > 0.0 else Decision.KEEP
            )
            return found.__class__(
                decision=decision, score=found.score, drop=found.drop, p_value=found.p_value
            )

    assert ended(Decision.ROLL_BACK, gate=Peeking(GateSettings())) > 0.25


def test_a_real_fall_is_undone_and_a_real_gain_promoted():
    assert ended(Decision.ROLL_BACK, shift=0.15) >= 0.8
    assert ended(Decision.PROMOTE, shift=-0.15) >= 0.8
    assert ended(Decision.PROMOTE, shift=0.15) == ended(Decision.ROLL_BACK, shift=-0.15) == 0.0


def test_the_p_value_is_that_of_counting_all_throws():
    for heads, tails in ((0, 0), (1, 0), (3, 1), (5, 5), (2, 6)):
        throws = list(itertools.product((0, 1), repeat=heads + tails))
        uneven = abs(heads - tails)
        expected = sum(abs(2 * sum(throw) - len(throw)) >= uneven for throw in throws)
        assert exact_p(heads, tails) == expected / len(throws)


def test_only_items_on_which_versions_differ_say_anything():
    lost = compare([False] * 8 + [True] * 92, [True] * 100)
    assert (lost.score, lost.drop, lost.p_value) == (0.92, 0.08, 2**-7)
    alike = compare([False] * 8, [True] * 8)
    assert alike.p_value == lost.p_value and alike.drop == 1.0
    assert compare([True] * 5, [True] * 5).p_value == 1.0
    with pytest.raises(ValueError, match="needs items"):
        compare([], [])


def test_a_fall_below_the_threshold_is_kept_however_certain():
    current, best = [False] * 20 + [True] * 1980, [True] * 2000
    strict, mild = PairedGate(GateSettings(threshold=0.009)), PairedGate(GateSettings())
    assert strict.look(current, best).decision is Decision.ROLL_BACK
    assert mild.look(current, best).decision is Decision.KEEP


def test_a_promotion_begins_a_new_sequence_of_looks():
    gate = PairedGate(GateSettings())
    equal = [True] * 10
    for _ in range(5):
        gate.look(equal, equal)
    assert gate.num_looks == 5
    assert gate.look([True] * 30, [False] * 30).decision is Decision.PROMOTE
    assert gate.num_looks == 0
