"""Hydra in whole runs: events by their own clocks, evidence, exact resume, nothing when off.

The verifier here passes about half of any model's completions, so that a tiny untrained model has
something to prefer; everything else is what a run builds.
"""

import json

import pytest
import torch

from model.adapters import Adapter, attached
from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from tests.training.rl.small_learner import OddBytes
from training.build_inference import load_for_inference
from training.config.cli import parse_args
from training.config.sigma_config import ConfigError
from training.features import FEATURES
from training.features.hydra_v21 import HydraFeature
from training.hydra.clocks import EventClock
from training.hydra.learner import Hydra
from training.modes import export
from training.runtime.checkpoint import CheckpointStore, IncompatibleCheckpoint
from training.runtime.state_tree import join_state

RUN = (
    "--startup-meta-ramp-steps", "0", "--ttrl-max-new-tokens", "3", "--steps", "10",
    "--save-interval", "50", "--eval-interval", "0", "--sample-interval", "0",
    "--no-curriculum-enabled", "--no-ema-enabled", "--grad-accum-steps", "1",
)  # fmt: skip
ON = (
    *RUN, "--hydra-enable", "--hydra-domains", "math,text", "--hydra-update-interval", "2",
    "--hydra-rollback-interval", "3", "--hydra-steps-per-phase", "5", "--hydra-gate-tasks", "8",
    "--hydra-lora-lr", "0.01",
)  # fmt: skip
COLUMNS = {
    "hydra_active", "hydra_step_skipped", "hydra_domain_id", "hydra_loss", "hydra_train_pairs",
    "hydra_pair_reward_pos", "hydra_pair_reward_neg", "hydra_pair_margin",
    "hydra_candidate_pass_rate", "hydra_rollback_triggered", "hydra_rollback_drop",
    "hydra_eval_score", "hydra_merge_count", "hydra_merge_weight_math",
    "hydra_merge_weight_text", "hydra_merge_sign_conflict_fraction",
}  # fmt: skip


@pytest.fixture(autouse=True)
def easy_verifier(monkeypatch):
    monkeypatch.setattr("training.build_hydra.Verifier", OddBytes)


def hydra_run(directory, *more, features=FEATURES, flags=ON):
    train(tiny_flags(directory, *flags, *more), features=features)
    return metrics_rows(directory)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.build_hydra.Verifier", OddBytes)
        hydra_run(directory)
    return directory


def test_every_event_has_its_own_clock_and_every_column_is_there(whole, tmp_path, monkeypatch):
    steps = {"update": [], "gate": [], "merge": []}

    def watch(name):
        original = getattr(Hydra, name)

        def called(self, **options):
            steps[name].append(now[0])
            return original(self, **options)

        monkeypatch.setattr(Hydra, name, called)

    now = [0]
    after_step = HydraFeature.after_step

    def noted(self, ctx):
        now[0] = ctx.step
        return after_step(self, ctx)

    monkeypatch.setattr(HydraFeature, "after_step", noted)
    for name in steps:
        watch(name)
    hydra_run(tmp_path / "run")
    assert steps == {"update": [2, 4, 6, 8, 10], "gate": [3, 6, 9], "merge": [5, 10]}
    assert differences(whole, tmp_path / "run") == []
    rows = metrics_rows(whole)[1:]
    assert all(COLUMNS <= row.keys() for row in rows[1:])
    last = rows[-1]
    assert last["hydra_merge_count"] == 2.0 and last["hydra_domain_id"] == 0.0
    assert last["feature_hydra_v21_effective_calls"] == 5 - last["hydra_step_skipped"] >= 3
    assert last["phase_hydra_s"] > 0.0


