"""Draws are a pure function of their arguments, and shares are shares of tokens."""

import numpy as np
import pytest
from scipy import stats

from training.stream.mixture import STRATEGIES, Mixture, uniform

WEIGHTS = {"a": 5.0, "b": 3.0, "c": 2.0}


def served(mixture, lengths, *, tokens, price=None):
    """Tokens by source when each source's documents have one length."""
    counts = dict.fromkeys(lengths, 0)
    turn = None
    while sum(counts.values()) < tokens:
        if turn is None or not mixture.has_turn(turn):
            _, turn = mixture.draw(list(lengths), available=list(lengths))
            mixture.grant(turn)
            continue
        counts[turn] += lengths[turn]
        mixture.pay(turn, price or lengths[turn])
    return counts


def test_draws_are_written_down():
    # A checkpoint made today must find the same draws on every later version.
    mixture = Mixture(seed=3, turn_tokens=8, weights=dict(WEIGHTS))
    drawn = "".join(mixture.draw("abc", available="abc")[0] for _ in range(24))
    assert drawn == "aaaaaaabaabbaaaaababbaca"
    jumped = Mixture(seed=3, turn_tokens=8, weights=dict(WEIGHTS), counter=10**12)
    again = Mixture(seed=3, turn_tokens=8, weights=dict(WEIGHTS), counter=10**12)
    assert jumped.draw("abc", available="abc") == again.draw("abc", available="abc")


def test_uniform_numbers_are_uniform_and_independent_of_neighbours():
    values = np.array([uniform(1, counter, stream=0) for counter in range(4000)])
    assert stats.kstest(values, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.06
    assert uniform(1, 5, stream=0) != uniform(1, 5, stream=1) != uniform(2, 5, stream=1)


@pytest.mark.parametrize("lengths", [(10, 10, 10), (7, 100, 3000)], ids=["equal", "unequal"])
def test_shares_are_shares_of_tokens_whatever_the_length_of_documents(lengths):
    mixture = Mixture(seed=1, turn_tokens=64, weights=dict(WEIGHTS))
    counts = served(mixture, dict(zip("abc", lengths, strict=True)), tokens=400_000)
    total = sum(counts.values())
    for key, weight in WEIGHTS.items():
        assert counts[key] / total == pytest.approx(weight / 10, abs=0.025)


def test_without_credit_long_documents_would_take_over():
    """Negative control: pay nothing for length and the share follows the length."""
    mixture = Mixture(seed=1, turn_tokens=64, weights={"a": 1.0, "b": 1.0})
    counts = served(mixture, {"a": 10, "b": 3000}, tokens=500_000, price=64)
    assert counts["b"] / sum(counts.values()) > 0.95


def test_draws_of_an_absent_source_go_to_the_others_in_proportion():
    mixture = Mixture(seed=1, turn_tokens=64, weights=dict(WEIGHTS))
    pairs = [mixture.draw("abc", available="bc") for _ in range(5000)]
    assert {chosen for chosen, _ in pairs} == set("abc")
    assert all(taken == chosen for chosen, taken in pairs if chosen != "a")
    instead = [taken for chosen, taken in pairs if chosen == "a"]
    assert instead.count("b") / len(instead) == pytest.approx(0.6, abs=0.04)


def test_round_robin_and_sequential():
    turns = Mixture(seed=1, turn_tokens=8, weights=dict(WEIGHTS), strategy="round_robin")
    assert [turns.draw("abc", available="abc")[0] for _ in range(6)] == list("abcabc")
    first = Mixture(seed=1, turn_tokens=8, weights=dict(WEIGHTS), strategy="sequential")
    assert [first.draw("abc", available="abc")[0] for _ in range(3)] == list("aaa")
    assert first.draw("bc", available="c") == ("b", "c")
    assert set(STRATEGIES) == {"weighted", "round_robin", "sequential"}


def test_a_weight_of_zero_is_drawn_only_when_nothing_else_is_there():
    mixture = Mixture(seed=1, turn_tokens=8, weights={"a": 1.0, "b": 0.0})
    assert {mixture.draw("ab", available="ab")[0] for _ in range(200)} == {"a"}
    assert mixture.draw("ab", available="b") == ("a", "b")


def test_reweighing_multiplies_what_was_asked_for_and_does_not_accumulate():
    mixture = Mixture(seed=1, turn_tokens=8, weights=dict(WEIGHTS), ids={"a": 1, "b": 2, "c": 2})
    for _ in range(3):
        mixture.reweigh({2: 0.5})
    assert mixture.weights == {"a": 5.0, "b": 1.5, "c": 1.0}
    mixture.reweigh({})
    assert mixture.weights == WEIGHTS
