"""The state of one step as a checkpoint will hold it, copied so that training may go on.

The copy is as large as the state, so it is where host memory runs out first; torch has no exception
class of its own for that, Python has. A save that training waits for needs none.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from training.runtime.memory_guard import is_out_of_memory
from training.runtime.state_tree import split_state
from training.runtime.tensor_file import HostTensors, copy_to_host

_GROUP = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(slots=True, kw_only=True)
class Snapshot:
    """The state of one step; where it was copied, no longer shared with anything that trains."""

    step: int
    groups: dict[str, HostTensors]
    state: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.state) + sum(group.num_bytes for group in self.groups.values())


def take_snapshot(
    step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], *, copy: bool
) -> Snapshot:
    """Copy groups of tensors and the plain values of a step; without `copy` no tensor is copied,
    and none may change before the snapshot is written.

    MemoryError if there is no room for it; ValueError names what no checkpoint can hold.
    """
    try:
        groups = {name: _copy_group(name, group, copy=copy) for name, group in tensors.items()}
        return Snapshot(step=step, groups=groups, state=_encode_state(state))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError("not enough memory to copy the state") from error


def _copy_group(name: str, group: dict[str, Tensor], *, copy: bool) -> HostTensors:
    if not _GROUP.fullmatch(name):
        raise ValueError(f"tensor group {name!r} cannot be a file name")
    return copy_to_host(group, copy=copy)


def _encode_state(state: dict[str, Any]) -> bytes:
    tensors, plain = split_state(state)
    if tensors:
        raise ValueError(f"state holds a tensor at {next(iter(tensors))}; use split_state")
    return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode()
