"""The estimate of what an injection is worth, on simulated runs whose truth is known."""

import json
import math
import random
import statistics

import pytest

from training.replay.uplift import LEAST_WINDOWS, UpliftEstimator

HORIZON, DECAY = 6, 0.9


def simulate(
    effects,
    *,
    seed,
    coins=400,
    noise=0.01,
    drift=0.01,
    propensity=0.5,
    beta=0.95,
    every=2,
    reads_coin=True,
):
    """Coins on a loss that falls anyway; heads of a cluster lower it by its effect, once.

    Windows overlap as in a run. reads_coin: False replaces the coins by others: the placebo.
    """
    rng, names = random.Random(seed), sorted(effects)
    estimator = UpliftEstimator(beta=beta)
    windows, trusted = [], 0
    for step in range(coins * every):
        gain = drift / (1.0 + step / 200) + rng.gauss(0.0, noise)
        if step % every == 0:
            name, heads = rng.choice(names), rng.random() < propensity
            gain += effects[name] * heads
            recorded = heads if reads_coin else rng.random() < propensity
            windows.append([name, recorded, estimator.baseline, 0.0, 0])
        for window in windows:
            window[3] += DECAY ** window[4] * gain
            window[4] += 1
        for name, heads, baseline, outcome, age in windows:
            if age == HORIZON:
                estimator.observe(
                    name, outcome, heads=heads, propensity=propensity, baseline=baseline
                )
        windows = [window for window in windows if window[4] < HORIZON]
        trusted += sum(own.is_trusted for own in estimator.clusters.values())
    return estimator, trusted / (coins * every * len(names))


def errors_in_standard_errors(**settings):
    effects = {"a": 0.02, "b": -0.01, "c": 0.0}
    found = {name: [] for name in effects}
    for seed in range(150):
        estimator, _ = simulate(effects, seed=seed, coins=150, **settings)
        for name, effect in effects.items():
            found[name].append(estimator.clusters[name].mean - effect)
    return {
        name: statistics.fmean(values) / (statistics.stdev(values) / math.sqrt(len(values)))
        for name, values in found.items()
    }


@pytest.mark.parametrize("propensity", [0.5, 0.25])
def test_the_estimate_has_no_bias(propensity):
    """150 runs with a loss that falls for other reasons as well: within three standard errors."""
    found = errors_in_standard_errors(propensity=propensity)
    assert all(abs(value) < 3.0 for value in found.values()), found


def test_a_wrong_propensity_is_a_bias_that_this_would_see(monkeypatch):
    """Negative control: the coins fall with 0.25 and are taken for fair ones."""
    plain = UpliftEstimator.observe
    monkeypatch.setattr(
        UpliftEstimator,
        "observe",
        lambda self, *args, **named: plain(self, *args, **named | {"propensity": 0.5}),
    )
    found = errors_in_standard_errors(propensity=0.25)
    assert max(abs(value) for value in found.values()) > 3.0


def area_under_curve(estimator, useful, harmful):
    pairs = [
        (estimator.clusters[one].mean, estimator.clusters[other].mean)
        for one in useful
        for other in harmful
    ]
    return statistics.fmean((a > b) + 0.5 * (a == b) for a, b in pairs)


def test_useful_clusters_rank_above_harmful_ones_and_not_with_other_coins():
    useful, harmful = [f"good{n}" for n in range(4)], [f"bad{n}" for n in range(4)]
    effects = dict.fromkeys(useful, 0.01) | dict.fromkeys(harmful, -0.01)
    areas = {True: [], False: []}
    for seed in range(12):
        for reads in areas:
            estimator, _ = simulate(effects, seed=seed, coins=400, reads_coin=reads)
            areas[reads].append(area_under_curve(estimator, useful, harmful))
    assert statistics.fmean(areas[True]) > 0.8
    assert 0.35 < statistics.fmean(areas[False]) < 0.65


def test_without_an_effect_clusters_are_seldom_trusted():
    """A/A: one look at a 95 % interval is wrong in 5 % of cases; these are looks at every step."""
    shares = [simulate({"a": 0.0, "b": 0.0}, seed=seed)[1] for seed in range(60)]
    assert statistics.fmean(shares) < 0.10


def test_an_uplift_counts_only_when_its_interval_leaves_out_zero():
    estimator = UpliftEstimator(beta=0.95)
    for number in range(LEAST_WINDOWS - 1):
        estimator.observe("sure", 1.0, heads=number % 2 == 0, propensity=0.5, baseline=0.0)
    assert estimator.sample(["sure", "unknown"], seed=1) == {"sure": 0.0, "unknown": 0.0}
    for number in range(40):
        heads = number % 2 == 0
        outcome = (2.0 if heads else 0.0) + 0.1 * (number % 3)
        estimator.observe("sure", outcome, heads=heads, propensity=0.5, baseline=1.0)
        estimator.observe("noise", 1.0 - heads, heads=heads, propensity=0.5, baseline=1.0)
        estimator.observe("even", float(number % 4 < 2), heads=heads, propensity=0.5, baseline=0.5)
    sure, even = estimator.clusters["sure"], estimator.clusters["even"]
    assert sure.is_trusted and sure.mean - 1.96 * sure.error > 0.0
    assert not even.is_trusted
    draws = [estimator.sample(["sure", "even"], seed=seed) for seed in range(400)]
    assert {draw["even"] for draw in draws} == {0.0}
    sampled = [draw["sure"] for draw in draws]
    assert statistics.fmean(sampled) == pytest.approx(sure.mean, abs=4 * sure.error / 20)
    assert statistics.stdev(sampled) == pytest.approx(sure.error, rel=0.2)


def test_the_placebo_deals_the_uplifts_out_anew():
    estimator = UpliftEstimator(beta=0.95)
    names = [f"c{n}" for n in range(6)]
    for number in range(30):
        for place, name in enumerate(names):
            heads = (number + place) % 2 == 0
            outcome = place * heads + 0.01 * (number % 5)
            estimator.observe(name, outcome, heads=heads, propensity=0.5, baseline=place / 2)
    plain = estimator.sample(names, seed=4)
    dealt = [estimator.sample(names, seed=4 + n, shuffled=True) for n in range(20)]
    assert sorted(estimator.sample(names, seed=4, shuffled=True).values()) == sorted(plain.values())
    assert len({tuple(draw[name] > 2.5 for name in names) for draw in dealt}) > 5


def test_estimates_follow_what_changes():
    """With decaying weights the second half of a run counts, with equal weights the whole."""
    found = {}
    for beta in (0.95, 0.9999):
        rng, estimator = random.Random(0), UpliftEstimator(beta=beta)
        for number in range(400):
            heads = rng.random() < 0.5
            outcome = (1.0 if number < 200 else -1.0) * heads + rng.gauss(0.0, 0.1)
            estimator.observe("a", outcome, heads=heads, propensity=0.5, baseline=0.0)
        found[beta] = estimator.clusters["a"].mean
    assert found[0.95] < -0.7 and abs(found[0.9999]) < 0.3


def test_the_state_is_exact_and_plain():
    estimator, _ = simulate({"a": 0.02, "b": -0.02}, seed=5, coins=60)
    again = UpliftEstimator(beta=0.95)
    again.load_state_dict(json.loads(json.dumps(estimator.state_dict())))
    for own in (estimator, again):
        own.observe("b", 0.3, heads=True, propensity=0.5, baseline=own.baseline)
    assert again.clusters == estimator.clusters
    assert again.baseline == estimator.baseline and again.scale == estimator.scale
    assert again.sample("ab", seed=9) == estimator.sample("ab", seed=9)
