"""FeatureSet: order, schedule, evidence, named errors and state by name."""

from types import SimpleNamespace

import pytest
import torch

from training.context import StepContext
from training.features.base import Feature, FeatureSet, Schedule, feature_generator

CONFIG = SimpleNamespace()


def context(step: int) -> StepContext:
    return StepContext(step=step, total_steps=100, model=torch.nn.Linear(1, 1), optimizer=None)


def feature(name: str, *, schedule: Schedule | None, effect=True, calls: list | None = None):
    class Probe(Feature):
        def before_optim(self, ctx):
            if calls is not None:
                calls.append((name, ctx.step))
            if isinstance(effect, Exception):
                raise effect
            return effect

        def after_step(self, ctx):
            self.drawn = torch.rand(1, generator=ctx.rng).item()
            return False

        def state_dict(self):
            return {"drawn": getattr(self, "drawn", None)}

        def load_state_dict(self, state):
            self.drawn = state["drawn"]

    Probe.name = name
    Probe.schedule = classmethod(lambda cls, config: schedule)
    return Probe


def test_order_interval_and_start_are_the_sets_business():
    calls = []
    features = FeatureSet(
        (
            feature("second", schedule=Schedule(start_step=3, interval=2), calls=calls),
            feature("first", schedule=Schedule(), calls=calls),
        ),
        CONFIG,
        seed=0,
    )
    for step in range(1, 7):
        features.run("before_optim", context(step))
    assert [step for name, step in calls if name == "second"] == [3, 5]
    assert calls.index(("second", 3)) < calls.index(("first", 3))


@pytest.mark.parametrize("effect", [True, torch.tensor(True)])
def test_counts_effects_not_calls(effect):
    features = FeatureSet(
        (
            feature("acts", schedule=Schedule(), effect=effect),
            feature("idles", schedule=Schedule(), effect=torch.tensor(False)),
            feature("off", schedule=None),
        ),
        CONFIG,
        seed=0,
    )
    for step in range(1, 4):
        features.run("before_optim", context(step))
    row = features.metrics()
    assert row["feature_acts_effective_calls"] == 3
    assert row["feature_idles_effective_calls"] == 0
    assert row["feature_off_enabled"] == 0 and row["feature_off_ms"] == 0.0
    assert features.idle_features() == ["idles"]


def test_an_error_names_feature_and_phase():
    features = FeatureSet(
        (feature("breaks", schedule=Schedule(), effect=ValueError("inner")),), CONFIG, seed=0
    )
    with pytest.raises(ValueError, match="inner") as caught:
        features.run("before_optim", context(1))
    assert caught.value.__notes__ == ["in feature breaks, phase before_optim"]


def test_state_returns_by_name_with_the_random_stream():
    classes = (feature("a", schedule=Schedule()), feature("b", schedule=Schedule()))
    features = FeatureSet(classes, CONFIG, seed=0)
    features.run("after_step", context(1))
    state = features.state_dict()
    features.run("after_step", context(2))
    expected = features.state_dict()["b"]["state"]["drawn"]

    resumed = FeatureSet(tuple(reversed(classes)), CONFIG, seed=0)
    resumed.load_state_dict(state)
    resumed.run("after_step", context(2))
    assert resumed.state_dict()["b"]["state"]["drawn"] == expected


def test_streams_depend_on_seed_and_name_only():
    def draw(seed, name):
        return torch.rand(1, generator=feature_generator(seed, name)).item()

    assert draw(1, "ema") == draw(1, "ema")
    assert len({draw(1, "ema"), draw(2, "ema"), draw(1, "curriculum")}) == 3


def test_what_a_failed_device_no_longer_tells_does_not_hide_the_rest():
    """A crash report is written after the failure; a meta tensor stands for one that is lost."""
    lost = torch.empty((), dtype=torch.bool, device="meta")
    features = FeatureSet(
        (
            feature("before", schedule=Schedule()),
            feature("lost", schedule=Schedule(), effect=lost),
            feature("behind", schedule=Schedule(), effect=torch.tensor(True)),
        ),
        CONFIG,
        seed=0,
    )
    features.run("before_optim", context(1))
    with pytest.raises(RuntimeError):
        features.metrics()
    row = features.metrics_after_failure()
    assert row["feature_before_effective_calls"] == 1 and row["feature_behind_enabled"] == 1
    assert row["feature_lost_effective_calls"] == 0
