"""A SigmaLLM as the policy of transformers' learners: its weights, in eval mode."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("transformers")

from model.hf_policy import SigmaPolicy
from tests.model.test_hf import GREEDY, make_ids, make_sigma
from tests.trainable import patched


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}])
def test_it_computes_what_the_model_computes_and_owns_nothing(changes):
    model = make_sigma(quant_mode="bitnet_1_58", **changes)
    policy = SigmaPolicy.sharing(model, pad_token_id=0, eos_token_id=1)
    with torch.no_grad():
        assert torch.equal(policy(make_ids()).logits, model(make_ids()).logits)
    assert {id(p) for p in policy.parameters()} == {id(p) for p in model.parameters()}
    assert not any(p.is_meta for p in policy.parameters())
    generated = policy.generate(make_ids(), **GREEDY)
    assert torch.equal(policy.generate(make_ids(), use_cache=False, **GREEDY), generated)


def test_a_learners_train_mode_does_not_reach_the_modules():
    """Dropout and routing noise would make the trained policy another than the sampling one."""
    model = patched(make_sigma(dropout=0.5, router_jitter_noise=0.5))
    policy = SigmaPolicy.sharing(model.train())
    assert policy.train().training and not any(m.training for m in model.blocks.modules())
    first, second = (policy(make_ids(), use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)
    first.sum().backward()
    assert model.embed.weight.grad is not None
    model.train()
    assert all(module.training for module in model.modules())


def test_a_step_of_the_policy_is_a_step_of_the_model():
    model = make_sigma()
    before = copy.deepcopy(model.state_dict())
    policy = SigmaPolicy.sharing(model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(make_ids(), labels=make_ids(), use_cache=False).loss.backward()
    optimizer.step()
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert "embed.weight" in changed and any("blocks" in name for name in changed)


def test_the_backbone_gives_the_hidden_values_of_the_logits():
    """trl 1.x forms log-probabilities from these and the head, without the model's own forward."""
    policy = SigmaPolicy.sharing(make_sigma())
    ids = make_ids()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        output = policy.base_model(ids, attention_mask=mask, use_cache=False)
        logits = policy(ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(policy.lm_head(output.last_hidden_state), logits)
    assert output.past_key_values is None
    with torch.no_grad():
        cached = policy.base_model(ids[:, :5], use_cache=True).past_key_values
        rest = policy.base_model(ids[:, 5:], past_key_values=cached, use_cache=True)
        whole = policy.base_model(ids).last_hidden_state
    torch.testing.assert_close(rest.last_hidden_state, whole[:, 5:], atol=1e-4, rtol=0)
