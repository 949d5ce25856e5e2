"""Repeats of an update, by the rewards of the ticks before."""

import pytest

from training.rl.budget import RepeatBudget


def test_four_low_ticks_raise_it_and_four_high_ones_lower_it():
    budget = RepeatBudget(lowest=1, highest=4)
    values = []
    for reward in [0.1] * 20 + [0.9] * 20:
        budget.observe(reward)
        values.append(budget.value)
    assert values[:20] == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    assert values[20:33] == [4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1]
    assert values[-1] == 1


def test_a_tick_of_the_other_kind_starts_the_count_again():
    budget = RepeatBudget(lowest=1, highest=4)
    for reward in [0.1, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1]:
        budget.observe(reward)
    assert budget.value == 1
    budget.observe(0.1)
    assert budget.value == 2


@pytest.mark.parametrize(("reward", "repeats"), [(0.0, 4), (1 / 3, 3), (0.9, 1), (1.0, 1), (7, 1)])
def test_the_worse_the_reward_the_more_repeats(reward, repeats):
    budget = RepeatBudget(lowest=4, highest=4)
    assert budget.repeats(reward) == repeats


def test_its_state_and_its_bounds():
    budget = RepeatBudget(lowest=1, highest=3)
    for _ in range(7):
        budget.observe(0.0)
    other = RepeatBudget(lowest=1, highest=3)
    other.load_state_dict(budget.state_dict())
    for one in (budget, other):
        one.observe(0.0)
    assert budget.value == other.value == 3
    with pytest.raises(ValueError, match="--ttrl-budget-min"):
        RepeatBudget(lowest=2, highest=1)


@pytest.mark.parametrize(("factor", "repeats"), [(1.0, 2), (1.5, 3), (0.5, 1), (99.0, 4)])
def test_a_factor_holds_for_one_tick_and_within_the_bounds(factor, repeats):
    budget = RepeatBudget(lowest=1, highest=4)
    for _ in range(4):
        budget.observe(0.1)
    assert budget.repeats(0.0, factor=factor) == repeats and budget.value == 2
