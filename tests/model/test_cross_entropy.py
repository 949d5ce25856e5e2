"""Fused linear cross entropy against torch's cross entropy on whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import cross_entropy
from model.cross_entropy import linear_cross_entropy


def make_inputs(rows: int, width: int, vocab: int, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::3] = -100
    return hidden, weight, labels


def evaluate(function, hidden, weight, labels):
    hidden.grad = weight.grad = None
    loss = function(hidden, weight, labels)
    (3.0 * loss).backward()
    return loss.detach(), hidden.grad, weight.grad


def whole(hidden, weight, labels):
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


@pytest.mark.parametrize("rows", [1 + 1, 63, 200])
def test_value_and_gradients_equal_cross_entropy_over_several_blocks(rows, monkeypatch):
    monkeypatch.setitem(cross_entropy._BLOCK_LOGITS, "cpu", 64 * 50)
    monkeypatch.setattr(cross_entropy, "_FEWEST_ROWS", 1)
    inputs = make_inputs(rows, 16, 50)
    fused = evaluate(linear_cross_entropy, *inputs)
    for mine, reference in zip(fused, evaluate(whole, *inputs)):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_gradient_against_finite_differences():
    hidden, weight, labels = make_inputs(5, 3, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy(h, w, labels), (hidden, weight)
    )


def test_extreme_logits_stay_finite_and_right():
    hidden = torch.tensor([[400.0], [-400.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    loss, grad, _ = evaluate(linear_cross_entropy, hidden, weight, torch.tensor([1, 2]))
    assert loss == pytest.approx((800.0 + 400.0) / 2)
    assert torch.isfinite(grad).all()


def test_no_counted_label_gives_zero_loss_and_zero_gradient():
    hidden, weight, labels = make_inputs(4, 8, 9)
    loss, grad_hidden, grad_weight = evaluate(
        linear_cross_entropy, hidden, weight, torch.full_like(labels, -100)
    )
    assert loss == 0 and grad_hidden.abs().sum() == 0 and grad_weight.abs().sum() == 0


def test_frozen_head_and_inference_need_no_gradient_buffers():
    hidden, weight, labels = make_inputs(30, 8, 9)
    expected = evaluate(whole, hidden, weight, labels)
    weight.requires_grad_(False)
    weight.grad = hidden.grad = None
    loss = linear_cross_entropy(hidden, weight, labels)
    (3.0 * loss).backward()
    torch.testing.assert_close(hidden.grad, expected[1], atol=1e-6, rtol=1e-5)
    assert weight.grad is None
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), expected[0])


def test_autocast_runs_products_in_its_type_and_returns_fp32():
    hidden, weight, labels = make_inputs(40, 16, 30)
    expected = evaluate(whole, hidden, weight, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
    hidden.grad = weight.grad = None
    (3.0 * loss).backward()
    assert loss.dtype == torch.float32 and loss != expected[0]
    torch.testing.assert_close(loss.detach(), expected[0], atol=0, rtol=0.02)
    for mine, reference in ((hidden.grad, expected[1]), (weight.grad, expected[2])):
        assert (mine - reference).norm() < 0.03 * reference.norm()


def test_without_gradients_the_loss_is_the_same():
    hidden, weight, labels = make_inputs(40, 8, 50)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels).detach())
