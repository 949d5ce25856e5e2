"""Trials in whole runs: nothing promoted is nothing changed; what is undone is undone exactly."""

import errno
import json
import math
import os
import random
import shutil

import pytest

from evolution.overlays import Overlay
from evolution.uroboros import Decision, Replicate, SearchSettings, Uroboros
from research.journal import Journal, read_trials
from tests.integration.runs import differences, metrics_rows, stop_after, train
from tests.integration.test_resume_pairwise import every_resume
from tests.training.small_run import small_flags
from training.build import build_trainer
from training.config.cli import parse_args
from training.features import FEATURES
from training.features.uroboros import UroborosFeature
from training.fork import ArmEnd, hash_state, run_arm

STEPS = 24
TRIALS = (
    "--uroboros-enabled", "--uroboros-interval", "4", "--uroboros-trial-horizon-steps", "4",
    "--steps", str(STEPS), "--save-interval", str(STEPS),
)  # fmt: skip
UNTIMED = TRIALS[:-4]
OFF = (*TRIALS, "--no-uroboros-enabled", "--probe-held-out")
CURVES = ("train_loss", "grad_norm", "lr", "eval_bpb", "loss_ema")


def history(directory):
    path = directory / "uroboros_patch_history.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_feature(found):
    """Differences apart from the feature's own state and columns."""
    return [name for name in found if not name.startswith(("features", "row"))]


def curves(directory):
    return [{name: row.get(name) for name in CURVES} for row in metrics_rows(directory)[1:]]


def promote_the_first(monkeypatch, *, then):
    """Candidate 1 is promoted after one replicate, later ones never; the watch ends in `then`."""

    def decide(self, found):
        chosen = Decision.PROMOTE if found.number == 1 else Decision.CONTINUE
        return chosen, "forced by the test"

    monkeypatch.setattr(Uroboros, "_decide", decide)
    limit = -math.inf if then is Decision.ROLL_BACK else math.inf
    monkeypatch.setattr("evolution.uroboros.REVERSAL_T", limit)


@pytest.fixture(scope="module")
def off(tmp_path_factory):
    """The run without trials, on the same text."""
    directory = tmp_path_factory.mktemp("off") / "run"
    train(small_flags(directory, *OFF))
    return directory


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    directory = tmp_path_factory.mktemp("on") / "run"
    train(small_flags(directory, *TRIALS, "--proof-mode"))
    return directory


def test_without_a_promotion_the_run_is_the_one_without_trials(on, off):
    assert without_feature(differences(on, off)) == []
    assert curves(on) == curves(off)
    rows = history(on)
    assert [row["event"] for row in rows] == ["replicate"] * 5
    assert [(row["begun"], row["step"]) for row in rows] == [
        (4, 8), (8, 12), (12, 16), (16, 20), (20, 24),
    ]  # fmt: skip
    last = metrics_rows(on)[-1]
    assert last["feature_uroboros_effective_calls"] == last["uroboros_trials"] == 5
    # The other arm did something else than the run.
    assert all(abs(row["difference"]) > 1e-6 for row in rows)


def test_the_journal_is_written_before_the_arm_runs(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    seen = []

    def look(trainer, **_):
        seen.append(list((directory / "research").glob("RESEARCH_LOG_*_cycle001.md")))
        return run_arm(trainer, **_)

    monkeypatch.setattr("training.overlay_trials.run_arm", look)
    train(small_flags(directory, *TRIALS, "--steps", "9"))
    assert len(seen[0]) == 1 and "## Hypothesis" in seen[0][0].read_text(encoding="utf-8")


def test_no_arm_runs_while_its_trial_cannot_be_registered(tmp_path, monkeypatch):
    directory, begun = tmp_path / "run", []

    def append(self, event):
        if not begun:
            begun.append(event)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, event)

    def look(trainer, **_):
        trials = read_trials(directory / "research")
        begun.append([trial["title"].split(":")[0] for trial in trials])
        return run_arm(trainer, **_)

    write = Journal._append
    monkeypatch.setattr(Journal, "_append", append)
    monkeypatch.setattr("training.overlay_trials.run_arm", look)
    train(small_flags(directory, *TRIALS, "--steps", "13"))
    assert begun[1:] == [["candidate 2"]]
    assert [line["event"] for line in history(directory)] == ["dropped", "replicate"]
    assert "could not be registered" in history(directory)[0]["reason"]


