"""Codes of ternary weights are reused where weights cannot change, and nowhere else."""

import copy

import pytest
import torch

from model.bitlinear import BitLinear, fused_linear, ternarize
from model.byte_product import multiplies_bytes
from model.config import SigmaModelConfig
from model.generation import generate
from model.sigma_llm import SigmaLLM
from model.weight_cache import TernaryCache
from tests.trainable import patched
from training.optim.adamuon import AdaMuon
from training.optim.adamw import AdamW
from training.optim.galore_lion import GaloreLion
from training.optim.gnprox import GNProx
from training.optim.lion import Lion
from training.optim.muon import Muon
from training.optim.normuon import NorMuon
from training.optim.soap import Soap

VOCABULARY = 40


def scaled(optimizer):
    optimizer.set_scales({p: 1.5 for group in optimizer.param_groups for p in group["params"]})
    return optimizer


class WritesThroughData(torch.optim.Optimizer):
    """What many optimizers do, and what leaves a tensor's version as it was."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.sub_(parameter.grad, alpha=0.5)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
    "adamw, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, foreach=True),
    "adamw, fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True),
    "own adamw": lambda parameters: AdamW(parameters, lr=0.05),
    "muon": lambda parameters: Muon([p for p in parameters if p.dim() == 2], lr=0.2),
    "normuon": lambda parameters: NorMuon([p for p in parameters if p.dim() == 2], lr=0.2),
    "adamuon": lambda parameters: AdaMuon([p for p in parameters if p.dim() == 2], lr=0.2),
    "soap": lambda parameters: Soap([p for p in parameters if p.dim() >= 2], lr=0.1),
    "lion": lambda parameters: Lion(parameters, lr=0.05, state_dtype=torch.bfloat16),
    "galore-lion": lambda parameters: GaloreLion(parameters, lr=0.05, rank=4, refresh=2),
    "gnprox": lambda parameters: GNProx(parameters, lr=0.05),
    "scaled": lambda parameters: scaled(AdamW(parameters, lr=0.05)),
    "through .data": WritesThroughData,
}


def small_model(seed=0):
    config = SigmaModelConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2},
        **{"mamba_ratio": 1, "attention_ratio": 1, "kv_latent_dim": 16, "rope_dim": 8},
        **{"mamba_head_dim": 16, "mamba_d_state": 8, "mamba_chunk_len": 8, "mimo_rank": 2},
        **{"d_ff": 48, "n_routed_experts": 4, "router_jitter_noise": 0.0},
    )
    return patched(SigmaLLM(config, seed=seed))


def tokens(seed, rows=2, length=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


def loss_of(model, seed):
    ids = tokens(seed)
    return model(ids, labels=ids.roll(-1, 1)).loss


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_optimizer_leaves_codes_stale(name):
    model = small_model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    for step in range(3):
        before = {name: codes[0].clone() for name, codes in codes_of(model).items()}
        with model.weights_held():
            loss_of(model, 2 * step).backward()
            loss_of(model, 2 * step + 1).backward()
        optimizer.step()
        optimizer.zero_grad()
        after = codes_of(model)
        if name == "soap" and step == 0:
            continue  # its first gradient only makes the basis
        assert any(not torch.equal(before[name], after[name][0]) for name in before)
        untouched = copy.deepcopy(model)  # its tensors were never in any cache
        with torch.no_grad(), model.weights_held():
            held = model(tokens(9)).logits
        assert torch.equal(held, untouched(tokens(9)).logits)


def codes_of(model):
    return {
        name: ternarize(weight, size) for name, (weight, size) in model.ternary_weights().items()
    }


def test_a_block_that_spans_such_a_step_would_be_stale():
    """The control: why codes end with their block."""
    layer = BitLinear(8, 8, generator=torch.Generator().manual_seed(0))
    with TernaryCache().held() as cache:
        first = ternarize(layer.weight)[0]
        layer.weight.data.neg_()
        assert torch.equal(ternarize(layer.weight)[0], first) and cache.hits == 1
    assert torch.equal(ternarize(layer.weight)[0], -first)


def test_ordinary_writes_inside_a_block_are_noticed():
    layer = BitLinear(8, 8, generator=torch.Generator().manual_seed(1))
    with TernaryCache().held() as cache, torch.no_grad():
        first = ternarize(layer.weight)[0]
        layer.weight.neg_()
        assert torch.equal(ternarize(layer.weight)[0], -first)
    assert (cache.hits, cache.invalidations) == (0, 1)


def test_micro_batches_get_the_same_gradients_to_the_bit():
    plain, held = small_model(), small_model()
    for seed in range(3):
        loss_of(plain, seed).backward()
    with held.weights_held():
        for seed in range(3):
            loss_of(held, seed).backward()
    for expected, found in zip(plain.parameters(), held.parameters()):
        assert torch.equal(expected.grad, found.grad)
    assert held.metrics()["bitlinear_cache_hits"] > 0
    assert plain.metrics()["bitlinear_cache_hits"] == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_joined_layers_are_joined_once(mode):
    generator = torch.Generator().manual_seed(2)
    layers = [BitLinear(8, width, generator=generator) for width in (4, 6)]
    x = torch.randn(3, 8, generator=generator)
    expected = [layer(x) for layer in layers]
    with mode(), TernaryCache().held() as cache:
        for _ in range(3):
            found = fused_linear(x, layers)
    assert all(torch.equal(a, b) for a, b in zip(expected, found))
    # Twice the joined weight and its codes, and these in bytes where the CPU multiplies bytes.
    assert cache.hits == (6 if multiplies_bytes() else 4)


def test_gradients_through_joined_layers_inside_a_block():
    generator = torch.Generator().manual_seed(3)
    layers = [BitLinear(8, width, generator=generator) for width in (4, 6)]
    x = torch.randn(3, 8, generator=generator)
    with TernaryCache().held():
        with torch.no_grad():
            fused_linear(x, layers)
        torch.cat(fused_linear(x, layers), dim=-1).sum().backward()
    assert all(layer.weight.grad.any() for layer in layers)


def test_generation_rounds_every_weight_once_and_says_the_same(monkeypatch):
    model, rounded = small_model(), []
    original = torch.Tensor.clamp_

    def counting(tensor, *limits, **options):
        if limits == (-1.0, 1.0):
            rounded.append(tensor.shape)
        return original(tensor, *limits, **options)

    monkeypatch.setattr(torch.Tensor, "clamp_", counting)
    prompt = tokens(5, rows=1, length=4)
    generate(model, prompt, max_new_tokens=2, temperature=0.0)
    few = len(rounded)
    rounded.clear()
    text = generate(model, prompt, max_new_tokens=20, temperature=0.0)
    assert len(rounded) <= few + 2  # attention reads its latent directly once it is long
    for length in range(4, text.shape[1]):
        with torch.no_grad():
            expected = model.eval()(text[:, :length], num_logits_to_keep=1).logits[:, -1].argmax(-1)
        assert text[0, length] == expected
