"""NaN in loss, gradient or weights: caught in its step, weights stay finite, no good step lost."""

import json

import pytest
from safetensors.torch import load_file

from tests.integration.runs import differences, metrics_rows, newest_checkpoint, tiny_flags
from training.build import build_trainer
from training.config.cli import parse_args

FLAGS = ("--steps", "12", "--save-interval", "2", "--grad-accum-steps", "1")


def poisoned_trainer(directory, poison, *, at_calls, flags=FLAGS):
    """A trainer whose forward is spoiled at the given calls (counted from 1)."""
    trainer = build_trainer(parse_args(tiny_flags(directory, *flags)), features=())
    forward, calls = trainer.forward, [0]

    def spoiled(ctx):
        forward(ctx)
        calls[0] += 1
        if calls[0] in at_calls:
            poison(trainer, ctx)

    trainer.forward = spoiled
    return trainer


def poison_loss(trainer, ctx):
    ctx.losses["lm"] = ctx.losses["lm"] * float("nan")


def poison_gradient(trainer, ctx):
    ctx.losses["extra"] = (trainer.model.embed.weight[:1] * float("inf")).sum() * 0.0


def poison_weights(trainer, ctx):
    trainer.model.final_norm.weight.data.fill_(float("nan"))  # unseen by autograd's versions


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
@pytest.mark.parametrize("call", [1, 5])
def test_one_bad_batch_is_skipped_and_nothing_else(tmp_path, poison, call):
    directory = tmp_path / "run"
    poisoned_trainer(directory, poison, at_calls={call}).fit()
    rows = metrics_rows(directory)
    assert [row["step"] for row in rows] == list(range(13))
    assert all(row["train_loss"] is not None for row in rows[1:])
    assert rows[-1]["steps_skipped"] == 1
    model = load_file(newest_checkpoint(directory) / "model.safetensors")
    assert all(t.isfinite().all() for t in model.values() if t.is_floating_point())


def test_spoiled_weights_are_rolled_back_and_the_run_ends_as_if_nothing_had_been(tmp_path):
    poisoned_trainer(tmp_path / "run", poison_weights, at_calls={6}).fit()
    build_trainer(parse_args(tiny_flags(tmp_path / "plain", *FLAGS)), features=()).fit()
    assert differences(tmp_path / "plain", tmp_path / "run") == []


def test_weights_that_are_spoiled_again_at_the_same_step_get_new_data(tmp_path):
    directory = tmp_path / "run"
    poisoned_trainer(directory, poison_weights, at_calls={6, 8}).fit()
    rows = metrics_rows(directory)
    assert [row["step"] for row in rows] == list(range(13))
    streams = []
    for step in (4, 6):
        path = directory / "checkpoints" / f"checkpoint_step_{step:08d}" / "state.json"
        streams.append(json.loads(path.read_text(encoding="utf-8"))["run"]["stream"]["window"])
    assert streams == [8, 16]  # two batches of two rows were left out between them


def test_endless_nan_ends_with_a_crash_report_and_a_good_checkpoint(tmp_path):
    directory = tmp_path / "run"
    trainer = poisoned_trainer(directory, poison_loss, at_calls=set(range(6, 10_000)))
    with pytest.raises(RuntimeError, match="--lr"):
        trainer.fit()
    crash = json.loads(next((directory / "errors").glob("*.json")).read_text(encoding="utf-8"))
    assert "non-finite" in crash["error"]["message"]
    assert newest_checkpoint(directory).name == "checkpoint_step_00000004"
