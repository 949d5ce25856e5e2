"""The search finds a mis-set learning rate, finds nothing where nothing is, and resumes exactly."""

import json
import math

import numpy as np
import pytest
import torch

from tests.training.falling_regression import best_rate, improve
from training.self_improver import (
    BELIEVED,
    FURTHEST,
    ORDERS,
    REACH,
    WINDOW,
    ImproverSettings,
    SelfImprover,
    belief,
    signed_ranks,
    vote,
)

NEARLY_ALL = 0.9  # of the way to the end of the reach


def share_recovered(*, batch, wrong, seeds, **settings):
    """Share of seeds that go nine tenths of the way they can within 60 quadruples."""
    way = []
    for seed in seeds:
        search, _ = improve(
            wrong * best_rate(batch), seed=seed, batch=batch, quadruples=60, **settings
        )
        moved = (search.factors["lr"] - 1.0) / REACH["lr"]
        way.append(moved if wrong < 1.0 else -moved)
    return float(np.mean([part >= NEARLY_ALL for part in way]))


@pytest.mark.parametrize("wrong", [1 / 3, 3.0])
def test_a_learning_rate_three_times_off_is_recovered(wrong):
    assert share_recovered(batch=1024, wrong=wrong, seeds=range(2)) == 1.0


def test_shuffled_scores_lead_nowhere():
    """Against the real search on the same rows: no way made, and a loss that falls less."""
    for seed in range(2):
        real, placebo = (
            improve(0.3, seed=seed, batch=512, quadruples=60, is_shuffled=shuffled)
            for shuffled in (False, True)
        )
        assert placebo[0].factors["lr"] < 1.0 + 0.5 * REACH["lr"] < real[0].factors["lr"]
        assert real[1] < placebo[1] - 5.0


def test_a_policy_without_effect_stays_where_it_is():
    ends = [
        abs(improve(0.3, seed=s, batch=64, quadruples=100, has_effect=False)[0].theta[0])
        for s in range(6)
    ]
    assert np.median(ends) < 0.05 and sum(end < 0.2 for end in ends) >= 5


@pytest.mark.soak
def test_rates_over_many_seeds():
    """Figures of README_ALGORITHMS.md. In small batches noise hides a change of a few percent."""
    for wrong in (1 / 3, 3.0):
        rate = share_recovered(batch=256, wrong=wrong, seeds=range(20))
        print(f"batch 256, {wrong:.2f} times the best rate: {rate}")
        assert rate >= 0.8
    ends = [
        abs(improve(0.3, seed=s, batch=64, quadruples=100, has_effect=False)[0].theta[0])
        for s in range(40)
    ]
    print(f"without effect: {np.quantile(ends, [0.5, 0.95, 1.0])}, {np.mean(np.array(ends) < 0.2)}")
    assert np.mean(np.array(ends) < 0.2) >= 0.9


def quadruple(search, score, *, generator):
    """One quadruple whose trials score `score(number, sign)`; the difference of its rewards."""
    loss = 10.0
    search.begin(loss, generator=generator)
    number = 0
    while search.is_running:
        sign = math.copysign(1.0, search.factors["lr"] - 1.0 - REACH["lr"] * center(search))
        loss -= score(number, sign)
        search.end_trial(loss, generator=generator)
        number += 1
    return search.reward_plus - search.reward_minus


def center(search):
    return math.tanh(search.theta[0])


def test_a_linear_trend_cancels_and_an_effect_does_not():
    generator = torch.Generator().manual_seed(0)
    search = SelfImprover(ImproverSettings(), knobs=("lr",))
    seen = set()
    for _ in range(6):
        trend = quadruple(search, lambda number, sign: 1.0 - 0.2 * number, generator=generator)
        assert trend == pytest.approx(0.0, abs=1e-12)
        search.begin(0.0, generator=generator)
        seen.add(search._order)
        for _ in range(4):
            search.end_trial(0.0, generator=generator)
    assert seen == set(ORDERS)  # either sign goes first
    effect = abs(quadruple(search, lambda number, sign: 0.1 * sign, generator=generator))
    assert effect == pytest.approx(0.2)


def test_factors_are_of_the_base_and_within_reach():
    generator = torch.Generator().manual_seed(1)
    search = SelfImprover(ImproverSettings(), knobs=tuple(REACH))
    assert search.factors == dict.fromkeys(REACH, 1.0)
    for number in range(80):
        # A score that always praises the direction tried with plus.
        search.begin(0.0, generator=generator)
        loss, order = 0.0, search._order
        for sign in order:
            for name, factor in search.factors.items():
                assert abs(factor - 1.0) <= REACH[name]
            loss -= sign * search._direction[0]
            search.end_trial(loss, generator=generator)
        assert search.num_quadruples == number + 1
    # The first knob alone was praised; nothing accumulated beyond the end of its reach.
    assert search.theta[0] == FURTHEST
    assert search.factors["lr"] == pytest.approx(1.0 + REACH["lr"], rel=0.006)
    assert all(abs(place) < 1.0 for place in search.theta[1:])


