"""Objectives: gradients by hand, REINFORCE at equal policies, rewards that reach the weights."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.training.rl.small_model import PAD, STOPS, random_prompts, small_model
from training.rl.objectives import (
    MODES,
    ClipSettings,
    entropy_bonus,
    group_advantages,
    kl_penalty,
    policy_loss,
)
from training.rl.rollout import completion_log_probs, sample

CLIP = ClipSettings(eps=0.2, gspo_eps=0.1)


def drawn(*, rows: int = 6, columns: int = 5, seed: int = 0, distance: float = 0.3):
    """log_probs with gradient, old_log_probs, advantages, mask; lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"dtype": torch.float64, "generator": generator}
    old = -3 * torch.rand(rows, columns, **kind) - 0.05
    log_probs = (old + distance * torch.randn(rows, columns, **kind)).requires_grad_()
    lengths = 1 + torch.arange(rows) % columns
    mask = torch.arange(columns) < lengths.unsqueeze(1)
    return log_probs, old, torch.randn(rows, **kind), mask


def gradient_by_hand(mode, log_probs, old, advantages, mask):
    """d loss / d log pi, number by number, from the objectives' formulas."""
    rows, columns = log_probs.shape
    log_probs = log_probs.detach()
    lengths = mask.sum(1).tolist()
    result = torch.zeros(rows, columns, dtype=torch.float64)
    for i, t in itertools.product(range(rows), range(columns)):
        if not mask[i, t]:
            continue
        a, size = float(advantages[i]), lengths[i]
        ratio = math.exp(float(log_probs[i, t] - old[i, t]))
        if mode in ("grpo", "igrpo"):
            kept = ratio <= 1.2 if a > 0 else ratio >= 0.8
            result[i, t] = -a * ratio * kept / (rows * size)
        elif mode == "gspo":
            total = sum(float(log_probs[i, s] - old[i, s]) for s in range(size))
            s = math.exp(total / size)
            kept = s <= 1.1 if a > 0 else s >= 0.9
            result[i, t] = -a * s * kept / (rows * size)
        elif mode == "cispo":
            result[i, t] = -a * min(max(ratio, 0.8), 1.2) / sum(lengths)
        else:
            up = 1.4 if a > 0 else 1.2
            result[i, t] = -a * min(max(ratio, 0.8), up) / sum(lengths)
    return result


def term_of(mode, log_probs, old, advantages, mask, **changes):
    settings = {"clip": CLIP} | changes
    return policy_loss(
        mode, log_probs=log_probs, old_log_probs=old, advantages=advantages, mask=mask, **settings
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_equals_the_one_by_hand(mode, seed):
    case = drawn(seed=seed)
    term = term_of(mode, *case)
    term.loss.backward()
    expected = gradient_by_hand(mode, *case)
    torch.testing.assert_close(case[0].grad, expected, atol=1e-12, rtol=0)
    assert 0.0 < term.clip_fraction < 1.0  # both sides of the clip are in the sample


def test_a_gradient_worked_out_on_paper():
    """Two completions of 2 and 1 tokens, A = 1 and -1; rho = 1.5, 1; 0.5."""
    rho = torch.tensor([[1.5, 1.0], [0.5, 1.0]])
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([1.0, -1.0])
    expected = {
        "grpo": [[0.0, -1 / 4], [0.0, 0.0]],
        "gspo": [[0.0, 0.0], [0.0, 0.0]],  # s = 1.2247 and 0.5, both beyond the bounds
        "cispo": [[-1.2 / 3, -1 / 3], [0.8 / 3, 0.0]],
        "dispo": [[-1.4 / 3, -1 / 3], [0.8 / 3, 0.0]],
    }
    for mode, values in expected.items():
        log_probs = rho.log().requires_grad_()
        term = term_of(mode, log_probs, torch.zeros(2, 2), advantages, mask)
        term.loss.backward()
        torch.testing.assert_close(log_probs.grad, torch.tensor(values), atol=1e-6, rtol=0)
        clipped, ratio = (1.0, (math.sqrt(1.5) + 0.5) / 2) if mode == "gspo" else (2 / 3, 1.0)
        assert term.clip_fraction == pytest.approx(clipped)
        assert term.ratio_mean == pytest.approx(ratio)


@pytest.mark.parametrize("mode", MODES)
def test_at_equal_policies_it_is_reinforce(mode):
    """Weights 1 / (N |y_i|) or 1 / sum |y|; with equal lengths both are one gradient."""
    _, old, advantages, mask = drawn()
    for kept in (mask, torch.ones_like(mask)):
        log_probs = old.clone().requires_grad_()
        term = term_of(mode, log_probs, old, advantages, kept)
        term.loss.backward()
        by_token = torch.full_like(old, 1.0 / float(kept.sum()))
        by_row = (1.0 / (len(old) * kept.double().sum(1, keepdim=True))).expand_as(old)
        weight = by_token if mode in ("cispo", "dispo") else by_row
        expected = -advantages.unsqueeze(1) * weight * kept
        torch.testing.assert_close(log_probs.grad, expected, atol=1e-12, rtol=0)
        assert term.clip_fraction == 0 and term.ratio_mean == pytest.approx(1.0)
    torch.testing.assert_close(by_token, by_row, atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_only_completion_tokens_count(mode):
    case = drawn()
    term = term_of(mode, *case)
    term.loss.backward()
    log_probs, old, advantages, mask = case
    for rubbish in (7.0, -50.0, math.inf, math.nan):
        other = log_probs.detach().masked_fill(~mask, rubbish).requires_grad_()
        disturbed = term_of(mode, other, old.masked_fill(~mask, -rubbish), advantages, mask)
        disturbed.loss.backward()
        assert torch.equal(disturbed.loss, term.loss)
        assert torch.equal(disturbed.clip_fraction, term.clip_fraction)
        assert torch.equal(disturbed.ratio_mean, term.ratio_mean)
        assert torch.equal(other.grad, log_probs.grad)
    assert not log_probs.grad[~mask].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalise", [True, False])
def test_rewards_reach_the_weights_of_a_model(mode, normalise):
    """Permuted rewards give another gradient, equal rewards exactly none (rollouts of a model)."""
    model = small_model()
    prompts = [prompt for prompt in random_prompts(2) for _ in range(4)]
    result = sample(
        model,
        prompts,
        max_new_tokens=8,
        temperature=1.0,
        top_k=0,
        generator=torch.Generator().manual_seed(0),
        stop_ids=STOPS,
        pad_id=PAD,
    )

    def gradient(rewards: list[float]) -> torch.Tensor:
        model.zero_grad()
        log_probs, _ = completion_log_probs(model, result)
        advantages = group_advantages(torch.tensor(rewards).view(2, 4), normalise=normalise)
        old, mask = result.old_log_probs, result.completion_mask
        term_of(mode, log_probs, old, advantages.flatten(), mask).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    first = gradient([1.0, 0.0, 0.0, 1.0, 0.1, 0.7, 0.0, 0.0])
    permuted = gradient([0.0, 1.0, 1.0, 0.0, 0.7, 0.1, 0.0, 0.0])
    cosine = torch.cosine_similarity(first, permuted, dim=0)
    assert first.norm() > 1e-3 and permuted.norm() > 1e-3 and cosine < 0.5
    # 0.1 has no exact mean: what rounding leaves must not be divided by 1e-6.
    assert not gradient([0.1] * 4 + [0.3] * 4).any()
    half = gradient([0.1] * 4 + [1.0, 0.0, 0.0, 1.0])
    assert half.norm() > 1e-3


def test_advantages_are_centred_scaled_and_exactly_zero_without_variance():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [3.0, 1.0, 1.0, 1.0]])
    plain = group_advantages(rewards, normalise=False)
    scaled = group_advantages(rewards, normalise=True)
    torch.testing.assert_close(plain[0], torch.tensor([0.5, -0.5, -0.5, 0.5]))
    torch.testing.assert_close(scaled[0], plain[0] / (0.5 + 1e-6))
    assert not plain[1].any() and not scaled[1].any()
    torch.testing.assert_close(scaled[2], plain[2] / (math.sqrt(0.75) + 1e-6))
    assert not group_advantages(torch.ones(3, 1), normalise=True).any()
    assert group_advantages(torch.tensor([[1, 0]]), normalise=False).tolist() == [[0.5, -0.5]]


