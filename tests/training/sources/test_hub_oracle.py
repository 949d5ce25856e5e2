"""The same rows in the same order as the `datasets` library, from the same hub, in every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.fakeworld.clients import drain, make_client
from tests.fakeworld.hub import FakeDataset, FakeHub, make_rows, parquet_bytes
from tests.fakeworld.server import FakeWorld
from training.sources.hub import HubSource

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.soak


def part(tag: str) -> bytes:
    return parquet_bytes(make_rows(tag, 12), rows_per_group=5)


LAYOUTS = {
    "numbered": (
        [f"data/train-{n:05}-of-00003.parquet" for n in range(3)]
        + ["data/test-00000-of-00001.parquet"],
        {},
        None,
    ),
    "plain": (["b.parquet", "a.parquet", "more/c.parquet"], {}, None),
    "keywords": (["train.parquet", "dev.parquet", "test.parquet"], {}, None),
    "folders": (["train/1.parquet", "train/0.parquet", "validation/0.parquet"], {}, None),
    "configs": (
        ["data/x/000.parquet", "data/y/000.parquet", "sample/1.parquet"],
        {
            "configs": [
                {
                    "config_name": "default",
                    "data_files": [{"split": "train", "path": "data/*/*"}],
                },
                {
                    "config_name": "sample",
                    "data_files": [{"split": "train", "path": "sample/*"}],
                },
            ]
        },
        "sample",
    ),
    "marked": (
        ["en/train-0.parquet", "de/train-0.parquet"],
        {
            "configs": [
                {"config_name": "en", "data_dir": "en"},
                {"config_name": "de", "data_dir": "de", "default": True},
            ]
        },
        None,
    ),
}


@pytest.fixture(scope="module")
def world():
    pytest.importorskip("datasets")
    with FakeWorld() as world:
        hub = FakeHub(world)
        for name, (paths, card, _) in LAYOUTS.items():
            files = {path: part(path) for path in paths}
            readme = f"---\n{yaml.safe_dump(card)}---\n" if card else "# no card\n"
            hub.datasets[f"own/{name}"] = FakeDataset(
                files={**files, "README.md": readme.encode()}, card=card
            )
        yield world


def with_datasets(world, home, **wanted):
    run = subprocess.run(
        [sys.executable, "-m", "tests.fakeworld.stream_with_datasets", json.dumps(wanted)],
        cwd=ROOT,
        env={
            **os.environ,
            "HF_ENDPOINT": world.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_rows_are_those_of_datasets(world, tmp_path, name):
    config = LAYOUTS[name][2]
    theirs = with_datasets(world, tmp_path, dataset=f"own/{name}", config=config, split="train")
    source = HubSource(
        f"own/{name}", name="hf", config=config, endpoint=world.url, client=make_client()
    )
    documents, errors = drain(source)
    assert not errors and [document.text for document in documents] == theirs
