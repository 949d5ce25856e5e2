"""The step of one token: the blocks' values to the bit, used where it may be, never stale."""

from __future__ import annotations

import pytest
import torch

from model import sigma_llm
from model.adapters import Adapter, attached
from model.blocks import Block
from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache
from tests.tiny_model import VOCAB, tiny_config

SETTINGS = {
    "ternary": {"quant_mode": "bitnet_1_58"},
    "full precision": {},
    "rank 1": {"quant_mode": "bitnet_1_58", "mimo_rank": 1},
    "no trapezoid": {"quant_mode": "bitnet_1_58", "mamba_trapezoid": False},
    "groups": {"quant_mode": "bitnet_1_58", "bitlinear_group_size": 16},
    "two streams": {"quant_mode": "bitnet_1_58", "residual_layout": "two-stream"},
    "two shared experts": {"quant_mode": "bitnet_1_58", "n_shared_experts": 2},
    "no shared expert": {"quant_mode": "bitnet_1_58", "n_shared_experts": 0},
    "one expert per token": {"quant_mode": "bitnet_1_58", "moe_top_k": 1},
    "dense": {"quant_mode": "bitnet_1_58", "n_routed_experts": 0},
    "plain attention": {"quant_mode": "bitnet_1_58", "diff_attention_enabled": False},
    "wide latent": {"quant_mode": "bitnet_1_58", "kv_latent_dim": 64},
    "no sub-norm": {"quant_mode": "bitnet_1_58", "sub_norm": False},
}


def make_model(**changes) -> SigmaLLM:
    """With every weight away from its initial value."""
    model = SigmaLLM(tiny_config(**changes), seed=3).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def decode(model: SigmaLLM, ids: torch.Tensor, *, prompt: int = 5, **masks):
    """Logits of every token after the prompt, and the last state."""
    logits = []
    with torch.no_grad(), TernaryCache().held():
        state = model(ids[:, :prompt], use_cache=True, **masks).state
        for place in range(prompt, ids.shape[1]):
            output = model(ids[:, place : place + 1], state=state, use_cache=True)
            state = output.state
            logits.append(output.logits)
    return torch.cat(logits, 1), state


def by_blocks(monkeypatch, *args, **more):
    with monkeypatch.context() as patch:
        patch.setattr(sigma_llm, "token_step", lambda *given: None)
        return decode(*args, **more)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_values_are_those_of_the_blocks_to_the_bit(name, rows, monkeypatch):
    model, ids = make_model(**SETTINGS[name]), tokens(rows, 24)
    expected, expected_state = by_blocks(monkeypatch, model, ids)
    forwards = []
    for block in model.blocks:
        block.register_forward_hook(lambda *given: forwards.append(1))
    logits, state = decode(model, ids)
    assert len(forwards) == len(model.blocks)  # the prompt's
    assert torch.equal(logits, expected)
    # Either state continues the rows in the same way.
    assert state.num_tokens == expected_state.num_tokens
    with torch.no_grad():
        answers = [model(ids[:, :3], state=given).logits for given in (state, expected_state)]
    assert torch.equal(*answers)


def test_rows_with_padding_before_their_prompt(monkeypatch):
    model, ids = make_model(quant_mode="bitnet_1_58"), tokens(2, 16)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, :2] = False
    expected, _ = by_blocks(monkeypatch, model, ids, valid_mask=mask)
    logits, _ = decode(model, ids, valid_mask=mask)
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, decode(model, ids)[0])


@pytest.mark.parametrize("name", ["blocks.0.mixer.in_proj.weight", "blocks.1.ffn.router.weight"])
def test_a_weight_written_to_counts_from_the_next_token_on(name, monkeypatch):
    ids = tokens(1, 8)

    def change_half_way(model: SigmaLLM) -> torch.Tensor:
        weight = dict(model.named_parameters())[name]
        with torch.no_grad(), TernaryCache().held():
            state = model(ids[:, :5], use_cache=True).state
            state = model(ids[:, 5:6], state=state).state
            weight.copy_(weight.flip(0))
            return model(ids[:, 6:7], state=state).logits

    found = change_half_way(make_model(quant_mode="bitnet_1_58"))
    monkeypatch.setattr(sigma_llm, "token_step", lambda *given: None)
    assert torch.equal(found, change_half_way(make_model(quant_mode="bitnet_1_58")))


def test_the_balance_of_the_router_is_read_at_every_token(monkeypatch):
    model, ids = make_model(), tokens(1, 8)
    with torch.no_grad(), TernaryCache().held():
        state = model(ids[:, :5], use_cache=True).state
        before = model(ids[:, 5:6], state=state).logits
        for block in model.blocks:
            block.ffn.balance_bias.copy_(torch.tensor([-2.0, 2.0, -2.0, 2.0]))
        after = model(ids[:, 5:6], state=state).logits
        monkeypatch.setattr(sigma_llm, "token_step", lambda *given: None)
        assert torch.equal(after, model(ids[:, 5:6], state=state).logits)
    assert not torch.equal(before, after)


def test_what_an_adapter_adds_is_added(monkeypatch):
    model, ids = make_model(quant_mode="bitnet_1_58"), tokens(1, 8)
    adapter = Adapter.create(model, rank=2, alpha=4.0, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), TernaryCache().held():
        for _, factor in adapter.named_parameters():
            factor.add_(0.3)
        state = model(ids[:, :5], use_cache=True).state
        plain = model(ids[:, 5:6], state=state).logits
        with attached(model, adapter):
            found = model(ids[:, 5:6], state=state).logits
            monkeypatch.setattr(sigma_llm, "token_step", lambda *given: None)
            assert torch.equal(found, model(ids[:, 5:6], state=state).logits)
    assert not torch.equal(plain, found)


def forwards_of_blocks(model: SigmaLLM, monkeypatch, run) -> int:
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    run(model)
    return len(calls)


@pytest.mark.parametrize("what", ["weights not held", "gradients", "training", "masks", "kernels"])
def test_the_blocks_run_themselves_where_they_must(what, monkeypatch):
    model, ids = make_model(), tokens(1, 6)
    with torch.no_grad():
        state = model(ids[:, :5], use_cache=True).state

    def one_more(model: SigmaLLM) -> None:
        given = {"state": state, "use_cache": True}
        if what == "masks":
            given["valid_mask"] = torch.ones(1, 1, dtype=torch.bool)
        if what == "training":
            model.train()
        if what == "kernels":
            for block in model.blocks:
                monkeypatch.setattr(block.mixer, "backend", "triton")
        if what == "weights not held":
            with torch.no_grad():
                model.run(ids[:, 5:6], **given)
            return
        with torch.set_grad_enabled(what == "gradients"), TernaryCache().held():
            model.run(ids[:, 5:6], **given)

    assert forwards_of_blocks(model, monkeypatch, one_more) == len(model.blocks)


def test_rows_that_have_not_begun_go_through_the_blocks():
    model = make_model()
    with torch.no_grad(), TernaryCache().held():
        begun = model(tokens(1, 1), state=model.initial_state(1)).logits
    with torch.no_grad():
        assert torch.equal(begun, model(tokens(1, 1)).logits)
