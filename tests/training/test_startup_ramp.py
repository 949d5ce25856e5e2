"""When ticks come: the plain interval, the gate, the ramp, and the same after a resume."""

import itertools
from types import SimpleNamespace

import pytest

from training.config.cli import parse_args
from training.features import FEATURES
from training.startup_ramp import RampSettings, TickClock


def ticks(settings, steps, *, real_from=1, clock=None, first=1):
    clock = clock or TickClock(settings)
    return [
        step
        for step in range(first, steps + 1)
        if clock.is_due(step, real_batches=max(0, step - real_from + 1))
    ]


def settings(**changes):
    values = {"interval": 8, "ramp_steps": 64, "multiplier": 4, "buffer_steps": -1}
    return RampSettings(**(values | changes))


def test_without_a_ramp_ticks_are_the_multiples_of_the_interval():
    assert ticks(settings(interval=2, ramp_steps=0), 7) == [2, 4, 6]
    assert ticks(settings(ramp_steps=0), 40) == [8, 16, 24, 32, 40]


def test_the_ramp_spaces_ticks_wider_at_first():
    """At step s a tick lies at least 8 (1 + 3 (1 - s / 64)) steps behind the one before."""
    found = ticks(settings(), 120)
    assert found[0] == 24  # so that a run of 50 steps has one
    expected, last = [], 0
    for step in range(1, 121):
        if step - last >= (8 * (1 + 3 * (1 - step / 64)) if step <= 64 else 8):
            expected.append(step)
            last = step
    assert found == expected
    gaps = [later - one for one, later in itertools.pairwise(found)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] == 8


def test_weights_rise_from_nothing_to_one():
    ramp = settings()
    assert [ramp.weight(step) for step in (16, 32, 64, 65, 1000)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert settings(ramp_steps=0).weight(1) == 1.0


@pytest.mark.parametrize(("real_from", "first"), [(1, 8), (6, 13), (15, 22), (40, 24)])
def test_real_data_opens_the_gate_and_step_24_at_the_latest(real_from, first):
    clock = TickClock(settings(multiplier=1))
    assert ticks(clock.settings, 60, real_from=real_from, clock=clock)[0] == first
    assert clock.activation_step == first


def test_a_buffer_of_its_own():
    assert ticks(settings(multiplier=1, buffer_steps=0, interval=3), 9) == [3, 6, 9]
    assert ticks(settings(multiplier=1, buffer_steps=20, interval=3), 24) == [20, 23]


def test_the_first_tick_is_known_before_the_run():
    for ramp in (settings(), settings(ramp_steps=0), settings(interval=2, buffer_steps=5)):
        assert ramp.first_tick() == ticks(ramp, 100)[0]


@pytest.mark.parametrize("stop", range(1, 60, 7))
def test_a_resumed_clock_ticks_where_the_whole_one_did(stop):
    ramp = settings(interval=3)
    whole = ticks(ramp, 80, real_from=5)
    clock = TickClock(ramp)
    begun = ticks(ramp, stop, real_from=5, clock=clock)
    resumed = TickClock(ramp)
    resumed.load_state_dict(clock.state_dict())
    assert begun + ticks(ramp, 80, real_from=5, clock=resumed, first=stop + 1) == whole


def test_a_factor_on_the_spacing_holds_while_it_is_given():
    clock, found = TickClock(settings(interval=4, ramp_steps=0)), []
    for step in range(1, 25):
        if clock.is_due(step, real_batches=step, factor=1.25 if 8 <= step < 16 else 1.0):
            found.append(step)
    assert found == [4, 9, 14, 18, 22]


CONTROLLED = (
    "--ttrl-interval 4 --self-improver-enabled --self-evolve-interval 2 --uroboros-enabled "
    "--uroboros-interval 3 --causal-replay-enabled --hydra-enable --hydra-update-interval 1 "
    "--no-require-cuda"
).split()


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        (["--startup-meta-real-data-buffer-steps", "9"], 9),
        (["--startup-meta-real-data-buffer-steps", "90"], 24),
        (["--startup-meta-real-data-buffer-steps", "9", "--startup-meta-ramp-steps", "0"], 1),
    ],
)
def test_what_stands_above_training_waits_for_the_gate(flags, first):
    config = parse_args([*CONTROLLED, *flags])
    names = {"self_improver", "self_evolve", "uroboros", "causal_replay", "hydra_v21"}
    steps = {
        feature.name: schedule.first_step
        for feature in FEATURES
        if feature.name in names and (schedule := feature.schedule(config)) is not None
    }
    assert steps == dict.fromkeys(names, first) | {"uroboros": max(first, 3)}


def test_batches_that_are_no_real_data_do_not_open_the_gate():
    """8 batches of a warm-up pool come first; without RL nothing counts them."""
    own = settings(buffer_steps=4)
    pooled = SimpleNamespace(real_batches=lambda step: max(0, step - 8))
    opened = [s for s in range(1, 20) if own.is_open_in(SimpleNamespace(step=s, rl=pooled))]
    assert opened[0] == 12
    assert own.is_open_in(SimpleNamespace(step=4, rl=None))
    late = SimpleNamespace(step=24, rl=SimpleNamespace(real_batches=lambda step: 0))
    assert own.is_open_in(late)
