"""Features are additions: none of them is needed, and one that does nothing changes nothing."""

import pytest

from tests.integration.runs import differences, metrics_rows, tiny_flags, train
from training.config.cli import parse_args
from training.features.base import Feature, FeatureSet, Schedule
from training.features.ema import EmaFeature

QUIET = ("--no-ema-enabled", "--no-curriculum-enabled", "--steps", "12")


class Idle(Feature):
    """Runs in every phase, owns a random stream, changes nothing."""

    name = "idle"

    @classmethod
    def schedule(cls, config):
        return Schedule()


def without_feature_columns(directory):
    rows = metrics_rows(directory)
    return [
        {k: v for k, v in row.items() if k in ("step", "train_loss", "grad_norm", "eval_bpb")}
        for row in rows
    ]


def test_a_run_without_any_feature_trains(tmp_path):
    learning = ("--steps", "40", "--lr", "0.02", "--adam-lr", "0.02")
    train(tiny_flags(tmp_path / "run", *QUIET, *learning), features=())
    rows = metrics_rows(tmp_path / "run")
    losses = [row["train_loss"] for row in rows[1:]]
    assert rows[-1]["step"] == len(losses) == 40
    assert sum(losses[-5:]) / 5 < sum(losses[:5]) / 5 - 0.3
    assert not any(name.startswith("feature_") for name in rows[-1])


def test_idle_features_change_nothing_to_the_bit(tmp_path):
    train(tiny_flags(tmp_path / "with", *QUIET), features=(Idle,))
    train(tiny_flags(tmp_path / "without", *QUIET), features=())
    assert without_feature_columns(tmp_path / "with") == without_feature_columns(
        tmp_path / "without"
    )
    found = differences(tmp_path / "with", tmp_path / "without")
    assert [name for name in found if not name.startswith(("row", "features"))] == []


def test_a_watching_feature_leaves_the_loss_curve_alone(tmp_path):
    """The average only reads weights: same losses with it and without."""
    on = ("--ema-enabled", "--ema-start-fraction", "0.1")
    train(tiny_flags(tmp_path / "on", *QUIET, *on), features=(EmaFeature,))
    train(tiny_flags(tmp_path / "off", *QUIET), features=())
    assert without_feature_columns(tmp_path / "on") == without_feature_columns(tmp_path / "off")
    assert metrics_rows(tmp_path / "on")[-1]["feature_ema_effective_calls"] == 11


def test_proof_mode_names_what_never_acted(tmp_path):
    with pytest.raises(RuntimeError, match="idle"):
        train(tiny_flags(tmp_path / "run", *QUIET, "--proof-mode"), features=(Idle,))
    assert list((tmp_path / "run" / "errors").glob("crash_step_*.json"))


def test_every_enabled_feature_of_a_full_run_had_effects(tmp_path):
    train(tiny_flags(tmp_path / "run", "--proof-mode"))
    last = metrics_rows(tmp_path / "run")[-1]
    assert last["feature_curriculum_effective_calls"] == 3  # T/4, T/2, T
    assert last["feature_ema_effective_calls"] == 48  # from step 16, the first one only copies
    assert last["feature_diff_mla_effective_calls"] == 64


def test_the_set_is_built_from_the_tuple_it_is_given(tmp_path):
    config = parse_args(tiny_flags(tmp_path))
    assert FeatureSet((), config, seed=0).metrics() == {}
