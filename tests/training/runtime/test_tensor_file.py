"""Tensor files against the safetensors package, and what makes a host copy a copy."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from training.runtime.atomic_io import FileOps, write_file
from training.runtime.tensor_file import (
    copy_to_host,
    encode_tensors,
    read_tensors,
    split_shards,
)

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Every bit pattern of the type may occur, NaN payloads included; only 0 and 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.empty(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert bits(a[name]) == bits(b[name]), name


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    shapes = ((3, 5), (), (1,), (0, 4), (2, 3, 2))
    named = {
        f"{dtype}/{shape}": random_tensor(shape, dtype, seed)
        for seed, dtype in enumerate(DTYPES)
        for shape in shapes
    }
    base = torch.arange(24.0).reshape(2, 3, 4)
    return named | {
        "transposed": base.permute(2, 0, 1),
        "strided": base[:, ::2, 1:3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        'namé with "quotes"': torch.ones(1),
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_file(FileOps(), path, encode_tensors(copy_to_host(tensors)))


def test_the_package_reads_what_is_written(tmp_path: Path, tensors) -> None:
    write(tmp_path / "t.safetensors", tensors)
    assert_same(safetensors.torch.load_file(tmp_path / "t.safetensors"), tensors)


def test_what_is_written_reads_back(tmp_path: Path, tensors) -> None:
    write(tmp_path / "t.safetensors", tensors)
    loaded = read_tensors(FileOps(), tmp_path / "t.safetensors")
    assert_same(loaded, tensors)
    (tmp_path / "t.safetensors").write_bytes(b"")  # nothing may still look into the file
    assert_same(loaded, tensors)


def test_the_packages_files_can_be_read(tmp_path: Path, tensors) -> None:
    plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(plain, tmp_path / "t.safetensors", metadata={"format": "pt"})
    assert_same(read_tensors(FileOps(), tmp_path / "t.safetensors"), tensors)


def test_the_host_copy_does_not_follow_the_original() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    host = copy_to_host({"w": weight})
    with torch.no_grad():
        weight.add_(1.0)
    assert host.tensors["w"].tolist() == [1.0, 1.0, 1.0]


def test_without_a_copy_the_file_is_the_same(tmp_path: Path, tensors) -> None:
    tensors["turned"] = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    whole = b"".join(encode_tensors(copy_to_host(tensors)))
    assert b"".join(encode_tensors(copy_to_host(tensors, copy=False))) == whole


@pytest.mark.parametrize("short", [True, False])
def test_no_room_for_what_is_on_a_device_is_short_memory(
    monkeypatch: pytest.MonkeyPatch, short: bool
) -> None:
    words = "DefaultCPUAllocator: can't allocate memory" if short else "an illegal memory access"

    def fail(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(words)

    host = copy_to_host({"w": torch.ones(3)}, copy=False)
    monkeypatch.setattr(torch.Tensor, "cpu", fail)
    with pytest.raises(MemoryError if short else RuntimeError, match="memory"):
        list(encode_tensors(host))


def test_tied_names_take_space_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    tied = {"embed": weight, "head": weight, "flat": weight.view(-1), "rows": weight[:10]}
    host = copy_to_host(tied)
    assert host.aliases == {"head": "embed"}  # other views differ in shape and are kept apart
    write(tmp_path / "t", tied)
    loaded = read_tensors(FileOps(), tmp_path / "t")
    assert_same(loaded, tied)
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()


def test_shards_hold_everything_once_and_aliases_stay_with_their_tensor(tmp_path: Path) -> None:
    tensors = {f"w{i}": torch.full((8,), float(i)) for i in range(7)}
    tensors["tied"] = tensors["w5"]
    shards = split_shards(copy_to_host(tensors), shard_bytes=70)
    assert len(shards) == 4
    loaded: dict[str, torch.Tensor] = {}
    for index, shard in enumerate(shards):
        write_file(FileOps(), tmp_path / f"{index}", encode_tensors(shard))
        loaded |= read_tensors(FileOps(), tmp_path / f"{index}")
    assert_same(loaded, tensors)


def test_an_empty_group_is_a_file(tmp_path: Path) -> None:
    write(tmp_path / "t", {})
    assert read_tensors(FileOps(), tmp_path / "t") == {}
    assert safetensors.torch.load_file(tmp_path / "t") == {}


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")],
    ids=["sparse", "complex", "meta"],
)
def test_tensors_the_format_cannot_hold_are_refused_by_name(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="'bad'"):
        copy_to_host({"bad": tensor})


def test_reserved_names_are_refused() -> None:
    with pytest.raises(ValueError, match="reserved"):
        copy_to_host({"__metadata__": torch.ones(1)})
