"""The feature in whole runs: guard, evidence, exact resume, nothing when off, nothing leaks in."""

import ast
from pathlib import Path

import pytest

from tests.integration.runs import differences, metrics_rows, stop_after, tiny_flags, train
from tests.test_architecture import imported_names, is_within
from training.config.cli import parse_args
from training.config.sigma_config import ConfigError
from training.credit_signal import CreditSignal
from training.features import FEATURES

ROOT = Path(__file__).resolve().parents[3]
C3O = (
    "--optimizer", "c3o", "--c3o-credit-enabled", "--c3o-probe-interval", "3",
    "--c3o-block-size", "512", "--probe-batches", "4", "--c3o-credit-speed-weight", "0",
    "--steps", "12", "--save-interval", "5", "--lr", "0.02", "--adam-lr", "0.01",
)  # fmt: skip
METRICS = {
    "c3o_credit_signal", "c3o_credit_centered", "c3o_loss_gain", "c3o_speed_gain",
    "c3o_block_scale_mean", "c3o_block_scale_std", "c3o_block_scaling_batches",
    "c3o_block_scaling_skipped", "c3o_step_elements", "c3o_update_norm",
    "c3o_trust_exact_recompute", "c3o_trust_norm_skipped", "c3o_foreach_groups",
    "c3o_grad_clip_foreach_groups", "c3o_probe_steps", "probe_loss",
}  # fmt: skip


def test_credit_with_another_optimizer_is_refused():
    with pytest.raises(RuntimeError, match=r"^c3o credit is enabled but optimizer is not 'c3o'"):
        parse_args(["--c3o-credit-enabled", "--optimizer", "muon"])
    with pytest.raises(ConfigError):  # and it is a user's mistake like any other
        parse_args(["--c3o-credit-enabled", "--optimizer", "adamw"])


@pytest.mark.parametrize("flag", ["--c3o-credit-enabled", "--probe-held-out"])
def test_a_backend_without_probe_text_is_refused(flag):
    with pytest.raises(ConfigError, match=rf"{flag} .*--data-backend embedded"):
        parse_args(["--optimizer", "c3o", flag, "--data-backend", "local", "--local-path", "x"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_flags(directory, *C3O))
    return directory


def test_every_column_is_there_and_counts_effects(whole):
    rows = metrics_rows(whole)[1:]
    assert all(METRICS <= row.keys() for row in rows)
    # Probes at steps 1, 4, 7 and 10; factors hold from the step after the first.
    assert [row["c3o_probe_steps"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert rows[-1]["feature_c3o_credit_effective_calls"] == 11
    assert rows[-1]["c3o_block_scaling_batches"] + rows[-1]["c3o_block_scaling_skipped"] == 4
    assert all(abs(row["c3o_block_scale_mean"] - 1.0) < 1e-3 for row in rows)
    assert rows[-1]["c3o_block_scale_std"] > 0.0
    assert rows[-1]["c3o_step_elements"] > 10_000
    assert all(row["c3o_update_norm"] > 0.0 for row in rows)


def test_a_stopped_run_resumes_to_the_bit(whole, tmp_path):
    directory = tmp_path / "run"
    for step in (2, 6):
        train(tiny_flags(directory, *C3O), features=(*FEATURES, stop_after(step, directory)))
    train(tiny_flags(directory, *C3O))
    assert differences(whole, directory) == []


def test_off_is_the_run_without_the_feature(tmp_path):
    """With the same text held out, the feature off and the feature not there are one run."""
    off = (*C3O, "--no-c3o-credit-enabled", "--probe-held-out")
    others = tuple(feature for feature in FEATURES if feature.name != "c3o_credit")
    train(tiny_flags(tmp_path / "off", *off))
    train(tiny_flags(tmp_path / "absent", *off), features=others)
    rows = [metrics_rows(tmp_path / name)[1:] for name in ("off", "absent")]
    for name in ("train_loss", "grad_norm", "eval_bpb"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]
    found = differences(tmp_path / "off", tmp_path / "absent")
    assert [name for name in found if not name.startswith(("row", "features"))] == []


def test_the_placebo_is_another_run_with_the_same_probes(whole, tmp_path):
    train(tiny_flags(tmp_path / "run", *C3O, "--c3o-credit-shuffled"))
    real, placebo = metrics_rows(whole)[1:], metrics_rows(tmp_path / "run")[1:]
    assert real[0]["train_loss"] == placebo[0]["train_loss"]
    assert real[-1]["train_loss"] != placebo[-1]["train_loss"]
    assert placebo[-1]["c3o_block_scale_std"] > 0.0


DECIDES = ("credit", "probe", "optim/c3o", "optim/c3o_bases", "optim/c3o_build", "optim/trust")
FORBIDDEN = (
    "time", "training.credit_signal", "training.hidden_eval", "training.hidden_process",
    "training.evaluation", "training.runtime", "training.run_services", "training.report",
)  # fmt: skip


def leaks(path, source):
    tree = ast.parse(source)
    return [name for _, name in imported_names(tree, path=path) if is_within(name, FORBIDDEN)]


def test_no_speed_and_no_reported_loss_enters_the_credit():
    for name in DECIDES:
        path = f"training/{name}.py"
        assert leaks(path, (ROOT / path).read_text(encoding="utf-8")) == [], path
    assert leaks("training/credit.py", "from training.evaluation import evaluate_bpb")
    assert leaks("training/credit.py", "import time")


def test_the_feature_hands_the_signal_to_the_log_only():
    """What reaches the control in the feature's code: gradients and losses of the probe."""
    source = (ROOT / "training/features/c3o_credit.py").read_text(encoding="utf-8")
    calls = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and "control." in ast.unparse(node.func)
    ]
    calls = [call for call in calls if call.args or call.keywords]
    calls = [call for call in calls if ast.unparse(call.func) != "control.active.to"]
    assert [ast.unparse(call.func) for call in calls] == ["control.finish_probe"]
    names = {n.id for call in calls for n in ast.walk(call) if isinstance(n, ast.Name)}
    assert names == {"ctx", "control", "probe", "model", "batch", "gradients"}


def test_the_logged_signal_is_the_clipped_weighted_sum():
    moments = iter([0.0, 1.0, 2.0, 2.5])
    signal = CreditSignal(
        loss_weight=0.5, speed_weight=0.2, beta=0.9, clip=0.4, now=lambda: next(moments)
    )
    for _ in range(4):
        signal.tick()
    assert signal.speed_gain == pytest.approx(1.0)  # the last step took half the average time
    signal.observe(0.1)
    assert signal.value == pytest.approx(0.25) and signal.centred == pytest.approx(0.25)
    signal.observe(5.0)
    assert signal.value == 0.4 and signal.centred == pytest.approx(0.4 - 0.025)
