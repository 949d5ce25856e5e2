"""Morphs on the real network: equal logits, moments and averages that follow, copies that part."""

from __future__ import annotations

import pytest
import torch

from evolution.genome import Genome, Letter, Mutation, why_inexact
from evolution.morphs import Carries, grow_average, grow_moments, grow_weights, plan_morph
from model.bitlinear import ternarize
from model.sigma_llm import SigmaLLM
from tests.evolution.networks import HYBRID, grown, make_base, make_ids, scramble
from tests.trainable import patched
from training.config.sections import OptimConfig
from training.ema import WeightAverage
from training.optimizer import build_optimizer

MUTATIONS = [
    *(
        Mutation(what=what, scale=scale)
        for what in ("width", "experts", "heads")
        for scale in (0, 1)
    ),
    Mutation(what="rank", scale=0),
    Mutation(what="scale", scale=2, kind="mamba"),
    Mutation(what="scale", scale=2, kind="attention"),
    Mutation(what="none"),
]
NETWORKS = {
    "ternary": {},
    "groups": {"bitlinear_group_size": 16},
    "plain": {"quant_mode": "none"},
    "dense": {"n_routed_experts": 0},
    "no sub-norm": {"sub_norm": False},
    "one stream": {"residual_layout": "standard"},
    "plain attention": {"diff_attention_enabled": False},
    "int8 router": {"moe_gate_precision": "int8"},
    "rank 2": {"mimo_rank": 2, "mamba_trapezoid": False},
    "untied, memory": {"tie_embeddings": False, "engram_enabled": True, "engram_buckets": 61},
}


def make_model(genome: Genome, *, dtype=torch.float64, seed=0, **changes) -> SigmaLLM:
    base = make_base(**changes)
    return scramble(SigmaLLM(genome.network(base), seed=seed)).to(dtype).eval()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.what}{m.scale}{m.kind}")
def test_a_morph_keeps_the_logits(mutation, network):
    """In fp64, where no last bit lies on the edge of an int8 step: what remains is algebra."""
    base = make_base(**NETWORKS[network])
    if mutation.what == "experts" and not base.n_routed_experts:
        pytest.skip("no experts")
    parent = make_model(HYBRID, **NETWORKS[network])
    child = grown(parent, HYBRID, mutation, base)
    with torch.no_grad():
        before, after = (model(make_ids()).logits for model in (parent, child))
    assert why_inexact(HYBRID, mutation, base) == ""
    assert (before - after).abs().max() < 1e-5
    changed = mutation.what != "none"
    assert (child.num_parameters()["total"] > parent.num_parameters()["total"]) == changed


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.what}{m.scale}{m.kind}")
def test_in_single_precision_all_but_edges_of_int8_steps_agree(mutation):
    base = make_base()
    worst = []
    for seed in range(4):
        parent = make_model(HYBRID, dtype=torch.float32, seed=seed)
        child = grown(parent, HYBRID, mutation, base)
        with torch.no_grad():
            pair = [model(make_ids(seed=seed)).logits for model in (parent, child)]
        worst.append(float((pair[0] - pair[1]).abs().max()))
    assert sorted(worst)[1] < 1e-5, worst


def carries_of(parent: SigmaLLM, mutation: Mutation, base) -> tuple[Carries, SigmaLLM]:
    child = SigmaLLM(HYBRID.mutated(mutation).network(base), seed=5).to(parent.embed.weight.dtype)
    generator = torch.Generator().manual_seed(3)
    names = child.state_dict()
    return plan_morph(HYBRID, mutation, base, names=names, generator=generator), child.eval()


def gradients_of(model: SigmaLLM) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ids = make_ids()
    model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("network", ["ternary", "rank 2", "dense"])
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.what}{m.scale}{m.kind}")
def test_gradients_are_what_the_moments_are_scaled_by(mutation, network):
    """The child's true gradient is the parent's, picked and scaled as its moments will be."""
    base = make_base(**NETWORKS[network])
    if mutation.what == "experts" and not base.n_routed_experts:
        pytest.skip("no experts")
    parent = make_model(HYBRID, **NETWORKS[network])
    carries, child = carries_of(parent, mutation, base)
    child.load_state_dict(grow_weights(carries, parent.state_dict(), child.state_dict()))
    before, after = gradients_of(parent), gradients_of(child)
    compared = 0
    for name, gradient in after.items():
        carry = carries[name]
        if carry.source and carry.moments:
            expected = carry.picked(before[carry.source]) * carry.gradient
            # The router computes in fp32 whatever the network's type.
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
            compared += 1
    assert compared >= len(before) - 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon", "lion", "soap", "galore-lion"])