def test_no_journal_without_the_research_loop(tmp_path):
    train(small_flags(tmp_path / "run", *TRIALS, "--steps", "8",
                      "--no-forward-research-loop-enabled"))  # fmt: skip
    assert history(tmp_path / "run") and not (tmp_path / "run" / "research").exists()


def test_a_promoted_overlay_holds_from_the_next_step(tmp_path, off, monkeypatch):
    promote_the_first(monkeypatch, then=Decision.KEEP)
    train(small_flags(tmp_path / "run", *TRIALS))
    rows = history(tmp_path / "run")
    commit = next(row for row in rows if row["event"] == "commit")
    factor = commit["overlay"]["lr_factor"]
    assert commit["step"] == 8 and factor != 1.0
    told = read_trials(tmp_path / "run" / "research")[0]["outcome"]
    assert told["step"] == 8 and told["decision"].startswith("promoted: significant")
    assert [row["event"] for row in rows] == [
        "replicate", "commit", "replicate", "replicate", "replicate", "kept",
    ]  # fmt: skip
    ours, theirs = curves(tmp_path / "run"), curves(off)
    assert ours[:8] == theirs[:8]
    for mine, other in zip(ours[8:], theirs[8:]):
        assert mine["lr"] == pytest.approx(factor * other["lr"])
    assert ours[9]["train_loss"] != theirs[9]["train_loss"]
    last = metrics_rows(tmp_path / "run")[-1]
    assert (last["uroboros_promotions"], last["uroboros_active_overlay_id"]) == (1, 1)


def test_a_dry_run_records_and_changes_nothing(tmp_path, off, monkeypatch):
    promote_the_first(monkeypatch, then=Decision.KEEP)
    train(small_flags(tmp_path / "run", *TRIALS, "--no-uroboros-patch-commit-enabled"))
    assert curves(tmp_path / "run") == curves(off)
    last = metrics_rows(tmp_path / "run")[-1]
    assert (last["uroboros_promotions"], last["uroboros_active_overlay_id"]) == (1, 0)


def test_without_memory_for_the_way_back_nothing_is_promoted(tmp_path, off, monkeypatch):
    promote_the_first(monkeypatch, then=Decision.KEEP)

    def starve(trainer, **_):
        raise MemoryError

    monkeypatch.setattr("training.overlay_trials.remember_run", starve)
    train(small_flags(tmp_path / "run", *TRIALS))
    rows = history(tmp_path / "run")
    assert [row["event"] for row in rows[:2]] == ["replicate", "not committed"]
    assert "commit" not in {row["event"] for row in rows}
    told = read_trials(tmp_path / "run" / "research")
    assert told[0]["outcome"]["decision"].startswith("not committed: no memory")
    last = metrics_rows(tmp_path / "run")[-1]
    assert (last["uroboros_promotions"], last["uroboros_active_overlay_id"]) == (0, 0)
    assert curves(tmp_path / "run") == curves(off)


def test_a_roll_back_restores_the_exact_state(tmp_path, off, monkeypatch):
    """The run ends as if nothing had ever been promoted."""
    promote_the_first(monkeypatch, then=Decision.ROLL_BACK)
    train(small_flags(tmp_path / "run", *TRIALS))
    rows = history(tmp_path / "run")
    commit = next(row for row in rows if row["event"] == "commit")
    back = next(row for row in rows if row["event"] == "rollback")
    assert back["state_sha256"] == commit["state_sha256"]
    assert (commit["step"], back["step"], back["to_step"]) == (8, 21, 8)
    assert without_feature(differences(tmp_path / "run", off)) == []
    assert curves(tmp_path / "run") == curves(off)
    assert metrics_rows(tmp_path / "run")[-1]["uroboros_rollbacks"] == 1
    assert (tmp_path / "run" / "metrics.orphan-1.jsonl").exists()


