"""Latent attention against transformers' DeepSeek-V3 attention with the same weights."""

from __future__ import annotations

import pytest
import torch

from model.config import SigmaModelConfig
from model.mla import MLA
from model.sequence import SequenceContext

BATCH, LENGTH, WIDTH = 2, 40, 48


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _context(*, start: int = 0) -> SequenceContext:
    return SequenceContext.create(BATCH, LENGTH, device="cpu", start=start)


def _plain_layer() -> MLA:
    """What the two have in common: no second map, no rounding, no norm before the output."""
    layer = MLA(
        SigmaModelConfig(
            d_model=WIDTH,
            n_heads=3,
            kv_latent_dim=24,
            rope_dim=8,
            mamba_head_dim=16,
            diff_attention_enabled=False,
            quant_mode="none",
            sub_norm=False,
        ).validate()
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15, generator=generator)
    return layer


def _deepseek(layer: MLA):
    """transformers' DeepSeek-V3 attention with this layer's weights, and its rotary tables."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as module

    config = module.DeepseekV3Config(
        hidden_size=WIDTH,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        rope_interleave=False,
        max_position_embeddings=LENGTH,
        attention_dropout=0.0,
    )
    config._attn_implementation = "eager"
    theirs = module.DeepseekV3Attention(config, layer_idx=0)
    ours = {name: value.detach() for name, value in layer.named_parameters()}
    queries = (ours["q_content.weight"].view(3, 16, -1), ours["q_rope.weight"].view(3, 8, -1))
    values = (ours["k_content_up.weight"].view(3, 16, -1), ours["v_up.weight"].view(3, 16, -1))
    mapped = {
        "q_proj.weight": torch.cat(queries, 1).flatten(0, 1),
        "kv_a_proj_with_mqa.weight": torch.cat((ours["kv_down.weight"], ours["k_rope_up.weight"])),
        "kv_a_layernorm.weight": ours["latent_norm.weight"],
        "kv_b_proj.weight": torch.cat(values, 1).flatten(0, 1),
        "o_proj.weight": ours["out_proj.weight"],
    }
    theirs.load_state_dict(mapped)
    return theirs, module.DeepseekV3RotaryEmbedding(config)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_equals_transformers_deepseek_attention(implementation: str) -> None:
    layer = _plain_layer()
    theirs, rotary = _deepseek(layer)
    theirs.config._attn_implementation = implementation
    x = _random(BATCH, LENGTH, WIDTH).requires_grad_()
    positions = torch.arange(LENGTH)[None].expand(BATCH, -1)
    mask = torch.full((LENGTH, LENGTH), float("-inf")).triu_(1).expand(BATCH, 1, -1, -1)
    expected = theirs(x, rotary(x, positions), mask)[0]
    y = layer(x, _context())[0]
    assert (y - expected).abs().max() < 1e-5
    grad = _random(*y.shape, seed=1)
    (ours,) = torch.autograd.grad(y, x, grad)
    (oracle,) = torch.autograd.grad(expected, x, grad)
    assert (ours - oracle).abs().max() < 1e-5
    shifted = _context(start=1000)
    assert (layer(x, shifted)[0] - y).abs().max() < 1e-4, "only distances may matter"
