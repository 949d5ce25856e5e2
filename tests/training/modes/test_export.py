"""What is exported is the checkpoint, to the bit, for a program that knows transformers only."""

import json
import os
import sys

import pytest
import torch

from model.sigma_llm import SigmaLLM
from tests.training.modes.test_evaluate_generate_report import SHAPE, STEP, TEXT
from training.build_data import build_tokenizer
from training.config.cli import parse_args, write_resolved
from training.modes import export
from training.runtime.atomic_io import FileOps
from training.runtime.checkpoint import CheckpointStore

transformers = pytest.importorskip("transformers")


@pytest.fixture
def saved(tmp_path):
    """Flags of a run with one checkpoint, its model and its tokenizer."""
    where = ["--output-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "checkpoints")]
    config = parse_args([*SHAPE, *where])
    tokenizer = build_tokenizer(config)
    model = SigmaLLM(config.model_config(tokenizer.vocab_size), seed=3).eval()
    store = CheckpointStore(tmp_path / "checkpoints", max_checkpoints=2, fingerprint={"a": "b"})
    store.save(STEP, {"model": model.state_dict()}, {}, block=True)
    store.close()
    write_resolved(config, tmp_path)
    return ["--no-require-cuda", "--device", "cpu", *where, "--mode", "export"], model, tokenizer


def test_transformers_loads_the_same_model_and_tokens(saved, tmp_path, capsys):
    from model.hf import register

    flags, model, tokenizer = saved
    assert export.run(parse_args([*flags, "--json"])) == 0
    directory = tmp_path / "export" / f"step_{STEP:08d}"
    assert json.loads(capsys.readouterr().out) == {"export": str(directory)}
    register()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokens(TEXT)["input_ids"]
    assert ids == tokenizer.encode(TEXT) and tokens.bos_token_id == tokenizer.end_id
    assert tokens.model_max_length == 16 and loaded.config.eos_token_id == tokenizer.end_id
    batch = torch.tensor([[tokens.bos_token_id, *ids]])
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, model(batch).logits)
    assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors", ".md"}


def test_what_was_exported_is_not_written_over(saved, tmp_path):
    flags, _, _ = saved
    export.run(parse_args(flags))
    with pytest.raises(ValueError, match="exists"):
        export.run(parse_args(flags))


def test_a_failure_leaves_no_half_export(saved, tmp_path, monkeypatch):
    flags, _, _ = saved

    def full_disk(directory, *rest, **more):
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(export, "_write", full_disk)
    with pytest.raises(OSError, match="disk full"):
        export.run(parse_args(flags))
    assert list((tmp_path / "export").iterdir()) == []


def test_a_scanner_that_reads_the_result_costs_a_moment(saved, tmp_path, monkeypatch):
    """Windows renames no directory while somebody reads a file in it."""
    flags, _, _ = saved
    pauses: list[float] = []

    class InUse(PermissionError):
        winerror = 5

    def held_at_first(move):
        def call(source, target):
            if str(source).endswith(".partial") and not pauses:
                raise InUse(13, "in use by another process")
            move(source, target)

        return call

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, held_at_first(getattr(os, name)))
    monkeypatch.setattr(FileOps, "sleep", staticmethod(pauses.append))
    assert export.run(parse_args(flags)) == 0 and len(pauses) == 1
    assert [path.name for path in (tmp_path / "export").iterdir()] == [f"step_{STEP:08d}"]


def test_missing_transformers_is_named(saved, tmp_path, monkeypatch):
    flags, _, _ = saved
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="--mode export needs transformers"):
        export.run(parse_args(flags))
    assert not (tmp_path / "export").exists()
