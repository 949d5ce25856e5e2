"""The loss against one written by hand in numpy, its gradients, length control, and margins."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from model.adapters import attached
from tests.model.test_adapters import digest_of, make_adapter, make_model
from training.hydra import dpo
from training.hydra.dpo import (
    DPOSettings,
    Pair,
    as_rollout,
    length_masks,
    pair_gradients,
    pair_logits,
)
from training.rl.rollout import completion_log_probs

PAIRS = [
    Pair(prompt=(3, 9), chosen=(4, 8, 8), rejected=(5,), reward_chosen=1, reward_rejected=0),
    Pair(prompt=(7,), chosen=(6, 2), rejected=(1, 2, 9, 4), reward_chosen=1, reward_rejected=0.2),
    Pair(prompt=(9, 9, 1), chosen=(11,), rejected=(12,), reward_chosen=0.2, reward_rejected=0.1),
]


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def dense_model():
    """In fp64 throughout; routers compute in fp32."""
    return make_model(n_routed_experts=0).double()


def loss_by_hand(log_ratios, masks, lengths, *, beta, verbosity, max_len):
    """Mean loss and its gradient in every log-ratio, token by token."""
    count = log_ratios.shape[1]
    gradient, total = np.zeros(log_ratios.shape), 0.0
    for pair in range(count):
        won = sum(r for r, m in zip(log_ratios[0, pair], masks[0, pair]) if m)
        lost = sum(r for r, m in zip(log_ratios[1, pair], masks[1, pair]) if m)
        logit = beta * (won - lost)
        logit -= verbosity * (lengths[0, pair] - lengths[1, pair]) / max_len
        total += math.log1p(math.exp(-logit)) / count
        slope = -beta / (1.0 + math.exp(logit)) / count
        gradient[0, pair][masks[0, pair]] = slope
        gradient[1, pair][masks[1, pair]] = -slope
    return total, gradient


@pytest.mark.parametrize("verbosity", [0.0, 0.02, 3.0])
def test_loss_and_gradient_are_those_by_hand(verbosity):
    draw = torch.randn(2, 4, 6, generator=generator(), dtype=torch.float64)
    lengths = torch.tensor([[6, 2, 3, 1], [1, 2, 6, 5]])
    there = torch.arange(6).view(1, 1, -1) < lengths.unsqueeze(2)
    masks = length_masks(there[0], there[1], generator=generator(1))
    settings = DPOSettings(beta=0.3, verbosity=verbosity, max_len=5)
    leaf = draw.clone().requires_grad_()
    loss = -torch.nn.functional.logsigmoid(pair_logits(leaf, masks, lengths, settings)).mean()
    loss.backward()
    expected, gradient = loss_by_hand(
        draw.numpy(), masks.numpy(), lengths.numpy(), beta=0.3, verbosity=verbosity, max_len=5
    )
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-13, atol=1e-16)


def test_equally_many_tokens_of_both_answers_count_and_every_one_may():
    lengths = torch.tensor([[6, 2, 1], [2, 2, 4]])
    there = torch.arange(6).view(1, 1, -1) < lengths.unsqueeze(2)
    counts = torch.zeros(2, 3, 6)
    for seed in range(600):
        masks = length_masks(there[0], there[1], generator=generator(seed))
        assert (masks & ~there).sum() == 0
        assert masks.sum(2).tolist() == [[2, 2, 1], [2, 2, 1]]
        counts += masks
    shares = counts / 600
    assert torch.equal(shares[1, 0], torch.tensor([1.0, 1.0, 0, 0, 0, 0]))
    assert (shares[0, 0] - 1 / 3).abs().max() < 0.08  # 4 standard errors
    assert (shares[1, 2, :4] - 1 / 4).abs().max() < 0.08


def gradients_of(pairs, settings, *, seed=5, model=None, adapter=None):
    model = model or dense_model()
    adapter = adapter or make_adapter(model)
    loss = pair_gradients(
        model, adapter, pairs, settings, generator=generator(seed), pad_id=0, autocast=nullcontext
    )
    return loss, [value.grad for _, value in adapter.named_parameters() if value.grad is not None]


def test_the_adapters_gradient_is_that_of_the_loss_by_hand():
    """All factors by finite differences of the hand-written loss over the model's log-ratios."""
    model = dense_model()
    adapter = make_adapter(model)
    settings = DPOSettings(beta=0.5, verbosity=0.2, max_len=4)
    loss, gradients = gradients_of(PAIRS, settings, model=model, adapter=adapter)
    rollout = as_rollout(PAIRS, device=torch.device("cpu"), pad_id=0)
    there = rollout.completion_mask.view(2, 3, -1)
    masks = length_masks(there[0], there[1], generator=generator()).numpy()

    @torch.no_grad()
    def by_hand():
        reference, _ = completion_log_probs(model, rollout)
        with attached(model, adapter):
            own, _ = completion_log_probs(model, rollout)
        ratios = (own - reference).view(2, 3, -1).numpy()
        lengths = there.sum(2).numpy()
        return loss_by_hand(ratios, masks, lengths, beta=0.5, verbosity=0.2, max_len=4)[0]

    assert loss == pytest.approx(by_hand(), rel=1e-12)
    step, draw = 1e-6, generator(9)
    for (_, value), gradient in zip(adapter.named_parameters(), gradients):
        direction = torch.randn(value.shape, generator=draw, dtype=torch.float64)
        ends = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                value.add_(direction, alpha=sign * step)
            ends.append(by_hand())
            with torch.no_grad():
                value.sub_(direction, alpha=sign * step)
        slope = (ends[0] - ends[1]) / (2 * step)
        assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def test_the_length_term_changes_the_gradient_where_lengths_differ():
    differing, equal = PAIRS[:2], PAIRS[2:]
    for pairs, changes in ((differing, True), (equal, False)):
        _, without = gradients_of(pairs, DPOSettings(verbosity=0.0, max_len=4))
        _, with_term = gradients_of(pairs, DPOSettings(verbosity=0.02, max_len=4))
        same = all(torch.equal(one, two) for one, two in zip(without, with_term))
        assert same is not changes


