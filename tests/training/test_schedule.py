"""Schedules are pure functions of the step with known corners."""

import pytest

from training.schedule import learning_rate_factor, weight_decay_factor


def factor(step, **changes):
    settings = {
        "total_steps": 100,
        "warmup_steps": 10,
        "warmdown_fraction": 0.4,
        "final_ratio": 0.1,
    }
    return learning_rate_factor(step, **(settings | changes))


def test_warms_up_holds_and_warms_down():
    assert factor(1) == pytest.approx(0.1)
    assert factor(10) == factor(60) == 1.0
    assert factor(80) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(100) == pytest.approx(0.1)


def test_without_warm_phases_the_rate_is_constant():
    assert {factor(s, warmup_steps=0, warmdown_fraction=0.0) for s in range(1, 101)} == {1.0}


def test_never_rises_after_warm_up_and_stays_positive():
    values = [factor(step) for step in range(10, 101)]
    assert values == sorted(values, reverse=True) and values[-1] > 0


def test_decay_stops_at_half_time():
    assert weight_decay_factor(50, total_steps=100) == 1.0
    assert weight_decay_factor(51, total_steps=100) == 0.0
