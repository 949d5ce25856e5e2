"""Suite R20: a step that runs out of memory becomes the step of a run with smaller micro-batches.

The oracle is another run of the same program that was configured so from the start, or whose
micro-batches were made smaller before the step in question; every tensor, row and the position in
the data must agree to the last bit.
"""

import json

import pytest
import torch

import training.data
import training.sigma_trainer
from tests.integration.runs import (
    REPLAY,
    differences,
    metrics_rows,
    newest_checkpoint,
    tiny_flags,
)
from training.build import build_trainer
from training.config.cli import parse_args
from training.features import FEATURES
from training.features.base import Feature, Schedule
from training.micro_batch import MicroBatchPlan
from training.runtime.memory_guard import is_out_of_memory

FLAGS = (
    "--steps", "9", "--save-interval", "3", "--batch-size", "4", "--grad-accum-steps", "1",
    "--dropout", "0.1", "--router-jitter-noise", "0.05", "--eval-interval", "0",
    "--ema-start-fraction", "0.3", *REPLAY, "--replay-inject-every", "1",
    "--causal-replay-propensity", "0.8",
)  # fmt: skip
BEFORE_UPDATE = ("data", "move", "on_batch", "forward", "on_losses", "backward", "before_optim")
IN_UPDATE = ("clip", "optimizer", "after_optimizer_step", "after_step")


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Failing(Feature):
    """Last of the features: what the others did in the phase must be undone."""

    name = "failing"
    phase, step, done = "", 0, False

    @classmethod
    def schedule(cls, config):
        return Schedule()

    def _maybe_fail(self, phase, ctx):
        if ctx.step == self.step and phase == self.phase and not type(self).done:
            type(self).done = True
            out_of_memory()
        return False

    def on_batch(self, ctx):
        return self._maybe_fail("on_batch", ctx)

    def on_losses(self, ctx):
        if ctx.micro == 0 and ctx.batch.input_ids.numel() > 64 and self.phase == "backward":
            ctx.losses["lm"].register_hook(lambda grad: self._maybe_fail("backward", ctx) or None)
        return self._maybe_fail("on_losses", ctx)

    def before_optim(self, ctx):
        return self._maybe_fail("before_optim", ctx)

    def after_step(self, ctx):
        return self._maybe_fail("after_step", ctx)


def failing_class(phase, step):
    return type("FailingOnce", (Failing,), {"phase": phase, "step": step})


def fail_once(target, name, when):
    """Let the call of `target.name` for which `when()` is first true run out of memory."""
    original, done = getattr(target, name), []

    def call(*args, **kwargs):
        if not done and when():
            done.append(True)
            original(*args, **kwargs)  # what it did before it failed must be undone as well
            out_of_memory()
        return original(*args, **kwargs)

    setattr(target, name, call)


def run_with_failure(directory, phase, step, monkeypatch, *, flags=FLAGS):
    """Train with one failed allocation; the trainer afterwards."""
    trainer = build_trainer(
        parse_args(tiny_flags(directory, *flags)), features=(*FEATURES, failing_class(phase, step))
    )

    def when():
        return trainer.step == step - 1

    if phase == "data":
        with monkeypatch.context() as patch:
            patch.setattr(training.data, "to_batch", training.data.to_batch)
            fail_once(training.data, "to_batch", when)
            trainer.fit()
        return trainer
    elif phase == "move":
        with monkeypatch.context() as patch:
            patch.setattr(training.sigma_trainer, "move_batch", training.sigma_trainer.move_batch)
            fail_once(training.sigma_trainer, "move_batch", when)
            trainer.fit()
        return trainer
    elif phase == "forward":
        fail_once(trainer, "forward", when)
    elif phase == "clip":
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", torch.nn.utils.clip_grad_norm_)
            fail_once(torch.nn.utils, "clip_grad_norm_", when)
            trainer.fit()
        return trainer
    elif phase == "optimizer":
        fail_once(trainer.optimizer.parts[0], "step", when)
    elif phase == "after_optimizer_step":
        fail_once(trainer.model, "after_optimizer_step", when)
    trainer.fit()
    return trainer


def run_split_from(directory, step, *, flags=FLAGS):
    """The oracle: micro-batches are halved between two steps, before `step`."""
    trainer = build_trainer(
        parse_args(tiny_flags(directory, *flags)), features=(*FEATURES, failing_class("", 0))
    )
    begin = trainer.begin_step

    def begin_step():
        if trainer.step + 1 == step and trainer.plan.split == 1:
            trainer.plan.halve()
        return begin()

    trainer.begin_step = begin_step
    trainer.fit()


def compared(first, second):
    """`differences` without the note of how rows were configured and split."""
    return [name for name in differences(first, second) if "micro_batch" not in name]


