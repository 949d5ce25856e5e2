"""Tensors as safetensors files, written straight from host memory and hashed on the way.

The format is a length, a JSON header and the raw values, so it is written here piece by piece: the
package's own `save` would hold a second copy of everything, and refuses tensors that share memory.
Names that share all of their memory are stored once and listed in the header's metadata.
Source: https://github.com/huggingface/safetensors (format description).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from training.runtime.atomic_io import FileOps
from training.runtime.memory_guard import is_out_of_memory

ALIAS_PREFIX = "alias:"
METADATA_KEY = "__metadata__"
SHARD_BYTES = 2 * 2**30

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(slots=True, kw_only=True)
class HostTensors:
    """Named tensors for a file, each distinct memory once: copies in host memory, contiguous, or
    the tensors themselves, wherever they are.

    aliases: further names, each with the name in `tensors` whose values it has.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def copy_to_host(tensors: Mapping[str, Tensor], *, copy: bool = True) -> HostTensors:
    """Copy, so that training may go on changing the originals; without `copy`, for who changes none
    of them until they are written, take them as they are: that needs no memory.

    ValueError names a tensor that the format cannot hold (sparse, quantised, complex, meta).
    """
    host, seen = HostTensors(), {}
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
        tensor = tensor.detach()
        memory = (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and memory in seen:
            host.aliases[name] = seen[memory]
            continue
        seen[memory] = name
        if copy:
            own = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            tensor = own.copy_(tensor)
        host.tensors[name] = tensor
    return host


def split_shards(host: HostTensors, *, shard_bytes: int = SHARD_BYTES) -> list[HostTensors]:
    """Parts of at most `shard_bytes` (one tensor may exceed it); an alias stays with its tensor."""
    shards, home, filled = [HostTensors()], {}, 0
    for name, tensor in host.tensors.items():
        if shards[-1].tensors and filled + tensor.nbytes > shard_bytes:
            shards.append(HostTensors())
            filled = 0
        shards[-1].tensors[name] = tensor
        home[name] = shards[-1]
        filled += tensor.nbytes
    for alias, name in host.aliases.items():
        home[name].aliases[alias] = name
    return shards


def encode_tensors(host: HostTensors) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece."""
    # Widest type first keeps every tensor aligned to its type; the package sorts likewise.
    order = sorted(host.tensors, key=lambda name: (-host.tensors[name].element_size(), name))
    header: dict[str, object] = {}
    if host.aliases:
        header[METADATA_KEY] = {ALIAS_PREFIX + a: name for a, name in host.aliases.items()}
    offset = 0
    for name in order:
        tensor = host.tensors[name]
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        if host.tensors[name].numel():
            yield _values(host.tensors[name])


def _values(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; MemoryError without room for those that are not on the host yet."""
    try:
        return tensor.cpu().reshape(-1).view(torch.uint8).numpy().data
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError("not enough memory to copy a tensor") from error


def read_tensors(ops: FileOps, path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, copied into memory of their own; the file is closed.

    Meant for files whose hash has been verified: a header that lies raises ValueError or KeyError.
    """
    mapped = ops.map_file(path)
    try:
        length = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + length])
        metadata = header.pop(METADATA_KEY, {})
        tensors = {name: _read_one(mapped, 8 + length, entry) for name, entry in header.items()}
    finally:
        mapped.close()
    for key, name in metadata.items():
        if key.startswith(ALIAS_PREFIX):
            tensors[key.removeprefix(ALIAS_PREFIX)] = tensors[name]
    return tensors


def _read_one(mapped, start: int, entry: dict) -> Tensor:
    dtype, shape = _DTYPES[entry["dtype"]], entry["shape"]
    begin, end = entry["data_offsets"]
    # Before there is a view: without memory an error is raised here, and what has views of it open
    # cannot be closed.
    copy = torch.empty(shape, dtype=dtype)
    if begin == end:
        return copy
    count = (end - begin) // dtype.itemsize
    view = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin)
    return copy.copy_(view.reshape(shape))


def _check_storable(name: str, tensor: Tensor) -> None:
    if name == METADATA_KEY or name.startswith(ALIAS_PREFIX):
        raise ValueError(f"a tensor cannot be saved under the reserved name {name!r}")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(
            f"tensor {name!r} cannot be saved: {tensor.dtype}, {tensor.layout}, {tensor.device}"
        )
