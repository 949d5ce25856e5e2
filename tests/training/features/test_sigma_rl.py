"""RL in whole runs: ticks by the schedule, evidence, exact resume, nothing when off, guards.

The verifier here passes about half of any model's completions, so that a tiny untrained model has
something to learn from; everything else is what a run builds.
"""

import sys

import pytest

from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from tests.training.rl.small_learner import AllPass, OddBytes
from training.config.cli import parse_args
from training.config.sigma_config import ConfigError
from training.features import FEATURES

RL = (
    "--ttrl-interval", "2", "--startup-meta-ramp-steps", "0", "--ttrl-max-new-tokens", "3",
    "--ttrl-group-size", "3", "--ttrl-discriminative-topk", "4", "--ttrl-top-k", "0",
    "--no-verifier-code-enabled", "--verifier-eval-tasks", "4", "--ttrl-refine-iters", "1",
    "--ttrl-tasks", "2", "--steps", "7", "--save-interval", "3", "--no-ema-enabled",
    "--eval-interval", "0", "--no-curriculum-enabled", "--grad-accum-steps", "1",
    "--ttrl-asym-verify-enabled", "--sigma-rl-auto-mix-enabled",
)  # fmt: skip
RL_FEATURES = ("sigma_rl", "verifier", "verifier_cascade", "asym_verify", "rl_auto_mix")
METRICS = {
    "ttrl_reward_mean", "ttrl_raw_reward_mean", "ttrl_shaped_reward_mean", "ttrl_majority_pass",
    "ttrl_vote_entropy", "ttrl_label_accuracy", "ttrl_abstain_rate", "ttrl_confidence",
    "ttrl_diversity_mean", "ttrl_domain_math", "ttrl_domain_code", "ttrl_online_loss",
    "ttrl_budget", "ttrl_refined_candidates", "ttrl_asym_candidate_pool",
    "ttrl_asym_verified_candidates", "ttrl_asym_discriminative_mean", "ttrl_asym_recall_at_k",
    "sigma_rl_component_igrpo_loss", "sigma_rl_component_dispo_loss",
    "sigma_rl_component_gspo_loss", "sigma_rl_component_cispo_loss", "sigma_rl_mix_w_igrpo",
    "sigma_rl_mix_w_dispo", "sigma_rl_mix_w_gspo", "sigma_rl_mix_w_cispo", "sigma_rl_mix_arm",
    "sigma_rl_mix_reward", "sigma_rl_mix_entropy", "sigma_rl_ratio",
    "sigma_rl_ratio_clip_fraction", "sigma_rl_kl", "sigma_rl_entropy", "sigma_rl_adv_mean",
    "sigma_rl_adv_abs_mean", "sigma_rl_policy_grad_norm", "verifier_task_level",
    "verifier_cascade_stage0_rejects", "verifier_cascade_stage1_accepts",
    "verifier_cascade_gate_rejects", "verifier_cascade_strict_calls",
    "verifier_cascade_cost_saved_fraction", "verifier_cascade_audit_disagreement",
    "task_val_pass", "meta_activation_step", "meta_features_ready", "phase_ttrl_s",
}  # fmt: skip


def answer_in(text, task):
    """Three of four completions of any model have an answer; the cascade rejects the others."""
    number = sum(text.encode()) % 8
    return None if number in (0, 4) else str(number)


def make_easy(patch, verifier=OddBytes):
    patch.setattr("training.build_rl.Verifier", verifier)
    patch.setattr("training.rl.cascade.extract_answer", answer_in)
    patch.setattr("training.rl.candidates.extract_answer", answer_in)
    patch.setattr("training.rl.passed.extract_answer", answer_in)
    patch.setattr("training.rl.cascade.check_lightly", lambda *args, **options: None)


@pytest.fixture(autouse=True)
def easy_verifier(monkeypatch):
    make_easy(monkeypatch)


