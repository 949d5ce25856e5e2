"""Every parameter gets exactly one optimizer, by role; the state returns by name."""

import copy

import pytest
import torch

from model.config import SigmaModelConfig
from model.sigma_llm import SigmaLLM
from training.config.sections import OPTIMIZERS, OptimConfig
from training.optim.muon import Muon
from training.optimizer import SPLITTING, build_optimizer, parameter_role, state_settings


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


@pytest.mark.parametrize("kind", SPLITTING)
def test_those_that_split_take_what_muon_takes(model, kind):
    muon = build_optimizer(model, OptimConfig())
    optimizer = build_optimizer(model, OptimConfig(optimizer=kind, lr=0.02, adam_lr=0.004))
    assert len(optimizer.parts) == 2
    main, companion = optimizer.parts
    assert names_of(optimizer, type(main)) >= names_of(muon, Muon)
    assert {id(p) for p in optimizer.parameters()} == {id(p) for p in model.parameters()}
    lrs = {group["peak_lr"] for group in companion.param_groups}
    assert lrs == ({0.02} if kind == "galore-lion" else {0.004})


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "gnprox"])
def test_only_matrices_decay_whoever_moves_them(model, kind):
    optimizer = build_optimizer(model, OptimConfig(optimizer=kind, weight_decay=0.1))
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    roles = {name: parameter_role(name, param) for name, param in model.named_parameters()}
    assert decays == {name: 0.1 if role == "matrix" else 0.0 for name, role in roles.items()}


def test_gnprox_wants_cuda(model):
    with pytest.raises(RuntimeError, match="gnprox needs CUDA"):
        build_optimizer(model, OptimConfig(optimizer="gnprox"))


@pytest.mark.parametrize(
    ("changes", "attribute", "value"),
    [
        ({"optimizer": "soap", "soap_refresh": 7}, "refresh", 7),
        ({"optimizer": "galore-lion", "galore_rank": 9}, "rank", 9),
        ({"optimizer": "galore-lion", "galore_refresh": 8}, "refresh", 8),
        ({"optimizer": "lion", "lion_state_dtype": "bf16"}, "state_dtype", torch.bfloat16),
    ],
)
def test_the_flags_reach_the_optimizer(model, changes, attribute, value):
    assert getattr(build_optimizer(model, OptimConfig(**changes)).parts[0], attribute) == value


def test_group_flags_reach_the_optimizer(model):
    lion = build_optimizer(model, OptimConfig(optimizer="lion", lion_beta1=0.8, lion_beta2=0.7))
    assert {group["betas"] for group in lion.param_groups} == {(0.8, 0.7)}
    changes = {"gn_ns_steps": 3, "muon_iteration": "polar-express"}
    muon = build_optimizer(model, OptimConfig(**changes)).parts[0]
    (group,) = muon.param_groups
    assert (group["num_steps"], group["iteration"]) == (3, "polar-express")


def test_experts_without_tokens_are_watched(model):
    for kind in ("muon", "adamw"):
        optimizer = build_optimizer(model, OptimConfig(optimizer=kind, weight_decay=0.5))
        weights = dict(model.named_parameters())
        experts = weights["blocks.0.ffn.experts.gate_up"]
        start = {name: param.detach().clone() for name, param in weights.items()}
        for param in weights.values():
            param.grad = torch.ones_like(param)
        experts.grad[2] = 0.0
        optimizer.step()
        moved = (experts != start["blocks.0.ffn.experts.gate_up"]).flatten(1).any(1)
        assert moved.tolist() == [True, True, False, True]
        model.load_state_dict(start, strict=False)


def test_scales_go_to_the_part_that_owns_the_parameter(model):
    weights = dict(model.named_parameters())
    start = {name: param.detach().clone() for name, param in weights.items()}
    frozen = ("blocks.0.ffn.experts.gate_up", "final_norm.weight")  # one of Muon, one of AdamW
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.0))
    optimizer.set_scales({weights[name]: 0.0 for name in frozen})
    for param in weights.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    still = {name for name, param in weights.items() if torch.equal(param, start[name])}
    assert still == set(frozen)
    optimizer.set_scales(None)
    optimizer.step()
    assert not [name for name, param in weights.items() if torch.equal(param, start[name])]
    model.load_state_dict(start, strict=False)


def test_schedule_scales_each_group_from_its_own_peak(model):
    optimizer = build_optimizer(model, OptimConfig(lr=0.02, adam_lr=0.004, weight_decay=0.1))
    optimizer.set_schedule(lr_factor=0.5, decay_factor=0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.002}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}
    optimizer.set_schedule(lr_factor=1.0, decay_factor=1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.004}


@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "gnprox"])
def test_state_continues_exactly_and_by_name(model, kind):
    settings = OptimConfig(optimizer=kind, galore_rank=4, lion_state_dtype="bf16")

    def stepped(optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        return {name: param.detach().clone() for name, param in model.named_parameters()}

    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = build_optimizer(model, settings)
    middle = stepped(optimizer, 0)
    state = {k: copy.deepcopy(s) for k, s in optimizer.state_dict().items()}
    expected = stepped(optimizer, 1)
    model.load_state_dict(middle, strict=False)
    resumed = build_optimizer(model, settings)
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


def test_galore_reports_its_columns(model):
    settings = OptimConfig(optimizer="galore-lion", galore_rank=4, galore_refresh=2)
    optimizer = build_optimizer(model, settings)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    metrics = optimizer.metrics()
    projected = [p for p in optimizer.parts[0].state if optimizer.parts[0].projects(p)]
    assert metrics["galore_rank"] == 4 and metrics["galore_refreshes"] == 2 * len(projected) > 0
    assert 0.0 < metrics["galore_energy_captured"] < 1.0
    assert metrics["galore_state_bytes"] > 0
    assert build_optimizer(model, OptimConfig()).metrics() == {}
    model.load_state_dict(start, strict=False)


def test_an_empty_entry_takes_state_away(model):
    """Back to a checkpoint from before a parameter's first gradient."""
    optimizer = build_optimizer(model, OptimConfig())
    empty = optimizer.state_dict()
    weights = dict(model.named_parameters())
    start = {name: param.detach().clone() for name, param in weights.items()}
    for param in weights.values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(optimizer.state_dict().values())
    optimizer.load_state_dict(empty)
    assert not any(optimizer.state_dict().values())
    model.load_state_dict(start, strict=False)


def test_what_shapes_the_state_is_named():
    assert state_settings(OptimConfig(galore_rank=7)) == {"optimizer": "muon"}
    lion = OptimConfig(optimizer="lion", lion_state_dtype="bf16")
    assert state_settings(lion) == {"optimizer": "lion", "lion-state-dtype": "bf16"}
    galore = OptimConfig(optimizer="galore-lion", galore_rank=7)
    assert state_settings(galore)["galore-rank"] == 7
    split = state_settings(OptimConfig(muon_strict_split=False))
    assert split == {"optimizer": "muon", "muon-strict-split": False}
