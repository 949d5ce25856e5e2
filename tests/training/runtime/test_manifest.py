"""What a manifest says, number by number: other versions of the program read it."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.training.runtime.faults import (
    FINGERPRINT,
    assert_is_example,
    contents,
    example,
    open_store,
    save_steps,
)
from training.runtime import checkpoint
from training.runtime.atomic_io import FileOps
from training.runtime.manifest import read_manifest
from training.runtime.tensor_file import split_shards


def body_of(directory: Path, step: int) -> dict:
    path = directory / f"checkpoint_step_{step:08d}" / "MANIFEST.json"
    return json.loads(path.read_bytes())["body"]


def test_the_schema_is_number_one(ram_path: Path) -> None:
    """Another number means that a program of today cannot read it: it is part of the format."""
    save_steps(ram_path, 1)
    assert body_of(ram_path, 1)["schema"] == 1


def test_fields_are_sorted_and_nothing_is_spaced(ram_path: Path) -> None:
    """A program that seals the same content otherwise would call each other's manifests damaged."""
    save_steps(ram_path, 1)
    text = (ram_path / "checkpoint_step_00000001" / "MANIFEST.json").read_text("utf-8")
    body = json.dumps(json.loads(text)["body"], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    assert text == f'{{"body":{body},"sha256":"{digest}"}}\n'


def test_saves_are_numbered_from_one_over_all_lives(ram_path: Path) -> None:
    """The order of saves is not that of steps: a run that went back saves lower steps later."""
    save_steps(ram_path, 3, 6)
    save_steps(ram_path, 5)
    assert [body_of(ram_path, step)["sequence"] for step in (3, 6, 5)] == [1, 2, 3]


def test_a_manifest_that_says_nothing_counts_for_nothing(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    (ram_path / "checkpoint_step_00000001" / "MANIFEST.json").write_bytes(b"torn")
    save_steps(ram_path, 2)
    assert body_of(ram_path, 2)["sequence"] == 1


def test_a_manifest_that_was_read_is_the_one_that_was_written(ram_path: Path) -> None:
    save_steps(ram_path, 1)
    found = read_manifest(FileOps(), ram_path / "checkpoint_step_00000001")
    assert found.step == 1 and found.fingerprint == FINGERPRINT and found.parent is None
    sizes = {
        path.name: path.stat().st_size
        for path in (ram_path / "checkpoint_step_00000001").iterdir()
        if path.name != "MANIFEST.json"
    }
    assert {name: record.size for name, record in found.files.items()} == sizes
    assert found.num_bytes == sum(sizes.values())


def test_a_checkpoint_that_was_resumed_counts_as_verified(ram_path: Path) -> None:
    """So the first save after a resume may already delete the oldest: two have been read back."""
    save_steps(ram_path, 1, 2, keep=2)
    store = open_store(ram_path, keep=2)
    resumed = store.load_newest()
    assert resumed is not None and resumed.step == 2
    tensors = {name: dict(group) for name, group in resumed.tensors.items()}
    store.save(3, tensors, dict(resumed.state), block=True)
    store.close()
    steps = {name.partition("/")[0][-8:] for name in contents(ram_path)}
    assert steps == {"00000002", "00000003"}


def test_large_groups_are_split_over_numbered_files(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "split_shards", partial(split_shards, shard_bytes=70))
    save_steps(ram_path, 1)
    path = ram_path / "checkpoint_step_00000001"
    assert sorted(file.name for file in path.glob("*.safetensors")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer.safetensors",
    ]
    found = open_store(ram_path)
    resumed = found.load_newest()
    found.close()
    assert resumed is not None
    assert_is_example(resumed)


def test_how_long_a_save_took_is_told(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(perf_counter=clock.__next__))
    store = open_store(ram_path)
    assert store.last_save_seconds == 0.0
    store.save(1, *example(1), block=True)
    store.close()
    assert store.last_save_seconds == 2.5
