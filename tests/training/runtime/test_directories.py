"""Run directories are judged by trying, and the trial leaves nothing behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

import train_sigma
import training.build
from model.sigma_llm import SigmaLLM
from training.config.cli import parse_args
from training.optimizer import build_optimizer
from training.runtime import directories
from training.runtime.directories import (
    cache_directory,
    check_directories,
    checkpoint_bytes,
    nearest_existing,
    training_bytes,
    write_problem,
)
from training.runtime.environment import EnvironmentProblem
from training.runtime.locks import RunLock

SMALL = (
    "--tokenizer-name assets-4k --d-model 128 --n-layers 6 --n-heads 4 --d-ff 384 --seq-len 64 "
    "--kv-latent-dim 48 --rope-dim 16 --mamba-head-dim 32 --mamba-d-state 16 --mimo-rank 2"
).split()


def test_a_writable_directory_is_probed_without_a_trace(tmp_path):
    assert write_problem(tmp_path / "deep" / "er") == ""
    assert list(tmp_path.iterdir()) == []
    assert nearest_existing(tmp_path / "deep" / "er") == tmp_path


def test_what_is_no_directory_or_takes_no_file_is_a_problem(tmp_path):
    (tmp_path / "file").touch()
    assert "is not a directory" in write_problem(tmp_path / "file")
    assert "is not a directory" in write_problem(tmp_path / "file" / "below")
    assert write_problem(tmp_path / ("x" * 5000))
    if Path("/proc/self").is_dir():
        assert write_problem(Path("/proc/self/run"))


def test_lack_of_space_names_flag_and_sizes(tmp_path, monkeypatch):
    config = parse_args([*SMALL, "--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path)])
    needed = 2 * checkpoint_bytes(config)
    check_directories(config)
    monkeypatch.setattr(directories, "free_bytes", lambda path: needed - 1)
    monkeypatch.setattr(directories, "LOG_BYTES", 1)
    with pytest.raises(EnvironmentProblem, match=r"--checkpoint-dir .* MiB free of about"):
        check_directories(config)


def test_a_directory_in_use_is_refused_before_anything_is_built(tmp_path, monkeypatch, capsys):
    """A second model on the card could take the memory of the run that is at work."""
    monkeypatch.setattr(training.build, "build_trainer", lambda config: pytest.fail("was built"))
    flags = [*SMALL, "--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path)]
    with RunLock(tmp_path):
        before = sorted(tmp_path.iterdir())
        assert train_sigma.main(flags) == 2
        assert sorted(tmp_path.iterdir()) == before
    assert f"{tmp_path} is in use by process {os.getpid()}" in capsys.readouterr().err
    check_directories(parse_args(flags))  # what was asked and is free is not held
    with RunLock(tmp_path):
        pass


def test_to_ask_for_a_lock_makes_no_directory(tmp_path):
    RunLock(tmp_path / "new").check_free()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        [],
        *(
            ["--optimizer", name]
            for name in ("adamw", "normuon", "adamuon", "soap", "lion", "galore-lion")
        ),
        ["--optimizer", "galore-lion", "--galore-rank", "16", "--lion-state-dtype", "bf16"],
        ["--mamba-ratio", "0"],
        ["--attention-ratio", "0"],
        ["--n-routed-experts", "0"],
        ["--no-tie-embeddings", "--ema-enabled"],
        ["--engram-enabled", "--engram-layers", "0,3"],
    ],
    ids=lambda flags: " ".join(flags) or "hybrid",
)
def test_the_estimate_is_close_to_the_built_model(flags):
    config = parse_args([*SMALL, *flags])
    model = SigmaLLM(config.model_config(4096), seed=0)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = sum(p.numel() * 4 for p in model.parameters())
    moments = sum(
        value.numel() * value.element_size()
        for state in optimizer.state_dict().values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    copies = 2 if config.ema.enabled else 1
    assert checkpoint_bytes(config) == pytest.approx(copies * weights + moments, rel=0.1)
    assert training_bytes(config) - checkpoint_bytes(config) == pytest.approx(weights, rel=0.1)


def test_reinforcement_learning_keeps_three_more_copies():
    plain, taught = (parse_args([*SMALL, "--ttrl-interval", n]) for n in ("0", "2"))
    weights = training_bytes(plain) - checkpoint_bytes(plain)
    assert checkpoint_bytes(taught) - checkpoint_bytes(plain) == 3 * weights


def test_caches_go_into_the_working_directory_unless_packed():
    assert cache_directory(parse_args(SMALL)) == Path(".runtime_cache")


def test_a_packed_program_never_caches_among_its_own_modules(tmp_path, monkeypatch):
    bundle = tmp_path / "sigma" / "_internal"
    elsewhere = tmp_path / "elsewhere"
    for folder in (bundle / "torch", elsewhere):
        folder.mkdir(parents=True)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "_MEIPASS", str(bundle), raising=False)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "sigma" / "eco_train.exe"))
    config = parse_args([*SMALL, "--output-dir", str(tmp_path / "data" / "run")])
    for start, expected in (
        (elsewhere, elsewhere),
        (bundle, tmp_path / "sigma"),
        (bundle / "torch", tmp_path / "sigma"),
    ):
        monkeypatch.chdir(start)
        assert cache_directory(config) == expected / ".runtime_cache"
    read_only = {elsewhere: "denied", tmp_path / "sigma": "denied"}
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(directories, "write_problem", lambda folder: read_only.get(folder, ""))
    assert cache_directory(config) == tmp_path / "data" / "run" / ".runtime_cache"
