"""The Mamba-3 block: gradients, causality, documents, decoding, initial values, learning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import mamba
from model.config import SigmaModelConfig
from model.mamba import Mamba, _GatedRankNorm, decay_rate
from model.norm_rope import RMSNorm
from model.sequence import SequenceContext


def build_config(**changes) -> SigmaModelConfig:
    settings = {
        "d_model": 32, "n_heads": 4, "mamba_head_dim": 16, "mamba_d_state": 8, "mimo_rank": 2,
        "mamba_chunk_len": 16, "quant_mode": "none",
    }  # fmt: skip
    return SigmaModelConfig(**(settings | changes))


def build_block(*, seed: int = 0, lively: bool = True, **changes) -> Mamba:
    """A block with fixed weights; `lively` gives the control projection data-dependent values."""
    generator = torch.Generator().manual_seed(seed)
    block = Mamba(build_config(**changes))
    with torch.no_grad():
        for projection in (block.in_proj, block.out_proj):
            projection.weight.normal_(std=projection.in_features**-0.5, generator=generator)
        if lively:
            block.control_proj.weight.normal_(std=0.1, generator=generator)
            block.step_scale.fill_(1.0)
    return block


def draw(batch: int, length: int, *, seed: int = 1, width: int = 32) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def run(block: Mamba, x: Tensor, *, state=None, **settings):
    context = SequenceContext.create(x.shape[0], x.shape[1], device="cpu", **settings)
    return block(x, context, state=state)


@pytest.mark.parametrize("quant_mode", ["none", "bitnet_1_58"])
@pytest.mark.parametrize("rank", [1, 2])
def test_every_trainable_tensor_learns_within_two_steps(rank, quant_mode):
    block = build_block(mimo_rank=rank, quant_mode=quant_mode, lively=False)
    x, target = draw(2, 40), draw(2, 40, seed=2)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    seen = dict.fromkeys((name for name, _ in block.named_parameters()), False)
    first = run(block, x)[0].detach()
    for _ in range(2):
        optimizer.zero_grad()
        (run(block, x)[0] - target).square().mean().backward()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            seen[name] |= bool(parameter.grad.abs().max() > 0)
        optimizer.step()
    assert all(seen.values()), seen
    assert not torch.equal(run(block, x)[0], first)


@pytest.mark.parametrize("quant_mode", ["none", "bitnet_1_58"])
def test_changing_the_future_changes_nothing_before_it_to_the_bit(quant_mode):
    block = build_block(quant_mode=quant_mode)
    x, other = draw(2, 50), draw(2, 50, seed=2)
    before = run(block, x)[0]
    for cut in (1, 15, 16, 17, 49):
        after = run(block, torch.cat([x[:, :cut], other[:, cut:]], 1))[0]
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert (after[:, cut:] != before[:, cut:]).any()


@pytest.mark.parametrize("rank", [1, 2])
def test_decoding_token_by_token_equals_prefill(rank):
    block = build_block(mimo_rank=rank)
    x = draw(2, 45)
    expected = run(block, x)[0]
    y, state = run(block, x[:, :20], use_cache=True)
    outputs = [y]
    for t in range(20, 45):
        y, state = run(block, x[:, t : t + 1], state=state, start=t, use_cache=True)
        outputs.append(y)
    assert (torch.cat(outputs, 1) - expected).abs().max() < 1e-4
    assert (expected[:, 20:] - run(block, x[:, 20:])[0]).abs().max() > 1e-2  # the past matters


def test_no_state_is_kept_unless_asked_for():
    block = build_block()
    x = draw(1, 5)
    assert run(block, x)[1] is None
    state = run(block, x, use_cache=True)[1]
    assert run(block, x, state=state)[1] is not None


def test_reordered_states_continue_their_rows():
    block = build_block()
    x, more = draw(2, 20), draw(3, 7, seed=2)
    index = torch.tensor([1, 1, 0])
    state = run(block, x, use_cache=True)[1]
    continued = run(block, more, state=state.reorder(index))[0]
    whole = run(block, torch.cat([x[index], more], 1))[0]
    assert (continued - whole[:, 20:]).abs().max() < 1e-4


def test_packed_documents_equal_separate_documents():
    block = build_block()
    x = draw(1, 40)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, [0, 13, 32]] = True
    packed = run(block, x, reset_mask=reset)[0]
    parts = [run(block, x[:, start:stop])[0] for start, stop in ((0, 13), (13, 32), (32, 40))]
    assert (packed - torch.cat(parts, 1)).abs().max() < 1e-4
    assert (packed - run(block, x)[0]).abs().max() > 1e-2


def test_padding_on_the_left_changes_nothing():
    block = build_block()
    x = draw(1, 30)
    valid = torch.tensor([[False] * 9 + [True] * 30])
    y, state = run(block, torch.cat([draw(1, 9, seed=3), x], 1), valid_mask=valid, use_cache=True)
    expected, plain = run(block, x, use_cache=True)
    assert y.isfinite().all()
    assert (y[:, 9:] - expected).abs().max() < 1e-4
    assert (state.h - plain.h).abs().max() < 1e-4


def test_two_blocks_of_one_forward_share_masks_and_stay_right():
    first, second = build_block(), build_block(seed=5)
    x = draw(1, 40)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    context = SequenceContext.create(1, 40, device="cpu", reset_mask=reset)
    y = second(first(x, context)[0], context)[0]
    alone = run(second, run(first, x, reset_mask=reset)[0], reset_mask=reset)[0]
    assert torch.equal(y, alone)


@pytest.mark.parametrize("slab", [1, 100, 10**6])
@pytest.mark.parametrize("rank", [1, 3])
def test_gated_norm_equals_its_formula_with_every_gradient(rank, slab, monkeypatch):
    monkeypatch.setattr(mamba, "_SLAB", slab)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    y, z, gain = normal(2, 5, 3, rank, 4), normal(2, 5, 3, 4), normal(3, rank, 4)
    gate = normal(3, rank, 4) if rank > 1 else None
    leaves = [leaf for leaf in (y, z, gain, gate) if leaf is not None]
    gates = z.unsqueeze(3) * (1.0 if gate is None else gate)
    expected = (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain * F.silu(gates)).sum(
        3
    )
    actual = _GatedRankNorm.apply(y, z, gain, gate, 1e-6)
    weight = torch.randn(actual.shape, generator=generator, dtype=torch.float64)
    assert torch.allclose(actual, expected, atol=1e-12)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for got, want in zip(torch.autograd.grad((actual * weight).sum(), leaves), wanted, strict=True):
        assert torch.allclose(got, want, atol=1e-12)


def test_initial_steps_decays_and_frequencies():
    block = build_block(lively=False, mamba_step_scale=0.05)
    inputs, _ = block.scan_inputs(draw(2, 6))
    dt = inputs.dt[0, 0]
    assert torch.allclose(dt.min(), torch.tensor(1e-3), rtol=1e-3)
    assert torch.allclose(dt.max(), torch.tensor(0.1), rtol=1e-3)
    assert torch.allclose(inputs.log_decay, -inputs.dt)  # A = -1
    assert torch.allclose(inputs.trap, torch.full_like(inputs.trap, 0.5))
    assert torch.allclose(inputs.theta.max(), torch.tensor(1.0), rtol=1e-4)
    assert torch.allclose(inputs.theta.min(), torch.tensor(1e-3), rtol=1e-3)
    assert block.step_scale.item() == pytest.approx(0.05)
    assert (block.bc_bias == 1).all()


def test_decay_rate_is_negative_clamped_and_continuous():
    values = torch.tensor([-1e9, -3.0, -1e-4, 0.0, 1e-4, 2.0, 1e9])
    rate = decay_rate(values)
    assert (rate <= -1e-4).all() and (rate >= -1e4).all()
    assert torch.allclose(rate[1:6], torch.tensor([-0.25, -1.0, -1.0, -1.0, -3.0]), atol=2e-4)
    assert (rate.diff() <= 0).all()


def test_control_parameters_stay_in_high_precision():
    block = build_block(quant_mode="bitnet_1_58")
    assert type(block.control_proj) is nn.Linear
    weight = block.control_proj.weight
    x = draw(1, 4)
    before = block.scan_inputs(x)[0].dt
    with torch.no_grad():
        weight[0, 0] += 1e-3  # a ternary layer would round this away or move whole rows
    after = block.scan_inputs(x)[0].dt
    assert (after[..., 0] != before[..., 0]).all()
    assert torch.equal(after[..., 1:], before[..., 1:])


def test_variants_have_only_the_parameters_they_use():
    plain = build_block(mimo_rank=1, mamba_trapezoid=False, mamba_rope_fraction=0.0)
    assert plain.rank_in is None and plain.rank_gate is None
    assert plain.control_proj.out_features == 2 * plain.num_heads
    inputs, _ = plain.scan_inputs(draw(1, 3))
    assert inputs.trap is None and inputs.theta is None
    x = draw(1, 40)
    assert run(plain, x)[0].shape == x.shape
    full = build_block()
    assert full.control_proj.out_features == 3 * full.num_heads + 2


def test_metrics_describe_the_last_training_forward():
    block = build_block().train()
    x = draw(2, 33)
    run(block, x)
    inputs, _ = block.scan_inputs(x)
    state = run(block, x, use_cache=True)[1]
    metrics = block.metrics()
    norm = state.h.flatten(2).norm(dim=-1).mean()
    assert metrics["mamba_state_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["mamba_dt_mean"] == pytest.approx(float(inputs.dt.mean()), rel=1e-5)
    assert metrics["mamba_decay_mean"] == pytest.approx(
        float(inputs.log_decay.exp().mean()), rel=1e-5
    )  # fmt: skip
    assert metrics["mamba_chunk_len"] == 16.0
    block.eval()
    run(block, draw(2, 33, seed=9))
    assert block.metrics() == metrics


def test_autocast_keeps_decays_exact():
    block = build_block()
    x = draw(2, 40)
    expected = run(block, x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(block, x)[0]
        inputs, _ = block.scan_inputs(x)
    assert torch.equal(inputs.log_decay, block.scan_inputs(x)[0].log_decay)
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()


class _ParityModel(nn.Module):
    """Two residual blocks over 0/1 tokens; the answer at t is the parity of tokens up to t."""

    def __init__(self, *, rotation: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(2, 32)
        fraction = 0.5 if rotation else 0.0
        self.blocks = nn.ModuleList(
            build_block(seed=s, lively=False, mamba_rope_fraction=fraction, mamba_step_scale=1.0)
            for s in range(2)
        )
        self.norms = nn.ModuleList(RMSNorm(32) for _ in range(3))
        self.head = nn.Linear(32, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for norm, block in zip(self.norms, self.blocks):
            x = x + run(block, norm(x))[0]
        return self.head(self.norms[2](x))


def _parity_accuracy(*, rotation: bool) -> float:
    """Accuracy at twice the trained length."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = _ParityModel(rotation=rotation)
    steps = 1500
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, s / 50) * (0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    for step in range(steps):
        length = 4 + step * 36 // steps  # short strings first
        tokens = torch.randint(2, (32, length), generator=generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), (tokens.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    tokens = torch.randint(2, (256, 80), generator=generator)
    with torch.no_grad():
        right = model(tokens).argmax(-1) == tokens.cumsum(1) % 2
    return float(right[:, 40:].float().mean())


@pytest.mark.soak
def test_parity_generalises_and_needs_the_rotation():
    rotating, real = _parity_accuracy(rotation=True), _parity_accuracy(rotation=False)
    assert rotating > 0.8
    assert real < 0.65