def test_without_a_fold_the_model_is_that_of_a_run_without_adapters(whole, tmp_path):
    off = hydra_run(tmp_path / "off", flags=RUN)
    others = tuple(feature for feature in FEATURES if feature is not HydraFeature)
    absent = hydra_run(tmp_path / "absent", flags=RUN, features=others)
    on = metrics_rows(whole)
    for name in ("train_loss", "grad_norm"):
        assert [row[name] for row in off[1:]] == [row[name] for row in absent[1:]]
        assert [row[name] for row in off[1:]] == [row[name] for row in on[1:]]
    for other in (tmp_path / "absent", whole):
        found = differences(tmp_path / "off", other)
        assert [name for name in found if not name.startswith(("row", "features"))] == []
    assert off[-1]["feature_hydra_v21_enabled"] == 0
    assert not any(name.startswith("hydra_") for name in off[-1])


@pytest.mark.parametrize("stops", [(2, 5), (3, 7)], ids=str)
def test_stopped_at_an_event_or_between_it_resumes_to_the_bit(whole, tmp_path, stops):
    directory = tmp_path / "run"
    for step in stops:
        hydra_run(directory, features=(*FEATURES, stop_after(step, directory)))
    hydra_run(directory)
    assert differences(whole, directory) == []


def test_adapters_that_are_not_restored_are_noticed(whole, tmp_path, monkeypatch):
    """Negative control."""
    directory = tmp_path / "run"
    hydra_run(directory, features=(*FEATURES, stop_after(4, directory)))
    monkeypatch.setattr("training.hydra.domain.Domain.load_state_dict", lambda *a: None)
    hydra_run(directory)
    assert differences(whole, directory) != []


def test_a_merge_leaves_its_record(whole):
    names = sorted(path.name for path in (whole / "hydra").iterdir())
    assert names == ["merge_step_10.json", "merge_step_5.json"]
    record = json.loads((whole / "hydra" / "merge_step_10.json").read_text(encoding="utf-8"))
    assert record["domains"] == ["math", "text"] and record["method"] == "ties"
    assert set(record["weights"]) == set(record["score_deltas"]) == {"math", "text"}
    assert all(0.05 <= weight <= 0.80 for weight in record["weights"].values())
    assert record["adapter_sha256_after"] not in record["adapter_sha256_before"].values()
    assert record["folded"] is False and set(record["gate"]) == {"math", "text"}


def test_a_merge_that_gains_nothing_is_not_folded(whole, tmp_path):
    hydra_run(tmp_path / "run", "--merge-fold-into-backbone", "--steps", "5")
    record = json.loads((tmp_path / "run/hydra/merge_step_5.json").read_text(encoding="utf-8"))
    assert sum(look["drop"] for look in record["gate"].values()) >= 0.0  # of a tiny model
    assert record["folded"] is False


def fold_whatever_it_shows(monkeypatch):
    """A tiny model gains nothing that a fold could be allowed for."""
    monkeypatch.setattr(Hydra, "_is_sound", lambda self, looks: True)


def test_a_fold_changes_the_model_and_resumes_to_the_bit(whole, tmp_path, monkeypatch):
    fold_whatever_it_shows(monkeypatch)
    fold = ("--merge-fold-into-backbone",)
    rows = hydra_run(tmp_path / "folded", *fold)
    record = json.loads((tmp_path / "folded/hydra/merge_step_5.json").read_text(encoding="utf-8"))
    assert record["folded"] is True
    same = [a["train_loss"] == b["train_loss"] for a, b in zip(rows[1:], metrics_rows(whole)[1:])]
    assert same == [True] * 5 + [False] * 5
    directory = tmp_path / "parts"
    hydra_run(directory, *fold, features=(*FEATURES, stop_after(5, directory)))
    hydra_run(directory, *fold)
    assert differences(tmp_path / "folded", directory) == []


