"""Isotonic regression against its definition and another library; a gate that is calibrated."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression

from training.rl.gate import Gate, fit_gate, gate_features, isotonic
from training.rl.tasks import draw_task

LABELLED = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=40)


@given(LABELLED)
@settings(deadline=None)
def test_the_steps_are_those_of_the_least_squares_rising_function(pairs):
    """scipy has it too, for distinct scores: equal ones are merged into a weighted one for it."""
    scores = sorted({float(score) for score, _ in pairs})
    groups = [[passed for score, passed in pairs if score == one] for one in scores]
    wanted = isotonic_regression(
        [np.mean(group) for group in groups], weights=[len(group) for group in groups]
    ).x
    starts, heights = isotonic([float(score) for score, _ in pairs], [flag for _, flag in pairs])
    found = [heights[np.searchsorted(starts, score, side="right") - 1] for score in scores]
    assert found == pytest.approx(wanted.tolist(), abs=1e-12)
    assert heights == sorted(heights) and starts == sorted(starts)


def labelled(count, *, seed=0):
    rng = random.Random(seed)
    task = draw_task("function", level=1, rng=rng)
    features, passed = [], []
    for _ in range(count):
        log_prob = rng.uniform(-4, 0)
        text = "x" * rng.randint(1, 60)
        features.append(gate_features(task, text, parsed=True, mean_log_prob=log_prob))
        passed.append(rng.random() < 1 / (1 + math.exp(-3 * (log_prob + 2))))
    return features, passed


def test_probabilities_are_calibrated_on_new_completions():
    gate = fit_gate(*labelled(12_000))
    features, passed = labelled(6000, seed=1)
    chances = np.asarray(gate.probabilities(features))
    for low in np.arange(0, 1, 0.25):
        inside = (chances >= low) & (chances < low + 0.25)
        if inside.sum() > 100:
            assert chances[inside].mean() == pytest.approx(
                np.asarray(passed)[inside].mean(), abs=0.08
            )
    ranks = np.asarray(gate.scores(features))
    flags = np.asarray(passed)
    above = (ranks[flags][:, None] > ranks[~flags][None, :]).mean()
    assert above > 0.85  # area under the curve; the truth's own is 0.92


def test_a_gate_of_shuffled_labels_knows_nothing():
    features, passed = labelled(2000)
    random.Random(2).shuffle(passed)
    gate = fit_gate(features, passed)
    found = np.asarray(gate.probabilities(features))
    assert found.std() < 0.1


def test_too_little_or_one_sided_data_makes_no_gate():
    features, passed = labelled(63)
    assert fit_gate(features, passed) is None
    features, _ = labelled(200)
    assert fit_gate(features, [True] * 200) is None


def test_a_gate_is_kept_as_plain_values():
    gate = fit_gate(*labelled(300))
    features, _ = labelled(50, seed=3)
    assert Gate(**gate.state()).probabilities(features) == gate.probabilities(features)
    assert gate.scores([]) == [] and gate.probabilities([]) == []


def test_a_log_probability_that_is_no_number_counts_as_unlikely():
    task = draw_task("add", level=1, rng=random.Random(0))
    for broken in (math.nan, -math.inf, -1e9):
        assert gate_features(task, "1", parsed=True, mean_log_prob=broken)[0] == -20.0
