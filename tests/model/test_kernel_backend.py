"""A whole network of either backend is the same function, packed documents and padding included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from model import mamba, mla, sigma_kernels, ssd
from model.config import SigmaModelConfig
from model.mamba import Mamba
from model.mla import MLA
from model.opaque import compile_model
from model.sigma_llm import SigmaLLM
from tests.model.kernel_inputs import Recorded
from tests.trainable import patched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABULARY = 40


def network(backend: str) -> SigmaLLM:
    """Without rounding, so that the two backends differ by the order of sums only."""
    config = SigmaModelConfig(
        **{"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 2},
        **{"mamba_ratio": 1, "attention_ratio": 1, "kv_latent_dim": 16, "rope_dim": 8},
        **{"mamba_head_dim": 32, "mamba_d_state": 8, "mamba_chunk_len": 16, "mimo_rank": 2},
        **{"d_ff": 48, "n_routed_experts": 0, "quant_mode": "none"},
    )
    model = SigmaLLM(config, seed=0).to(DEVICE)
    model.use_kernels(backend)
    return patched(model)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, 18), generator=generator)
    reset, valid = torch.zeros(2, 18, dtype=torch.bool), torch.ones(2, 18, dtype=torch.bool)
    reset[0, 5] = reset[1, 0] = reset[1, 16] = True
    valid[0, 15:] = False
    labels = ids.roll(-1, 1).masked_fill(~valid, -100)
    named = {"input_ids": ids, "reset_mask": reset, "valid_mask": valid, "labels": labels}
    return {name: value.to(DEVICE) for name, value in named.items()}


def loss_and_gradients(model, owner=None) -> dict[str, torch.Tensor]:
    loss = model(**batch()).loss
    loss.backward()
    named = (model if owner is None else owner).named_parameters()
    return {"loss": loss.detach()} | {name: value.grad for name, value in named}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_loss_and_every_gradient_are_the_same_and_from_the_kernels(monkeypatch):
    expected = loss_and_gradients(network("torch"))

    def refused(*_, **__):
        raise AssertionError("the torch form ran")

    monkeypatch.setattr(ssd.ChunkedScan, "apply", refused)
    monkeypatch.setattr(mamba._GatedRankNorm, "apply", refused)
    monkeypatch.setattr(mla, "attend", refused)
    assert_close(loss_and_gradients(network("triton")), expected)
    with pytest.raises(AssertionError, match="torch form"):
        network("torch")(**batch())


def test_use_kernels_reaches_every_mixer():
    model = network("triton")
    mixers = [module for module in model.modules() if isinstance(module, Mamba | MLA)]
    assert {type(mixer) for mixer in mixers} == {Mamba, MLA}
    assert all(mixer.backend == "triton" for mixer in mixers)


@pytest.mark.parametrize(("asked", "tiles"), [((0, 0), (16, 16)), ((32, 64), (32, 64))])
def test_the_asked_tile_is_the_compiled_one(asked, tiles, monkeypatch):
    expected = loss_and_gradients(network("torch"))
    model = network("triton")
    model.use_kernels("triton", scan_blocks=asked)
    seen: list[dict[str, int]] = []
    names = [name for name in vars(sigma_kernels) if name.endswith("_kernel")]
    for name in names:
        monkeypatch.setattr(sigma_kernels, name, Recorded(getattr(sigma_kernels, name), seen))
    assert_close(loss_and_gradients(model), expected)
    for constant, value in zip(("BLOCK_T", "BLOCK_N"), tiles, strict=True):
        found = [constants[constant] for constants in seen if constant in constants]
        assert len(found) >= 4 and set(found) == {value}


def test_prompt_and_decoding_agree():
    """The prompt goes through the kernels, single steps through the recurrence."""
    model = network("triton").eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        whole = model(ids).logits
        prompt = model(ids[:, :15], use_cache=True)
        state, steps = prompt.state, []
        for t in range(15, 18):
            out = model(ids[:, t : t + 1], state=state, use_cache=True)
            state = out.state
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole[:, 15:], rtol=1e-4, atol=1e-5)


def test_a_compiled_network_breaks_its_graph_at_the_kernels_and_is_the_same():
    expected = loss_and_gradients(network("torch"))
    plain = network("triton")
    compiled = compile_model(plain, backend="eager", mode="default", dynamic=False)
    assert_close(loss_and_gradients(compiled, plain), expected)
