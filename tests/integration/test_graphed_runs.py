"""`--cuda-graphs on` in whole runs: the same run to the bit, over stops, curricula, short memory.

Graphs are emulated (tests/training/graph_emulator.py); everything else is the program.
"""

import pytest

import model.attention
import training.build
from tests.integration.runs import (
    checkpoint_differences,
    metrics_rows,
    newest_checkpoint,
    stop_after,
    tiny_flags,
    train,
)
from tests.integration.test_out_of_memory import run_split_from, run_with_failure
from tests.training.graph_emulator import EmulatedGraphs
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.features import FEATURES
from training.features.base import Feature
from training.runtime.environment import EnvironmentProblem

STEPS = 24
FLAGS = (
    "--n-routed-experts", "0", "--moe-top-k", "1", "--instant-mode", "off", "--dropout", "0.1",
    "--steps", str(STEPS), "--save-interval", str(STEPS), "--eval-interval", "8",
)  # fmt: skip
ON = (*FLAGS, "--cuda-graphs", "on")
CURVES = ("train_loss", "grad_norm", "lr", "eval_bpb", "loss_ema", "diff_attn_lambda_mean")


@pytest.fixture(autouse=True)
def emulated_graphs(monkeypatch):
    monkeypatch.setattr(training.build, "CudaGraphs", lambda device: EmulatedGraphs())
    monkeypatch.setattr(training.build, "require_cuda_graphs", lambda config, device: None)
    monkeypatch.setattr(model.attention, "may_read", lambda values: False)


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """The run without graphs."""
    directory = tmp_path_factory.mktemp("ordinary") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.attention, "may_read", lambda values: False)
        train(tiny_flags(directory, *FLAGS))
    return directory


def compared(first, second):
    """Tensors, position in the data and steps of curves in which two runs differ."""
    ours, theirs = ({r["step"]: [r.get(n) for n in CURVES] for r in metrics_rows(d)[1:]}
                    for d in (first, second))  # fmt: skip
    rows = [step for step in {*ours, *theirs} if ours.get(step) != theirs.get(step)]
    found = checkpoint_differences(newest_checkpoint(first), newest_checkpoint(second), rows=rows)
    return [name for name in found if "micro_batch" not in name]


def test_a_run_by_graphs_is_the_run_without(tmp_path, ordinary):
    """With dropout, two micro-batches a step, n-gram memory, EMA and a curriculum of 3 lengths."""
    train(tiny_flags(tmp_path / "run", *ON))
    assert compared(ordinary, tmp_path / "run") == []
    last = metrics_rows(tmp_path / "run")[-1]
    assert last["cuda_graph_captures"] == 6  # two of each length
    assert last["cuda_graph_replays"] == 2 * STEPS - 3 * 4


def test_stopped_and_resumed_by_graphs(tmp_path, ordinary):
    directory = tmp_path / "run"
    args = tiny_flags(directory, *ON)
    train(args, features=(*FEATURES, stop_after(13, directory)))
    train(args)
    assert compared(ordinary, directory) == []
    assert metrics_rows(directory)[-1]["cuda_graph_replays"] > 0


@pytest.mark.parametrize("phase", ["forward", "before_optim"])
def test_short_memory_is_answered_with_smaller_graphs(tmp_path, monkeypatch, phase):
    small = ("--batch-size", "4", "--grad-accum-steps", "1", "--no-curriculum-enabled",
             "--steps", "9", "--save-interval", "3", "--eval-interval", "0")  # fmt: skip
    run_split_from(tmp_path / "oracle", 6, flags=(*FLAGS, *small))
    flags = (*ON, *small)
    run_with_failure(tmp_path / "run", phase, 6, monkeypatch, flags=flags)
    assert compared(tmp_path / "oracle", tmp_path / "run") == []
    last = metrics_rows(tmp_path / "run")[-1]
    assert last["micro_batch_rows"] == 2 and last["cuda_graph_captures"] == 3


def test_without_a_cuda_device_the_flag_is_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(EnvironmentProblem, match=r"--cuda-graphs on.*on the cpu.*cuda-graphs off"):
        train(tiny_flags(tmp_path / "run", *ON))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "mend"),
    [
        (("--torch-compile",), "--no-torch-compile"),
        (("--instant-mode", "compress"), "--instant-mode off"),
        (("--causal-replay-enabled", "--verifier-math-enabled"), "--no-causal-replay-enabled"),
        (("--fractal-arch-search",), "drop --fractal-arch-search"),
        (("--n-routed-experts", "4"), "--kernel-backend triton"),
        (("--n-routed-experts", "4", "--kernel-backend", "triton", "--quant-mode", "none"),
         "--quant-mode bitnet_1_58"),
        (("--n-routed-experts", "4", "--kernel-backend", "triton", "--moe-dispatch-mode", "packed"),
         "--moe-dispatch-mode grouped"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused_with_its_mend(tmp_path, flags, mend):
    args = tiny_flags(tmp_path, *ON, *flags)
    with pytest.raises(ConfigError, match=r"--cuda-graphs on captures") as refusal:
        parse_args(args)
    assert mend in str(refusal.value) and "\n" not in str(refusal.value)
    parse_args([*args, "--cuda-graphs", "off"])


def test_every_feature_that_adds_a_loss_is_among_the_refused():
    adding = {feature.name for feature in FEATURES if feature.on_losses is not Feature.on_losses}
    assert adding == {"causal_replay"}


def test_automatic_instant_is_off_under_graphs(tmp_path):
    args = tiny_flags(tmp_path, *ON)
    assert parse_args([*args, "--instant-mode", "auto"]).instant_mode() == "off"
