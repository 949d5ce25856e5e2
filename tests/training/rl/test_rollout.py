"""Rollouts: equal to decoding row by row, to the model's distribution, and to one whole pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.generation import iter_generate
from tests.training.rl.small_model import PAD, STOPS, VOCAB, random_prompts, small_model
from training.rl import rollout as rollout_module
from training.rl.objectives import ClipSettings, policy_loss
from training.rl.rollout import (
    Rollout,
    choose,
    completion_hidden,
    completion_log_probs,
    concatenate,
    head_log_probs,
    sample,
)

TOLERANCE = 1e-4  # nats, between decoding and one pass over the row, in fp32
KINDS = {
    "all blocks": {},
    "standard residual": {"residual_layout": "standard"},
    "attention only": {"mamba_ratio": 0},
    "Mamba only": {"attention_ratio": 0},
    "dense, plain attention": {"n_routed_experts": 0, "diff_attention_enabled": False},
}


def roll(model, prompts, *, seed=1, **changes) -> Rollout:
    settings = {
        "max_new_tokens": 12,
        "temperature": 1.0,
        "top_k": 0,
        "stop_ids": STOPS,
        "pad_id": PAD,
    }
    generator = torch.Generator().manual_seed(seed)
    return sample(model, prompts, generator=generator, **(settings | changes))


def groups_of(number: int, prompts: list[list[int]]) -> list[list[int]]:
    return [prompt for prompt in prompts for _ in range(number)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_rows_equal_decoding_one_by_one(kind):
    model = small_model(**KINDS[kind])
    prompts = random_prompts(9)
    rows = roll(model, prompts, temperature=0.0, max_new_tokens=20).token_rows(stop_ids=STOPS)
    for prompt, row in zip(prompts, rows, strict=True):
        tokens = iter_generate(
            model, torch.tensor([prompt]), max_new_tokens=20, temperature=0.0, stop_id=STOPS[0]
        )
        expected = []
        for token in tokens:
            if token == STOPS[1]:
                break
            expected.append(token)
        assert row == expected
    assert len({len(row) for row in rows}) > 1  # some have stopped


def decode_from_scratch(model, prompt, uniforms, *, temperature, top_k):
    """One row without cache or batch: the whole row again for every token."""
    tokens, log_probs = [], []
    for uniform in uniforms:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, -1].double()
        order = logits.argsort(descending=True)[: top_k or None]
        order = order if top_k else torch.arange(len(logits))
        shares = (logits[order] / temperature).softmax(0)
        place = int((shares.cumsum(0) <= uniform).sum())
        tokens.append(int(order[place]))
        log_probs.append(float(logits.log_softmax(0)[tokens[-1]]))
        if tokens[-1] in STOPS:
            break
    return tokens, log_probs


@pytest.mark.parametrize(
    ("kind", "temperature", "top_k"),
    [*((kind, 1.0, 0) for kind in KINDS), ("all blocks", 0.7, 6)],
)
def test_sampled_rows_equal_decoding_one_by_one(kind, temperature, top_k):
    model = small_model(**KINDS[kind]).eval()
    prompts = groups_of(3, random_prompts(4))
    result = roll(model, prompts, temperature=temperature, top_k=top_k)
    generator = torch.Generator().manual_seed(1)
    uniforms = torch.rand(12, len(prompts), dtype=torch.float64, generator=generator)
    rows = result.token_rows()
    for number, prompt in enumerate(prompts):
        tokens, log_probs = decode_from_scratch(
            model, prompt, uniforms[:, number].tolist(), temperature=temperature, top_k=top_k
        )
        assert rows[number] == tokens
        found = result.old_log_probs[number, : len(tokens)]
        torch.testing.assert_close(found, torch.tensor(log_probs), atol=TOLERANCE, rtol=0)


def test_a_thousand_rows_follow_the_models_distribution():
    """Chi-square of first and second tokens against exact probabilities, 0.1 % level."""
    model = small_model(vocab_size=7).eval()
    number, temperature, top_k = 4000, 0.8, 5
    found = roll(
        model,
        [[3, 1, 4]] * number,
        temperature=temperature,
        top_k=top_k,
        max_new_tokens=2,
        stop_ids=(),
    ).completion_ids

    def shares(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids).logits[:, -1].double() / temperature
        kept = logits >= logits.topk(top_k, dim=1).values[:, -1:]
        return logits.masked_fill(~kept, -torch.inf).softmax(1)

    first = shares(torch.tensor([[3, 1, 4]]))[0]
    second = shares(torch.tensor([[3, 1, 4, token] for token in range(7)]))
    expected = (first.unsqueeze(1) * second).flatten() * number
    counts = torch.bincount(found[:, 0] * 7 + found[:, 1], minlength=49)
    assert not counts[expected == 0].any()
    large = expected >= 5
    statistic = ((counts - expected)[large] ** 2 / expected[large]).sum()
    limit = {24: 51.2, 23: 49.7, 22: 48.3, 21: 46.8, 20: 45.3, 19: 43.8, 18: 42.3}
    assert statistic < limit[int(large.sum()) - 1]


def test_choose_is_the_inverse_of_the_distribution_function():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0]]).expand(4000, 4)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.0, 2)):
        tokens = choose(logits, uniforms, temperature=temperature, top_k=top_k)
        scaled = logits[0] / temperature
        if top_k:
            scaled = scaled.masked_fill(torch.arange(4) < 2, -torch.inf)
        share = torch.bincount(tokens, minlength=4) / 4000
        torch.testing.assert_close(share, scaled.softmax(0), atol=1e-3, rtol=0)
    extremes = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens = choose(
        torch.tensor([[-torch.inf, 0.0, 0.0]]).expand(2, 3), extremes, temperature=1.0, top_k=0
    )
    assert tokens.tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_log_probs_equal_the_recomputed_ones(kind):
    model = small_model(**KINDS[kind])
    result = roll(model, groups_of(4, random_prompts(8)), temperature=0.9, top_k=12)
    found, entropy = completion_log_probs(model, result)
    torch.testing.assert_close(found.detach(), result.old_log_probs, atol=TOLERANCE, rtol=0)
    assert found.requires_grad and entropy.requires_grad
    assert not found[~result.completion_mask].any() and not entropy[~result.completion_mask].any()


def test_a_ternary_model_stores_the_log_probs_of_the_same_function():
    """In fp64, where no activation is near enough to a rounding edge for the last bit to matter."""
    model = small_model(quant_mode="bitnet_1_58").double()
    result = roll(model, groups_of(4, random_prompts(8)))
    found, _ = completion_log_probs(model, result)
    torch.testing.assert_close(found.detach().float(), result.old_log_probs, atol=TOLERANCE, rtol=0)


def test_a_ternary_model_in_fp32_differs_by_single_rounding_steps():
    model = small_model(quant_mode="bitnet_1_58")
    result = roll(model, groups_of(4, random_prompts(8)))
    found, _ = completion_log_probs(model, result)
    error = (found.detach() - result.old_log_probs).abs()[result.completion_mask]
    assert error.median() < 1e-5
    assert error.mean() < 1e-3 and error.max() < 5e-2


def test_the_rounding_steps_of_a_ternary_model_do_not_bias_the_importance_ratio():
    """Sampling and training forward are two distributions, each normalised: the mean ratio is 1."""
    model = small_model(quant_mode="bitnet_1_58", n_layers=6, d_model=64, n_heads=4)
    result = roll(model, groups_of(4, random_prompts(64)))
    found, _ = completion_log_probs(model, result)
    mask = result.completion_mask
    ratio = (found.detach() - result.old_log_probs)[mask].double().exp()
    assert (ratio != 1.0).double().mean() > 0.1 and (ratio - 1).abs().max() < 0.2  # none is clipped
    error = ratio.std() / len(ratio) ** 0.5
    assert abs(ratio.mean() - 1) < 4 * error < 1e-3
    advantages = torch.randn(len(result), generator=torch.Generator().manual_seed(1))
    gradients = []
    for old in (result.old_log_probs, found.detach()):
        term = policy_loss(
            "cispo",
            log_probs=found,
            old_log_probs=old,
            advantages=advantages,
            mask=mask,
            clip=ClipSettings(),
        )
        gradients.append(torch.autograd.grad(term.loss, found, retain_graph=True)[0])
    assert (gradients[0] - gradients[1]).norm() < 0.02 * gradients[1].norm()


def test_log_probs_and_entropy_equal_those_of_plain_logits_with_their_gradient():
    model = small_model().eval()
    result = roll(model, groups_of(2, random_prompts(4)))
    weights = torch.randn(2, *result.completion_mask.shape)
    found = completion_log_probs(model, result, temperature=0.8)
    sum((w * value).sum() for w, value in zip(weights, found)).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = torch.zeros(())
    for number, row in enumerate(result.token_rows()):
        prompt = result.prompt_ids[number][result.prompt_mask[number]].tolist()
        logits = model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1] / 0.8
        normal = logits.log_softmax(1)
        picked = normal.gather(1, torch.tensor(row).unsqueeze(1)).squeeze(1)
        spread = -(normal.exp() * normal).sum(1)
        torch.testing.assert_close(found[0][number, : len(row)], picked, atol=1e-5, rtol=0)
        torch.testing.assert_close(found[1][number, : len(row)], spread, atol=1e-5, rtol=0)
        for w, value in zip(weights[:, number, : len(row)], (picked, spread)):
            total = total + (w * value).sum()
    total.backward()
    assert len(gradients) > 20
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-4, rtol=1e-3)


def test_padding_is_never_read():
    model = small_model().eval()
    result = roll(model, groups_of(2, random_prompts(5)))
    assert not result.prompt_mask.all() and not result.completion_mask.all()
    noise = torch.randint(VOCAB, (2, 100), generator=torch.Generator().manual_seed(0))

    def disturbed(ids: torch.Tensor, mask: torch.Tensor, row: int) -> torch.Tensor:
        return torch.where(mask, ids, noise[row, : ids.shape[1]])

    other = replace(
        result,
        prompt_ids=disturbed(result.prompt_ids, result.prompt_mask, 0),
        completion_ids=disturbed(result.completion_ids, result.completion_mask, 1),
    )
    gradients = []
    for version in (result, other):
        model.zero_grad()
        found, entropy = completion_log_probs(model, version)
        (found.sum() + entropy.sum()).backward()
        gradients.append((found.detach(), [p.grad for p in model.parameters()]))
    assert torch.equal(gradients[0][0], gradients[1][0])
    for first, second in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(first, second, atol=0, rtol=0)


def test_blocks_of_logits_change_nothing(monkeypatch):
    model = small_model().eval()
    result = roll(model, random_prompts(6))
    outcomes = []
    for limit in (2**24, VOCAB * 7):
        monkeypatch.setattr(rollout_module, "LARGEST_LOGITS", limit)
        model.zero_grad()
        found, entropy = completion_log_probs(model, result)
        (found.sum() - entropy.sum()).backward()
        outcomes.append((found.detach(), entropy.detach(), model.embed.weight.grad))
    for first, second in zip(*outcomes):
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_two_temperatures_share_the_hidden_values():
    model = small_model()
    result = roll(model, random_prompts(4))
    hidden = completion_hidden(model, result)
    assert hidden.shape == (result.num_tokens, 32)
    for temperature in (1.0, 0.6):
        both = (
            head_log_probs(model, result, hidden, temperature=temperature),
            completion_log_probs(model, result, temperature=temperature),
        )
        assert torch.equal(both[0][0], both[1][0])


@pytest.mark.parametrize("share", [0.01, 2.0])
def test_who_leaves_changes_nobodys_text(monkeypatch, share):
    model = small_model()
    prompts = groups_of(4, random_prompts(6))
    expected = roll(model, prompts, max_new_tokens=24)
    batches: list[int] = []
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    monkeypatch.setattr(rollout_module, "LEAVING_SHARE", share)
    found = roll(model, prompts, max_new_tokens=24)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.completion_mask, expected.completion_mask)
    torch.testing.assert_close(found.old_log_probs, expected.old_log_probs, atol=TOLERANCE, rtol=0)
    assert batches[0] == 6 and batches[1] <= 24
    assert (batches[-1] < 12) == (share < 1.0)


def test_looking_rarely_changes_nobodys_text(monkeypatch):
    model = small_model()
    prompts = groups_of(4, random_prompts(6))
    expected = roll(model, prompts, max_new_tokens=24)
    monkeypatch.setattr(rollout_module, "STEPS_BETWEEN_LOOKS", {"cpu": 5})
    found = roll(model, prompts, max_new_tokens=24)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.completion_mask, expected.completion_mask)


def test_a_stop_token_ends_a_row_and_is_part_of_it():
    result = roll(small_model(), groups_of(4, random_prompts(6)), max_new_tokens=24)
    lengths = result.completion_mask.sum(1)
    for number, row in enumerate(result.token_rows()):
        assert not set(row[:-1]) & set(STOPS)
        assert row[-1] in STOPS or len(row) == 24
        assert result.completion_mask[number, : lengths[number]].all()
        assert (result.completion_ids[number, lengths[number] :] == PAD).all()
        assert not result.old_log_probs[number, lengths[number] :].any()
    stripped = result.token_rows(stop_ids=STOPS)
    assert all(not set(row) & set(STOPS) for row in stripped)
    assert result.completion_ids.shape[1] == lengths.max()


def test_the_generator_gives_the_same_share_whatever_is_said():
    states = []
    for prompts in (random_prompts(4, seed=0), random_prompts(4, seed=1)):
        generator = torch.Generator().manual_seed(0)
        sample(
            small_model(),
            prompts,
            max_new_tokens=8,
            temperature=1.0,
            top_k=0,
            generator=generator,
            stop_ids=STOPS,
            pad_id=PAD,
        )
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_a_training_model_is_sampled_without_dropout_and_stays_in_training():
    model = small_model(dropout=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = (roll(model, random_prompts(4), temperature=0.0) for _ in range(2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    found, _ = completion_log_probs(model, first)
    torch.testing.assert_close(found.detach(), first.old_log_probs, atol=TOLERANCE, rtol=0)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_can_be_picked_and_rollouts_joined():
    model = small_model()
    prompts = random_prompts(8)
    result = roll(model, prompts)
    picked = result.select([5, 2])
    assert picked.token_rows() == [result.token_rows()[5], result.token_rows()[2]]
    assert picked.prompt_ids.shape[1] == max(len(prompts[5]), len(prompts[2]))
    assert len(result.select([])) == 0
    joined = concatenate([picked, result.select([0])], pad_id=PAD)
    assert joined.token_rows() == [result.token_rows()[row] for row in (5, 2, 0)]
    found, _ = completion_log_probs(model, joined)
    torch.testing.assert_close(found.detach(), joined.old_log_probs, atol=TOLERANCE, rtol=0)
    rows = torch.tensor([5, 2, 0])
    torch.testing.assert_close(joined.mean_log_probs(), result.mean_log_probs()[rows])
    with pytest.raises(ValueError, match="different temperature"):
        concatenate([result, roll(model, prompts, temperature=0.5)], pad_id=PAD)
    with pytest.raises(ValueError, match="no rollout"):
        concatenate([], pad_id=PAD)


def test_texts_hold_the_completion_alone():
    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("a") + token) for token in ids)

    result = roll(small_model(), random_prompts(5))
    texts = result.texts(Letters(), stop_ids=STOPS)
    assert [len(text) for text in texts] == [len(r) for r in result.token_rows(stop_ids=STOPS)]
    assert all(not set(text) & {"f", "h"} for text in texts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_new_tokens": 0}, "--ttrl-max-new-tokens"),
        ({"temperature": -0.1}, "--ttrl-temperature"),
        ({"top_k": -1}, "--ttrl-top-k"),
        ({"prompts": [[1], []]}, "a prompt of at least one token"),
        ({"prompts": []}, "a prompt of at least one token"),
    ],
)
def test_a_wrong_setting_is_named(changes, words):
    prompts = changes.pop("prompts", [[1]])
    with pytest.raises(ValueError, match=words):
        roll(small_model(), prompts, **changes)
    result = roll(small_model(), [[1]])
    with pytest.raises(ValueError, match="--sigma-rl-dispo-logit-temp"):
        completion_log_probs(small_model(), result, temperature=0.0)