def test_the_optimizer_goes_on_by_parameter_name(optimizer):
    base, mutation = make_base(), Mutation(what="width", scale=0)
    settings = OptimConfig(optimizer=optimizer, galore_rank=4)
    parent = patched(make_model(HYBRID, dtype=torch.float32))
    steps = build_optimizer(parent, settings)
    for _ in range(3):
        gradients_of(parent)
        steps.step()
    carries, child = carries_of(parent, mutation, base)
    child.load_state_dict(grow_weights(carries, parent.state_dict(), child.state_dict()))
    shapes = {name: tensor.shape for name, tensor in parent.state_dict().items()}
    state = grow_moments(carries, steps.state_dict(), shapes)
    goes_on = build_optimizer(child, settings)
    goes_on.load_state_dict(state)
    assert set(state) == {name for name, _ in child.named_parameters()}
    name = "blocks.0.ffn.experts.gate_up"
    assert bool(state[name]) == (optimizer in ("adamw", "muon", "lion"))
    if optimizer == "adamw":
        old = steps.state_dict()[name]
        half = carries[name].picked(old["exp_avg"]) / 2
        torch.testing.assert_close(state[name]["exp_avg"], half)
        torch.testing.assert_close(
            state[name]["exp_avg_sq"], carries[name].picked(old["exp_avg_sq"]) / 4
        )
        assert state[name]["step"] == old["step"] == 3
    gradients_of(child)
    goes_on.step()
    assert all(bool(p.isfinite().all()) for p in child.parameters())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.what}{m.scale}{m.kind}")
def test_the_average_is_carried_to_the_same_function(mutation):
    base = make_base()
    parent = make_model(HYBRID)
    average = WeightAverage(decay=0.5)
    average.update(parent)
    parent.load_state_dict(scramble(make_model(HYBRID, seed=1), seed=9).state_dict())
    average.update(parent)
    carries, child = carries_of(parent, mutation, base)
    weights = grow_weights(carries, parent.state_dict(), child.state_dict())
    child.load_state_dict(weights)
    child.load_state_dict(grow_average(carries, average.shadow, weights), strict=False)
    parent.load_state_dict(average.shadow, strict=False)
    with torch.no_grad():
        before, after = (model(make_ids()).logits for model in (parent, child))
    assert (before - after).abs().max() < 1e-5


def codes_of_copies(child: SigmaLLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of the first and the second copy of the first block's shared gate rows."""
    codes = ternarize(child.state_dict()["blocks.0.ffn.shared.gate_up.weight"])[0]
    first, second = codes[: codes.shape[0] // 2].chunk(2)
    return first, second


@pytest.mark.parametrize("parted", [True, False])
def test_copies_part_when_trained_and_only_if_parted(parted):
    base, mutation = make_base(), Mutation(what="width", scale=0)
    parent = make_model(HYBRID)
    if parted:
        child = grown(parent, HYBRID, mutation, base)
    else:
        carries, child = carries_of(parent, mutation, base)
        child.load_state_dict(grow_weights(carries, parent.state_dict(), child.state_dict()))
    assert torch.equal(*codes_of_copies(child))
    optimizer = build_optimizer(child, OptimConfig(optimizer="adamw", lr=0.01))
    for _ in range(6):
        gradients_of(child)
        optimizer.step()
    first, second = codes_of_copies(child)
    assert bool((first != second).any()) == parted


def logit_gap(parent: SigmaLLM, child: SigmaLLM) -> float:
    with torch.no_grad():
        before, after = (model(make_ids()).logits for model in (parent, child))
    return float((before - after).abs().max())


def test_what_the_docstring_calls_inexact_is_seen_to_be():
    """Negative controls: the comparison of logits finds every shortcut."""
    parent, base = make_model(HYBRID), make_base()
    mutation = Mutation(what="width", scale=0)
    carries, child = carries_of(parent, mutation, base)
    right = grow_weights(carries, parent.state_dict(), child.state_dict())
    child.load_state_dict(right)
    assert logit_gap(parent, child) < 1e-9

    name = "blocks.0.ffn.shared.down.weight"
    child.load_state_dict(right | {name: carries[name].picked(parent.state_dict()[name])})
    assert logit_gap(parent, child) > 1e-3  # columns doubled and not halved

    half = right[name].clone()
    half[:, half.shape[1] // 4 : half.shape[1] // 2] *= 2  # some units alone, their copies silent
    half[:, 3 * half.shape[1] // 4 :] = 0.0
    child.load_state_dict(right | {name: half})
    assert logit_gap(parent, child) > 1e-3


@pytest.mark.parametrize(
    ("changes", "mutation"),
    [
        ({"moe_top_k": 1, "d_ff": 32}, Mutation(what="experts", scale=0)),
        ({"bitlinear_group_size": 12}, Mutation(what="width", scale=0)),
        ({"bitlinear_group_size": 12}, Mutation(what="heads", scale=1)),
    ],
)
def test_what_is_refused_could_not_have_been_kept(changes, mutation):
    base = make_base(**changes)
    assert why_inexact(HYBRID, mutation, base)
    parent = make_model(HYBRID, **changes)
    assert logit_gap(parent, grown(parent, HYBRID, mutation, base)) > 1e-3


def test_morphs_follow_each_other():
    base, genome = make_base(), Genome(scales=(Letter(kind="mamba"),))
    first = parent = make_model(genome)
    for what in ("rank", "width", "scale", "heads", "experts", "rank"):
        mutation = Mutation(what=what, scale=1 if what == "scale" else 0, kind="attention")
        parent = grown(parent, genome, mutation, base)
        genome = genome.mutated(mutation)
    assert parent.config.n_layers == 3 and logit_gap(first, parent) < 1e-5
