"""Attention by query blocks against its definition, against torch's kernel, and its masks."""

from __future__ import annotations

import pytest
import torch

from model import attention, reference_ops
from model.attention import (
    MAX_BLOCKED_KEYS,
    PADDING,
    attend,
    blocked_pairs,
    context_blocked_pairs,
    context_documents,
    subtracted_share,
)
from model.sequence import SequenceContext


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _problem(
    length: int, *, maps: int, keys: int | None = None, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    """q, k, v and (two maps) lam; batch 2, 3 heads, widths 8 and 5."""
    keys = keys or length
    tensors = [
        _random(2, maps, 3, length, 8, dtype=dtype),
        _random(2, 3, keys, 8, seed=1, dtype=dtype),
        _random(2, 3, keys, 5, seed=2, dtype=dtype),
    ]
    if maps == 2:
        tensors.append(_random(2, 3, length, 1, seed=3, dtype=dtype).sigmoid())
    return [tensor.requires_grad_() for tensor in tensors]


def _attend(tensors: list[torch.Tensor], blocked: torch.Tensor | None = None, scale=8**-0.5):
    q, k, v, *lam = tensors
    return attend(q, k, v, scale=scale, lam=lam[0] if lam else None, blocked=blocked)


def _starts(length: int) -> torch.Tensor:
    reset = torch.rand(2, length, generator=torch.Generator().manual_seed(9)) < 0.1
    reset[0] = False
    return reset


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("documents", [False, True])
def test_values_and_gradients_equal_the_definition(length: int, maps: int, documents: bool) -> None:
    tensors = _problem(length, maps=maps, dtype=torch.float64)
    reset = _starts(length) if documents else None
    valid = None
    if documents:
        valid = torch.ones(2, length, dtype=torch.bool)
        valid[1, : length // 3] = False
    context = SequenceContext.create(2, length, device="cpu", reset_mask=reset, valid_mask=valid)
    q, k, v, *lam = tensors
    expected = reference_ops.attention(
        q.permute(0, 3, 1, 2, 4),
        k.transpose(1, 2),
        v.transpose(1, 2),
        lam=lam[0].squeeze(-1).transpose(1, 2) if lam else None,
        documents=context.document_ids,
        valid=valid,
    )
    fast = _attend(tensors, context_blocked_pairs(context))
    torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-9)
    grad = _random(*fast.shape, seed=4, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(fast, tensors, grad),
        torch.autograd.grad(expected, tensors, grad, materialize_grads=True),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("keys", [130, 200])
@pytest.mark.parametrize("masked", [False, True])
def test_long_rows_and_continuations_agree_with_torch_kernel(
    maps: int, keys: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two routes of `attend` are one function; T = 130 queries at the end of `keys` keys."""
    tensors = _problem(130, maps=maps, keys=keys)
    documents = torch.zeros(2, keys, dtype=torch.int32)
    documents[0, keys // 2 :] = 1
    documents[1, :20] = PADDING
    blocked = blocked_pairs(documents, 130) if masked else None
    first = _attend(tensors, blocked)
    monkeypatch.setattr(attention, "MAX_BLOCKED_KEYS", 0)
    second = _attend(tensors, blocked)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    grad = _random(*first.shape, seed=4)
    for ours, theirs in zip(
        torch.autograd.grad(first, tensors, grad), torch.autograd.grad(second, tensors, grad)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_rows_beyond_the_blocked_limit_work() -> None:
    tensors = _problem(MAX_BLOCKED_KEYS + 1, maps=2)
    out = _attend(tensors)
    short = _attend([t[..., :64, :] for t in tensors])
    torch.testing.assert_close(out[:, :64], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("kernel", ["blocked", "torch"])
def test_the_future_changes_nothing_to_the_bit(
    maps: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch":
        monkeypatch.setattr(attention, "MAX_BLOCKED_KEYS", 0)
    tensors = [t.detach() for t in _problem(100, maps=maps)]
    before = _attend(tensors)
    for cut in (1, 40, 64, 99):
        changed = [t.clone() for t in tensors]
        for index, tensor in enumerate(changed):
            tensor[..., cut:, :] = 1e3 * _random(*tensor[..., cut:, :].shape, seed=20 + index)
        after = _attend(changed)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("kernel", ["blocked", "torch"])
def test_lambda_zero_is_the_first_map_to_the_bit(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch":
        monkeypatch.setattr(attention, "MAX_BLOCKED_KEYS", 0)
    q, k, v, lam = (t.detach() for t in _problem(130, maps=2))
    assert torch.equal(_attend([q, k, v, torch.zeros_like(lam)]), _attend([q[:, :1], k, v]))
    assert not torch.equal(_attend([q, k, v, lam]), _attend([q[:, :1], k, v]))


def test_map_count_and_lambda_must_match() -> None:
    q, k, v, lam = _problem(4, maps=2)
    with pytest.raises(ValueError, match="lam"):
        attend(q, k, v, scale=1.0)
    with pytest.raises(ValueError, match="lam"):
        attend(q[:, :1], k, v, scale=1.0, lam=lam)


def test_masks_are_built_only_for_boundaries_and_padding_and_only_once() -> None:
    none = torch.zeros(2, 8, dtype=torch.bool)
    first = none.clone()
    first[:, 0] = True
    for reset, valid in ((None, None), (none, ~none), (first, None)):
        context = SequenceContext.create(2, 8, device="cpu", reset_mask=reset, valid_mask=valid)
        assert context_blocked_pairs(context) is None
    starts = SequenceContext.create(2, 8, device="cpu", reset_mask=first)
    assert context_documents(starts, continued=True) is not None, "earlier tokens are cut off"
    middle = none.clone()
    middle[1, 5] = True
    context = SequenceContext.create(2, 8, device="cpu", reset_mask=middle)
    blocked = context_blocked_pairs(context)
    assert blocked is not None and context_blocked_pairs(context) is blocked
    assert blocked[1, 0, 5, 4] and not blocked[0, 0, 5, 4] and blocked[0, 0, 4, 5]


def test_padding_is_never_seen_and_never_makes_nan() -> None:
    documents = torch.zeros(1, 6, dtype=torch.int32)
    documents[0, [0, 1, 5]] = PADDING
    blocked = blocked_pairs(documents, 6)
    seen = ~blocked[0, 0]
    assert seen.diagonal().all(), "an empty softmax would be NaN"
    assert not seen[2:5, :2].any()
    assert not seen[5, :5].any() and not seen[1, 0]
    tensors = [t[:1, ..., :6, :] for t in _problem(8, maps=2)]
    out = _attend(tensors, blocked)
    grads = torch.autograd.grad(out.sum(), tensors)
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_subtracted_share_is_the_measured_ratio() -> None:
    q, k, v, lam = (t.detach() for t in _problem(20, maps=2))
    first = _attend([q[:1, :1], k[:1], v[:1]])
    second = _attend([q[:1, 1:], k[:1], v[:1]]) * lam[:1].transpose(1, 2)
    expected = second.norm() / first.norm()
    share = subtracted_share(q, k, v, scale=8**-0.5, lam=lam)
    torch.testing.assert_close(share, expected)
    assert subtracted_share(q, k, v, scale=8**-0.5, lam=torch.zeros_like(lam)) == 0
