"""The gated norm's kernels against the plain form, on values and every gradient by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from model.rank_norm_kernels import gated_rank_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds values that would show if a kernel left an element unwritten."""
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **options: empty(*size, **options).fill_(float("nan"))
    )


def draw(length: int, *, rank: int, width: int, batch: int = 2, heads: int = 3):
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    y, z = normal(batch, length, heads, rank, width), normal(batch, length, heads, width)
    gate = normal(heads, rank, width) if rank > 1 else None
    return [y, z, normal(heads, rank, width), gate]


def define(y: Tensor, z: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    gates = z.unsqueeze(3) if gate is None else z.unsqueeze(3) * gate
    rms = torch.sqrt(y.square().mean(-1, keepdim=True) + EPS)
    return (gain * y / rms * torch.nn.functional.silu(gates)).sum(3)


def with_gradients(function, values: list) -> dict[str, Tensor]:
    leaves = [None if value is None else value.detach().requires_grad_() for value in values]
    out = function(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
    named = {n: leaf for n, leaf in zip(("y", "z", "gain", "gate"), leaves) if leaf is not None}
    grads = torch.autograd.grad((out * weight).sum(), list(named.values()))
    return {"out": out.detach()} | dict(zip(named, grads))


def compute(y: Tensor, z: Tensor, gain: Tensor, gate: Tensor | None) -> Tensor:
    return gated_rank_norm(y, z, gain, gate, eps=EPS)


def assert_equals(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / (1 + value.abs().max())
        assert error < 2e-6, name


@pytest.mark.parametrize(
    ("length", "rank", "width"), [(1, 2, 16), (63, 4, 12), (100, 1, 16), (500, 2, 5)]
)
def test_kernels_equal_the_plain_form(length, rank, width):
    values = draw(length, rank=rank, width=width)
    assert_equals(with_gradients(compute, values), with_gradients(define, values))


def test_strided_inputs_and_rows_of_zeros():
    """z is a slice of a wider projection, as in the block; y may have any layout."""
    y, z, gain, gate = draw(40, rank=2, width=16)
    y[0, 3] = 0.0
    wide = torch.cat((z.flatten(2), z.flatten(2)), -1)
    sliced = wide[..., : z[0, 0].numel()].view(z.shape)
    turned = y.transpose(1, 4).contiguous().transpose(1, 4)
    expected = with_gradients(define, [y, z, gain, gate])
    for z_layout in (sliced, z.transpose(1, 3).contiguous().transpose(1, 3)):
        assert_equals(with_gradients(compute, [turned, z_layout, gain, gate]), expected)


@pytest.mark.gpu
def test_on_a_gpu():
    values = [v if v is None else v.cuda() for v in draw(300, rank=4, width=64, heads=24)]
    expected = with_gradients(define, values)
    for name, value in with_gradients(compute, values).items():
        assert (value - expected[name]).norm() / expected[name].norm() < 1e-5, name
