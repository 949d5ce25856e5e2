"""The rule on scripted traces: the exact factors, its bounds, the spike, the placebo, resuming."""

import json
import math
import random
from typing import Any

import pytest
import torch
from scipy import stats

from training.config.cli import parse_args
from training.features.self_evolve import SelfEvolveFeature
from training.fork import copy_state
from training.self_evolve import (
    LearningRateRule,
    PaceRule,
    PaceSettings,
    RuleSettings,
    is_spike,
    slope_statistic,
)

SHORT = RuleSettings(history=6)
QUIET = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.02, 0.98]


def fitted(values):
    """Slope and its standard error by another library."""
    fit: Any = stats.linregress(range(len(values)), values)
    return fit.slope, fit.stderr


def factors(losses, *, norms=None, settings=SHORT):
    rule = LearningRateRule(settings)
    found = []
    for number, loss in enumerate(losses):
        rule.observe(loss, grad_norms=[1.0] if norms is None else [norms[number]])
        found.append(rule.settle())
    return found


def test_the_slope_is_that_of_another_library():
    draw = random.Random(0)
    for _ in range(20):
        values = [draw.gauss(0.0, 1.0) - 0.1 * place for place in range(24)]
        slope, error = fitted(values)
        assert slope_statistic(values) == pytest.approx(slope / error, rel=1e-9)
    assert slope_statistic([2.0] * 8) == 0.0
    assert slope_statistic([3.0 - 0.1 * place for place in range(8)]) == -math.inf
    with pytest.raises(ValueError, match="three values"):
        slope_statistic([1.0, 2.0])


def test_falling_rising_and_level_losses_give_the_exact_factors():
    falling = factors([4.0 - 0.1 * n for n in range(9)])
    assert falling == [1.0] * 5 + [1.03, 1.03 * 1.03, 1.03 * 1.03 * 1.03, 1.03 * 1.03 * 1.03 * 1.03]
    rising = factors([4.0 + 0.1 * n for n in range(7)])
    assert rising == [1.0] * 5 + [0.94, 0.94 * 0.94]
    assert factors([4.0, 4.1] * 6) == [1.0] * 12


def test_a_turn_of_the_trend_turns_the_factor():
    """Six falling, then rising: by hand, the window rises by two errors from the tenth on."""
    losses = [4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.6, 3.7, 3.8, 3.9, 4.0]
    expected, factor = [], 1.0
    for end in range(1, len(losses) + 1):
        if end >= 6:
            slope, error = fitted(losses[end - 6 : end])
            t = slope / error if error > 1e-9 else math.copysign(9.0, slope)
            factor *= 0.94 if t > 2.0 else 1.03 if t < -2.0 else 1.0
        expected.append(factor)
    assert factors(losses) == pytest.approx(expected, rel=1e-15)
    assert expected[5] > 1.0 and expected[-1] < expected[-3]


def test_bounds_are_never_exceeded():
    assert factors([9.0 - 0.01 * n for n in range(60)])[-1] == 1.80
    assert factors([1.0 + 0.01 * n for n in range(60)])[-1] == 0.50
    draw = random.Random(1)
    walk, place = [], 0.0
    for _ in range(2000):
        place += draw.gauss(0.0, 1.0)
        walk.append(place)
    assert all(0.5 <= factor <= 1.8 for factor in factors(walk))


def test_a_spike_lowers_the_rate_although_the_loss_falls():
    falling = [4.0 - 0.1 * n for n in range(10)]
    norms = [*QUIET, 5.0, 1.0]
    assert factors(falling, norms=norms)[-3:] == [
        pytest.approx(1.03**3), pytest.approx(1.03**3 * 0.94), pytest.approx(1.03**4 * 0.94)
    ]  # fmt: skip
    assert is_spike(2.0, QUIET) and not is_spike(1.15, QUIET)
    assert not is_spike(99.0, QUIET[:7])  # too few to know
    assert not is_spike(1.0, [1.0] * 8)  # no spread is no spike
    rule = LearningRateRule(SHORT)
    rule.observe(1.0, grad_norms=QUIET)
    rule.observe(math.nan, grad_norms=[math.inf, math.nan])
    assert rule.losses == [1.0] and not rule.is_spike


