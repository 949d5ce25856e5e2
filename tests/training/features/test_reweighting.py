"""The adaptive mixture inside real runs over planted sources."""

import json

import numpy as np
import pytest
import torch

from tests.integration.runs import (
    differences,
    metrics_rows,
    newest_checkpoint,
    stop_after,
    tiny_flags,
    train,
)
from training.build import build_trainer
from training.config.cli import parse_args
from training.config.fields import ConfigError
from training.features import FEATURES, reweighting
from training.features.reweighting import source_losses
from training.stream.batch import to_batch

ALPHABET = list("abcdefghijklmnopqrstuvwxyz0123456789")


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A list of three sources: letters at random, sentences of a small grammar, one line."""
    folder = tmp_path_factory.mktemp("planted")
    generator = np.random.default_rng(7)
    subjects = ["the index", "a table", "each stream", "our query", "no value"]
    verbs = ["returns", "holds", "waits for", "writes", "reads"]
    for name in ("noise", "hard", "easy"):
        (folder / name).mkdir()
        for number in range(60):
            if name == "noise":
                text = "".join(generator.choice([*ALPHABET, " "], 900))
            elif name == "hard":
                text = " ".join(
                    f"{generator.choice(subjects)} {generator.choice(verbs)} "
                    f"{generator.choice(subjects)}."
                    for _ in range(30)
                )
            else:
                text = "zero zero zero zero\n" * 40
            (folder / name / f"{number}.txt").write_text(f"{number} {text}", encoding="utf-8")
    path = folder / "sources.json"
    entries = [{"type": "text", "path": str(folder / n), "name": n} for n in ("noise", "hard",
                                                                              "easy")]  # fmt: skip
    path.write_text(json.dumps(entries))
    return path


def flags(planted, directory, *more):
    return tiny_flags(
        directory, "--data-backend", "local", "--source-list", str(planted), "--spool-max-mb", "0",
        "--dedup-window-size", "0", "--near-dedup-window", "0", "--no-quality-filter",
        "--source-read-timeout-sec", "60", "--no-curriculum-enabled", "--no-engram-enabled",
        "--grad-accum-steps", "1", "--batch-size", "4", "--eval-interval", "0", "--steps", "16",
        *more,
    )  # fmt: skip


ADAPTIVE = (
    "--aux-enable-adaptive-sources", "--aux-adaptive-interval-tokens", "512",
    "--aux-adaptive-smoothing", "0.5",
)  # fmt: skip


def test_weights_move_are_counted_logged_and_handed_to_the_stream(planted, tmp_path):
    train(flags(planted, tmp_path / "raw", *ADAPTIVE, "--aux-adaptive-signal", "raw"))
    rows = metrics_rows(tmp_path / "raw")
    last = rows[-1]
    assert last["source_loss_noise"] > last["source_loss_easy"]
    assert last["source_weight_noise"] > last["source_weight_easy"]
    assert last["feature_adaptive_sources_effective_calls"] >= 3
    saved = json.loads((newest_checkpoint(tmp_path / "raw") / "state.json").read_text())
    stream = json.dumps(saved)
    for name in ("noise", "hard", "easy"):  # the weights of the next draws are the factors
        assert f'"{name}": {last[f"source_weight_{name}"]!r}' in stream


def test_measuring_changes_nothing_but_its_own_columns(planted, tmp_path):
    """With an interval longer than the run sources are measured and no weight moves."""
    more = ("--aux-enable-adaptive-sources", "--aux-adaptive-interval-tokens", "8192")
    train(flags(planted, tmp_path / "on", "--steps", "12", *more))
    train(flags(planted, tmp_path / "off", "--steps", "12"))
    assert metrics_rows(tmp_path / "on")[-1]["source_loss_noise"] > 1.0
    tensors = [name for name in differences(tmp_path / "on", tmp_path / "off") if "/" in name]
    assert [name for name in tensors if not name.startswith("features")] == []


def test_a_stopped_run_continues_with_its_weights(planted, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(flags(planted, whole, "--save-interval", "16", *ADAPTIVE))
    arguments = flags(planted, parts, "--save-interval", "16", *ADAPTIVE)
    for step in (5, 10):
        train(arguments, features=(*FEATURES, stop_after(step, parts)))
        assert newest_checkpoint(parts).name.endswith(f"{step:08d}")
    train(arguments)
    found = [name for name in differences(whole, parts) if not name.startswith("row ")]
    assert found == []
    rows = [metrics_rows(path)[-1] for path in (whole, parts)]
    for name in ("train_loss", "source_weight_hard", "data_source_fraction_hard"):
        assert rows[0][name] == rows[1][name]


def test_excess_measures_against_the_reference_run(planted, tmp_path):
    reference = tmp_path / "reference"
    train(flags(planted, reference, "--save-interval", "16"))
    train(
        flags(
            planted, tmp_path / "run", *ADAPTIVE, "--aux-adaptive-signal", "excess",
            "--aux-adaptive-reference", str(reference / "checkpoints"),
        )
    )  # fmt: skip
    rows = [row for row in metrics_rows(tmp_path / "run") if row["step"] > 8]
    # Early on the reference is ahead where something can be learned.
    assert any(row["source_signal_easy"] > row["source_signal_noise"] for row in rows)


def test_a_reference_of_another_shape_and_a_missing_one_are_told(planted, tmp_path):
    arguments = flags(
        planted, tmp_path / "run", *ADAPTIVE, "--aux-adaptive-signal", "excess",
        "--aux-adaptive-reference", str(tmp_path / "nowhere"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"--aux-adaptive-reference .* no valid checkpoint"):
        train(arguments)
    with pytest.raises(ConfigError, match="needs --aux-adaptive-reference"):
        parse_args(["--aux-enable-adaptive-sources", "--aux-adaptive-signal", "excess"])


def test_without_sources_to_choose_from_the_switch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--aux-enable-adaptive-sources needs sources"):
        build_trainer(parse_args(tiny_flags(tmp_path, "--aux-enable-adaptive-sources")))


def test_source_losses_are_the_models_loss_by_source(planted, tmp_path):
    trainer = build_trainer(parse_args(flags(planted, tmp_path / "run")))
    model, generator = trainer.model, np.random.default_rng(0)
    tokens = generator.integers(1, 4000, (4, 33))
    sources = np.repeat(np.array([[9], [101], [9], [0]], dtype=np.int16), 32, axis=1)
    batch = to_batch(
        tokens[:, :-1], tokens[:, 1:], sources, end_id=0, byte_lengths=np.ones(4096, dtype=np.int32)
    )
    found = source_losses(model, batch, sources={9, 101, 102})
    assert model.training and set(found) == {9, 101}
    model.eval()
    with torch.no_grad():
        logits = model(batch.input_ids, reset_mask=batch.reset_mask).logits
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction="none"
    ).view(4, 32)
    assert found[9] == pytest.approx(float(each[[0, 2]].mean()), rel=1e-4)
    assert found[101] == pytest.approx(float(each[1].mean()), rel=1e-4)
    trainer.stream.close()


@pytest.mark.parametrize("place", ["measurement", "forward"])
def test_a_step_replayed_for_memory_measures_as_one_of_a_run_configured_so(
    planted, tmp_path, monkeypatch, place
):
    more = (*ADAPTIVE, "--aux-adaptive-signal", "raw", "--dropout", "0.2", "--steps", "2")
    small = ("--batch-size", "2", "--grad-accum-steps", "4")
    train(flags(planted, tmp_path / "small", *more, *small))
    arguments = flags(planted, tmp_path / "run", *more, "--batch-size", "4")
    trainer = build_trainer(parse_args([*arguments, "--grad-accum-steps", "2"]))
    forward, cross_entropy, failed = trainer.forward, reweighting.linear_cross_entropy, []

    def fail_once(call, *, now):
        if now and not failed:
            failed.append(place)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call()

    if place == "measurement":
        monkeypatch.setattr(
            reweighting,
            "linear_cross_entropy",
            lambda *args: fail_once(lambda: cross_entropy(*args), now=True),
        )
    else:
        trainer.forward = lambda ctx: fail_once(lambda: forward(ctx), now=ctx.micro == 1)
    trainer.fit()
    assert failed == [place]
    found = differences(tmp_path / "small", tmp_path / "run")
    assert [name for name in found if "micro_batch" not in name] == []
