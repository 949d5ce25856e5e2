"""Small real networks for the tests of morphs and search."""

from __future__ import annotations

import torch

from evolution.genome import Genome, Letter, Mutation
from evolution.morphs import grow_weights, part_copies, plan_morph
from model.bitlinear import ternarize
from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM

BASE = {
    "vocab_size": 61,
    "d_model": 32,
    "n_heads": 2,
    "mamba_ratio": 1,
    "attention_ratio": 1,
    "d_ff": 48,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "moe_top_k": 2,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_chunk_len": 8,
    "mimo_rank": 1,
    "kv_latent_dim": 16,
    "rope_dim": 8,
    "router_balance_lr": 1e-2,
    "rib_router_enabled": False,
}
HYBRID = Genome(scales=(Letter(kind="mamba"), Letter(kind="attention")))


def make_base(**changes) -> SigmaModelConfig:
    return SigmaModelConfig(**(BASE | changes)).validate()


def make_ids(*, seed: int = 1, vocab: int = 61, shape=(3, 24)) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def scramble(model: SigmaLLM, *, seed: int = 7) -> SigmaLLM:
    """Every parameter moved away from its initial value, so that no zero or one hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "temperature" not in name:
                noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                tensor.add_(0.2 * noise * tensor.abs().mean().clamp_min(0.05))
    return model


def grown(parent: SigmaLLM, genome: Genome, mutation: Mutation, base: SigmaModelConfig) -> SigmaLLM:
    """The child of a model under a mutation, with parted copies."""
    child = SigmaLLM(genome.mutated(mutation).network(base), seed=5).to(parent.embed.weight.dtype)
    generator = torch.Generator().manual_seed(3)
    fresh = child.state_dict()
    carries = plan_morph(genome, mutation, base, names=fresh, generator=generator)
    weights = grow_weights(carries, parent.state_dict(), fresh)
    part_copies(
        carries,
        weights,
        ternary=[n if n in weights else f"{n}.weight" for n in child.ternary_weights()],
        codes_of=lambda w: ternarize(w, base.bitlinear_group_size)[0],
        generator=generator,
    )
    child.load_state_dict(weights)
    return child.eval()