def test_what_was_merged_can_be_used(whole, tmp_path, monkeypatch):
    def load(directory, weights):
        flags = tiny_flags(directory, *ON, "--weights", weights)
        return load_for_inference(parse_args(flags)).model

    tokens = torch.tensor([[256, 5, 9, 77]])
    plain, merged = load(whole, "last"), load(whole, "hydra")
    state = CheckpointStore.newest_for_inference(whole / "checkpoints")
    own = join_state(state.tensors["features"], state.state["features"])["hydra_v21"]["state"]
    adapter = Adapter.create(plain, rank=8, alpha=16.0, generator=torch.Generator())
    adapter.load_state_dict(own["learner"]["merged"])
    with torch.no_grad():
        without, with_it = plain(tokens).logits, merged(tokens).logits
        assert not torch.equal(without, with_it)
        with attached(plain, adapter):
            assert torch.equal(plain(tokens).logits, with_it)
    # Folded into the weights it must not be added a second time.
    fold_whatever_it_shows(monkeypatch)
    hydra_run(tmp_path / "folded", "--merge-fold-into-backbone")
    with pytest.raises(ConfigError, match="--weights hydra: this checkpoint has no merged adapter"):
        load(tmp_path / "folded", "hydra")
    flags = tiny_flags(whole, *ON, "--weights", "hydra", "--mode", "export")
    with pytest.raises(ConfigError, match="--mode export writes no adapters"):
        export.run(parse_args(flags))


def test_gates_and_merges_wait_for_an_experiment_and_updates_do_not():
    updates, gates = EventClock(2), EventClock(3)
    allowed = {step: not 3 <= step < 8 for step in range(1, 11)}
    assert [s for s in allowed if updates.is_due(s)] == [2, 4, 6, 8, 10]
    assert [s for s in allowed if gates.is_due(s, allowed=allowed[s])] == [8, 9]
    assert not any(EventClock(0).is_due(step) for step in range(1, 9))


def test_it_begins_when_the_ramp_lets_it():
    def first(*flags):
        schedule = HydraFeature.schedule(parse_args(["--hydra-enable", *flags]))
        return None if schedule is None else schedule.first_step

    assert first() == 16
    assert first("--hydra-update-interval", "5", "--ttrl-interval", "8") == 10
    assert first("--hydra-update-interval", "7", "--ttrl-interval", "40") == 28
    assert first("--startup-meta-ramp-steps", "0", "--hydra-update-interval", "4") == 4
    assert first("--no-hydra-enable") is None


def test_a_run_too_short_for_an_update_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match=r"hydra_v21 \(needs 16\)"):
        hydra_run(tmp_path / "run", "--hydra-update-interval", "16", "--strict-feature-usage")
    assert not (tmp_path / "run").exists()


def test_a_gate_without_enough_items_is_refused_before_training(tmp_path):
    flags = ("--hydra-domains", "math", "--ttrl-task-families", "subtract",
             "--hydra-gate-tasks", "1000")  # fmt: skip
    mend = r"--hydra-gate-tasks 1000: math has only (\d+) items for its gate; give .* \1 or fewer"
    with pytest.raises(ConfigError, match=mend):
        hydra_run(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [("--hydra-lora-rank", "4"), ("--hydra-lora-alpha", "8")])
def test_adapters_of_another_shape_are_refused_by_their_flag(whole, more):
    with pytest.raises(IncompatibleCheckpoint, match=more[0]):
        hydra_run(whole, *more)


@pytest.mark.parametrize("domains", ["", "math,math", "math,music", "math,"])
def test_domains_that_there_are_not_are_refused(domains):
    with pytest.raises(ConfigError, match="--hydra-domains takes math, code, text"):
        parse_args(["--hydra-domains", domains])


def test_code_without_a_sandbox_is_refused_in_one_line(tmp_path, monkeypatch):
    def none(**_):
        raise RuntimeError("no sandbox here; --no-verifier-code-enabled trains without code tasks")

    monkeypatch.setattr("training.build_hydra.Verifier", none)
    with pytest.raises(ConfigError, match="no sandbox here; --hydra-domains math,text goes") as e:
        hydra_run(tmp_path / "run", "--hydra-domains", "math,code,text")
    assert "\n" not in str(e.value) and not (tmp_path / "run").exists()
