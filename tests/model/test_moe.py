"""Mixture of experts: dispatch modes, routing rules, auxiliary losses, balancing, resume."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from model.config import SigmaModelConfig
from model.dispatch import DispatchPlan
from model.moe import DenseFeedForward, MoE, counter_uniform, swiglu_settings
from model.sequence import SequenceContext
from model.swiglu import SwigluSettings, swiglu, swiglu_definition


def make_config(**changes) -> SigmaModelConfig:
    values = {"d_model": 32, "n_heads": 4, "d_ff": 96, "n_routed_experts": 6, "vocab_size": 50}
    values["rib_router_enabled"] = True
    return SigmaModelConfig(**(values | changes)).validate()


def make_moe(*, seed: int = 0, **changes) -> MoE:
    torch.manual_seed(seed)
    moe = MoE(make_config(**changes), layer=1, seed=seed)
    torch.nn.init.normal_(moe.router.weight, std=0.3)
    return moe


def make_input(batch: int = 3, length: int = 40, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


def make_context(x: torch.Tensor, **masks) -> SequenceContext:
    return SequenceContext.create(x.shape[0], x.shape[1], device="cpu", **masks)


def run_with_gradients(moe: MoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    moe.zero_grad()
    y, _ = moe(x, make_context(x))
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    results = {"y": y.detach(), "x": x.grad}
    return results | {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_top_k": 1, "n_shared_experts": 2},
        {"quant_mode": "none"},
        {"sub_norm": False, "n_shared_experts": 0, "moe_top_k": 3},
        {"bitlinear_group_size": 16},
    ],
)
def test_dispatch_modes_agree_in_values_and_every_gradient(changes):
    moe = make_moe(**changes)
    results = {}
    for mode in ("legacy", "packed", "grouped"):
        moe.config.moe_dispatch_mode = mode
        results[mode] = run_with_gradients(moe, make_input())
    assert set(results["legacy"]) >= {"router.weight", "experts.gate_up", "experts.down", "x"}
    for mode in ("packed", "grouped"):
        assert results[mode].keys() == results["legacy"].keys()
        for name, expected in results["legacy"].items():
            torch.testing.assert_close(
                results[mode][name],
                expected,
                atol=1e-5,
                rtol=1e-5,
                msg=lambda m, n=name: f"{n} {m}",
            )


@pytest.mark.parametrize("ternary", [True, False])
def test_grouped_product_equals_the_loop(ternary):
    """torch's grouped product, which runs on CUDA only by choice, on an expert without rows too."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(shape, generator=generator)
        for shape in ((50, 16), (4, 32, 16), (4, 16, 16), (50, 2))
    ]
    experts = torch.randint(0, 3, (50, 2), generator=generator)  # expert 3 stays empty
    results = []
    for grouped in (False, True):
        leaves = [t.clone().requires_grad_() for t in tensors]
        plan = DispatchPlan.create(experts, 4, grouped=grouped)
        settings = SwigluSettings(ternary=ternary)
        y = swiglu(*leaves[:3], settings=settings, plan=plan, gates=leaves[3].sigmoid())
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for loop, grouped in zip(*results):
        torch.testing.assert_close(grouped, loop, atol=1e-4, rtol=1e-5)
    assert results[0][2][3].abs().max() == 0.0


@pytest.mark.parametrize("changes", [{}, {"sub_norm": False}, {"quant_mode": "none"}])
def test_dense_equals_its_definition(changes):
    torch.manual_seed(0)
    config = make_config(n_routed_experts=0, **changes)
    dense = DenseFeedForward(config, width=48)
    x = make_input(seed=4)
    results = []
    for kind in ("product", "definition"):
        leaf = x.clone().requires_grad_()
        dense.zero_grad()
        if kind == "product":
            y, aux = dense(leaf, make_context(leaf))
            assert aux == {}
        else:
            weights = (dense.gate_up.weight, dense.down.weight)
            y = swiglu_definition(leaf, *weights, settings=swiglu_settings(config))
        y.pow(3).sum().backward()
        results.append((y.detach(), leaf.grad, dense.gate_up.weight.grad, dense.down.weight.grad))
    for product, definition in zip(*results):
        torch.testing.assert_close(product, definition, atol=1e-5, rtol=1e-4)


def test_high_precision_gradients_against_finite_differences():
    generator = torch.Generator().manual_seed(2)
    shapes = ((7, 4), (3, 6, 4), (3, 4, 3), (7, 2))
    leaves = [
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]
    plan = DispatchPlan.create(torch.randint(0, 3, (7, 2), generator=generator), 3)
    settings = SwigluSettings(ternary=False)

    def layer(x, weight_in, weight_out, gates):
        return swiglu(x, weight_in, weight_out, settings=settings, plan=plan, gates=gates)

    assert torch.autograd.gradcheck(layer, leaves, atol=1e-6)


