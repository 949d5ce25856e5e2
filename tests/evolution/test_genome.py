"""The expansion, the space, and costs against the network that is built."""

from __future__ import annotations

import random

import pytest

from evolution.genome import (
    MULTIPLES,
    Genome,
    Letter,
    Mutation,
    forward_flops,
    mutations,
    plain_genomes,
    sample_genome,
    why_inexact,
)
from model.config import SigmaModelConfig
from model.mamba import Mamba
from model.mla import MLA
from model.sigma_llm import SigmaLLM
from tests.evolution.networks import make_base

A, B, C = Letter(kind="mamba"), Letter(kind="attention"), Letter(kind="mamba", width=2)


def test_each_scale_repeats_what_is_below_it():
    assert Genome(scales=(A,)).word() == (A,)
    assert Genome(scales=(A, B)).word() == (A, A, B)
    genome = Genome(scales=(A, B, C))
    assert genome.word() == (A, A, B, A, A, B, C)
    assert [genome.places(scale) for scale in range(3)] == [[0, 1, 3, 4], [2, 5], [6]]


def test_a_letter_changes_every_block_it_has_made():
    genome = Genome(scales=(A, B, C)).mutated(Mutation(what="heads", scale=0))
    kinds = [(letter.kind, letter.heads) for letter in genome.word()]
    assert kinds.count(("mamba", 2)) == 4 and kinds.count(("attention", 1)) == 2
    assert Genome.from_list(genome.to_list()) == genome


def test_every_genome_is_a_network_and_survives_being_written():
    rng = random.Random(0)
    for base in (make_base(), make_base(n_routed_experts=0), make_base(engram_enabled=True)):
        for _ in range(30):
            config = sample_genome(base, rng).network(base)
            assert SigmaModelConfig.from_dict(config.to_dict()) == config
            assert config.engram_layers == ((0,) if base.engram_enabled else base.engram_layers)


def test_a_network_without_own_layers_is_written_as_before():
    values = make_base().to_dict()
    assert not {"layers", "head_dim"} & set(values)
    assert make_base().at_layer(1) == make_base()
    assert SigmaModelConfig.from_dict(values) == make_base()


def test_layers_must_be_as_many_as_said():
    config = Genome(scales=(A, B)).network(make_base())
    config.n_layers = 4
    with pytest.raises(ValueError, match="--n-layers must be the number"):
        config.validate()
    values = Genome(scales=(A, B)).network(make_base()).to_dict()
    values["layers"][0]["kind"] = "convolution"
    with pytest.raises(ValueError, match="choose mamba or attention"):
        SigmaModelConfig.from_dict(values)


def test_operations_are_those_of_the_built_network():
    """Weights of products once per token; scores and scans, which have none, added by hand."""
    rng, seq_len = random.Random(1), 64
    base = make_base()
    for _ in range(12):
        config = sample_genome(base, rng).network(base)
        model = SigmaLLM(config)
        active = model.num_parameters()["active"]
        vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
        for module in model.modules():
            if isinstance(module, Mamba):
                tables = [module.bc_gain, module.bc_bias, module.rank_out, module.rank_in]
                vectors += sum(t.numel() for t in [*tables, module.rank_gate] if t is not None)
                active += module.d_inner * module.d_state * (2 * module.rank + 1)
            elif isinstance(module, MLA):
                widths = 2 * module.d_head + module.d_rope
                active += module.maps * module.heads * widths * seq_len // 2
        assert forward_flops(config, seq_len=seq_len) == 2 * (active - vectors)


def test_mutations_stay_inside_the_space_and_reach_all_of_it():
    base = make_base()
    seen, open_ = set(), list(plain_genomes(base))
    while open_ and len(seen) < 400:
        genome = open_.pop()
        if genome in seen:
            continue
        seen.add(genome)
        for mutation in mutations(genome, base):
            child = genome.mutated(mutation)
            assert child != genome and len(child.scales) <= 3
            for letter in child.scales:
                assert {letter.width, letter.experts, letter.heads, letter.rank} <= set(MULTIPLES)
                assert letter.rank == 1 or letter.kind == "mamba"
            child.network(base)
            open_.append(child)
    assert len(seen) == 400


def test_changes_that_are_not_exact_are_not_offered():
    base = make_base(moe_top_k=1, d_ff=48)
    offered = mutations(Genome(scales=(A, B)), base)
    assert "experts" not in {mutation.what for mutation in offered}
    base = make_base(bitlinear_group_size=12)
    offered = {
        (mutation.what, mutation.scale) for mutation in mutations(Genome(scales=(A, B)), base)
    }
    assert not offered & {("width", 0), ("heads", 1)} and ("experts", 0) in offered
    assert "groups of 12" in why_inexact(Genome(scales=(A,)), Mutation(what="width"), base)


def test_a_genome_can_be_read_back_from_what_it_shows():
    rng = random.Random(0)
    for _ in range(50):
        genome = sample_genome(make_base(), rng)
        assert Genome.parse(str(genome)) == genome
    for text in ("", "mamba |", "conv", "mamba width", "mamba width x3", "mamba width 2", "x2"):
        with pytest.raises(ValueError, match="no genome"):
            Genome.parse(text)
