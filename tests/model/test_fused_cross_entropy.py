"""The fused head's loss and gradients against its definition, under Triton's interpreter."""

import pytest
import torch

from model import reference_ops
from model.cross_entropy import linear_cross_entropy
from tests.model.kernel_inputs import DEVICE, poisoned_empty, random

pytest.importorskip("triton")

from model import fused_cross_entropy as fused

SHAPES = [(1, 1, 1), (1, 64, 63), (63, 100, 500), (100, 63, 100), (500, 17, 130)]  # N, D, V


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    with poisoned_empty(monkeypatch):
        yield


def labels_of(rows, vocabulary, *, seed):
    labels = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    labels[1::3] = -100
    return labels.to(DEVICE)


def evaluate(function, hidden, weight, labels):
    """Loss and the gradients of 3 * loss, by name."""
    hidden, weight = (value.detach().requires_grad_() for value in (hidden, weight))
    loss = function(hidden, weight, labels)
    (3.0 * loss).backward()
    return {"loss": loss.detach(), "hidden": hidden.grad, "weight": weight.grad}


def triton_loss(hidden, weight, labels):
    return linear_cross_entropy(hidden, weight, labels, backend="triton")


def assert_same(found, expected):
    for name, value in expected.items():
        close = torch.allclose(found[name], value, rtol=2e-5, atol=2e-6)
        assert close, (name, (found[name] - value).abs().max())


@pytest.mark.parametrize(("rows", "width", "vocabulary"), SHAPES)
def test_loss_and_gradients_equal_the_definition(rows, width, vocabulary):
    hidden, weight = random(rows, width, seed=1), random(vocabulary, width, seed=2)
    labels = labels_of(rows, vocabulary, seed=3)
    found = evaluate(triton_loss, hidden, weight, labels)
    assert_same(found, evaluate(reference_ops.linear_cross_entropy, hidden, weight, labels))


@pytest.mark.parametrize("processors", [1, 3, 108])
def test_any_split_of_the_vocabulary_gives_the_same(processors, monkeypatch):
    monkeypatch.setattr(fused, "processor_count", lambda device: processors)
    hidden, weight, labels = (
        random(70, 20, seed=4),
        random(700, 20, seed=5),
        labels_of(70, 700, seed=6),
    )
    normaliser, picked = fused.logit_statistics(hidden, weight, labels)
    logits = hidden @ weight.T
    torch.testing.assert_close(normaliser, torch.logsumexp(logits, 1), rtol=1e-6, atol=1e-5)
    counted = labels >= 0
    wanted = logits.gather(1, labels.clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(picked[counted], wanted[counted], rtol=1e-5, atol=1e-5)
    assert not picked[~counted].any()


def test_rows_in_several_blocks_of_gradient(monkeypatch):
    hidden, weight, labels = (
        random(200, 20, seed=7),
        random(90, 20, seed=8),
        labels_of(200, 90, seed=9),
    )
    whole = evaluate(triton_loss, hidden, weight, labels)
    monkeypatch.setattr(fused, "MAX_GRADIENT_ENTRIES", 64 * 128)
    split = evaluate(triton_loss, hidden, weight, labels)
    assert_same(split, whole)
    assert torch.equal(split["hidden"], whole["hidden"])


def test_memory_of_backward_is_bounded(monkeypatch):
    """No tensor as large as all logits is ever made."""
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **o: sizes.append(a) or empty(*a, **o))
    monkeypatch.setattr(fused, "MAX_GRADIENT_ENTRIES", 64 * 512)
    evaluate(
        triton_loss, random(300, 8, seed=10), random(500, 8, seed=11), labels_of(300, 500, seed=12)
    )
    assert (64, 512) in sizes
    assert max(torch.Size(size).numel() for size in sizes) < 300 * 500 / 4


def test_strided_inputs():
    hidden, weight = random(40, 2 * 33, seed=13)[:, ::2], random(33, 130, seed=14).T
    labels = torch.stack((labels_of(40, 130, seed=15),) * 2, dim=1)[:, 0]
    found = evaluate(triton_loss, hidden, weight, labels)
    plain = [value.contiguous() for value in (hidden, weight, labels)]
    assert_same(found, evaluate(reference_ops.linear_cross_entropy, *plain))


def test_extreme_logits_stay_finite_and_right():
    hidden = torch.tensor([[400.0], [-400.0]], device=DEVICE)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], device=DEVICE)
    found = evaluate(triton_loss, hidden, weight, torch.tensor([1, 2], device=DEVICE))
    assert found["loss"].item() == pytest.approx((800.0 + 400.0) / 2)
    assert torch.isfinite(found["hidden"]).all()


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counted_gives_zero_loss_and_zero_gradients(rows):
    labels = torch.full((rows,), -100, device=DEVICE)
    found = evaluate(triton_loss, random(rows, 8, seed=16), random(9, 8, seed=17), labels)
    assert not any(value.any() for value in found.values())
    assert found["hidden"].shape == (rows, 8)


@pytest.mark.parametrize("strange", [9, -1])
def test_a_label_outside_the_vocabulary_is_not_passed_over(strange):
    labels = torch.tensor([1, strange, 3], device=DEVICE)
    assert torch.isnan(triton_loss(random(3, 8, seed=18), random(9, 8, seed=19), labels))


def test_only_what_is_asked_for_gets_a_gradient():
    hidden, weight, labels = (
        random(20, 8, seed=20),
        random(30, 8, seed=21),
        labels_of(20, 30, seed=22),
    )
    expected = evaluate(triton_loss, hidden, weight, labels)
    for name in ("hidden", "weight"):
        given = {"hidden": hidden.clone(), "weight": weight.clone()}
        given[name].requires_grad_()
        (3.0 * triton_loss(given["hidden"], given["weight"], labels)).backward()
        assert torch.equal(given[name].grad, expected[name])
    with torch.no_grad():
        assert torch.equal(triton_loss(hidden, weight, labels), expected["loss"])


def test_half_precision_gradients_of_small_probabilities_survive():
    """1 / (rows * vocabulary) is far below what fp16 can hold."""
    hidden, weight = random(64, 16, seed=23) * 0.01, random(2000, 16, seed=24)
    labels = labels_of(64, 2000, seed=25)
    expected = evaluate(reference_ops.linear_cross_entropy, hidden, weight, labels)
    with torch.autocast(DEVICE, dtype=torch.float16):
        found = evaluate(triton_loss, hidden, weight, labels)
    assert found["loss"].dtype == torch.float32 and found["weight"].dtype == torch.float32
    for name, value in expected.items():
        assert (found[name] - value).norm() < 3e-3 * value.norm(), name


def test_backward_repeats_to_the_bit():
    hidden, weight, labels = (
        random(130, 20, seed=26),
        random(90, 20, seed=27),
        labels_of(130, 90, seed=28),
    )
    first, second = (evaluate(triton_loss, hidden, weight, labels) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_on_a_device_in_bf16():
    hidden, weight = random(2000, 768, seed=29), random(8000, 768, seed=30) * 0.05
    labels = labels_of(2000, 8000, seed=31)
    expected = evaluate(
        lambda h, w, y: torch.nn.functional.cross_entropy(h @ w.T, y), hidden, weight, labels
    )
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = evaluate(triton_loss, hidden, weight, labels)
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.01 * value.norm(), name