def test_token_result_is_independent_of_the_other_rows_to_the_bit():
    moe = make_moe().eval()
    x = make_input(4, 64)
    with torch.no_grad():
        logits = F.linear(x.flatten(0, 1), moe.router_weight())
        selected, gates = moe.select(torch.sigmoid(logits))
        whole = moe._dispatch(x.flatten(0, 1), selected, gates)
        for rows in (slice(0, 1), slice(17, 24), slice(100, 203)):
            part = moe._dispatch(x.flatten(0, 1)[rows], selected[rows], gates[rows])
            assert torch.equal(part, whole[rows])
        alone, _ = moe(x[2:3, 5:6], make_context(x[2:3, 5:6]))
        together, _ = moe(x, make_context(x))
    assert (alone - together[2:3, 5:6]).abs().max() < 1e-6


def test_bias_changes_the_selection_and_never_a_gate():
    moe = make_moe().eval()
    affinity = torch.rand(200, 6, generator=torch.Generator().manual_seed(3)) * 0.5 + 0.25
    before, gates_before = moe.select(affinity)
    moe.balance_bias[4] = 2.0
    after, gates_after = moe.select(affinity)
    assert (after == 4).any(1).all() and not (before == 4).any(1).all()
    chosen = affinity.gather(1, after)
    torch.testing.assert_close(gates_after, chosen / chosen.sum(1, keepdim=True))
    same = (before.sort(1).values == after.sort(1).values).all(1)
    assert same.any()
    torch.testing.assert_close(gates_after[same].sort(1).values, gates_before[same].sort(1).values)


def test_top_1_gate_is_the_affinity_itself_and_trains_the_router():
    moe = make_moe(moe_top_k=1, n_shared_experts=1)
    affinity = torch.rand(50, 6)
    _, gates = moe.select(affinity)
    assert torch.equal(gates[:, 0], affinity.amax(1))
    gradients = run_with_gradients(moe, make_input())
    assert gradients["router.weight"].abs().sum() > 0


def test_auxiliary_losses_follow_their_formulas():
    moe = make_moe(router_jitter_noise=0.0)
    moe.temperature.fill_(0.9)
    x = make_input()
    _, aux = moe(x, make_context(x))
    logits = F.linear(x.flatten(0, 1).double(), moe.router_weight().double())
    z_loss = logits.exp().sum(1).log().square().mean()
    torch.testing.assert_close(aux["moe_z"].double(), 1e-3 * z_loss, rtol=1e-5, atol=0)

    affinity = 1 / (1 + (-logits / 0.9).exp())
    probs = affinity / affinity.sum(1, keepdim=True)
    entropy = -(probs * probs.log()).sum(1) / math.log(6)
    bounded = entropy.clamp(max=0.99)
    rib = (
        0.03 * (bounded / (1 - bounded + 1e-6)).mean()
        + 0.08 * (probs.mean(0).max() - probs.mean(0).min())
        - 0.03 * (probs.amax(1) * (1 - entropy)).mean()
    )
    torch.testing.assert_close(aux["rib"].double(), rib, rtol=1e-4, atol=0)
    moe.config.rib_router_enabled = False
    assert set(moe(x, make_context(x))[1]) == {"moe_z"}
    moe.eval()
    assert moe(x, make_context(x))[1] == {}


def max_violation(moe: MoE, batches: list[torch.Tensor]) -> float:
    """Load violation over the last 20 batches."""
    for x in batches[:-20]:
        moe(x, make_context(x))
        moe.apply_balance_update()
    total = torch.zeros(6)
    for x in batches[-20:]:
        moe(x, make_context(x))
        total += moe.load_counts
        moe.apply_balance_update()
    return float(total.max() / total.mean() - 1.0)


def test_balance_bias_lowers_the_load_violation():
    """An off-centre input overloads some experts; only the bias moves here, no weight trains."""
    violations = {}
    for rate in (0.0, 5e-3):
        moe = make_moe(router_balance_lr=rate, rib_router_enabled=False)
        batches = [make_input(2, 128, seed=i) + 0.15 for i in range(150)]
        violations[rate] = max_violation(moe, batches)
    assert violations[0.0] > 0.4
    assert violations[5e-3] < 0.2


def test_balance_update_is_one_clamped_sign_step_over_all_micro_batches():
    moe = make_moe(router_balance_lr=1.5)
    for seed in (1, 2):
        x = make_input(seed=seed)
        moe(x, make_context(x))
    load = moe.load_counts.clone()
    assert load.sum() == 2 * 3 * 40 * 2
    moe.apply_balance_update()
    expected = (1.5 * torch.sign(load.mean() - load)).clamp(-2, 2)
    assert torch.equal(moe.balance_bias, expected)
    assert moe.load_counts.abs().sum() == 0
    moe.load_counts.copy_(load)
    moe.apply_balance_update()
    assert torch.equal(moe.balance_bias, (2 * expected).clamp(-2, 2))
    before = moe.state_dict()["balance_bias"].clone()
    moe.apply_balance_update()  # no load: nothing moves
    assert torch.equal(moe.balance_bias, before)