@pytest.fixture(scope="module")
def configured_small(tmp_path_factory):
    """A run with the smaller micro-batches in its flags."""
    directory = tmp_path_factory.mktemp("configured") / "run"
    flags = (*FLAGS, "--batch-size", "2", "--grad-accum-steps", "2")
    build_trainer(
        parse_args(tiny_flags(directory, *flags)), features=(*FEATURES, failing_class("", 0))
    ).fit()
    return directory


@pytest.mark.parametrize("phase", BEFORE_UPDATE)
def test_out_of_memory_in_the_first_step_equals_a_run_configured_so(
    tmp_path, monkeypatch, phase, configured_small
):
    run_with_failure(tmp_path / "run", phase, 1, monkeypatch)
    assert compared(configured_small, tmp_path / "run") == []


@pytest.fixture(scope="module")
def split_from(tmp_path_factory):
    """Oracle runs by the first step with smaller micro-batches."""
    runs = {}

    def get(step):
        if step not in runs:
            runs[step] = tmp_path_factory.mktemp("oracle") / "run"
            run_split_from(runs[step], step)
        return runs[step]

    return get


@pytest.mark.parametrize("phase", BEFORE_UPDATE)
def test_out_of_memory_before_the_update_replays_that_step(
    tmp_path, monkeypatch, phase, split_from
):
    run_with_failure(tmp_path / "run", phase, 6, monkeypatch)
    assert compared(split_from(6), tmp_path / "run") == []
    assert metrics_rows(tmp_path / "run")[-1]["micro_batch_rows"] == 2


@pytest.mark.parametrize("phase", IN_UPDATE)
def test_out_of_memory_in_the_update_goes_back_to_the_checkpoint(
    tmp_path, monkeypatch, phase, split_from
):
    run_with_failure(tmp_path / "run", phase, 6, monkeypatch)
    assert compared(split_from(4), tmp_path / "run") == []


def test_a_resumed_run_keeps_the_smaller_micro_batches(tmp_path, monkeypatch, split_from):
    directory = tmp_path / "run"
    run_with_failure(directory, "forward", 6, monkeypatch, flags=(*FLAGS, "--steps", "7"))
    saved = json.loads((newest_checkpoint(directory) / "state.json").read_text(encoding="utf-8"))
    assert saved["run"]["micro_batch"] == {"split": 2}
    trainer = build_trainer(parse_args(tiny_flags(directory, *FLAGS, "--steps", "8")))
    trainer.fit()
    assert trainer.plan.rows == 2


@pytest.mark.parametrize("broken", ["rng", "stream", "features", "model"])
def test_what_is_not_undone_is_noticed(tmp_path, monkeypatch, broken, split_from):
    """Negative control: the comparison sees each part of the replay that is left out."""
    target = {
        "rng": "training.sigma_trainer.restore_rng_state",
        "stream": "training.micro_batch.StepRows.rewind",
        "features": "training.features.base.FeatureSet.rewind",
        "model": "model.sigma_llm.SigmaTrunk.discard_step",
    }[broken]
    phase = "before_optim" if broken == "features" else "backward"
    monkeypatch.setattr(target, lambda *args, **kwargs: None)
    step = 1 if broken == "features" else 6
    run_with_failure(tmp_path / "run", phase, step, monkeypatch)
    assert compared(split_from(step), tmp_path / "run") != []


def test_one_row_that_is_too_much_ends_with_advice(tmp_path, monkeypatch):
    flags = (*FLAGS, "--batch-size", "1")
    with pytest.raises(torch.OutOfMemoryError):
        run_with_failure(tmp_path / "run", "forward", 2, monkeypatch, flags=flags)
    crash = next((tmp_path / "run" / "errors").glob("crash_*.json")).read_text(encoding="utf-8")
    assert "one row per micro-batch is too much: lower --seq-len" in crash


def test_an_update_without_memory_before_any_checkpoint_ends_with_advice(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="--batch-size if memory ran out"):
        run_with_failure(tmp_path / "run", "optimizer", 1, monkeypatch)


def test_halving_ends_where_rows_are_odd():
    plan = MicroBatchPlan(batch_size=12, accumulation=3)
    plan.halve()
    plan.halve()
    assert (plan.rows, plan.num_micro_batches, plan.can_halve) == (3, 12, False)
    with pytest.raises(ValueError, match="3 rows"):
        plan.halve()


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: "
                      "you tried to allocate 8 bytes"), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
         True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("size mismatch"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)  # fmt: skip
def test_what_counts_as_short_memory(error, short):
    assert is_out_of_memory(error) is short


def test_the_cpu_allocator_says_what_is_looked_for():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45, dtype=torch.float64)
    assert is_out_of_memory(caught.value)
