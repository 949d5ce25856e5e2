"""Random configurations that obey every rule, for the identity tests."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import strategies as st

from training.config.fields import LARGEST_INT, Flag, iter_flags
from training.config.sigma_config import SigmaConfig

FRACTION = st.floats(0.01, 0.99)
# Fields that rules tie together get values that fit with each other.
FITTING = {
    "run.device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1"]),
    "data.seq_len": st.integers(1, 64).map(lambda n: 64 * n),
    "model.d_model": st.sampled_from([192, 384, 768]),
    "model.n_heads": st.sampled_from([4, 12]),
    "model.n_layers": st.integers(2, 40),
    "model.mamba_ratio": st.integers(1, 9),
    "model.attention_ratio": st.integers(1, 9),
    "model.rope_dim": st.integers(1, 64).map(lambda n: 2 * n),
    "model.mamba_expand": st.sampled_from([1, 2, 4]),
    "model.mamba_head_dim": st.sampled_from([32, 64]),
    "model.mamba_d_state": st.integers(1, 64).map(lambda n: 4 * n),
    "model.d_ff": st.integers(1, 99).map(lambda n: 12 * n),
    "model.n_shared_experts": st.sampled_from([1, 2]),
    "model.n_routed_experts": st.sampled_from([0, 2, 8]),
    "model.moe_top_k": st.sampled_from([1, 2]),
    "model.diff_attention_lambda_min": st.floats(-1.0, 0.2),
    "model.diff_attention_lambda_init": st.floats(0.3, 0.9),
    "model.diff_attention_lambda_max": st.floats(1.0, 9.0),
    "model.engram_orders": st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    "model.engram_layers": st.lists(st.integers(0, 1), max_size=3).map(tuple),
    "optim.gn_damping_min": st.floats(1e-6, 1e-4),
    "optim.gn_damping": st.floats(1e-4, 0.1),
    "optim.gn_damping_max": st.floats(0.1, 9.0),
    "adaptive.adaptive_min_weight": st.floats(0.01, 1.0),
    "adaptive.adaptive_max_weight": st.floats(1.0, 9.0),
    "adaptive.adaptive_signal": st.sampled_from(["progress", "raw"]),
    "ttrl.budget_min": st.integers(1, 4),
    "ttrl.budget_max": st.integers(4, 64),
    "ttrl.task_families": st.sampled_from(["add", "function,gym:gcd", "symbolic,subtract"]),
    "grpo.reward_fail": st.floats(-9.0, 0.0),
    "grpo.reward_success": st.floats(0.5, 9.0),
    "sigma_rl.sigma_rl_dispo_clip": st.lists(FRACTION, min_size=4, max_size=4).map(
        lambda widths: ",".join(map(repr, widths))
    ),
    "fractal.genome": st.just(""),  # whether one fits depends on all widths
    "precision.cuda_graphs": st.just("off"),  # whether they can be on depends on ten others
    "self_evolve.ttrl_interval_min": st.integers(1, 8),
    "self_evolve.ttrl_interval_max": st.integers(8, 10**6),
    "hydra.domains": st.sampled_from(["math,code,text", "text", "code,math"]),
    "self_improver.sigma_min": st.floats(0.001, 0.02),
    "self_improver.mutation_sigma": st.floats(0.02, 0.3),
    "self_improver.sigma_max": st.floats(0.3, 1.0),
    "curriculum.phases": st.lists(FRACTION, min_size=1, max_size=4, unique=True).map(
        lambda values: ",".join(map(repr, sorted(values)))
    ),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PATHS = st.text(
    st.characters(exclude_categories=["Cs"], min_codepoint=0x20), min_size=1, max_size=30
).filter(str.strip)


def values_of(flag: Flag) -> st.SearchStrategy:
    rule = flag.rule
    if flag.dest in FITTING:
        return FITTING[flag.dest]
    if rule.choices:
        return st.sampled_from(rule.choices)
    if flag.kind == "bool":
        return st.booleans()
    if flag.kind == "str":
        return PATHS if rule.is_path else TEXT
    low = rule.minimum if rule.above is None else math.nextafter(rule.above, math.inf)
    high = rule.maximum if rule.below is None else math.nextafter(rule.below, -math.inf)
    high = LARGEST_INT if high is None else high
    if flag.kind == "int":
        return st.integers(int(low or 0), int(high))
    return st.floats(-LARGEST_INT if low is None else low, float(high))


@st.composite
def configs(draw: st.DrawFn) -> SigmaConfig:
    config = SigmaConfig()
    flags = iter_flags(SigmaConfig)
    for flag in draw(st.lists(st.sampled_from(flags), unique_by=lambda f: f.dest)):
        setattr(getattr(config, flag.section), flag.field, draw(values_of(flag)))
    if config.generate.hidden:
        config.generate.eval_file = ""  # the two exclude each other
    if config.c3o.credit_enabled:
        config.optim.optimizer = "c3o"
    for name in ("mamba_block_t", "mamba_block_n"):
        if getattr(config.precision, name):
            config.precision.kernel_backend, config.fractal.interval_steps = "triton", 0
            setattr(config.precision, name, 32)
    if config.fractal.arch_search:
        config.c3o.credit_enabled = config.precision.torch_compile = False
        config.optim.optimizer = "muon"
    if config.replays():
        config.verifier.math_enabled, config.ttrl.label_mode = True, "verifier"
    if config.probe_flag() or config.fractal.arch_search:
        config.stream.data_backend = "embedded"
    if config.ttrl.interval:
        config.verifier.math_enabled = True
        own = config.sigma_rl
        if config.ttrl.label_mode == "majority" or own.sigma_rl_placebo != "none":
            config.grpo.backend = "internal"
        if config.grpo.backend == "trl":
            config.ttrl.asym_verify_enabled = own.sigma_rl_auto_mix_enabled = False
        config.verifier.code_enabled &= config.ttrl.label_mode != "majority"
        own = config.ttrl
        own.discriminative_topk = max(own.discriminative_topk, own.group_size)
    if config.instant.mode in ("reversible", "compress"):
        config.precision.torch_compile = False
    if config.instant.mode == "reversible":
        config.model.residual_layout, config.instant.byte_budget_mb = "two-stream", 0
    return config.validate()


@pytest.fixture(scope="session")
def config_strategy() -> st.SearchStrategy[SigmaConfig]:
    return configs()


@pytest.fixture(scope="session")
def exactly():
    """Values with their types: 1, 1.0 and True differ, as do 0.0 and -0.0."""
    return lambda config: repr(dataclasses.asdict(config))
