"""Whole runs under their guards: nothing hidden steers, nothing tampered or idle passes."""

import json

import pytest

import train_sigma
from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from training.features import FEATURES
from training.features.base import Feature, Schedule
from training.integrity_guards import MANIFEST_NAME, TamperedSource

TOKEN = "hf_PlantedAndSecret"
SHORT = ("--steps", "12", "--save-interval", "4", "--no-ema-enabled", "--no-curriculum-enabled")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same run with a hidden evaluation and without one."""
    root = tmp_path_factory.mktemp("hidden")
    secret = ("--hf-token", TOKEN)
    train(tiny_flags(root / "with", *SHORT, *secret, "--integrity-hidden-eval-every", "1"))
    train(tiny_flags(root / "without", *SHORT))
    return root / "with", root / "without"


def test_hidden_figures_reach_the_rows_and_nothing_else(pair):
    measured, plain = pair
    rows = {row["step"]: row for row in metrics_rows(measured)}
    assert [rows[s]["hidden_eval_step"] for s in (4, 7, 8, 11, 12)] == [None, None, 4, 4, 12]
    last = rows[12]
    assert last["hidden_eval_n"] == 200
    assert last["hidden_eval_ci_low"] < last["hidden_eval_pass"] < last["hidden_eval_ci_high"]
    assert last["integrity_guards_enabled"] == last["integrity_source_match"] == 1
    # Write-only: weights, optimizer, features, stream and losses are the same to the bit.
    found = differences(measured, plain)
    assert [name for name in found if not name.startswith("row")] == []
    for one, two in zip(metrics_rows(measured)[1:], metrics_rows(plain)[1:], strict=True):
        assert one["train_loss"] == two["train_loss"] and one["grad_norm"] == two["grad_norm"]
        assert one.keys() == two.keys()


def test_the_token_is_in_no_file_of_a_run(pair):
    files = [path for path in pair[0].rglob("*") if path.is_file()]
    assert {"config.json", MANIFEST_NAME, "metrics.jsonl"} <= {path.name for path in files}
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_a_user_can_ask_for_it(pair, capsys):
    measured, _ = pair
    flags = ["--mode", "eval", "--hidden", *tiny_flags(measured)]
    assert train_sigma.main([*flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    last = metrics_rows(measured)[-1]
    assert answer["hidden_eval_pass"] == last["hidden_eval_pass"]
    assert answer["checkpoint_step"] == 12 and answer["chance"] == 0.25
    assert train_sigma.main(flags) == 0
    assert "of 200 hidden questions answered rightly" in capsys.readouterr().out


def test_a_resumed_run_has_the_rows_of_an_uninterrupted_one(pair, tmp_path):
    """Stopped while the evaluation of step 4 is under way."""
    measured, _ = pair
    flags = tiny_flags(tmp_path / "run", *SHORT, "--integrity-hidden-eval-every", "1")
    train(flags, features=(*FEATURES, stop_after(5, tmp_path / "run")))
    (tmp_path / "run" / "STOP").unlink(missing_ok=True)
    train(flags)
    assert differences(tmp_path / "run", measured) == []


def test_tampering_during_the_run_ends_it_with_everything_saved(tmp_path, monkeypatch):
    import training.integrity_guards as guards

    real, calls = guards.fingerprint_files, []

    def tampered(root):
        calls.append(root)
        return real(root) | ({"model/mla.py": "0" * 64} if len(calls) == 3 else {})

    monkeypatch.setattr(guards, "fingerprint_files", tampered)
    with pytest.raises(TamperedSource, match=r"model/mla.py was changed"):
        train(tiny_flags(tmp_path / "run", *SHORT))
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_step_00000008").is_dir()
    assert list((tmp_path / "run" / "errors").glob("crash_step_00000008_*.json"))
    monkeypatch.undo()
    train(tiny_flags(tmp_path / "run", *SHORT))
    assert metrics_rows(tmp_path / "run")[-1]["step"] == 12


def test_resuming_with_another_program_is_refused_before_anything_is_written(tmp_path, capsys):
    flags = tiny_flags(tmp_path / "run", *SHORT)
    train([*flags, "--steps", "4"])
    path = tmp_path / "run" / MANIFEST_NAME
    document = json.loads(path.read_text(encoding="utf-8"))
    document["files"]["model/moe.py"] = "1" * 64
    path.write_text(json.dumps(document), encoding="utf-8")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    assert train_sigma.main(flags) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "model/moe.py was changed" in error
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before
    assert train_sigma.main([*flags, "--no-strict-runtime-audit"]) == 0
    assert metrics_rows(tmp_path / "run")[-1]["integrity_source_match"] == 0
    assert train_sigma.main([*flags, "--no-resume"]) == 0
    assert metrics_rows(tmp_path / "run")[-1]["integrity_source_match"] == 1


class Late(Feature):
    name = "late"

    @classmethod
    def schedule(cls, config):
        return Schedule(start_step=100)


def test_too_few_steps_are_refused_before_anything_is_written(tmp_path):
    flags = tiny_flags(tmp_path / "run", *SHORT)
    with pytest.raises(RuntimeError, match=r"--steps 12 .* late \(needs 100\)"):
        train([*flags, "--strict-feature-usage"], features=(Late,))
    assert not (tmp_path / "run").exists()
    with pytest.raises(RuntimeError, match=r"proof mode: .* late"):
        train([*flags, "--proof-mode"], features=(Late,))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--integrity-hidden-eval-manifest", "gone.json"], "--integrity-hidden-eval-manifest"),
        (["--integrity-hidden-eval-tasks", "900"], "--integrity-hidden-eval-tasks 900"),
        (["--integrity-hidden-eval-tasks", "100"], "must be at least 200"),
        (["--mode", "eval", "--hidden", "--eval-file", "x.txt"], "--hidden and --eval-file"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(tmp_path, capsys, flags, says):
    every = ("--integrity-hidden-eval-every", "1")
    assert train_sigma.main([*tiny_flags(tmp_path / "run", *every), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
