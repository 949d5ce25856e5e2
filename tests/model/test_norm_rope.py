"""RMSNorm and RoPE: definitions, gradients, and the properties that attention relies on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import reference_ops
from model.norm_rope import (
    RMSNorm,
    apply_rope,
    biased_norm,
    context_rope_table,
    rms_norm,
    rope_table,
)
from model.sequence import SequenceContext


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("width", [1, 63, 256])
@pytest.mark.parametrize("learnable", [True, False])
def test_rms_norm_equals_definition_and_torch(width: int, learnable: bool) -> None:
    x = _random(3, 5, width).requires_grad_()
    weight = (_random(width, seed=1) + 1.0).requires_grad_() if learnable else None
    inputs = [x] if weight is None else [x, weight]
    grad = _random(3, 5, width, seed=2)
    results = []
    for y in (
        rms_norm(x, weight, eps=1e-6),
        reference_ops.rms_norm(x, weight, eps=1e-6),
        F.rms_norm(x, (width,), weight, 1e-6),
    ):
        results.append([y, *torch.autograd.grad(y, inputs, grad)])
    for other in results[1:]:
        for ours, theirs in zip(results[0], other):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rms_norm_gradient_by_finite_differences() -> None:
    x = _random(4, 7, dtype=torch.float64).requires_grad_()
    weight = _random(7, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rms_norm(a, b, eps=1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda a: rms_norm(a, eps=1e-6), (x,))


def test_rms_norm_takes_its_statistics_in_fp32() -> None:
    """Sums of squares of 300 overflow fp16; in fp32 the result is right to fp16's rounding."""
    x = (_random(4, 512) * 300).half()
    y = rms_norm(x)
    torch.testing.assert_close(y.float(), rms_norm(x.float()), rtol=1e-3, atol=1e-3)


def test_rms_norm_of_non_contiguous_and_zero_rows() -> None:
    x = _random(6, 4, 5).transpose(0, 2)
    torch.testing.assert_close(rms_norm(x), rms_norm(x.contiguous()), rtol=1e-6, atol=1e-6)
    zero = torch.zeros(2, 8, requires_grad=True)
    y = RMSNorm(8)(zero)
    y.sum().backward()
    assert (y == 0).all() and zero.grad is not None and zero.grad.isfinite().all()


@pytest.mark.parametrize("dim", [2, 32, 64])
def test_rope_equals_definition_with_gradient(dim: int) -> None:
    x = _random(2, 9, 3, dim).requires_grad_()
    positions = torch.arange(9).expand(2, 9) + torch.tensor([[0], [100]])
    grad = _random(2, 9, 3, dim, seed=1)
    fast = apply_rope(x, *rope_table(positions, dim))
    slow = reference_ops.rope(x, positions)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    (fast_grad,) = torch.autograd.grad(fast, x, grad)
    (slow_grad,) = torch.autograd.grad(slow, x, grad)
    torch.testing.assert_close(fast_grad, slow_grad, rtol=1e-5, atol=1e-5)


def test_rope_keeps_norms() -> None:
    x = _random(1, 2000, 32)
    y = apply_rope(x, *rope_table(torch.arange(2000)[None], 32))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def _scores_of_equal_distance(rotate) -> torch.Tensor:
    """<q_m, k_n> for m - n = 5 at ten places of the sequence, one q and one k."""
    q, k = _random(32, seed=3), _random(32, seed=4)
    starts = torch.arange(0, 100_000, 10_000)
    rotated_q = rotate(q.expand(1, 10, 32), starts[None] + 5)
    rotated_k = rotate(k.expand(1, 10, 32), starts[None])
    return (rotated_q * rotated_k).sum(-1).flatten()


def test_rope_scores_depend_on_distance_only() -> None:
    scores = _scores_of_equal_distance(lambda x, p: apply_rope(x, *rope_table(p, 32)))
    assert (scores - scores[0]).abs().max() < 1e-5 * 32


def test_interleaved_pairs_with_half_split_angles_are_no_rotation() -> None:
    """Negative control: the classical mistake fails the property tested above."""

    def wrong(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = (torch.cat((t, t), -1) for t in rope_table(positions, 32))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + turned * sin

    scores = _scores_of_equal_distance(wrong)
    assert (scores - scores[0]).abs().max() > 0.1


def test_context_table_is_built_once_and_follows_the_decode_offset() -> None:
    shared = SequenceContext.create(4, 6, device="cpu", start=10)
    table = context_rope_table(shared, 8)
    assert context_rope_table(shared, 8) is table
    assert table[0].shape == (1, 6, 4)
    offsets = SequenceContext.create(2, 6, device="cpu", start=torch.tensor([10, 3]))
    assert context_rope_table(offsets, 8)[0].shape == (2, 6, 4)
    torch.testing.assert_close(context_rope_table(offsets, 8)[0][:1], table[0], rtol=0, atol=0)
    expected = rope_table(torch.arange(10, 16)[None], 8)
    torch.testing.assert_close(table, expected, rtol=0, atol=0)


def test_biased_norm_is_its_formula_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, gain, bias = draw(2, 3, 2, 2, 5), draw(2, 1, 5), draw(2, 2, 5)
    assert torch.equal(biased_norm(x, gain, bias), torch.addcmul(bias, rms_norm(x), gain))
    assert torch.autograd.gradcheck(biased_norm, (x, gain, bias))
