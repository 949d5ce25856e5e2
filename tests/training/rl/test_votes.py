"""A majority is a label only where it is clear."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.rl.votes import majority_rewards, majority_vote


def test_the_answer_of_most_is_the_label():
    answers = ["7", "7", None, "7", "8", None]
    vote = majority_vote(answers)
    assert (vote.label, vote.top, vote.share) == ("7", "7", 0.75)
    assert vote.counts == {"7": 3, "8": 1} and not vote.abstained
    assert vote.entropy == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert majority_rewards(answers, vote) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [None] * 5,
        ["7", "7"],  # two answers are no majority
        ["7", "7", None, None],
        ["7", "7", "8", "9", "1"],  # 0.4
        ["7", "7", "8", "8"],  # 0.5, but of both
    ],
)
def test_without_a_clear_majority_nothing_is_earned(answers):
    vote = majority_vote(answers)
    assert vote.abstained and vote.label is None
    assert majority_rewards(answers, vote) == [0.0] * len(answers)


def test_half_of_the_votes_is_enough():
    assert majority_vote(["7", "7", "8", "9"]).label == "7"


@given(st.lists(st.one_of(st.none(), st.sampled_from(["1", "2", "3"])), max_size=12))
def test_the_order_of_the_votes_is_nothing(answers):
    vote, other = majority_vote(answers), majority_vote(answers[::-1])
    assert (vote.label, vote.top, vote.share) == (other.label, other.top, other.share)
    assert vote.counts == other.counts and vote.entropy == pytest.approx(other.entropy)
    assert sum(majority_rewards(answers, vote)) == (vote.counts.get(vote.label or "", 0))
    assert 0.0 <= vote.share <= 1.0 and -1e-12 <= vote.entropy <= math.log(3) + 1e-12
