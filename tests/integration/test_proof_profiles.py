"""Proof runs: every mechanism acts, and one that does nothing fails the run by its name.

The negative cases leave the feature switched on and take away what it does, each in a run with
nothing else on.
"""

import json
from pathlib import Path

import pytest
import torch

import train_sigma
from training.config.cli import parse_args
from training.features import FEATURES
from training.features.base import PHASES, Feature, FeatureSet

PROFILES = Path(__file__).resolve().parents[2] / "profiles"
ALL_OFF = {
    "instant": "--instant-mode off",
    "c3o_credit": "--no-c3o-credit-enabled",
    "sigma_rl": "--ttrl-interval 0",
    "verifier_cascade": "--no-verifier-cascade-enabled",
    "asym_verify": "--no-ttrl-asym-verify-enabled",
    "rl_auto_mix": "--no-sigma-rl-auto-mix-enabled",
    "self_improver": "--no-self-improver-enabled",
    "uroboros": "--no-uroboros-enabled",
    "self_evolve": "--self-evolve-interval 0",
    "curriculum": "--no-curriculum-enabled",
    "causal_replay": "--no-causal-replay-enabled",
    "diff_mla": "--no-diff-attention-enabled",
    "ema": "--no-ema-enabled",
    "fractal_nas": "--fractal-interval-steps 0",
    "hydra_v21": "--no-hydra-enable",
}
NEEDS = {"verifier": "sigma_rl", "verifier_cascade": "sigma_rl", "asym_verify": "sigma_rl",
         "rl_auto_mix": "sigma_rl"}  # fmt: skip
# What a feature does, made to do nothing: target and stand-in.
DISABLED = {
    "instant": ("training.features.instant.apply_instant", lambda model, settings: None),
    "c3o_credit": ("training.optim.c3o.C3O.finish_probe", lambda *a, **k: None),
    "sigma_rl": (
        "training.rl.learner.group_advantages",
        lambda rewards, normalise: torch.zeros_like(rewards),
    ),
    "rl_auto_mix": (
        "training.rl.auto_mix.AutoMix.blend",
        lambda self, arm: {"igrpo": 0.0, "dispo": 0.0, "gspo": 0.0, "cispo": 1.0},
    ),
    "self_improver": (
        "training.self_improver.vote",
        lambda window: ([0.0] * len(window[0][1]), [0.0] * len(window[0][1])),
    ),
    "self_evolve": ("training.self_evolve.LearningRateRule.settle", lambda self: 1.0),
    "uroboros": ("training.overlay_trials.OverlayTrials._begin", lambda self, ctx: False),
    "curriculum": ("training.features.curriculum.sequence_divisor", lambda *a, **k: 1),
    "causal_replay": (
        "training.replay.causal_replay.CausalReplay.flip",
        lambda self, *, seed, row_tokens: None,
    ),
    "diff_mla": (
        "model.mla.MLA.gate",
        lambda self, x: 0.0 * self.gate_lambda(x).transpose(1, 2).unsqueeze(-1),
    ),
    "ema": ("training.ema.WeightAverage.update", lambda self, model: False),
    "hydra_v21": ("training.hydra.learner.make_pairs", lambda made, rng, placebo: []),
}
SMALL = """
--d-model 32 --n-layers 2 --mamba-ratio 1 --no-engram-enabled --seq-len 32 --probe-batches 2
--probe-batch-size 2 --eval-tokens 64 --sample-tokens 1 --integrity-hidden-eval-every 0
--no-integrity-guards-enabled --save-interval 50 --ttrl-tasks 2
""".split()


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache" / "triton"))


def profile(name):
    return [f"@{PROFILES / name}.txt", "--device", "cpu"]


def enabled_in(name):
    config = parse_args(profile(name))
    return [feature.name for feature in FEATURES if feature.schedule(config) is not None]


def run(directory, name, *more):
    """Exit code of the program on a profile, and the last row of the run."""
    paths = ["--output-dir", str(directory), "--checkpoint-dir", str(directory / "checkpoints")]
    code = train_sigma.main([*profile(name), *paths, *more])
    rows = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return code, json.loads(rows[-1])


def only(name):
    """Flags that switch off what `name` does not need."""
    kept = {name, NEEDS.get(name)}
    return " ".join(flags for feature, flags in ALL_OFF.items() if feature not in kept).split()


def disable(patch, name):
    if name in DISABLED:
        patch.setattr(*DISABLED[name])
        return
    # A part of something else, which reports for it; or a feature that came later.
    feature = next(one for one in FEATURES if one.name == name)
    for phase in PHASES:
        patch.setattr(feature, phase, getattr(Feature, phase))
    mark = FeatureSet.mark
    patch.setattr(
        FeatureSet, "mark", lambda self, n, count=1: None if n == name else mark(self, n, count)
    )


def assert_all_acted(row, name):
    idle = [one for one in enabled_in(name) if row[f"feature_{one}_effective_calls"] < 1]
    assert idle == []


def test_everything_acts_within_twelve_steps(tmp_path):
    code, row = run(tmp_path / "run", "activation")
    assert code == 0 and row["step"] == 12
    assert_all_acted(row, "activation")
    # The exact schedules of what has one.
    for name, calls in (("instant", 12), ("diff_mla", 12), ("c3o_credit", 11), ("curriculum", 3)):
        assert row[f"feature_{name}_effective_calls"] == calls
    for name in ("sigma_rl", "verifier_cascade", "asym_verify"):
        assert row[f"feature_{name}_effective_calls"] >= 3


@pytest.mark.soak
def test_everything_acts_within_fifty_steps_of_plain_intervals(tmp_path):
    code, row = run(tmp_path / "run", "proof")
    assert code == 0 and row["step"] == 50
    assert_all_acted(row, "proof")


def test_both_profiles_have_everything_on_that_one_run_can_hold():
    every = {feature.name for feature in FEATURES} - {"adaptive_sources"}
    off_with_a_reason = every - set(enabled_in("proof"))
    assert set(enabled_in("activation")) == set(enabled_in("proof"))
    assert off_with_a_reason == set(), "add the flags of a new feature to both profiles"


@pytest.mark.parametrize("name", enabled_in("activation"))
def test_a_feature_that_does_nothing_fails_the_run_by_name(tmp_path, monkeypatch, capsys, name):
    disable(monkeypatch, name)
    code, row = run(tmp_path / "run", "activation", *only(name), *SMALL)
    assert code == 1 and row[f"feature_{name}_effective_calls"] == 0
    said = capsys.readouterr().err
    assert "proof mode" in said and name in said and "0 effective calls" in said
    report = next((tmp_path / "run" / "errors").glob("crash_step_*.json"))
    assert name in report.read_text(encoding="utf-8")


def test_too_few_steps_are_refused_with_the_names_and_the_steps_needed(tmp_path, capsys):
    flags = [*profile("proof"), "--steps", "9", "--output-dir", str(tmp_path / "run")]
    assert train_sigma.main(flags) == 2
    said = capsys.readouterr().err
    assert "--steps 9 is too small" in said
    assert "sigma_rl (needs 24)" in said and "uroboros (needs 10)" in said
    assert not (tmp_path / "run").exists()