def test_a_roll_back_that_forgets_is_noticed(tmp_path, monkeypatch):
    """Negative control: the optimizer's state is left where it is."""
    promote_the_first(monkeypatch, then=Decision.ROLL_BACK)
    monkeypatch.setattr("training.optimizer.OptimizerSet.load_state_dict", lambda *_: None)
    train(small_flags(tmp_path / "run", *TRIALS))
    hashes = {row["state_sha256"] for row in history(tmp_path / "run") if "state_sha256" in row}
    assert len(hashes) == 2


def test_resumed_at_every_point_of_a_trial_a_commit_and_a_watch(ram_path, monkeypatch):
    promote_the_first(monkeypatch, then=Decision.ROLL_BACK)
    more = ("--engram-layers", "0", "--max-checkpoints", "100")
    flags = (*small_flags(ram_path, *UNTIMED, *more)[4:],)  # every_resume gives paths and steps
    for step, found in every_resume(ram_path, flags, steps=21):
        assert found == [], step


def test_resumed_just_before_a_roll_back(tmp_path, off, monkeypatch):
    promote_the_first(monkeypatch, then=Decision.ROLL_BACK)
    directory = tmp_path / "run"
    flags = small_flags(directory, *TRIALS)
    for step in (6, 14, 21):
        train(flags, features=(*FEATURES, stop_after(step, directory)))
    assert [row["event"] for row in history(directory)].count("rollback") == 0
    train(flags)
    assert without_feature(differences(directory, off)) == []
    assert [row["event"] for row in history(directory)].count("rollback") == 1


def test_a_stop_inside_the_other_arm_loses_nothing(tmp_path, on, monkeypatch):
    directory = tmp_path / "run"

    class StopInArm(stop_after(0, directory)):
        def after_step(self, ctx):
            if ctx.trials.in_other_arm and ctx.step == 14:
                (directory / "STOP").touch()
            return False

    train(small_flags(directory, *TRIALS), features=(*FEATURES, StopInArm))
    assert metrics_rows(directory)[-1]["step"] == 12
    train(small_flags(directory, *TRIALS))
    assert differences(on, directory) == []
    assert history(on) == history(directory)


def open_trainer(directory, *more):
    trainer = build_trainer(parse_args(small_flags(directory, *TRIALS, *more)))
    trainer.services.recorder.open(metrics_offset=None)
    trainer.features.run("on_setup", trainer.begin_step())
    for _ in range(3):
        trainer.train_step()
        trainer.rows.clear()
    return trainer


def fork(trainer, factor, **more):
    trials = trainer.services.trials
    trials.overlay, trials.in_other_arm = Overlay(lr_factor=factor), True
    try:
        return run_arm(trainer, steps=4, score=trials.score, keep=("uroboros",), **more)
    finally:
        trials.in_other_arm = False


def test_an_arm_equals_the_run_it_stands_for_and_is_undone(tmp_path):
    trainer = open_trainer(tmp_path / "run")
    before, place = hash_state(trainer), trainer.stream.state_dict()
    same, other, noisy = (
        fork(trainer, 1.0), fork(trainer, 2.0), fork(trainer, 1.0, seed=5)
    )  # fmt: skip
    assert hash_state(trainer) == before and trainer.stream.state_dict() == place
    for _ in range(4):
        trainer.train_step()
        trainer.rows.clear()
    trials = trainer.services.trials
    assert trials is not None
    own = trials.score(trainer.model)
    assert same.end == own  # the control, over the same batches and random numbers
    assert other.end != own and noisy.end != own
    for part in trainer._parts():
        part.close()


