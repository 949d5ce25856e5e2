"""Replay in whole runs: rows replaced on schedule, evidence, exact resume, forks, nothing off."""

import pytest

import training.features.causal_replay as feature
from tests.integration.runs import differences, metrics_rows, stop_after, train
from tests.training.features.test_sigma_rl import make_easy
from tests.training.small_run import small_flags
from training.build import build_trainer
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.features import FEATURES
from training.fork import ArmEnd, run_arm
from training.replay.causal_replay import CausalReplay

STEPS = 24
RUN = ("--probe-held-out", "--steps", str(STEPS), "--save-interval", "50")
ON = (*RUN, "--causal-replay-enabled", "--causal-replay-horizon-steps", "3")
RL = (
    "--ttrl-interval", "2", "--startup-meta-ramp-steps", "0", "--ttrl-max-new-tokens", "3",
    "--ttrl-group-size", "3", "--ttrl-top-k", "0", "--no-verifier-code-enabled",
    "--verifier-eval-tasks", "4", "--ttrl-refine-iters", "0", "--ttrl-tasks", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(small_flags(directory, *ON))
    return directory


def test_coins_come_every_other_step_and_rows_replaced_are_what_is_counted(
    whole, tmp_path, monkeypatch
):
    replaced = []
    original = feature.inject
    monkeypatch.setattr(
        feature, "inject", lambda batch, item: replaced.append(item) or original(batch, item)
    )
    train(small_flags(tmp_path / "run", *ON))
    assert differences(whole, tmp_path / "run") == []
    rows = metrics_rows(whole)[1:]
    flipped = [row["causal_replay_used"] + row["causal_replay_controls"] for row in rows]
    assert flipped == [step // 2 for step in range(1, STEPS + 1)]  # at steps 2, 4, ...
    last = rows[-1]
    assert last["feature_causal_replay_effective_calls"] == last["causal_replay_used"]
    assert last["causal_replay_used"] == len(replaced) and 3 <= len(replaced) <= 9
    assert last["ttrl_buffer_size"] == 32 and last["causal_replay_propensity"] == 0.5
    assert last["causal_replay_uplift_worst"] <= last["causal_replay_uplift_best"]
    assert {row["causal_replay_pending_windows"] for row in rows[4:]} <= {1.0, 2.0}
    assert "policy_replay_bias" not in last


def test_a_run_with_replay_differs_from_the_first_injection_on(whole, tmp_path):
    """Controls and looks at the probe change nothing."""
    train(small_flags(tmp_path / "off", *RUN))
    off, on = metrics_rows(tmp_path / "off")[1:], metrics_rows(whole)[1:]
    first = next(row["step"] for row in on if row["causal_replay_used"])
    same = [one["train_loss"] == other["train_loss"] for one, other in zip(on, off, strict=True)]
    assert same[: first - 1] == [True] * (first - 1) and not any(same[first - 1 :])


@pytest.mark.parametrize("stops", [(1,), (8,), (3, 9, 17)], ids=str)
def test_stopped_anywhere_it_resumes_to_the_bit(whole, tmp_path, stops):
    directory = tmp_path / "run"
    for step in stops:
        train(small_flags(directory, *ON), features=(*FEATURES, stop_after(step, directory)))
    train(small_flags(directory, *ON))
    assert differences(whole, directory) == []


@pytest.mark.parametrize(
    "target",
    [
        "training.features.causal_replay.CausalReplayFeature",
        "training.replay.causal_replay.CausalReplay",
        "training.replay.uplift.UpliftEstimator",
    ],
)
def test_a_part_that_is_not_restored_is_noticed(whole, tmp_path, monkeypatch, target):
    """Negative control."""
    directory = tmp_path / "run"
    train(small_flags(directory, *ON), features=(*FEATURES, stop_after(9, directory)))
    monkeypatch.setattr(f"{target}.load_state_dict", lambda *args: None)
    train(small_flags(directory, *ON))
    assert differences(whole, directory) != []


@pytest.mark.parametrize("off", [(), ("--causal-replay-enabled", "--replay-capacity", "0")])
def test_off_is_the_run_without_it(tmp_path, off):
    others = tuple(own for own in FEATURES if own.name != "causal_replay")
    short = (*RUN, "--steps", "8", *off)
    train(small_flags(tmp_path / "off", *short))
    train(small_flags(tmp_path / "absent", *short), features=others)
    rows = [metrics_rows(tmp_path / name)[1:] for name in ("off", "absent")]
    for name in ("train_loss", "grad_norm"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    found = differences(tmp_path / "off", tmp_path / "absent")
    assert [name for name in found if not name.startswith(("row", "features"))] == []
    assert rows[0][-1]["feature_causal_replay_enabled"] == 0
    assert not any(name.startswith("causal_replay") for name in rows[0][-1])


def test_both_arms_of_a_fork_flip_the_same_coins(tmp_path, monkeypatch):
    coins, original = [], CausalReplay.flip

    def flip(self, *, seed, row_tokens):
        coins.append(original(self, seed=seed, row_tokens=row_tokens))
        return coins[-1]

    monkeypatch.setattr(CausalReplay, "flip", flip)
    trainer = build_trainer(parse_args(small_flags(tmp_path / "run", *ON)))
    probe, arms = trainer.services.probe, []
    assert probe is not None

    def between(steps):
        arm = run_arm(
            trainer,
            steps=steps,
            score=lambda model: float(probe.loss(model, probe.batch(1))),
            seed=5,
        )
        assert arm.outcome is ArmEnd.FINISHED
        arms.append(coins[-steps // 2 :])

    class Forks:
        def between_steps(self, owner, should_stop):
            if owner.step == 7 and not arms:
                between(8)
            return True

    monkeypatch.setattr(trainer.services, "trials", Forks())
    trainer.fit()
    own = coins[3:7] if len(arms[0]) == 0 else coins[7:11]
    assert arms[0] == own and {coin.heads for coin in own} == {True, False}


def test_with_rl_the_model_s_own_completions_are_kept_and_resume_is_exact(tmp_path, monkeypatch):
    make_easy(monkeypatch)
    flags = (*ON, *RL, "--self-improver-enabled", "--self-improver-interval", "1", "--steps", "16")
    train(small_flags(tmp_path / "whole", *flags))
    last = metrics_rows(tmp_path / "whole")[-1]
    assert last["ttrl_buffer_size"] > 34 and last["causal_replay_used"] >= 1
    assert last["policy_replay_bias"] != 1.0 and last["self_improver_knobs"] >= 2.0
    strict = (*flags, "--ttrl-confidence-replay-min", "1.0")
    train(small_flags(tmp_path / "strict", *strict))
    kept = metrics_rows(tmp_path / "strict")[-1]["ttrl_buffer_size"]
    assert 32 <= kept < last["ttrl_buffer_size"]
    directory = tmp_path / "stopped"
    for step in (5, 10):
        train(small_flags(directory, *flags), features=(*FEATURES, stop_after(step, directory)))
    train(small_flags(directory, *flags))
    assert differences(tmp_path / "whole", directory) == []


def test_it_waits_for_the_start_up_ramp(tmp_path):
    flags = (
        *ON, *RL, "--startup-meta-ramp-steps", "64", "--startup-meta-real-data-buffer-steps", "6",
        "--ttrl-interval", "50", "--steps", "12",
    )  # fmt: skip
    train(small_flags(tmp_path / "run", *flags))
    rows = metrics_rows(tmp_path / "run")[1:]
    flipped = [
        None if "causal_replay_used" not in row
        else row["causal_replay_used"] + row["causal_replay_controls"] for row in rows
    ]  # fmt: skip
    assert flipped == [None] * 5 + [0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--data-backend", "local", "--local-path", "x"), "--no-causal-replay-enabled"),
        (("--no-verifier-math-enabled", "--no-verifier-code-enabled"), "needs tasks"),
        (("--ttrl-interval", "8", "--ttrl-label-mode", "majority", "--no-verifier-code-enabled"),
         "--ttrl-label-mode majority"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(flags, named):
    with pytest.raises(ConfigError, match=named):
        parse_args(["--causal-replay-enabled", *flags])
