"""The transformers face: same numbers, cache, padding, beams, saving, training conventions."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM

from model import hf
from model.generation import generate
from model.hf import SigmaForCausalLM, SigmaHFConfig
from model.sigma_llm import SigmaLLM
from tests.tiny_model import VOCAB, tiny_config


def make_sigma(**changes) -> SigmaLLM:
    return SigmaLLM(tiny_config(**changes), seed=3).eval()


def make_pair(**changes) -> tuple[SigmaLLM, SigmaForCausalLM]:
    sigma = make_sigma(**changes)
    return sigma, SigmaForCausalLM.from_sigma(sigma, pad_token_id=0, eos_token_id=1)


def make_ids(rows: int = 2, length: int = 12, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 10}


@pytest.mark.parametrize(
    "changes", [{"quant_mode": "bitnet_1_58"}, {"tie_embeddings": False}, {"n_routed_experts": 0}]
)
def test_logits_equal_those_of_the_plain_model(changes):
    sigma, model = make_pair(**changes)
    ids = make_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, sigma(ids).logits)
        torch.testing.assert_close(
            model(ids, logits_to_keep=3).logits, sigma(ids).logits[:, -3:], atol=1e-6, rtol=0
        )
    back = model.to_sigma()
    for name, value in sigma.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


def test_logits_never_depend_on_later_tokens():
    _, model = make_pair(n_routed_experts=0, quant_mode="bitnet_1_58")
    ids = make_ids(1, 30)
    changed = ids.clone()
    changed[:, 17:] = 2 + (changed[:, 17:] + 5) % (VOCAB - 2)
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :17], model(changed).logits[:, :17])
        assert not torch.equal(model(ids).logits[:, 17], model(changed).logits[:, 17])


def test_greedy_generate_equals_the_plain_model_with_and_without_cache():
    sigma, model = make_pair()
    expected = generate(sigma, make_ids(), max_new_tokens=10, temperature=0.0)
    assert torch.equal(model.generate(make_ids(), **GREEDY), expected)
    assert torch.equal(model.generate(make_ids(), use_cache=False, **GREEDY), expected)


def test_cached_steps_see_one_token_each():
    _, model = make_pair()
    lengths = []
    model.model.embed.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    model.generate(make_ids(), **(GREEDY | {"max_new_tokens": 4}))
    assert lengths == [12, 1, 1, 1]


def test_cache_continues_in_chunks_and_reports_its_length():
    _, model = make_pair()
    ids = make_ids(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        cache = first.past_key_values
        assert cache.get_seq_length() == 7
        second = model(ids[:, 7:8], past_key_values=cache, use_cache=True)
        third = model(ids[:, 8:], past_key_values=cache, use_cache=True)
    assert third.past_key_values is cache and cache.get_seq_length() == 20
    joined = torch.cat((first.logits, second.logits, third.logits), dim=1)
    torch.testing.assert_close(joined, whole, atol=1e-4, rtol=0)


def test_left_padding_changes_neither_logits_nor_generation():
    _, model = make_pair()
    short, long = make_ids(1, 5, seed=4), make_ids(1, 11, seed=5)
    batch = torch.cat((F.pad(short, (6, 0), value=0), long))
    mask = torch.ones_like(batch)
    mask[0, :6] = 0
    with torch.no_grad():
        padded = model(batch, attention_mask=mask).logits
        torch.testing.assert_close(padded[0, 6:], model(short).logits[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(padded[1], model(long).logits[0], atol=1e-4, rtol=0)
        unmasked = model(batch).logits
    assert (unmasked[0, 6:] - padded[0, 6:]).abs().max() > 1e-3
    generated = model.generate(batch, attention_mask=mask, **GREEDY)
    assert torch.equal(generated[0, 6:], model.generate(short, **GREEDY)[0])
    assert torch.equal(generated[1], model.generate(long, **GREEDY)[0])


def test_beam_search_with_cache_equals_without():
    _, model = make_pair()
    settings = GREEDY | {"num_beams": 3}
    cached = model.generate(make_ids(), **settings)
    assert torch.equal(model.generate(make_ids(), use_cache=False, **settings), cached)
    assert not torch.equal(cached, model.generate(make_ids(), **GREEDY))


def test_generation_from_embeddings_equals_generation_from_ids():
    _, model = make_pair(engram_enabled=False)
    ids = make_ids(2, 6)
    expected = model.generate(ids, **GREEDY)[:, 6:]
    new = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(new, expected)
    _, with_memory = make_pair()
    with pytest.raises(ValueError, match="input_ids"):
        with_memory(inputs_embeds=torch.randn(1, 4, 32))


def test_labels_are_unshifted_and_the_loss_may_be_scaled_by_the_item_count():
    _, model = make_pair()
    ids = make_ids(3, 15)
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
        expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        torch.testing.assert_close(out.loss, expected)
        scaled = model(ids, labels=labels, num_items_in_batch=torch.tensor(66)).loss
    torch.testing.assert_close(scaled, expected * 33 / 66)
    assert out.aux_loss is None
    out = model.train()(ids, labels=labels)
    assert out.aux_loss > 0 and out.past_key_values is None
    out.loss.backward()
    assert model.model.blocks[0].ffn.router.weight.grad.abs().sum() > 0
    assert model(ids, labels=labels, return_dict=False)[0] == out.loss


def test_position_ids_that_restart_separate_packed_documents():
    _, model = make_pair()
    ids = make_ids(1, 14)
    positions = torch.cat((torch.arange(9), torch.arange(5))).unsqueeze(0)
    with torch.no_grad():
        packed = model(ids, position_ids=positions).logits
        torch.testing.assert_close(packed[:, 9:], model(ids[:, 9:]).logits, atol=1e-4, rtol=0)
        assert torch.equal(
            model(ids, position_ids=torch.arange(14)[None]).logits, model(ids).logits
        )


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_round_trip(tie, tmp_path):
    _, model = make_pair(
        quant_mode="bitnet_1_58",
        tie_embeddings=tie,
        engram_orders=(2, 3),
        residual_layout="two-stream",
    )
    ids = make_ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    model.model.after_optimizer_step()  # leaves a balance state worth keeping
    model.eval().save_pretrained(tmp_path)
    hf.register()
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert settings["model_type"] == "sigma"
    assert settings["layer_types"] == ["linear_attention", "linear_attention", "full_attention"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, SigmaHFConfig) and config.hidden_size == 32
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SigmaForCausalLM and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed.weight) is tie
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.model.blocks[0].ffn.balance_bias.abs().sum() > 0
    assert loaded.model.blocks[0].ffn.load_counts.abs().sum() == 0
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) is not tie


def test_checkpoint_without_a_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    _, model = make_pair()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.blocks.1.ffn.experts.down"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.experts\.down"):
        SigmaForCausalLM.from_pretrained(tmp_path)


def test_fresh_model_follows_the_global_seed_and_learns():
    config = SigmaHFConfig.from_model_config(make_sigma().config)
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(SigmaForCausalLM(config))
    first, second, other = (m.model.blocks[0].ffn.experts.down for m in models)
    assert torch.equal(first, second) and not torch.equal(first, other)
    model = models[0].train()
    model.gradient_checkpointing_enable()
    ids = make_ids(2, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        optimizer.step()
        losses.append(float((out.loss - out.aux_loss).detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_config_translates_both_ways_and_refuses_contradictions():
    original = make_sigma(engram_orders=(1, 2), tie_embeddings=False).config
    config = SigmaHFConfig.from_model_config(original)
    assert config.to_model_config() == original
    assert config.tie_word_embeddings is False
    assert SigmaHFConfig(hidden_size=96, num_hidden_layers=2).n_layers == 2
    with pytest.raises(ValueError, match="--n-heads"):
        SigmaHFConfig(hidden_size=64, num_attention_heads=7)


def test_what_the_model_cannot_return_is_an_error():
    _, model = make_pair()
    with pytest.raises(ValueError, match="attentions"):
        model(make_ids(), output_attentions=True)
    with pytest.raises(ValueError, match="input_ids"):
        model()
