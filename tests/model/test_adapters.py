"""Adapters: nothing without one, W + BA with one, in every path; the model itself untouched."""

from __future__ import annotations

import hashlib

import pytest
import torch

from model.adapters import Adapter, adapted_layers, attached, fold, frozen
from model.generation import generate
from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache
from tests.tiny_model import VOCAB, tiny_config

PROJECTIONS = {
    "q_content", "q_rope", "kv_down", "k_rope_up", "k_content_up", "v_up", "out_proj",
}  # fmt: skip


def make_model(**changes) -> SigmaLLM:
    return SigmaLLM(tiny_config(**changes), seed=3).eval()


def make_adapter(model, *, size: float = 0.3, rank: int = 4) -> Adapter:
    """One that changes something: B is drawn too."""
    generator = torch.Generator().manual_seed(2)
    adapter = Adapter.create(model, rank=rank, alpha=8.0, generator=generator)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.up.normal_(std=size, generator=generator)
    return adapter


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model, ids=None) -> torch.Tensor:
    return model(tokens() if ids is None else ids).logits


def said_by(model, adapter) -> torch.Tensor:
    with attached(model, adapter):
        return generate(model, tokens(), max_new_tokens=12, temperature=0.0)


def digest_of(model) -> str:
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_it_is_beside_the_model_and_changes_nothing_until_trained():
    model = make_model(quant_mode="bitnet_1_58")
    plain, digest = logits_of(model), digest_of(model)
    names = [name for name, _ in model.named_parameters()]
    generator = torch.Generator().manual_seed(2)
    adapter = Adapter.create(model, rank=4, alpha=8.0, generator=generator)
    assert {name.rsplit(".", 1)[1] for name in adapter.layers} == PROJECTIONS
    with attached(model, adapter):
        assert torch.equal(logits_of(model), plain)
        assert [name for name, _ in model.named_parameters()] == names
        assert digest_of(model) == digest
    with attached(model, make_adapter(model)):
        assert not torch.allclose(logits_of(model), plain, atol=1e-2)
        with attached(model, None):
            assert torch.equal(logits_of(model), plain)
        assert not torch.allclose(logits_of(model), plain, atol=1e-2)
    assert torch.equal(logits_of(model), plain) and digest_of(model) == digest
    assert all(layer.adapter is None for layer in adapted_layers(model).values())


@pytest.mark.parametrize("differential", [True, False])
def test_it_is_the_model_with_the_products_in_its_weights(differential):
    model = make_model(diff_attention_enabled=differential)
    other = make_model(diff_attention_enabled=differential)
    adapter = make_adapter(model)
    fold(other, adapter.products())
    with attached(model, adapter):
        assert torch.allclose(logits_of(model), logits_of(other), atol=1e-5)


def test_cached_decoding_and_its_absorbed_form_follow_the_adapter():
    model = make_model()
    plain = generate(model, tokens(), max_new_tokens=16, temperature=0.0)
    with attached(model, make_adapter(model)):
        said = generate(model, tokens(), max_new_tokens=16, temperature=0.0)
        expected = tokens()
        with torch.no_grad():
            for _ in range(16):
                following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
                expected = torch.cat((expected, following), dim=1)
            step = model(tokens()[:, :-1], use_cache=True)
            mla = next(m for m in model.modules() if hasattr(m, "absorption_pays"))
            assert mla.absorption_pays(1)
            last = model(tokens()[:, -1:], state=step.state).logits[:, -1]
            assert torch.allclose(last, model(tokens()).logits[:, -1], atol=1e-4)
    assert torch.equal(said, expected) and not torch.equal(said, plain)


def test_held_codes_stay_those_of_the_base():
    model = make_model(quant_mode="bitnet_1_58")
    adapter, plain = make_adapter(model), logits_of(model)
    with attached(model, adapter):
        adapted = logits_of(model)
    with TernaryCache().held() as cache, torch.no_grad():
        assert torch.equal(logits_of(model), plain)
        hits = cache.hits
        with attached(model, adapter):
            assert torch.equal(logits_of(model), adapted)
        assert cache.hits > hits and cache.invalidations == 0
        assert torch.equal(logits_of(model), plain)
    expected = said_by(model, None)
    with TernaryCache().held() as cache, torch.no_grad():
        assert not torch.equal(said_by(model, adapter), expected)
        assert torch.equal(said_by(model, None), expected)
        fold(model, adapter.products())
        assert not torch.equal(logits_of(model), plain)
        assert cache.invalidations > 0


def test_the_kernels_path_adds_the_same():
    pytest.importorskip("triton")
    model = make_model(quant_mode="bitnet_1_58", n_layers=1, mamba_ratio=0, engram_enabled=False,
                       n_routed_experts=0)  # fmt: skip
    adapter, before = make_adapter(model), logits_of(model)
    with attached(model, adapter):
        expected = logits_of(model)
        model.use_kernels("triton")
        found = logits_of(model)
    assert torch.allclose(found, expected, atol=2e-2)
    assert torch.allclose(logits_of(model), before, atol=2e-2)
    assert not torch.allclose(found, before, atol=2e-1)


def test_gradients_are_those_of_the_factors_alone():
    """Against the chain rule over W + BA, the dense weight of another model."""
    model, other = make_model().double(), make_model().double()
    adapter = make_adapter(model)
    fold(other, adapter.products())
    with attached(model, adapter), frozen(model):
        model(tokens(), labels=tokens().roll(-1, 1)).loss.backward()
    assert all(param.grad is None for param in model.parameters())
    assert all(param.requires_grad for param in model.parameters())
    other(tokens(), labels=tokens().roll(-1, 1)).loss.backward()
    for name, dense in adapted_layers(other).items():
        layer = adapter.layers[name]
        grad = dense.weight.grad
        assert torch.allclose(layer.up.grad, grad @ layer.down.mT * layer.scale, atol=1e-9)
        assert torch.allclose(layer.down.grad, layer.up.mT @ grad * layer.scale, atol=1e-9)
        assert layer.up.grad.abs().max() > 0 and layer.down.grad.abs().max() > 0


def test_state_and_digest_say_exactly_what_it_is():
    model = make_model()
    adapter = make_adapter(model)
    state, digest = adapter.state_dict(), adapter.digest()
    with torch.no_grad():
        next(iter(adapter.layers.values())).up[0, 0] += 1e-7
    assert adapter.digest() != digest
    adapter.load_state_dict(state)
    assert adapter.digest() == digest
    smaller = make_adapter(model, rank=2)
    with pytest.raises(ValueError, match="rank"):
        smaller.load_state_dict(state)
    with pytest.raises(ValueError, match="another network"):
        adapter.load_state_dict({})


def test_what_cannot_be_adapted_is_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="--hydra-lora-rank 9 is more"):
        Adapter.create(make_model(), rank=9, alpha=1.0, generator=generator)
    recurrent = make_model(mamba_ratio=3, attention_ratio=0, n_layers=3)
    with pytest.raises(ValueError, match="the model has none"):
        Adapter.create(recurrent, rank=2, alpha=1.0, generator=generator)