def test_an_arm_that_diverges_or_finds_no_memory_leaves_the_run_alone(tmp_path, monkeypatch):
    trainer = open_trainer(tmp_path / "run")
    before, update = hash_state(trainer), type(trainer).update

    def poison(self, ctx, position):
        next(iter(self.model.parameters())).grad.fill_(math.nan)
        return update(self, ctx, position)

    monkeypatch.setattr(type(trainer), "update", poison)
    assert fork(trainer, 1.0).outcome is ArmEnd.DIVERGED
    assert hash_state(trainer) == before and trainer.guard.skipped == []

    def starve(self, ctx, position):
        update(self, ctx, position)
        raise MemoryError

    monkeypatch.setattr(type(trainer), "update", starve)
    assert fork(trainer, 1.0).outcome is ArmEnd.NO_MEMORY
    assert hash_state(trainer) == before
    for part in trainer._parts():
        part.close()


def test_a_candidate_whose_arm_diverges_is_dropped(tmp_path, off, monkeypatch):
    def diverge(trainer, **more):
        arm = run_arm(trainer, **more)
        arm.outcome = ArmEnd.DIVERGED
        return arm

    monkeypatch.setattr("training.overlay_trials.run_arm", diverge)
    args = small_flags(tmp_path / "run", *TRIALS)
    train(args)
    rows = history(tmp_path / "run")
    assert {row["event"] for row in rows} == {"dropped"} and len(rows) > 2
    assert curves(tmp_path / "run") == curves(off)


def test_placebo_arms_differ_by_their_random_numbers_alone(tmp_path, off):
    train(small_flags(tmp_path / "run", *TRIALS, "--uroboros-placebo"))
    assert curves(tmp_path / "run") == curves(off)
    assert all(row["difference"] != 0.0 for row in history(tmp_path / "run"))


def test_arms_shorten_towards_the_end_but_not_below_four_steps(tmp_path):
    train(small_flags(tmp_path / "run", *TRIALS, "--uroboros-trial-horizon-steps", "12",
                      "--steps", "17"))  # fmt: skip
    assert [(row["begun"], row["step"]) for row in history(tmp_path / "run")] == [(4, 16)]
    shutil.rmtree(tmp_path / "run")
    train(small_flags(tmp_path / "run", *TRIALS, "--uroboros-trial-horizon-steps", "12",
                      "--steps", "9"))  # fmt: skip
    assert [(row["begun"], row["step"]) for row in history(tmp_path / "run")] == [(4, 9)]


def test_the_feature_gone_is_the_feature_off(tmp_path, off):
    others = tuple(feature for feature in FEATURES if feature is not UroborosFeature)
    train(small_flags(tmp_path / "run", *OFF), features=others)
    assert without_feature(differences(tmp_path / "run", off)) == []
    assert curves(tmp_path / "run") == curves(off)


def test_other_state_that_a_step_moves_is_put_back(tmp_path):
    """Averages, routing, credit and optimizer of a run with everything on."""
    more = (
        "--optimizer", "c3o", "--c3o-credit-enabled", "--c3o-probe-interval", "2",
        "--c3o-credit-speed-weight", "0", "--ema-enabled", "--ema-start-fraction", "0.1",
        "--n-routed-experts", "4", "--moe-top-k", "2", "--router-jitter-noise", "0.05",
        "--d-ff", "24",
    )  # fmt: skip
    train(small_flags(tmp_path / "on", *TRIALS, *more, "--steps", "13"))
    train(small_flags(tmp_path / "off", *OFF, *more, "--steps", "13"))
    assert without_feature(differences(tmp_path / "on", tmp_path / "off")) == []
    assert curves(tmp_path / "on") == curves(tmp_path / "off")


def test_replicates_are_what_the_search_decides_by(on):
    """The recorded figures are those of the search, fed with the recorded differences."""
    search = Uroboros(SearchSettings())
    for row in history(on):
        if search.open is None:
            search.open_candidate(Overlay.from_dict(row["overlay"]), random.Random(0))
        spikes = tuple(row["spikes"])
        verdict = search.observe(
            Replicate(difference=row["difference"], control=row["control"], spikes=spikes)
        )
        assert (verdict.e_value, verdict.decision.value) == (row["e_value"], row["decision"])
