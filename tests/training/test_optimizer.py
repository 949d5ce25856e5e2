"""Every parameter gets exactly one optimizer, by role; the state returns by name."""

import pytest
import torch

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from training.config.sections import OptimConfig
from training.optim.muon import Muon
from training.optimizer import build_optimizer


@pytest.fixture(scope="module")
def model():
    return SigmaLLM(
        SigmaModelConfig(
            vocab_size=64, d_model=32, n_layers=2, n_heads=2, mamba_ratio=1, attention_ratio=1,
            kv_latent_dim=16, rope_dim=8, mamba_head_dim=16, mamba_d_state=8, mimo_rank=2,
            d_ff=48, n_routed_experts=4, engram_enabled=True, engram_buckets=32, engram_dim=8,
        )
    )  # fmt: skip


def names_of(optimizer, kind):
    return {
        name
        for part in optimizer.parts
        if isinstance(part, kind)
        for group in part.param_groups
        for name in group["param_names"]
    }


def test_every_parameter_is_stepped_exactly_once(model):
    optimizer = build_optimizer(model, OptimConfig())
    stepped = list(optimizer.parameters())
    assert {id(p) for p in stepped} == {id(p) for p in model.parameters()}
    assert len(stepped) == len({id(p) for p in stepped})


def test_the_strict_split_gives_muon_projections_only(model):
    muon = names_of(build_optimizer(model, OptimConfig()), Muon)
    assert {"blocks.0.mixer.in_proj.weight", "blocks.0.ffn.experts.gate_up"} <= muon
    kept_out = ("embed", "router", "gate_lambda", "table", "norm", "bias", "rank_", "conv")
    assert not [name for name in muon if any(part in name for part in kept_out)]


@pytest.mark.parametrize(
    ("changes", "name", "in_muon"),
    [
        ({"muon_exclude_embeddings": False}, "embed.weight", True),
        ({"muon_strict_split": False}, "blocks.0.ffn.router.weight", True),
        ({"muon_max_orthogonalized_dim": 31}, "blocks.0.mixer.in_proj.weight", False),
    ],
)
def test_the_split_flags_move_parameters(model, changes, name, in_muon):
    muon = names_of(build_optimizer(model, OptimConfig(**changes)), Muon)
    assert (name in muon) == in_muon


def test_adamw_takes_everything_and_decays_matrices_only(model):
    optimizer = build_optimizer(model, OptimConfig(optimizer="adamw", weight_decay=0.1))
    assert names_of(optimizer, Muon) == set()
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert decays["blocks.0.mixer.in_proj.weight"] == 0.1
    assert decays["embed.weight"] == decays["final_norm.weight"] == 0.0


def test_schedule_scales_each_group_from_its_own_peak(model):
    optimizer = build_optimizer(model, OptimConfig(lr=0.02, adam_lr=0.004, weight_decay=0.1))
    optimizer.set_schedule(lr_factor=0.5, decay_factor=0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.002}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    optimizer.set_schedule(lr_factor=1.0, decay_factor=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.004}


def test_state_continues_exactly_and_by_name(model):
    def stepped(optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        return {name: param.detach().clone() for name, param in model.named_parameters()}

    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig())
    middle = stepped(optimizer, 0)
    state = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state_dict().items()}
    expected = stepped(optimizer, 1)
    model.load_state_dict(middle, strict=False)
    resumed = build_optimizer(model, OptimConfig())
    resumed.load_state_dict(state)
    found = stepped(resumed, 1)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    model.load_state_dict(start, strict=False)


def test_a_missing_entry_is_named(model):
    optimizer = build_optimizer(model, OptimConfig())
    state = optimizer.state_dict()
    del state["embed.weight"]
    with pytest.raises(ValueError, match=r"embed\.weight"):
        optimizer.load_state_dict(state)