def test_ranks_and_belief():
    assert signed_ranks([0.5, -2.0, 0.0, 1e9]) == [2 / 2.5, -3 / 2.5, 0.0, 4 / 2.5]
    assert signed_ranks([3.0, -3.0, 3.0]) == [1.0, -1.0, 1.0]
    ones = [(1.0 + n, [1.0]) for n in range(WINDOW)]
    mean, trust = vote(ones)
    assert mean == [pytest.approx(1.0)] and trust == [1.0]
    assert belief([0.0, 0.0]) == 0.0 and belief([1.0]) == 0.01
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (4000, WINDOW))
    ranks = np.arange(1, WINDOW + 1)
    believed = [belief(row * ranks) >= 0.5 for row in signs]
    assert np.mean(believed) < 0.005 and BELIEVED > 3.0  # of noise, next to nothing


def test_a_wild_or_undefined_score_does_no_harm():
    generator = torch.Generator().manual_seed(2)
    search = SelfImprover(ImproverSettings(), knobs=("lr",))
    quadruple(search, lambda number, sign: 1e30 * sign, generator=generator)
    assert abs(search.theta[0]) < 0.01
    before = list(search.theta)
    quadruple(search, lambda number, sign: math.nan, generator=generator)
    assert search.theta == before and search.num_quadruples == 2


def test_the_size_of_changes_adapts_within_its_bounds():
    for praise, edge in ((1.0, 0.30), (-1.0, 0.02)):
        generator = torch.Generator().manual_seed(3)
        search = SelfImprover(ImproverSettings(sigma=0.08), knobs=("lr",))
        for number in range(90):
            # With -1 what helped last time harms now.
            flip = praise if number % 2 else 1.0
            quadruple(search, lambda n, sign, flip=flip: flip * sign, generator=generator)
            assert 0.02 <= search.sigma <= 0.30
        assert search.sigma == edge
    fixed = SelfImprover(ImproverSettings(sigma=0.08, is_adaptive=False), knobs=("lr",))
    quadruple(fixed, lambda n, sign: sign, generator=generator)
    quadruple(fixed, lambda n, sign: sign, generator=generator)
    assert fixed.sigma == 0.08


def test_noise_lets_changes_shrink_and_a_signal_far_away_lets_them_grow():
    peaks, ends = [], []
    for seed in range(24):
        generator, noise = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        search, sizes = SelfImprover(ImproverSettings(sigma=0.08), knobs=("lr",)), []
        for _ in range(100):
            quadruple(search, lambda n, sign, rng=noise: rng.normal(), generator=generator)
            sizes.append(search.sigma)
        peaks.append(max(sizes))
        ends.append(search.sigma)
    assert np.mean(np.array(peaks) < 0.1) >= 0.9  # it hardly ever grows at all
    assert np.median(ends) == 0.02 and max(ends) < 0.08
    for wrong in (1 / 3, 3.0):
        rate = wrong * best_rate(1024)
        found, _ = improve(rate, seed=0, batch=1024, quadruples=30, sigma=0.08)
        assert found.sigma > 0.2


@pytest.mark.parametrize("cut", [1, 17, 18, 19, 20, 63])
def test_resumed_in_the_middle_of_a_quadruple_it_goes_on_exactly(cut):
    """`cut` counts trials; the state passes through JSON, as in a checkpoint."""

    def drive(search, generator, noise, count):
        for _ in range(count):
            if not search.is_running:
                search.begin(float(noise.normal()), generator=generator)
            search.end_trial(float(noise.normal()), generator=generator)

    one = SelfImprover(ImproverSettings(), knobs=("lr", "replay_bias"))
    generator, noise = torch.Generator().manual_seed(4), np.random.default_rng(4)
    drive(one, generator, noise, cut)
    two = SelfImprover(ImproverSettings(), knobs=("lr", "replay_bias"))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    other = torch.Generator()
    other.set_state(generator.get_state())
    drive(one, generator, np.random.default_rng(5), 80)
    drive(two, other, np.random.default_rng(5), 80)
    assert one.state_dict() == two.state_dict() and one.factors == two.factors


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="at least one knob"):
        SelfImprover(ImproverSettings(), knobs=())
    search = SelfImprover(ImproverSettings(), knobs=("lr",))
    with pytest.raises(RuntimeError, match="no quadruple"):
        search.end_trial(1.0, generator=torch.Generator())
