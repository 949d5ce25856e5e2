"""The search: what it proposes, that it keeps what is good, leaves what is not, and errs rarely.

Differences come from real arms of a small model (`bench/results/trial_noise.json`, written by
scripts/trial_noise.py), drawn in runs of neighbours so that what follows each other stays together.
"""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from evolution.e_process import mean
from evolution.overlays import NEUTRAL, Overlay, distance
from evolution.uroboros import (
    MAX_REPLICATES,
    Decision,
    Replicate,
    SearchSettings,
    Uroboros,
)

NOISE = Path(__file__).resolve().parents[2] / "bench" / "results" / "trial_noise.json"
SETTINGS = SearchSettings()
BARE = replace(SETTINGS, min_effect=0.0, gain_enforced=False, strict=False)  # the test alone
TRIALS = 400


def measured(case):
    """Differences and controls of consecutive real replicates."""
    records = json.loads(NOISE.read_text(encoding="utf-8"))[case]["records"]
    return [(record["difference"], record["control"]) for record in records]


def draws(records, rng, *, flip=False):
    """Endless replicates in blocks of five neighbours; `flip` swaps the arms of a block at random.

    Arms that differ in their random numbers alone can be swapped: which one is called the
    candidate changes nothing.
    """
    while True:
        start, sign = rng.randrange(len(records)), rng.choice((1.0, -1.0)) if flip else 1.0
        for place in range(5):
            difference, control = records[(start + place) % len(records)]
            yield Replicate(difference=sign * difference, control=control)


def run_trial(search, overlay, replicates, rng):
    """Test one candidate to its end; the last verdict."""
    search.open_candidate(overlay, rng)
    while True:
        verdict = search.observe(next(replicates))
        if verdict.decision is not Decision.CONTINUE:
            return verdict


def promoted(records, *, settings, flip=False, candidates=1):
    """Share of TRIALS runs with `candidates` candidates in which any was promoted."""
    rng, found = random.Random(11), 0
    for _ in range(TRIALS):
        search, replicates = Uroboros(settings), draws(records, rng, flip=flip)
        for _ in range(candidates):
            verdict = run_trial(search, Overlay(lr_factor=3.0), replicates, rng)
            if verdict.decision is Decision.PROMOTE:
                found += 1
                break
    return found / TRIALS


@pytest.mark.parametrize("settings", [SETTINGS, BARE], ids=["gates", "test alone"])
def test_equal_arms_are_promoted_in_few_trials(settings):
    records = measured("placebo")
    assert len({difference for difference, _ in records}) > 10, "arms with the same random numbers"
    assert promoted(records, settings=settings, flip=True) <= 0.05


def test_equal_arms_are_promoted_rarely_over_all_candidates_of_a_run():
    assert promoted(measured("placebo"), settings=BARE, flip=True, candidates=4) <= 0.05


def test_a_restored_learning_rate_is_promoted():
    """Arms of four steps, one run, a gain that fades with its length."""
    assert promoted(measured("restored"), settings=SETTINGS) >= 0.8


@pytest.mark.parametrize("case", ["far above", "far below"])
def test_a_bad_learning_rate_never_is(case):
    assert promoted(measured(case), settings=SETTINGS) == 0.0


def feed(search, values, *, control=1.0, spikes=(False, False)):
    verdict = None
    for value in values:
        verdict = search.observe(Replicate(difference=value, control=control, spikes=spikes))
        if verdict.decision is not Decision.CONTINUE:
            break
    assert verdict is not None
    return verdict


def steady(size, spread=0.1, seed=0):
    rng = random.Random(seed)
    return [size + spread * rng.gauss(0.0, 1.0) for _ in range(MAX_REPLICATES)]


def begun(settings=SETTINGS):
    search = Uroboros(settings)
    search.open_candidate(Overlay(lr_factor=2.0), random.Random(0))
    return search


def test_a_small_significant_gain_is_promoted_only_without_the_relative_gate():
    values = steady(0.05, spread=0.02)
    strict = feed(begun(), values)
    assert strict.decision is Decision.DROP and "relative gain is too small" in strict.reason
    loose = feed(begun(replace(SETTINGS, gain_enforced=False)), values)
    assert loose.decision is Decision.PROMOTE


def test_spiking_gradients_bar_a_promotion_only_under_the_strict_policy():
    values, spikes = steady(0.5), (False, True)
    strict = feed(begun(), values, spikes=spikes)
    assert strict.decision is Decision.DROP and "spike" in strict.reason
    loose = feed(begun(replace(SETTINGS, strict=False)), values, spikes=spikes)
    assert loose.decision is Decision.PROMOTE
    assert feed(begun(), values, spikes=(True, True)).decision is Decision.PROMOTE


def test_a_small_effect_is_no_promotion():
    verdict = feed(begun(replace(SETTINGS, min_effect=9.0)), steady(0.5))
    assert verdict.decision is Decision.DROP and "effect is too small" in verdict.reason


