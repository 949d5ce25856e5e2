"""What the tests of the Triton kernels share: seeded inputs, and memory that shows gaps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU: Triton's interpreter


@contextmanager
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every torch.empty and empty_like holds values that no kernel would write."""

    def poison(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return made

    with monkeypatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(torch, name, poison(getattr(torch, name)))
        yield


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device=DEVICE, dtype=dtype)


class Recorded:
    """A kernel that notes the constants it is compiled with."""

    def __init__(self, kernel: Any, seen: list[dict[str, int]]) -> None:
        self.kernel, self.seen = kernel, seen
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.seen.append(constants)
            return self.kernel[grid](*args, **constants)

        return launch
