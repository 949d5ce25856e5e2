"""A whole run with short memory, a full disk, or a step that never ends."""

import errno
import json
import os
import threading

import pytest
import torch

import training.build
from tests.integration.runs import differences, metrics_rows, newest_checkpoint, tiny_flags, train
from training.build import build_trainer
from training.config.cli import parse_args
from training.runtime.memory_guard import MemoryLimitReached, Reading

FLAGS = ("--steps", "6", "--save-interval", "4", "--eval-interval", "0", "--sample-interval", "0")


def pressed_trainer(directory, shares, *flags):
    """A trainer that reads a scripted share of memory at each of its steps, then 0."""
    trainer = build_trainer(parse_args(tiny_flags(directory, *FLAGS, *flags)))
    guard, script = trainer.services.memory, list(shares)

    def read():
        step = min(trainer.step, len(script))
        share = script[step - 1] if trainer.step <= len(script) else 0.0
        return [Reading(name="RAM", used=int(share * 1000), limit=1000)]

    guard._read, guard._clear = read, lambda: None
    guard._now = lambda: 100.0 * trainer.step
    guard._next_check = guard._next_measure = 0.0
    return trainer


def test_smaller_micro_batches_train_the_same_step(tmp_path):
    """Equal effective batch: rows 2 -> 1 after step 2, and every step still sees all its rows."""
    pressed_trainer(tmp_path / "run", [0.92, 0.92, 0.5], "--dropout", "0").fit()
    rows = metrics_rows(tmp_path / "run")
    assert [row["micro_batch_rows"] for row in rows[1:]] == [2, 2, 1, 1, 1, 1]
    assert [row["memory_guard_stage"] for row in rows[1:]] == [0, 1, 3, 0, 0, 0]
    train(tiny_flags(tmp_path / "plain", *FLAGS, "--dropout", "0"))
    plain = metrics_rows(tmp_path / "plain")
    for ours, theirs in zip(rows[1:], plain[1:], strict=True):
        assert ours["tokens_total"] == theirs["tokens_total"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=2e-2)


def test_above_the_hard_limit_the_run_is_saved_and_ends_with_a_report(tmp_path):
    directory = tmp_path / "run"
    with pytest.raises(MemoryLimitReached, match="saved at step 3"):
        pressed_trainer(directory, [0.5, 0.5, 0.99]).fit()
    assert newest_checkpoint(directory).name == "checkpoint_step_00000003"
    crash = json.loads(next((directory / "errors").glob("*.json")).read_text(encoding="utf-8"))
    assert crash["error"]["type"].endswith("MemoryLimitReached") and crash["step"] == 3
    train(tiny_flags(directory, *FLAGS))
    train(tiny_flags(tmp_path / "plain", *FLAGS))
    assert differences(tmp_path / "plain", directory) == []


def test_a_full_disk_costs_no_step(tmp_path):
    """Saves fail for a while; training goes on, and what is saved later is what it would be."""
    trainer = build_trainer(parse_args(tiny_flags(tmp_path / "run", *FLAGS)))
    ops = trainer.services.store._ops
    create, full = ops.create, threading.Event()
    full.set()

    def failing_create(path):
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(path)

    ops.create = failing_create
    trainer.services.saves._sleep = lambda seconds: full.clear()
    trainer.fit()
    train(tiny_flags(tmp_path / "plain", *FLAGS))
    assert differences(tmp_path / "plain", tmp_path / "run") == []


@pytest.mark.parametrize("largest", [2, 0])
def test_an_evaluation_without_memory_costs_no_run(tmp_path, monkeypatch, largest):
    """More than `largest` rows do not fit; the figure is that of a run with memory, or missing."""

    def evaluate(model, batches, *, measure=training.build.evaluate_bpb, **named):
        def fitting():
            for batch in batches:
                if len(batch.input_ids) > largest:
                    raise torch.OutOfMemoryError("CUDA out of memory")
                yield batch

        return measure(model, fitting(), **named)

    flags = (*FLAGS, "--eval-interval", "3", "--eval-tokens", "320")
    train(tiny_flags(tmp_path / "plain", *flags))
    monkeypatch.setattr("training.build.evaluate_bpb", evaluate)
    train(tiny_flags(tmp_path / "run", *flags))
    ours, theirs = (metrics_rows(tmp_path / name) for name in ("run", "plain"))
    for row, other in zip(ours[1:], theirs[1:], strict=True):
        assert row["train_loss"] == other["train_loss"]
        if other["eval_bpb"] is None or not largest:
            assert row["eval_bpb"] is None
        else:
            assert row["eval_bpb"] == pytest.approx(other["eval_bpb"], rel=1e-6)
    assert any(row["eval_bpb"] is not None for row in theirs[1:])


def test_a_step_that_never_ends_leaves_its_stacks(tmp_path):
    flags = (*FLAGS, "--hang-timeout-sec", "0.2")
    trainer = build_trainer(parse_args(tiny_flags(tmp_path / "run", *flags)))
    forward, found, calls = trainer.forward, threading.Event(), []
    trainer.services.watchdog._say = lambda message: found.set()

    def hanging_forward(ctx):
        calls.append(ctx.step)
        if len(calls) == 3:
            found.clear()
            assert found.wait(60.0)
        forward(ctx)

    trainer.forward = hanging_forward
    trainer.fit()
    dumps = list((tmp_path / "run" / "errors").glob("hang_step_*.txt"))
    assert any("hanging_forward" in path.read_text(encoding="utf-8") for path in dumps)
    assert metrics_rows(tmp_path / "run")[-1]["step"] == 6