def test_a_losing_candidate_is_dropped_early():
    verdict = feed(begun(), steady(-0.5))
    assert verdict.decision is Decision.DROP and "futile" in verdict.reason
    assert verdict.count < MAX_REPLICATES


def test_one_experiment_at_a_time():
    search = begun()
    with pytest.raises(RuntimeError, match="one experiment"):
        search.open_candidate(NEUTRAL, random.Random(0))
    search.commit()
    with pytest.raises(RuntimeError, match="one experiment"):
        search.open_candidate(NEUTRAL, random.Random(0))


@pytest.mark.parametrize(
    ("after", "decision"),
    [
        ((0.3, 0.4, 0.35), Decision.ROLL_BACK),
        ((0.3, -0.4, 0.35), Decision.KEEP),
        ((-0.3, -0.4, -0.35), Decision.KEEP),
        ((0.1, 0.9, 0.2), Decision.KEEP),  # positive, but not significantly
    ],
)
def test_what_was_kept_is_watched_for_three_replicates(after, decision):
    search = begun()
    feed(search, steady(0.5))
    search.commit()
    assert search.in_force == Overlay(lr_factor=2.0) and search.number == 1
    assert search.next_overlay(random.Random(0)) == NEUTRAL  # the other arm: what was replaced
    assert [search.observe(Replicate(difference=d, control=1.0)).decision for d in after] == [
        Decision.CONTINUE, Decision.CONTINUE, decision,
    ]  # fmt: skip
    search.end_watch(roll_back=decision is Decision.ROLL_BACK)
    rolled_back = decision is Decision.ROLL_BACK
    assert search.in_force == (NEUTRAL if rolled_back else Overlay(lr_factor=2.0))


def test_an_empty_archive_prefers_no_size_of_change():
    """Trap (b): picking the largest perturbation. All draws look the same, so any may be first."""
    rng = random.Random(3)
    sizes = []
    for _ in range(300):
        search = Uroboros(SETTINGS)
        sizes.append(distance(search.next_overlay(rng), NEUTRAL))
    # Uniform in [-1/2, 1/2] without the piece around 0 that is no change: mean size 0.275.
    assert mean(sizes) == pytest.approx(0.275, abs=0.03)


def test_the_search_goes_where_gains_were():
    search, rng = Uroboros(SETTINGS), random.Random(0)
    for factor, gain in ((3.0, 0.06), (0.3, -0.5)):
        search.open_candidate(Overlay(lr_factor=factor), rng)
        for value in steady(gain, spread=0.05, seed=int(10 * factor))[:8]:
            search.observe(Replicate(difference=value, control=1.0))
        if search.open is not None:
            search.abandon("enough")
    chosen = []
    for _ in range(40):
        copy = Uroboros(SETTINGS)
        copy.load_state_dict(search.state_dict())
        chosen.append(copy.next_overlay(rng).lr_factor)
    # Half of all draws are above 1; best of eight nearly always is.
    assert mean([float(factor > 1.0) for factor in chosen]) > 0.8
    high, low = search.predict(Overlay(lr_factor=3.0)), search.predict(Overlay(lr_factor=0.3))
    assert high[0] > 0.02 and low[0] < -0.2
    assert high[1] < search.predict(Overlay(lr_factor=1.0))[1]  # less is known between them


def test_a_round_gives_several_candidates_without_repeating_one():
    search, rng = Uroboros(replace(SETTINGS, patches=3)), random.Random(0)
    seen = []
    for _ in range(6):
        seen.append(search.next_overlay(rng))
        search.abandon("next")
    assert len(set(seen)) == 6 and search.tested == 6


def test_the_state_is_all_there_is():
    """At every point of a search: a copy made from the state goes on the same way."""
    rng, noise, decisions = random.Random(2), random.Random(4), []
    search = Uroboros(replace(SETTINGS, window=12))
    for _ in range(80):
        copy = Uroboros(replace(SETTINGS, window=12))
        copy.load_state_dict(json.loads(json.dumps(search.state_dict())))
        seed = rng.getrandbits(32)
        arms = [s.next_overlay(random.Random(seed)) for s in (search, copy)]
        # Every second promotion is regretted.
        side = -1.0 if search.watch is not None and len(decisions) % 4 == 1 else 1.0
        replicate = Replicate(difference=side * noise.gauss(0.4, 0.1), control=1.0)
        verdicts = [s.observe(replicate) for s in (search, copy)]
        assert arms[0] == arms[1] and verdicts[0] == verdicts[1]
        decision = verdicts[0].decision
        for s in (search, copy):
            if decision is Decision.PROMOTE:
                s.commit()
            elif decision in (Decision.KEEP, Decision.ROLL_BACK):
                s.end_watch(roll_back=decision is Decision.ROLL_BACK)
        decisions += [decision] * (decision is not Decision.CONTINUE)
        assert copy.state_dict() == search.state_dict()
    assert {Decision.PROMOTE, Decision.KEEP, Decision.ROLL_BACK} <= set(decisions)
    assert math.isfinite(search.predict(NEUTRAL)[0])