def test_a_decision_that_had_to_wait_moves_the_factor_once():
    rule = LearningRateRule(SHORT)
    for number in range(12):
        rule.observe(4.0 - 0.1 * number, grad_norms=[1.0])
    assert rule.factor == 1.0
    assert rule.settle() == 1.03
    assert rule.settle() == 1.03


def test_losses_in_a_random_order_move_nothing_for_long():
    """The placebo: t beyond 2 either way by chance only, so most looks leave the factor alone."""
    draw, rule = random.Random(2), LearningRateRule(RuleSettings())
    moved = 0
    for number in range(400):
        known = min(24, number + 1)
        before = rule.factor
        order = draw.sample(range(known), known)
        rule.observe(4.0 - 0.01 * number, grad_norms=[1.0], order=order)
        moved += rule.settle() != before
    assert moved < 0.15 * 400
    assert factors([4.0 - 0.01 * n for n in range(60)])[-1] == 1.8  # the control


@pytest.mark.parametrize("cut", [3, 9, 20])
def test_it_resumes_exactly(cut):
    draw = random.Random(3)
    losses = [draw.gauss(3.0, 0.3) - 0.05 * n for n in range(40)]
    norms = [abs(draw.gauss(1.0, 0.2)) for _ in range(40)]
    one = LearningRateRule(SHORT)
    for number in range(cut):
        one.observe(losses[number], grad_norms=[norms[number]])
        if number % 2:
            one.settle()
    two = LearningRateRule(SHORT)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for number in range(cut, 40):
        for rule in (one, two):
            rule.observe(losses[number], grad_norms=[norms[number]])
            rule.settle()
    assert one.state_dict() == two.state_dict() and one.factor == two.factor


def paces(looks, *, settings=None):
    """Interval and budget after each look at (GiB held, pass rate)."""
    rule = PaceRule(settings or PaceSettings(interval=8, budget=4))
    found = []
    for held, rate in looks:
        rule.observe(reserved_gb=held, task_val=rate)
        rule.settle()
        found.append((rule.interval, rule.budget))
    return found


def test_rl_gets_rarer_and_shorter_above_the_memory_target():
    assert paces([(11.0, math.nan)] * 10) == [
        (9, 3), (10, 2), (11, 1), (12, 1), (13, 1), (14, 1), (15, 1), (16, 1), (16, 1), (16, 1),
    ]  # fmt: skip


def test_rl_gets_more_frequent_with_room_and_a_rising_pass_rate_only():
    looks = [(0.0, 0.1), (0.0, 0.2), (0.0, 0.2), (0.0, 0.1), (10.0, 0.3), (9.4, 0.4)]
    assert [interval for interval, _ in paces(looks)] == [8, 7, 7, 7, 7, 6]
    rising = [(0.0, 0.01 * n) for n in range(20)]
    assert paces(rising)[-1] == (2, 4)


def test_an_interval_outside_the_bounds_is_left_alone():
    assert paces([(0.0, 0.5)], settings=PaceSettings(interval=1, budget=1)) == [(1, 1)]
    assert paces([(11.0, 0.5)], settings=PaceSettings(interval=32, budget=1)) == [(32, 1)]


def test_a_pace_is_carried_out_once_and_its_state_is_all_there_is():
    rule = PaceRule(PaceSettings(interval=8, budget=4))
    rule.observe(reserved_gb=11.0, task_val=0.5)
    copy = PaceRule(rule.settings)
    copy.load_state_dict(rule.state_dict())
    assert copy.settle() == rule.settle() == (9 / 8, 3 / 4)
    assert rule.settle() == (9 / 8, 3 / 4)
    copy.observe(reserved_gb=0.0, task_val=0.6)
    assert copy.settle() == (1.0, 3 / 4)


def test_norms_of_a_restored_state_and_of_the_next_step_are_saved_together():
    """What a state brings back is in host memory; meta stands for the device of the next step."""
    feature = SelfEvolveFeature.create(parse_args([]))
    feature._norms = [torch.tensor(1.0)]
    again = SelfEvolveFeature.create(parse_args([]))
    again.load_state_dict(copy_state(feature.state_dict()))
    assert again.state_dict()["norms"].tolist() == [1.0]
    again._norms.append(torch.tensor(2.0, device="meta"))
    norms = again.state_dict()["norms"]
    assert norms.shape == (2,) and norms.device.type == "meta"
