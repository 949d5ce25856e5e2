"""The test keeps its error bound however often it is looked at; a fixed-sample test does not."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evolution.e_process import (
    T_POINTS,
    EProcess,
    effect_size,
    interval,
    spent_alpha,
)

TRIALS = 400
LENGTH = 32


def student(rng):
    """A heavy tail: Student's t with 3 degrees of freedom."""
    return rng.gauss(0, 1) / math.sqrt(sum(rng.gauss(0, 1) ** 2 for _ in range(3)) / 3)


def correlated(rng, *, state):
    """Symmetric, with a scale that wanders by a factor of ten."""
    state[0] = 0.9 * state[0] + 0.4 * rng.gauss(0, 1)
    return rng.gauss(0, 1) * math.exp(state[0])


def crossings(draw, *, alpha, looks):
    """Share of trials in which `looks(values)` said yes at any time."""
    rng, found = random.Random(5), 0
    for _ in range(TRIALS):
        process, state = EProcess(), [0.0]
        found += any(looks(process, draw(rng, state)) for _ in range(LENGTH))
    return found / TRIALS


NOISES = {
    "normal": lambda rng, _: rng.gauss(0.0, 0.3),
    "heavy": lambda rng, _: student(rng),
    "wandering": lambda rng, state: correlated(rng, state=state),
}


@pytest.mark.parametrize("noise", NOISES)
def test_peeking_at_every_difference_keeps_the_level(noise):
    def looks(process, value):
        return process.observe(value) >= 1.0 / 0.05

    assert crossings(NOISES[noise], alpha=0.05, looks=looks) <= 0.05


def test_peeking_at_a_t_test_does_not():
    """Negative control: the same data, the test that trap (e) warns of."""

    def looks(process, value):
        process.observe(value)
        values = process.differences
        return len(values) > 3 and effect_size(values) * math.sqrt(len(values)) > 1.7

    assert crossings(NOISES["normal"], alpha=0.05, looks=looks) > 0.10


def test_the_wealth_gains_nothing_on_average_under_no_effect():
    rng, total = random.Random(1), 0.0
    for _ in range(4000):
        process = EProcess(scale=0.3)
        for _ in range(8):
            process.observe(rng.gauss(0.0, 0.3))
        total += process.value
    assert abs(total / 4000 - 1.0) < 0.05


def test_without_a_scale_nothing_is_staked_on_the_first_two():
    process = EProcess()
    assert process.observe(5.0) == 1.0 and process.observe(6.0) == 1.0
    assert process.observe(5.5) > 1.0


def test_a_scale_known_beforehand_is_used_at_once():
    assert EProcess(scale=1.0).observe(3.0) == 1.25  # the smallest bet on x = 1
    assert EProcess(scale=1.0).observe(-30.0) == 0.75  # clipped at -1


@given(st.lists(st.floats(-10, 10), max_size=40), st.floats(0.01, 5.0) | st.none())
def test_the_wealth_stays_positive_and_the_state_is_all_there_is(values, scale):
    whole = EProcess(scale=scale)
    half = EProcess()
    for place, value in enumerate(values):
        if place == len(values) // 2:
            half.load_state_dict(whole.state_dict())
        whole.observe(value)
        if place >= len(values) // 2:
            half.observe(value)
    assert whole.value > 0.0 and math.isfinite(whole.value)
    assert not values or half.state_dict() == whole.state_dict()


def test_no_noise_at_all_is_no_evidence():
    """Arms that do not differ: zero differences have no scale."""
    process = EProcess()
    for _ in range(10):
        process.observe(0.0)
    assert process.value == 1.0 and effect_size(process.differences) == 0.0


def test_all_candidates_together_spend_the_budget():
    shares = [spent_alpha(0.05, number) for number in range(1, 100_000)]
    assert shares == sorted(shares, reverse=True)
    assert 0.0499 < sum(shares) < 0.05


def test_the_interval_is_students():
    values = [0.3, 0.1, 0.25, -0.05, 0.4]
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=stats.sem(values))
    assert interval(values) == pytest.approx((low, high), abs=1e-4)
    assert interval([1.0]) is None
    for freedom, point in enumerate(T_POINTS, start=1):
        assert point == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-4)


def test_an_effect_that_fades_does_not_count_as_noise():
    """Evidence from a gain that falls to nothing, in steady noise, is that of the noise's size."""
    rng = random.Random(3)
    fading, steady = EProcess(), EProcess()
    for n in range(20):
        noise = rng.gauss(0.0, 0.02)
        fading.observe(0.4 * 0.8**n + noise)
        steady.observe(0.08 + noise)
    assert fading.value > 20.0 and steady.value > 20.0
