"""Optimizers to time beside ours: torch's and those of installed packages.

One for matrices gets what `muon` would take, stacked experts one by one, since other libraries know
no stacks, and torch's fused AdamW takes the rest. Packages that are not installed give no row. Our
gnprox is here because `--optimizer gnprox` refuses a CPU; its arithmetic does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.optim.gnprox import GNProx

RATE = 1e-4
PACKAGES = ("lion-pytorch", "pytorch-optimizer", "heavyball")


class Stepper(Protocol):
    """Anything that makes one update of parameters whose gradients stand."""

    def step(self) -> Any: ...


class Peer:
    """Optimizers stepped as one."""

    def __init__(self, parts: Sequence[Stepper]) -> None:
        self.parts = parts

    def step(self) -> None:
        for part in self.parts:
            part.step()


def peer_optimizers(matrices: Sequence[Tensor], rest: Sequence[Tensor]) -> dict[str, Stepper]:
    """By name. matrices (out, in) or (experts, out, in): what muon would take; rest: all others.

    Every peer has parameters and gradients of its own, equal to the given ones.
    """
    singles = [part for one in matrices for part in (one.unbind(0) if one.dim() > 2 else [one])]
    grads = [
        part
        for one in matrices
        for part in (_grad(one).unbind(0) if one.dim() > 2 else [_grad(one)])
    ]

    def everything() -> list[nn.Parameter]:
        return [_copy(one, _grad(one)) for one in (*matrices, *rest)]

    def split(make: Callable[[list[nn.Parameter]], Stepper]) -> Peer:
        own = [_copy(one, grad) for one, grad in zip(singles, grads, strict=True)]
        others = [_copy(one, _grad(one)) for one in rest]
        return Peer([make(own), torch.optim.AdamW(others, lr=RATE, fused=True)])

    found: dict[str, Stepper] = {
        "torch fused adamw": torch.optim.AdamW(everything(), lr=RATE, fused=True),
        "torch foreach adamw": torch.optim.AdamW(everything(), lr=RATE, foreach=True),
        "torch muon": split(lambda own: torch.optim.Muon(own, lr=RATE)),
        "gnprox, on this device": GNProx(everything(), lr=RATE),
    }
    if find_spec("lion_pytorch") is not None:
        from lion_pytorch import Lion  # pyright: ignore[reportMissingImports]

        found["lion-pytorch"] = Lion(everything(), lr=RATE)
    if find_spec("pytorch_optimizer") is not None:
        import pytorch_optimizer as other  # pyright: ignore[reportMissingImports]

        for name in ("Muon", "NorMuon", "AdaMuon"):
            kind = getattr(other, name)
            found[f"pytorch-optimizer {name}"] = split(
                lambda own, kind=kind: kind([{"params": own, "use_muon": True}], lr=RATE)
            )
        found["pytorch-optimizer SOAP"] = split(lambda own: other.SOAP(own, lr=RATE))
    if find_spec("heavyball") is not None:
        import heavyball  # pyright: ignore[reportMissingImports]

        heavyball.utils.compile_mode = None
        # By default it takes the gradients away, and every later step would be empty.
        found["heavyball SOAP"] = split(
            lambda own: heavyball.SOAP(own, lr=RATE, consume_grad=False)
        )
    return found


def peer_versions() -> dict[str, str]:
    """Versions of the peers' packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _grad(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def _copy(value: Tensor, grad: Tensor) -> nn.Parameter:
    param = nn.Parameter(value.detach().clone())
    param.grad = grad.clone()
    return param