def test_a_longer_better_answer_is_pushed_harder_and_a_shorter_one_less():
    for pair, sign in ((PAIRS[0], 1), (PAIRS[1], -1)):
        norms = []
        for verbosity in (0.0, 0.5):
            _, found = gradients_of([pair], DPOSettings(verbosity=verbosity, max_len=4))
            norms.append(float(torch.stack([grad.norm() for grad in found]).norm()))
        assert (norms[1] > norms[0]) == (sign > 0)


def test_an_adapter_that_adds_nothing_has_the_loss_of_a_coin():
    model = dense_model()
    adapter = make_adapter(model, size=0.0)
    settings = DPOSettings(verbosity=0.0)
    loss, gradients = gradients_of(PAIRS, settings, model=model, adapter=adapter)
    assert loss == pytest.approx(math.log(2.0), rel=1e-12)
    assert any(gradient.abs().max() > 0 for gradient in gradients)


def test_swapped_pairs_turn_the_gradient_round():
    """X4: the rewards decide, not the order in which completions come."""
    swapped = [
        Pair(prompt=p.prompt, chosen=p.rejected, rejected=p.chosen,
             reward_chosen=1, reward_rejected=0)
        for p in PAIRS[2:]
    ]  # fmt: skip
    model = dense_model()
    results = []
    for pairs in (PAIRS[2:], swapped):
        adapter = make_adapter(model, size=0.0)
        results.append(gradients_of(pairs, DPOSettings(), model=model, adapter=adapter)[1])
    assert all(torch.allclose(one, -two, atol=1e-12) for one, two in zip(*results))


def test_pairs_in_several_forwards_have_the_same_gradient(monkeypatch):
    pairs = [PAIRS[2]] * 5  # one token each: nothing is drawn
    loss, whole = gradients_of(pairs, DPOSettings())
    monkeypatch.setattr(dpo, "PAIRS_AT_ONCE", 2)
    again, parts = gradients_of(pairs, DPOSettings())
    assert again == pytest.approx(loss, rel=1e-12)
    assert all(torch.allclose(one, two, atol=1e-12) for one, two in zip(whole, parts))


def test_the_model_itself_gets_no_gradient_and_stays_as_it_was():
    model = make_model(quant_mode="bitnet_1_58")
    digest = digest_of(model)
    adapter = make_adapter(model)
    gradients_of(PAIRS, DPOSettings(), model=model, adapter=adapter)
    assert all(param.grad is None and param.requires_grad for param in model.parameters())
    assert digest_of(model) == digest


@pytest.mark.parametrize("rewards", [(0.5, 0.5), (0.0, 1.0), (math.nan, 0.0)])
def test_a_pair_without_a_margin_cannot_be_made(rewards):
    with pytest.raises(ValueError, match="margin"):
        Pair(prompt=(1,), chosen=(2,), rejected=(3,), reward_chosen=rewards[0],
             reward_rejected=rewards[1])  # fmt: skip
    with pytest.raises(ValueError, match="two completions"):
        Pair(prompt=(1,), chosen=(), rejected=(3,), reward_chosen=1, reward_rejected=0)
