"""The launch table: what was measured is used, and no bad file ever is."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from model import launch, launch_table
from model.launch import Tiles
from model.launch_table import FILE_NAME, LaunchKey, LaunchTable, measured_tiles
from model.ternary_linear import int8_product, quantize_rows
from tests.model.kernel_inputs import random

KEY = LaunchKey(operation="int8_product", itemsize=1, capability=80, rows=128, columns=30, depth=20)
TILES = Tiles(32, 32, 32, 2, 3)


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(launch, "_facts", lambda device: (80, 8))
    return tmp_path / FILE_NAME


def find(rows=100, columns=30, depth=20, operation="int8_product"):
    return measured_tiles(operation, torch.empty(0), (rows, columns, depth))


def test_what_was_written_is_found_for_its_bucket_and_nothing_else(path):
    LaunchTable(tiles={KEY: TILES}).write(path)
    assert find() == find(rows=128) == find(rows=65) == TILES
    assert find(rows=64) is find(rows=129) is find(columns=31) is find(depth=21) is None
    assert find(operation="weight_gradient") is None
    assert LaunchTable.read(path).tiles == {KEY: TILES}


def test_another_architecture_does_not_see_it(path, monkeypatch):
    LaunchTable(tiles={KEY: TILES}).write(path)
    monkeypatch.setattr(launch, "_facts", lambda device: (90, 132))
    assert find() is None


def test_the_launcher_takes_the_measured_tiles(path, monkeypatch):
    from model import ternary_linear

    LaunchTable(tiles={KEY: TILES}).write(path)
    used = []
    launcher = ternary_linear.launcher

    def watched(kernel, grid, **settings):
        used.append((grid, settings))
        return launcher(kernel, grid, **settings)

    codes, scale = quantize_rows(random(100, 20, seed=1))
    weight, weight_scale = quantize_rows(random(30, 20, seed=2))
    given = {"a_scale": scale, "b_scale": weight_scale, "dtype": torch.float32}
    expected = int8_product(codes, weight, tiles=Tiles(64, 64, 32, 4, 3), **given)
    monkeypatch.setattr(ternary_linear, "launcher", watched)
    assert torch.equal(int8_product(codes, weight, **given), expected)
    assert used == [((4,), {"warps": 2, "stages": 3})]


def test_without_a_file_or_a_folder_there_is_nothing_and_no_message(path, monkeypatch, caplog):
    assert find() is None
    monkeypatch.delenv("TRITON_CACHE_DIR")
    assert find() is None
    assert not caplog.records


def spoiled(change):
    values = LaunchTable(tiles={KEY: TILES}).dump()
    change(values)
    return json.dumps(values)


def entry_with(**changes):
    return spoiled(lambda values: values["entries"][0].update(changes))


BAD = {
    "empty": "",
    "not json": "{",
    "bytes": b"\xff\xfe\x00",
    "a list": "[]",
    "another format": spoiled(lambda values: values.update(format=2)),
    "another triton": spoiled(lambda values: values.update(triton="0.1")),
    "no entries": spoiled(lambda values: values.pop("entries")),
    "unknown operation": entry_with(operation="sum"),
    "unknown name": entry_with(colour=1),
    "four settings": entry_with(tiles=[32, 32, 32, 4]),
    "no power of two": entry_with(tiles=[48, 32, 32, 4, 3]),
    "zero": entry_with(tiles=[0, 32, 32, 4, 3]),
    "negative": entry_with(tiles=[32, 32, 32, 4, -3]),
    "huge": entry_with(tiles=[4096, 32, 32, 4, 3]),
    "truth for a number": entry_with(rows=True),
    "text for a number": entry_with(tiles=["32", 32, 32, 4, 3]),
    "entry is a number": spoiled(lambda values: values.update(entries=[1])),
    "deeply nested": "[" * 100000,
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_passed_over_with_one_message(name, path, caplog):
    text = BAD[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING):
        assert find() is None and find(columns=31) is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text and "tune_kernels" in caplog.text


def test_a_folder_in_the_files_place_is_no_failure(path):
    path.mkdir()
    assert find() is None


def test_facts_of_a_device_are_asked_once(monkeypatch):
    asked = []

    def properties(index):
        asked.append(index)
        return SimpleNamespace(major=9, minor=0, multi_processor_count=132 + index)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(launch, "_cuda_facts", launch.cache(launch._cuda_facts.__wrapped__))
    for _ in range(3):
        assert launch.processor_count(torch.device("cuda", 0)) == 132
        assert launch.processor_count(torch.device("cuda")) == 133
    assert asked == [0, 1]


def test_weight_gradient_splits_by_the_devices_multiprocessors(monkeypatch):
    from model import ternary_linear

    grids = []
    launcher = ternary_linear.launcher

    def watched(kernel, grid, **settings):
        grids.append(grid)
        return launcher(kernel, grid, **settings)

    grad, codes = random(400, 20, seed=3), quantize_rows(random(400, 30, seed=4))[0]
    scale = torch.ones(400, device=grad.device)
    monkeypatch.setattr(ternary_linear, "launcher", watched)
    for processors in (1, 4, 132):
        monkeypatch.setattr(ternary_linear, "processor_count", lambda device, n=processors: n)
        ternary_linear.weight_gradient(grad, codes, scale, in_bf16=False)
    splits = [grid[2] for grid in grids]
    assert splits[0] == 1 and splits[0] < splits[1] < splits[2] <= ternary_linear.MAX_SPLITS


def test_the_table_is_read_once(path, monkeypatch):
    LaunchTable(tiles={KEY: TILES}).write(path)
    reads = []
    read = LaunchTable.read
    monkeypatch.setattr(LaunchTable, "read", lambda place: reads.append(place) or read(place))
    monkeypatch.setattr(launch_table, "_loaded", launch.cache(launch_table._loaded.__wrapped__))
    for columns in (30, 31, 32):
        find(columns=columns)
    assert reads == [path]


def test_the_grouped_product_takes_measured_tiles_with_its_row_blocks(path, monkeypatch):
    from model import ternary_experts
    from model.dispatch import DispatchPlan
    from model.ternary_linear import ternarize_rows

    chosen = (torch.arange(90) % 3)[:, None]  # 30 rows an expert: blocks of 64
    groups = ternary_experts.RowGroups.create(DispatchPlan.create(chosen, 3, grouped=True))
    codes, scale = quantize_rows(random(90, 20, seed=1))
    weight = ternarize_rows(random(3, 40, 20, seed=2))
    given = {"a_scale": scale, "b_scale": weight.scale, "dtype": torch.float32, "by_token": False}
    expected = ternary_experts.grouped_int8_product(codes, weight.codes, groups, **given)
    key = LaunchKey(
        operation="grouped_product", itemsize=4, capability=80, rows=32, columns=40, depth=20
    )
    used = []
    launcher = ternary_experts.launcher

    def watched(kernel, grid, **settings):
        used.append(settings)
        return launcher(kernel, grid, **settings)

    monkeypatch.setattr(ternary_experts, "launcher", watched)
    heuristic = ternary_experts.grouped_tiles(30, 80, 4)
    for rows, warps in ((64, 2), (128, heuristic.warps)):
        LaunchTable(tiles={key: Tiles(rows, 32, 32, 2, 2)}).write(path)
        launch_table._loaded.cache_clear()
        launch_table._find.cache_clear()
        found = ternary_experts.grouped_int8_product(codes, weight.codes, groups, **given)
        assert torch.equal(found, expected)
        assert used[-1]["warps"] == warps
