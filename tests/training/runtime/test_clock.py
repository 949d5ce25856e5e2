"""Spans of a step: what is inside another span is charged to itself alone."""

import pytest
import torch

from training.runtime.clock import PhaseClock, phase_columns


@pytest.fixture
def clock(monkeypatch):
    """A clock that runs one second per look at it."""
    moments = iter(range(100))
    monkeypatch.setattr("training.runtime.clock.time.perf_counter", lambda: float(next(moments)))
    return PhaseClock(torch.device("cpu"))


def test_a_span_inside_another_is_charged_itself(clock):
    with clock("features"):  # from 0 to 5
        with clock("ttrl"):  # from 1 to 2
            pass
        with clock("ttrl"):  # from 3 to 4
            pass
    assert clock.seconds == {"ttrl": 2.0, "features": 3.0}
    with clock("forward"):  # and nothing is left over for the next
        pass
    assert clock.seconds["forward"] == 1.0
    columns = phase_columns(clock.seconds)
    assert columns["phase_ttrl_s"] == 2.0
    assert columns["phase_train_s"] == 4.0


def test_three_deep_and_with_an_error(clock):
    with pytest.raises(RuntimeError), clock("a"), clock("b"):
        with clock("c"):
            pass
        raise RuntimeError
    assert clock.seconds == {"c": 1.0, "b": 2.0, "a": 2.0}
