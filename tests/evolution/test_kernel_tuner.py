"""UCB1 over launch settings: hand-computed bounds, recorded latencies, planted failures."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from evolution.kernel_tuner import MARGIN, KernelTuner

# Medians of forward and backward of the scan by chunk length, eight rounds on one busy CPU core.
RECORDED = json.loads((Path(__file__).parent / "scan_latencies.json").read_text(encoding="utf-8"))
ARMS = ((64,), (16,), (32,), (128,))


def tuner(arms=ARMS, exploration=1.3) -> KernelTuner:
    return KernelTuner(arms, exploration=exploration)


def test_every_arm_is_tried_once_and_the_default_first():
    own, tried = tuner(), []
    for _ in ARMS:
        tried.append(own.choose())
        own.record(tried[-1], 100.0)
    assert tried == list(ARMS)


def test_the_next_arm_has_the_highest_bound():
    own = tuner()
    for arm, times in (
        ((64,), [100.0, 120.0]),
        ((16,), [200.0]),
        ((32,), [80.0]),
        ((128,), [90.0]),
    ):
        for time in times:
            own.record(arm, time)
    bounds = {
        (64,): (80 / 100 + 80 / 120) / 2 + 1.3 * math.sqrt(math.log(5) / 2),
        (16,): 80 / 200 + 1.3 * math.sqrt(math.log(5)),
        (32,): 80 / 80 + 1.3 * math.sqrt(math.log(5)),
        (128,): 80 / 90 + 1.3 * math.sqrt(math.log(5)),
    }
    assert own.reward((64,)) == pytest.approx((80 / 100 + 80 / 120) / 2)
    assert own.choose() == max(bounds, key=lambda arm: bounds[arm]) == (32,)
    own.record((32,), 80.0)
    assert own.choose() == (128,)


def test_a_machine_that_becomes_slower_does_not_make_late_arms_better():
    own = tuner(exploration=0.0)
    for arm, time in zip(ARMS, (100.0, 90.0, 80.0, 70.0)):
        own.record(arm, time)
    rewards = [own.reward(arm) for arm in ARMS]
    own.record(ARMS[3], 300.0)
    assert own.reward(ARMS[3]) < rewards[3] and own.best() != ARMS[3]


def test_the_default_stays_where_others_are_hardly_faster():
    own = tuner(ARMS[:2])
    own.record(ARMS[1], 50.0)
    assert own.best() == ARMS[0]  # the default was never measured
    own.record(ARMS[0], 100.0)
    assert own.best() == ARMS[1]
    own = tuner(ARMS[:2])
    own.record(ARMS[0], 100.0)
    own.record(ARMS[1], 100.0 * MARGIN)
    assert own.best() == ARMS[0]


def test_a_rejected_arm_is_never_tried_again_or_taken():
    own = tuner()
    own.record((64,), 100.0)
    own.record((16,), 1.0)
    own.reject((16,))
    assert own.best() == (64,) and own.num_trials == 1
    for _ in range(30):
        arm = own.choose()
        assert arm != (16,)
        own.record(arm, 100.0)
    with pytest.raises(ValueError, match="default"):
        own.reject((64,))


def play(arms, table, *, trials: int, rng: random.Random) -> KernelTuner:
    """A tuner that meets the recorded latencies of each arm in a drawn order."""
    own = tuner(arms)
    orders = {arm: rng.sample(table[arm], len(table[arm])) for arm in arms}
    for _ in range(trials):
        arm = own.choose()
        times = own.latencies.get(arm, [])
        own.record(arm, orders[arm][len(times) % len(orders[arm])])
    return own


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_recorded_latencies_with_half_of_the_exhaustive_trials(name):
    table = {tuple(row["arm"]): row["microseconds"] for row in RECORDED[name]}
    arms = list(table)
    medians = {arm: statistics.median(times) for arm, times in table.items()}
    exhaustive, best = sum(map(len, table.values())), min(medians.values())
    shares, against_default = [], []
    for seed in range(100):
        own = play(arms, table, trials=exhaustive // 2, rng=random.Random(seed))
        shares.append(best / medians[own.best()])
        against_default.append(medians[own.best()] / medians[arms[0]])
    assert statistics.fmean(shares) >= 0.95
    assert statistics.fmean(against_default) <= 1.0


def test_what_was_saved_goes_on_in_the_same_way():
    names = sorted(RECORDED)
    table = {tuple(row["arm"]): row["microseconds"] for row in RECORDED[names[0]]}
    own = play(list(table), table, trials=9, rng=random.Random(0))
    other = tuner(list(table))
    other.load_state_dict(json.loads(json.dumps(own.state_dict())))
    for _ in range(10):
        assert other.choose() == own.choose() and other.best() == own.best()
        for one in (own, other):
            one.record(one.choose(), 77.0)


def test_arms_that_are_gone_are_forgotten_and_nonsense_is_refused():
    own = tuner()
    own.load_state_dict({"latencies": [[[64], [3.0]], [[7], [1.0]]], "rejected": [[64], [9], [16]]})
    assert own.latencies == {(64,): [3.0]} and own.rejected == {(16,)}
    for state in ({}, {"latencies": [[[64], [0.0]]], "rejected": []}, {"latencies": 3}):
        with pytest.raises(ValueError):
            tuner().load_state_dict(state)
    with pytest.raises(ValueError, match="each of them once"):
        KernelTuner([(1,), (1,)], exploration=1.0)
    with pytest.raises(ValueError, match="positive"):
        own.record((64,), 0.0)