def test_an_overflowing_ratio_of_a_worthless_completion_adds_nothing():
    old = torch.full((2, 3), -500.0)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for mode in MODES:
        log_probs = torch.zeros(2, 3).requires_grad_()
        term_of(mode, log_probs, old, torch.zeros(2), mask).loss.backward()
        assert not log_probs.grad.any() and not log_probs.grad.isnan().any()


def test_dispo_differentiates_what_it_is_given_and_clips_by_the_plain_ratio():
    log_probs, old, advantages, mask = drawn()
    scored = (log_probs.detach() * 1.7).requires_grad_()
    term_of("dispo", log_probs, old, advantages, mask, scored=scored).loss.backward()
    assert log_probs.grad is None
    expected = gradient_by_hand("dispo", log_probs, old, advantages, mask)
    torch.testing.assert_close(scored.grad, expected, atol=1e-12, rtol=0)


def test_the_penalty_is_k3_and_unbiased():
    """Its mean over samples of pi is KL(pi || ref); its gradient vanishes where both agree."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 6, generator=generator, dtype=torch.float64).log_softmax(1)
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True, generator=generator)
    mask = torch.ones(1, len(tokens), dtype=torch.bool)
    found = kl_penalty(policy[tokens].unsqueeze(0), reference[tokens].unsqueeze(0), mask)
    exact = (policy.exp() * (policy - reference)).sum()
    assert float(found) == pytest.approx(float(exact), rel=0.02)
    log_probs, old, _, mask = drawn()
    kl_penalty(log_probs, old, mask).backward()
    d = (old - log_probs).detach()
    expected = (1 - d.exp()) * mask / mask.sum()
    torch.testing.assert_close(log_probs.grad, expected, atol=1e-12, rtol=0)
    assert kl_penalty(old, old, mask) == 0
    assert kl_penalty(log_probs, old, mask) > 0
    assert entropy_bonus(torch.full((6, 5), 2.0), mask) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 0.0}, "--sigma-rl-clip-eps"),
        ({"eps": 1.0}, "--sigma-rl-clip-eps"),
        ({"gspo_eps": -0.1}, "--sigma-rl-gspo-clip-eps"),
        ({"dispo": (0.2, 0.4, 1.2, 0.2)}, "--sigma-rl-dispo-clip"),
        ({"dispo": (0.2, -0.4, 0.2, 0.2)}, "--sigma-rl-dispo-clip"),
    ],
)
def test_a_wrong_clip_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        ClipSettings(**settings).validate()


def test_an_unknown_objective_is_named():
    with pytest.raises(ValueError, match=r"--sigma-rl-mode is 'ppo'; choose one of grpo"):
        term_of("ppo", *drawn())