def rl_run(directory, *more, features=FEATURES):
    train(tiny_flags(directory, *RL, *more), features=features)
    return metrics_rows(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_easy(patch)
        rl_run(directory)
    return directory


def test_ticks_come_when_they_are_due_and_every_column_is_there(whole):
    rows = metrics_rows(whole)[1:]
    assert [row["phase_ttrl_s"] > 0.0 for row in rows] == [False, True] * 3 + [False]
    assert all(METRICS <= row.keys() for row in rows[1:])
    last = rows[-1]
    assert last["feature_verifier_effective_calls"] >= 3 * 2 * 4
    assert last["feature_sigma_rl_effective_calls"] >= 3
    assert last["feature_asym_verify_effective_calls"] == 3
    assert last["feature_verifier_cascade_effective_calls"] == 3
    assert 1 <= last["feature_rl_auto_mix_effective_calls"] <= 3
    assert [row["meta_features_ready"] for row in rows[1:]] == [1.0] * 6
    assert last["meta_activation_step"] == 2.0


def test_a_tick_is_no_part_of_the_language_models_time(whole):
    row = metrics_rows(whole)[2]
    parts = row["phase_forward_s"] + row["phase_optim_s"] + row["phase_train_other_s"]
    assert row["phase_train_s"] == pytest.approx(parts, rel=1e-6)
    assert row["phase_train_other_s"] < row["phase_ttrl_s"]


@pytest.mark.parametrize("stops", [(2,), (3,), (1, 4, 5)], ids=str)
def test_stopped_at_a_tick_or_between_it_resumes_to_the_bit(whole, tmp_path, stops):
    directory = tmp_path / "run"
    for step in stops:
        rl_run(directory, features=(*FEATURES, stop_after(step, directory)))
    rl_run(directory)
    assert differences(whole, directory) == []


def test_a_learner_that_is_not_restored_is_noticed(whole, tmp_path, monkeypatch):
    """Negative control."""
    directory = tmp_path / "run"
    rl_run(directory, features=(*FEATURES, stop_after(3, directory)))
    monkeypatch.setattr("training.rl.learner.Learner.load_state_dict", lambda *a: None)
    rl_run(directory)
    assert differences(whole, directory) != []


def test_off_is_the_run_without_the_features(tmp_path):
    others = tuple(feature for feature in FEATURES if feature.name not in RL_FEATURES)
    off = rl_run(tmp_path / "off", "--ttrl-interval", "0")
    absent = rl_run(tmp_path / "absent", "--ttrl-interval", "0", features=others)
    for name in ("train_loss", "grad_norm"):
        assert [row[name] for row in off[1:]] == [row[name] for row in absent[1:]]
    found = differences(tmp_path / "off", tmp_path / "absent")
    assert [name for name in found if not name.startswith(("row", "features"))] == []
    assert all(off[-1][f"feature_{name}_enabled"] == 0 for name in RL_FEATURES)
    assert not any(name.startswith(("ttrl_", "sigma_rl_")) for name in off[-1])


def test_the_first_tick_is_the_first_difference(whole, tmp_path):
    """Before it a run with RL is the run without it; after it the weights are others."""
    off = rl_run(tmp_path / "off", "--ttrl-interval", "0")[1:]
    on = metrics_rows(whole)[1:]
    same = [one["train_loss"] == other["train_loss"] for one, other in zip(on, off)]
    assert same == [True, True] + [False] * 5


def test_permuted_rewards_are_another_run(whole, tmp_path):
    rows = rl_run(tmp_path / "run", "--sigma-rl-placebo", "permuted")[1:]
    real = metrics_rows(whole)[1:]
    assert rows[1]["train_loss"] == real[1]["train_loss"]
    assert rows[2]["train_loss"] != real[2]["train_loss"]


def test_equal_rewards_leave_the_run_as_it_is_without_rl(tmp_path, monkeypatch):
    make_easy(monkeypatch, AllPass)
    plain = ("--no-verifier-cascade-enabled",)
    rows = rl_run(tmp_path / "on", *plain)[1:]
    off = rl_run(tmp_path / "off", "--ttrl-interval", "0")[1:]
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in off]
    assert rows[-1]["feature_sigma_rl_effective_calls"] == 0
    assert rows[-1]["feature_rl_auto_mix_effective_calls"] == 0
    assert rows[-1]["feature_verifier_effective_calls"] > 0


def test_a_run_too_short_for_a_tick_is_refused(tmp_path):
    flags = ("--ttrl-interval", "8", "--startup-meta-ramp-steps", "64", "--strict-feature-usage")
    with pytest.raises(RuntimeError, match=r"sigma_rl \(needs 24\)"):
        rl_run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--ttrl-budget-min", "3", "--ttrl-budget-max", "2"), "--ttrl-budget-max"),
        (("--sigma-rl-dispo-clip", "0.2,0.4"), "four widths"),
        (("--ttrl-interval", "1", "--no-verifier-math-enabled", "--no-verifier-code-enabled"),
         "--verifier-math-enabled"),
        (("--ttrl-interval", "1", "--ttrl-label-mode", "majority"), "--no-verifier-code-enabled"),
        (("--ttrl-interval", "1", "--ttrl-asym-verify-enabled", "--ttrl-discriminative-topk", "2"),
         "--ttrl-group-size"),
        (("--ttrl-interval", "1", "--grpo-backend", "trl", "--sigma-rl-placebo", "random",
          "--ttrl-asym-verify-enabled"),
         "drop --ttrl-asym-verify-enabled, --sigma-rl-placebo random"),
        (("--ttrl-task-families", "add,magic"), "--ttrl-task-families: no task family 'magic'"),
        (("--ttrl-task-families", "gym:magic"), "--ttrl-task-families: no task family gym:magic"),
        (("--ttrl-task-families", ""), "--ttrl-task-families: no task family ''"),
        (("--ttrl-interval", "1", "--ttrl-task-families", "function",
          "--no-verifier-code-enabled"), "--verifier-code-enabled for those of"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(flags, named):
    with pytest.raises(ConfigError, match=named):
        parse_args(list(flags))


def test_families_are_those_of_the_flags():
    def families(*flags):
        config = parse_args(["--ttrl-interval", "1", *flags])
        return config.task_families(), config.has_code_tasks()

    assert families() == (("add", "subtract", "multiply", "expression", "function"), True)
    assert families("--no-verifier-code-enabled") == (("add", "subtract", "multiply"), False)
    assert families("--ttrl-task-families", "symbolic, gym:gcd,function,symbolic") == (
        ("symbolic", "gym:gcd", "function"),
        True,
    )
    assert families("--ttrl-task-families", "function,add", "--no-verifier-math-enabled") == (
        ("function",),
        True,
    )


def test_the_tasks_of_a_run_are_of_the_families_that_were_named(tmp_path, monkeypatch):
    seen = set()

    class Witness(OddBytes):
        def verify(self, tasks, completions, *, rng):
            seen.update(task.family for task in tasks)
            return super().verify(tasks, completions, rng=rng)

    make_easy(monkeypatch, Witness)
    flags = ("--ttrl-task-families", "symbolic", "--no-verifier-cascade-enabled", "--steps", "3")
    rl_run(tmp_path / "run", *flags)
    assert seen == {"symbolic"}


def test_a_package_that_is_missing_ends_the_run_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(RuntimeError, match="--ttrl-task-families"):
        rl_run(tmp_path / "run", "--ttrl-task-families", "add,gym:gcd")
    assert not (tmp_path / "run").exists()