def test_a_discarded_step_leaves_no_trace():
    moe = make_moe()
    state = {name: value.clone() for name, value in moe.state_dict().items()}
    moe(make_input(), make_context(make_input()))
    moe.reset_statistics()
    moe.apply_balance_update()
    assert torch.equal(moe.balance_bias, state["balance_bias"])
    assert torch.equal(moe.temperature, state["temperature"])


def test_load_is_counted_in_training_with_gradients_only_and_without_padding():
    moe = make_moe()
    x = make_input()
    with torch.no_grad():
        moe(x, make_context(x))
    moe.eval()
    moe(x, make_context(x))
    assert moe.load_counts.sum() == 0
    moe.train()
    valid = torch.ones(3, 40, dtype=torch.bool)
    valid[1, :30] = False
    moe(x, make_context(x, valid_mask=valid))
    assert moe.load_counts.sum() == 2 * (120 - 30)
    moe.load_counts.zero_()
    kept = x.flatten(0, 1)[valid.flatten()].unsqueeze(0)
    moe.config.router_jitter_noise = 0.0
    _, aux = moe(x, make_context(x, valid_mask=valid))
    _, aux_kept = moe(kept, make_context(kept))
    for name, value in aux_kept.items():
        torch.testing.assert_close(aux[name], value)


def test_training_output_does_not_depend_on_later_tokens():
    moe = make_moe()
    for seed in range(3):  # give temperature and bias something to react to
        x = make_input(seed=seed)
        moe(x, make_context(x))
        moe.apply_balance_update()
    assert moe.temperature != 1.0
    x = make_input(1, 60)
    changed = x.clone()
    changed[:, 30:] += 1.0
    first, _ = moe(x, make_context(x))
    second, _ = moe(changed, make_context(changed))
    assert torch.equal(first[:, :30], second[:, :30])
    assert not torch.equal(first[:, 30:], second[:, 30:])


def test_resumed_layer_continues_to_the_bit():
    def train(moe: MoE, steps: range) -> torch.Tensor:
        for step in steps:
            x = make_input(seed=step)
            y, aux = moe(x, make_context(x))
            (y.square().mean() + sum(aux.values())).backward()
            with torch.no_grad():
                for parameter in moe.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
            moe.apply_balance_update()
        return y.detach()

    straight = make_moe(seed=5)
    expected = train(straight, range(8))
    first = make_moe(seed=5)
    train(first, range(4))
    resumed = make_moe(seed=5)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(train(resumed, range(4, 8)), expected)
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    forgetful = make_moe(seed=5)
    state = first.state_dict()
    state["router_step"] = torch.zeros((), dtype=torch.int64)  # the saved counter matters
    forgetful.load_state_dict(state)
    assert not torch.equal(train(forgetful, range(4, 8)), expected)


def test_jitter_is_a_function_of_the_step_and_only_in_training():
    moe = make_moe(router_jitter_noise=0.5, rib_router_enabled=False)
    x = make_input()
    first, _ = moe(x, make_context(x))
    assert torch.equal(moe(x, make_context(x))[0], first)
    moe.router_step += 1
    assert not torch.equal(moe(x, make_context(x))[0], first)
    moe.eval()
    calm, _ = moe(x, make_context(x))
    moe.router_step += 1
    assert torch.equal(moe(x, make_context(x))[0], calm)


def test_counter_noise_is_uniform_and_uncorrelated_between_steps_and_layers():
    shape = torch.Size((4000, 8))
    first = counter_uniform(shape, torch.tensor(7), key=11)
    assert first.min() >= 0.0 and first.max() < 1.0
    histogram = torch.histc(first, bins=20, min=0, max=1)
    assert (histogram - 1600).abs().max() < 5 * math.sqrt(1600)
    for other in (
        counter_uniform(shape, torch.tensor(8), key=11),
        counter_uniform(shape, torch.tensor(7), key=12),
        first.roll(1, 0),
        first.roll(1, 1),
    ):
        correlation = torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(32000)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_router_weight_has_its_storage_precision_and_a_straight_through_gradient(precision):
    moe = make_moe(moe_gate_precision=precision)
    stored = moe.router_weight()
    if precision == "bf16":
        assert torch.equal(stored, stored.bfloat16().float())
    else:
        step = moe.router.weight.abs().amax(1, keepdim=True) / 127
        codes = stored / step
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
        assert codes.abs().max() <= 127.001
    assert not torch.equal(stored, moe.router.weight)
    stored.sum().backward()
    assert torch.equal(moe.router.weight.grad, torch.ones_like(moe.router.weight))


def test_metrics_report_the_finished_step():
    moe = make_moe()
    x = make_input()
    moe(x, make_context(x))
    load = moe.load_counts.clone()
    moe.apply_balance_update()
    figures = moe.metrics()
    share = load / load.sum()
    assert figures["moe_usage_max"] == pytest.approx(float(share.max()))
    assert figures["moe_max_vio"] == pytest.approx(float(load.max() / load.mean()) - 1)
    assert 0.0 < figures["moe_entropy"] <= 1.0
    assert 0.8 <= figures["moe_router_temp"] <= 1.35
    assert figures["moe_router_bias_std"] > 0
