"""Priorities: probabilities, ranks, novelty against a slow definition, importance weights."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.replay.test_buffer import REFERENCES
from training.replay.priority import (
    NUM_NEWEST,
    PriorityWeights,
    base_priorities,
    importance_weights,
    novelties,
    probabilities,
    qualities,
)


def items_of(rows, log_probs=None):
    log_probs = log_probs or [None] * len(rows)
    return [
        replace(REFERENCES[0], prompt=(9, *row[:1]), completion=tuple(row[1:]), mean_log_prob=value)
        for row, value in zip(rows, log_probs, strict=True)
    ]


def slow_novelty(rows, number):
    grams = [{tuple(row[n : n + 3]) for n in range(len(row) - 2)} or {tuple(row)} for row in rows]
    newest = [n for n in range(max(0, len(rows) - NUM_NEWEST), len(rows)) if n != number]
    shares = [len(grams[number] & grams[n]) / len(grams[number]) for n in newest]
    return 1.0 - max(shares, default=0.0)


def test_novelty_is_the_slow_definition():
    draw = random.Random(1)
    rows = [[draw.randrange(3) for _ in range(draw.randint(2, 7))] for _ in range(90)]
    found = novelties(items_of(rows))
    assert found == pytest.approx([slow_novelty(rows, n) for n in range(90)])
    assert 0.0 in found and len(set(found)) > 5
    assert novelties(items_of([[1, 2, 3]])) == [1.0]


def test_novelty_and_quality_are_two_quantities():
    rows = [[1, 2, 3, 4], [1, 2, 3, 4], [7, 8, 9, 6]]
    items = items_of(rows, [-3.0, -1.0, -2.0])
    assert novelties(items) == [0.0, 0.0, 1.0]
    assert qualities(items) == pytest.approx([1 / 6, 5 / 6, 3 / 6])
    assert qualities(items_of(rows, [None, -1.0, None])) == [0.5, 0.5, 0.5]


def test_each_weight_moves_the_base():
    items = items_of([[1, 2, 3, 4], [1, 2, 3, 4], [7, 8, 9, 6]], [-3.0, -1.0, -2.0])
    only = {"verifier": 0.0, "quality": 0.0, "novelty": 0.0}
    assert base_priorities(items, PriorityWeights(**only | {"verifier": 2.0})) == [2.0] * 3
    assert base_priorities(items, PriorityWeights(**only | {"novelty": 1.0})) == [0.0, 0.0, 1.0]
    assert base_priorities(items, PriorityWeights(**only | {"quality": 1.0})) == qualities(items)
    assert base_priorities(items, PriorityWeights()) == pytest.approx(
        [0.6 + 0.2 / 6, 0.6 + 1.0 / 6, 0.6 + 0.1 + 0.2]
    )


def test_planted_uplifts_change_the_ranking():
    """A gain common to all would leave it as it is."""
    base = [1.0, 1.05, 1.1]
    plain = probabilities(base, [0.0, 0.0, 0.0], alpha=0.2, scale=1.0)
    assert plain == pytest.approx([value / 3.15 for value in base])
    turned = probabilities(base, [2.0, 0.0, -2.0], alpha=0.2, scale=1.0)
    assert turned[0] > turned[1] > turned[2]
    common = probabilities(base, [2.0, 2.0, 2.0], alpha=0.2, scale=1.0)
    assert common == pytest.approx(plain)
    off = probabilities(base, [2.0, 0.0, -2.0], alpha=0.0, scale=1.0)
    assert off == plain


def test_no_priority_at_all_is_uniform():
    assert probabilities([0.0] * 4, [0.0] * 4, alpha=0.2, scale=1.0) == [0.25] * 4


@given(
    st.lists(st.tuples(st.floats(0.01, 100.0), st.floats(-1e3, 1e3)), min_size=1, max_size=20),
    st.floats(0.0, 0.99),
    st.floats(1e-6, 1e3),
)
def test_chances_sum_to_one_and_weights_are_in_their_bounds(values, alpha, scale):
    base, uplifts = zip(*values, strict=True)
    chances = probabilities(base, uplifts, alpha=alpha, scale=scale)
    assert math.fsum(chances) == pytest.approx(1.0, abs=1e-9)
    weights = importance_weights(chances)
    assert max(weights) == pytest.approx(1.0) and min(weights) > 0.0
    for one, other in zip(weights, chances, strict=True):
        assert one == pytest.approx(math.sqrt(min(chances) / other))


def test_what_cannot_be_drawn_does_not_scale_the_others():
    assert importance_weights([0.0, 0.2, 0.8]) == pytest.approx([1.0, 1.0, 0.5])
