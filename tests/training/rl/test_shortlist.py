"""The shortlist finds what is right, and the group inside it is as good as a plain sample."""

import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.rl.shortlist import choose, discriminative_scores, pool_size, recall_at_k


@pytest.mark.parametrize(("group", "factor", "size"), [(5, 1.8, 9), (5, 6.4, 32), (4, 1.0, 4)])
def test_the_pool_is_the_group_times_the_multiplier(group, factor, size):
    assert pool_size(group, factor) == size


@given(st.lists(st.floats(0, 1), min_size=5, max_size=40), st.integers(0, 2**32))
def test_the_rest_is_the_best_of_what_the_group_left(scores, seed):
    found = choose(scores, 3, 8, rng=random.Random(seed))
    assert len(set(found.verified)) == len(found.verified) == min(8, len(scores))
    left = [scores[n] for n in range(len(scores)) if n not in found.verified]
    chosen = [scores[n] for n in found.rest]
    assert chosen == sorted(chosen, reverse=True)
    assert not left or not chosen or min(chosen) >= max(left)
    # The group does not depend on the scores.
    other = choose([1 - score for score in scores], 3, 8, rng=random.Random(seed))
    assert other.group == found.group


def test_every_candidate_is_in_the_group_equally_often():
    rng, counts = random.Random(0), Counter()
    scores = [float(n) for n in range(8)]
    for _ in range(8000):
        counts.update(choose(scores, 2, 4, rng=rng).group)
    expected = 8000 * 2 / 8
    chi_square = sum((counts[n] - expected) ** 2 / expected for n in range(8))
    assert chi_square < 24.3  # 7 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pool_size(5, 0.5), "--ttrl-candidate-pool-multiplier"),
        (lambda: choose([0.0] * 3, 5, 8, rng=random.Random(0)), "a pool of 3"),
        (lambda: choose([0.0] * 9, 5, 4, rng=random.Random(0)), "--ttrl-discriminative-topk 4"),
    ],
)
def test_what_cannot_be_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_score_is_the_definition():
    scores = discriminative_scores([-1.0, -2.0, -3.0], [1.0, 0.0, 0.5], weight=0.35)
    place = math.sqrt(1.5)
    wanted = [0.35 / (1 + math.exp(-z)) + 0.65 * p for z, p in ((place, 1), (0, 0), (-place, 0.5))]
    assert scores == pytest.approx(wanted)
    assert discriminative_scores([-2.0] * 3, [0.0] * 3, weight=0.35) == [0.175] * 3
    assert discriminative_scores([-math.inf, -1.0], [0.5, 0.5], weight=1.0)[0] == 0.5
    assert discriminative_scores([], [], weight=0.5) == []


def test_recall_is_the_share_of_the_correct_that_was_chosen():
    assert recall_at_k([True, False, True, True], [0, 1]) == pytest.approx(1 / 3)
    assert math.isnan(recall_at_k([False, False], [0]))


def pools(rng, *, num=400, size=32):
    """Pools in which the scores know something of what is correct."""
    for _ in range(num):
        correct = [rng.random() < 0.15 for _ in range(size)]
        yield correct, [rng.gauss(1.0 if right else 0.0, 1.0) for right in correct]


def test_scores_that_know_something_raise_recall_and_shuffled_ones_do_not():
    rng = random.Random(3)
    found = {"score": [], "shuffled": [], "random": []}
    for correct, scores in pools(rng):
        shuffled = rng.sample(scores, len(scores))
        for name, by in (("score", scores), ("shuffled", shuffled), ("random", [0.0] * 32)):
            found[name].append(recall_at_k(correct, choose(by, 5, 8, rng=rng).verified))
    means = {name: np.nanmean(values) for name, values in found.items()}
    errors = {name: np.nanstd(values) / math.sqrt(len(values)) for name, values in found.items()}
    assert means["score"] > 8 / 32 + 5 * errors["score"]
    assert abs(means["shuffled"] - 8 / 32) < 3 * errors["shuffled"]
    assert abs(means["random"] - 8 / 32) < 3 * errors["random"]


ACTIONS, GROUP, POOL = 6, 4, 16
LOGITS = np.array([0.6, 0.1, -0.3, 0.0, 0.4, -0.8])
REWARDS = np.array([0.0, 1.0, 0.0, 1.0, 0.3, 0.0])


def group_gradient(actions, probabilities):
    """Policy gradient of one group of a softmax policy, advantages normalised within it."""
    rewards = REWARDS[actions]
    if rewards.std() == 0:
        return np.zeros(ACTIONS)
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    directions = np.eye(ACTIONS)[actions] - probabilities  # d log pi / d logits
    return (advantages[:, None] * directions).mean(axis=0)


def mean_gradient(select, *, trials, seed):
    """Mean and standard error over pools of the gradient of the group that `select` takes."""
    numbers, rng = np.random.default_rng(seed), random.Random(seed)
    probabilities = np.exp(LOGITS) / np.exp(LOGITS).sum()
    found = np.stack(
        [
            group_gradient(
                select(numbers.choice(ACTIONS, POOL, p=probabilities), rng), probabilities
            )
            for _ in range(trials)
        ]
    )
    return found.mean(axis=0), found.std(axis=0) / math.sqrt(trials)


def uniform_group(pool, rng):
    return pool[choose(list(REWARDS[pool]), GROUP, 8, rng=rng).group]


def best_group(pool, _):
    return pool[np.argsort(-REWARDS[pool], kind="stable")[:GROUP]]


def mixed_group(pool, rng):
    """What the design warns of: the whole shortlist as the group."""
    return pool[choose(list(REWARDS[pool]), GROUP, 8, rng=rng).verified]


def largest_deviation(one, other):
    """Over the logits, in standard errors of the difference."""
    return np.max(np.abs(one[0] - other[0]) / np.sqrt(one[1] ** 2 + other[1] ** 2 + 1e-18))


def test_the_gradient_of_the_uniform_group_is_that_of_a_plain_group():
    plain = mean_gradient(lambda pool, _: pool[:GROUP], trials=8000, seed=1)
    uniform = mean_gradient(uniform_group, trials=8000, seed=2)
    print(f"largest deviation {largest_deviation(plain, uniform):.2f} standard errors")
    assert largest_deviation(plain, uniform) < 3


@pytest.mark.parametrize(("biased", "size"), [(best_group, GROUP), (mixed_group, 8)])
def test_a_group_that_is_chosen_by_score_is_biased(biased, size):
    """The control: the same measurement sees the mistake that the uniform group avoids."""
    plain = mean_gradient(lambda pool, _: pool[:size], trials=4000, seed=1)
    assert largest_deviation(plain, mean_gradient(biased, trials=4000, seed=2)) > 6
