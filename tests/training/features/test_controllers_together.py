"""RL, search, rules and trials in one run: one experiment at a time, equal arms, exact resume."""

import itertools
import json

import pytest

from evolution.overlays import NEUTRAL
from evolution.uroboros import Uroboros
from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from tests.training.features.test_sigma_rl import make_easy
from training.build import build_policy
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.features import FEATURES
from training.run_policy import REPLAY_BIAS, TTRL_BUDGET, TTRL_INTERVAL

STEPS = 30
CONTROLLERS = (
    "--self-improver-enabled", "--self-improver-interval", "1",
    "--self-evolve-interval", "2", "--self-evolve-history", "4",
    "--uroboros-enabled", "--uroboros-interval", "4", "--uroboros-trial-horizon-steps", "4",
)  # fmt: skip
RUN = (
    "--ttrl-interval", "3", "--startup-meta-ramp-steps", "0", "--ttrl-max-new-tokens", "3",
    "--ttrl-group-size", "3", "--ttrl-top-k", "0", "--no-verifier-code-enabled",
    "--verifier-eval-tasks", "4", "--ttrl-refine-iters", "0", "--ttrl-budget-min", "2",
    "--no-verifier-cascade-enabled", "--probe-batches", "2", "--probe-batch-size", "2",
    "--steps", str(STEPS), "--save-interval", "50", "--eval-interval", "0",
    "--sample-interval", "0", "--no-ema-enabled", "--no-curriculum-enabled",
    "--grad-accum-steps", "1", "--lr", "0.02", *CONTROLLERS,
    "--causal-replay-enabled",
)  # fmt: skip


@pytest.fixture(autouse=True)
def easy_verifier(monkeypatch):
    make_easy(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_easy(patch)
        train(tiny_flags(directory, *RUN, "--proof-mode"))
    return directory


def replicates(directory):
    path = directory / "uroboros_patch_history.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["event"] == "replicate"]


def test_quadruples_and_replicates_take_turns_and_never_overlap(whole):
    rows = {row["step"]: row for row in metrics_rows(whole)[1:]}
    spans = [(row["begun"], row["step"]) for row in replicates(whole)]
    assert len(spans) >= 3
    quadruples = [step for step in range(2, STEPS + 1)
                  if rows[step]["self_improver_quadruples"]
                  > rows[step - 1]["self_improver_quadruples"]]  # fmt: skip
    assert len(quadruples) >= 3
    for begun, ended in spans:
        # One value of every knob all through a replicate, and no quadruple ends inside.
        for name in ("policy_lr_mul", "self_evolve_lr_factor", "policy_ttrl_interval_mul"):
            assert len({rows[step][name] for step in range(begun, ended)}) == 1
        assert not [step for step in quadruples if begun < step <= ended]
    # Between two replicates there is a quadruple of four steps, and after it the next replicate.
    for (_, ended), (begun, _) in itertools.pairwise(spans):
        assert [step for step in quadruples if ended < step <= begun] == [begun]


def test_every_controller_turned_what_it_should(whole):
    rows = metrics_rows(whole)[1:]
    assert rows[-1]["self_improver_knobs"] == 4.0
    columns = ("lr_mul", "ttrl_interval_mul", "ttrl_budget_bias", "replay_bias")
    for name in (f"policy_{column}" for column in columns):
        assert len({row[name] for row in rows}) > 4
    gaps = [b - a for a, b in itertools.pairwise(
        row["step"] for row in rows if row["phase_ttrl_s"] > 0.0)]  # fmt: skip
    assert set(gaps) - {3}, "ticks keep the plain interval whatever the policy says"
    # Text alone judges an overlay, so it says nothing about RL.
    overlays = [row["overlay"] for row in replicates(whole)]
    assert all(overlay.pop("lr_factor") != 1.0 for overlay in overlays)
    assert {value for overlay in overlays for value in overlay.values()} == {1.0}


@pytest.mark.parametrize("stops", [(6, 12, 21)], ids=str)
def test_stopped_inside_an_experiment_it_resumes_to_the_bit(whole, tmp_path, stops):
    directory = tmp_path / "run"
    for step in stops:
        train(tiny_flags(directory, *RUN), features=(*FEATURES, stop_after(step, directory)))
    train(tiny_flags(directory, *RUN, "--proof-mode"))
    assert differences(whole, directory) == []


def test_both_arms_see_the_same_batches_ticks_and_policy(tmp_path, monkeypatch):
    """A candidate that changes nothing: its arm is the run's own to the bit."""
    monkeypatch.setattr(Uroboros, "_next_candidate", lambda self, rng: NEUTRAL)
    train(tiny_flags(tmp_path / "run", *RUN, "--steps", "20"))
    found = [row["difference"] for row in replicates(tmp_path / "run")]
    assert len(found) >= 2 and set(found) == {0.0}


def test_an_arm_without_its_learner_is_noticed(tmp_path, monkeypatch):
    """Negative control of the one above: ticks draw from a state that the fork does not restore."""
    monkeypatch.setattr(Uroboros, "_next_candidate", lambda self, rng: NEUTRAL)
    monkeypatch.setattr("training.rl.learner.Learner.load_state_dict", lambda *a: None)
    train(tiny_flags(tmp_path / "run", *RUN, "--steps", "20"))
    assert any(row["difference"] != 0.0 for row in replicates(tmp_path / "run"))


def test_a_knob_of_rl_exists_only_with_rl():
    assert build_policy(parse_args([])).present((TTRL_INTERVAL, TTRL_BUDGET)) == ()
    policy = build_policy(parse_args(["--ttrl-interval", "8"]))
    assert policy.present((TTRL_INTERVAL, TTRL_BUDGET)) == (TTRL_INTERVAL, TTRL_BUDGET)
    replays = parse_args(["--ttrl-interval", "8", "--causal-replay-enabled"])
    assert build_policy(replays).present((REPLAY_BIAS,)) == (REPLAY_BIAS,)
    assert policy.present((REPLAY_BIAS,)) == ()
    for factor, steps in ((100.0, 16), (0.01, 2)):  # the bounds of the flags
        change = policy.propose(TTRL_INTERVAL, factor, by=str(factor), reason="")
        assert change is not None and policy.apply(change)
        assert 8 * policy.multiplier(TTRL_INTERVAL) == pytest.approx(steps)
        back = policy.propose(TTRL_INTERVAL, 1.0, by=str(factor), reason="")
        assert back is not None and policy.apply(back)


def test_bounds_the_wrong_way_round_are_refused():
    with pytest.raises(ConfigError, match="--self-evolve-ttrl-interval-min 9 must not exceed"):
        parse_args(["--self-evolve-ttrl-interval-min", "9", "--self-evolve-ttrl-interval-max", "3"])
