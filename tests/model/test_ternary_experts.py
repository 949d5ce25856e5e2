"""Ternary SwiGLU on int8 kernels, dense and by expert, against definitions looped over experts."""

import pytest
import torch

from model import reference_ops
from model.dispatch import DispatchPlan
from model.moe import MoE
from model.sequence import SequenceContext
from model.swiglu import SwigluSettings, swiglu
from tests.model.kernel_inputs import DEVICE, poisoned_empty, random
from tests.model.test_weight_cache import small_model

pytest.importorskip("triton")

from model.ternary_experts import (
    RowGroups,
    activate_rows,
    activation_gradient,
    combine_rows,
    grouped_int8_product,
    grouped_weight_gradient,
)
from model.ternary_linear import quantize_rows, ternarize_rows

NAMES = ("x", "weight_in", "weight_out", "gates")
# Tokens, width, hidden width, experts, experts per token.
SHAPES = [(1, 17, 9, 1, 1), (1, 63, 100, 5, 2), (63, 100, 63, 4, 2), (100, 24, 63, 3, 3)]
SHAPES += [(500, 9, 17, 8, 2)]
TRITON = SwigluSettings(backend="triton")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    with poisoned_empty(monkeypatch):
        yield


def routing(tokens, experts, top_k, *, seed, skip=()):
    """Distinct experts (tokens, top_k) of every token, none of them in `skip`."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    scores[:, list(skip)] = -1.0
    return scores.topk(top_k, dim=1).indices.to(DEVICE)


def make(tokens, width, hidden, experts, top_k, *, seed=0, skip=()):
    given = {
        "x": random(tokens, width, seed=seed),
        "weight_in": random(experts, 2 * hidden, width, seed=seed + 1),
        "weight_out": random(experts, width, hidden, seed=seed + 2),
        "gates": random(tokens, top_k, seed=seed + 3).abs(),
    }
    return given, routing(tokens, experts, top_k, seed=seed + 4, skip=skip)


def evaluate(given, selected, grad, *, settings=TRITON):
    """Output and gradients by name of the planned experts, or of one for all without a plan."""
    leaves = {name: value.detach().requires_grad_() for name, value in given.items()}
    gates = leaves.pop("gates", None)
    plan = None
    if selected is not None:
        plan = DispatchPlan.create(selected, given["weight_in"].shape[0], grouped=True)
    y = swiglu(**leaves, settings=settings, plan=plan, gates=gates)
    y.backward(grad)
    found = {name: leaf.grad for name, leaf in leaves.items()}
    if gates is not None:
        found["gates"] = gates.grad
    return y.detach(), found


def looped(given, selected, grad):
    """The same by the definition, one expert and slot at a time."""
    y = torch.zeros_like(given["x"])
    total = {name: torch.zeros_like(given[name]) for name in NAMES}
    for expert in range(given["weight_in"].shape[0]):
        token, slot = (selected == expert).nonzero(as_tuple=True)
        if not token.numel():
            continue
        weights = given["weight_in"][expert], given["weight_out"][expert]
        gate = given["gates"][token, slot]
        out, _ = reference_ops.ternary_swiglu(given["x"][token], *weights)
        y.index_add_(0, token, gate[:, None] * out)
        part = reference_ops.ternary_swiglu_backward(grad[token], gate, given["x"][token], *weights)
        total["x"].index_add_(0, token, part["x"])
        total["gates"].index_put_((token, slot), part["gates"])
        total["weight_in"][expert] = part["weight_in"]
        total["weight_out"][expert] = part["weight_out"]
    return y, total


def assert_close(found, expected, name):
    """Equal but for codes on the edge between two steps, which fp32's last bit may move by one."""
    scale = expected.abs().max().clamp_min(1e-6)
    error = (found - expected).abs() / scale
    assert error.max() < 2e-2, (name, error.max())
    assert error.mean() < 2e-5, (name, error.mean())


@pytest.mark.parametrize(("tokens", "width", "hidden", "experts", "top_k"), SHAPES)
def test_experts_equal_the_definition_on_values_and_gradients(
    tokens, width, hidden, experts, top_k
):
    given, selected = make(tokens, width, hidden, experts, top_k)
    grad = random(tokens, width, seed=9)
    y, found = evaluate(given, selected, grad)
    expected, wanted = looped(given, selected, grad)
    assert_close(y, expected, "y")
    for name in NAMES:
        assert_close(found[name], wanted[name], name)


@pytest.mark.parametrize("skip", [(0,), (3,), (0, 1, 3)])
def test_experts_without_tokens_get_a_gradient_of_zero(skip):
    given, selected = make(40, 24, 20, 4, 1, seed=10, skip=skip)
    grad = random(40, 24, seed=11)
    y, found = evaluate(given, selected, grad)
    expected, wanted = looped(given, selected, grad)
    assert_close(y, expected, "y")
    for name in NAMES:
        assert_close(found[name], wanted[name], name)
    for expert in skip:
        assert not found["weight_in"][expert].any() and not found["weight_out"][expert].any()


@pytest.mark.parametrize(("tokens", "width", "hidden"), [(1, 17, 9), (63, 100, 63), (100, 24, 100)])
@pytest.mark.parametrize("sub_norm", [True, False])
def test_one_network_for_all_rows_equals_the_definition(tokens, width, hidden, sub_norm):
    given, _ = make(tokens, width, hidden, 1, 1, seed=12)
    given = {name: given[name] for name in ("x",)} | {
        name: given[name][0] for name in ("weight_in", "weight_out")
    }
    grad = random(tokens, width, seed=13)
    settings = SwigluSettings(backend="triton", sub_norm=sub_norm)
    y, found = evaluate(given, None, grad, settings=settings)
    expected, _ = reference_ops.ternary_swiglu(**given, sub_norm=sub_norm)
    ones = torch.ones(tokens, device=DEVICE)
    wanted = reference_ops.ternary_swiglu_backward(grad, ones, **given, sub_norm=sub_norm)
    assert_close(y, expected, "y")
    for name in found:
        assert_close(found[name], wanted[name], name)


def test_rounded_gradients_are_close_to_those_of_torch():
    given, selected = make(100, 64, 48, 4, 2, seed=14)
    grad = random(100, 64, seed=15)
    y, found = evaluate(given, selected, grad)
    plain = {name: value.detach().requires_grad_() for name, value in given.items()}
    plan = DispatchPlan.create(selected, 4)
    exact = swiglu(
        *(plain[name] for name in NAMES[:3]),
        settings=SwigluSettings(),
        plan=plan,
        gates=plain["gates"],
    )
    assert_close(y, exact.detach(), "y")
    exact.backward(grad)
    for name, leaf in plain.items():
        pair = found[name].flatten(), leaf.grad.flatten()
        assert torch.nn.functional.cosine_similarity(*pair, dim=0) > 0.9995, name


def test_strided_inputs_and_gradients():
    given, selected = make(30, 20, 16, 3, 2, seed=16)
    grad = random(30, 20, seed=17)
    expected = evaluate(given, selected, grad)
    strided = {name: torch.stack((value, value), dim=-1)[..., 0] for name, value in given.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    found = evaluate(strided, selected, torch.stack((grad, grad), dim=-1)[..., 1])
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], expected[1][name]) for name in NAMES)


def test_no_tokens():
    given, selected = make(0, 8, 6, 3, 2, seed=18)
    y, found = evaluate(given, selected, torch.zeros(0, 8, device=DEVICE))
    assert y.shape == (0, 8)
    assert not found["weight_in"].any() and not found["weight_out"].any()


def test_a_token_does_not_depend_on_the_others():
    given, selected = make(80, 32, 24, 4, 2, seed=19)
    plan = DispatchPlan.create(selected, 4, grouped=True)
    gates = given.pop("gates")
    together = swiglu(**given, settings=TRITON, plan=plan, gates=gates)
    for token in (0, 41, 79):
        alone = slice(token, token + 1)
        plan = DispatchPlan.create(selected[alone], 4, grouped=True)
        one = {**given, "x": given["x"][alone]}
        y = swiglu(**one, settings=TRITON, plan=plan, gates=gates[alone])
        assert torch.equal(y, together[alone])


def test_grouped_products_are_exact():
    counts = [0, 70, 1, 0, 130, 0]
    selected = torch.repeat_interleave(torch.arange(6), torch.tensor(counts))[:, None].to(DEVICE)
    groups = RowGroups.create(DispatchPlan.create(selected, 6, grouped=True))
    codes = quantize_rows(random(201, 90, seed=20))[0]
    weight = ternarize_rows(random(6, 75, 90, seed=21))
    ones = torch.ones(201, device=DEVICE)
    found = grouped_int8_product(
        *(codes, weight.codes, groups),
        **{"a_scale": ones, "b_scale": None, "dtype": torch.float32, "by_token": False},
    )
    expert = selected[:, 0]
    exact = torch.einsum("nk,nok->no", codes.double(), weight.codes[expert].double())
    assert torch.equal(found.double(), exact)
    assert torch.equal(weight.codes_t, weight.codes.mT)
    grad, scale = random(201, 33, seed=22), random(201, seed=23)
    sums = grouped_weight_gradient(
        *(grad, codes, scale, groups), in_bf16=False, by_token=(False, False)
    )
    for index, (rows, part) in enumerate(zip(counts, grad.split(counts))):
        start = sum(counts[:index])
        scaled = part.double() * scale[start : start + rows, None].double()
        wanted = scaled.T @ codes[start : start + rows].double()
        torch.testing.assert_close(sums[index].double(), wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 17, 300])
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_every_distribution_fits_the_launched_grid(rows, experts):
    generator = torch.Generator().manual_seed(rows)
    worst = torch.zeros(rows, dtype=torch.int64)
    spread = torch.arange(rows) % experts
    drawn = torch.randint(experts, (rows,), generator=generator)
    for selected in (worst, spread, drawn):
        groups = RowGroups.create(DispatchPlan.create(selected[:, None], experts, grouped=True))
        assert int(groups.block_ends[-1]) <= groups.num_blocks
        assert int(groups.row_ends[-1]) == rows


@pytest.mark.parametrize("width", [1, 63, 100, 500, 5000])
@pytest.mark.parametrize("sub_norm", [True, False])
def test_activation_and_its_gradient_row_by_row(width, sub_norm):
    gate_up, grad = random(7, 2 * width, seed=24), random(7, width, seed=25)
    gates = random(7, seed=26)
    codes, step, rate = activate_rows(gate_up, sub_norm=sub_norm, eps=1e-6)
    leaf = gate_up.clone().requires_grad_()
    gate, up = leaf.chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    if sub_norm:
        hidden = reference_ops.rms_norm(hidden, eps=1e-6)
    expected, expected_step = reference_ops.round_rows(hidden.detach())
    assert (codes.float() - expected).abs().max() <= 1  # on the edge between two codes
    assert (codes.float() != expected).float().mean() < 1e-3
    torch.testing.assert_close(step, expected_step, rtol=1e-5, atol=0.0)
    found, found_gates = activation_gradient(
        *(grad, gate_up, codes, step, rate, gates), sub_norm=sub_norm
    )
    hidden.backward(grad * gates[:, None])
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5)
    wanted = (grad * codes * step[:, None]).sum(1)
    torch.testing.assert_close(found_gates, wanted, rtol=1e-4, atol=1e-4)


def test_rows_combine_in_the_order_of_slots():
    rows, gates = random(20, 33, seed=27), random(10, 2, seed=28)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(29)).view(10, 2).to(DEVICE)
    found = combine_rows(rows, order, gates, dtype=torch.float32)
    expected = rows[order[:, 0]] * gates[:, :1] + rows[order[:, 1]] * gates[:, 1:]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    plain = combine_rows(rows, order, None, dtype=torch.float32)
    assert torch.equal(plain, rows[order[:, 0]] + rows[order[:, 1]])


def moe_of(mode):
    """The feed-forward layer of a small model, on kernels, and its input."""
    model = small_model()
    model.use_kernels("triton")
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    layer.config.moe_dispatch_mode = mode
    u = random(2, 9, 32, seed=30)
    return layer.to(DEVICE), u, SequenceContext.create(2, 9, device=u.device)


def test_dispatch_modes_agree_and_grouped_takes_the_kernels():
    outputs = {}
    for mode in ("legacy", "packed", "grouped"):
        layer, u, context = moe_of(mode)
        assert layer.product_kind(u.flatten(0, 1)) == mode
        outputs[mode] = layer(u, context)[0]
    assert_close(outputs["packed"], outputs["legacy"], "packed")
    assert_close(outputs["grouped"], outputs["legacy"], "grouped")


def test_the_host_never_asks_for_the_loads_of_experts(monkeypatch):
    layer, u, context = moe_of("grouped")

    def refuse(*arguments):
        raise AssertionError("a tensor was read by the host")

    if DEVICE == "cpu":  # the interpreter reads tensors itself; ask only the part before kernels
        plan = DispatchPlan.create(routing(9, 4, 2, seed=31), 4, grouped=True)
        for name in ("item", "tolist", "__int__", "__bool__", "__index__", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        RowGroups.create(plan)
        return
    with torch.cuda.device(DEVICE):
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(u, context)[0].sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_device_in_bf16():
    given, selected = make(2048, 768, 1024, 8, 2, seed=32)
    grad = random(2048, 768, seed=33)
    expected, wanted = looped(given, selected, grad)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, found = evaluate(given, selected, grad)
    assert (y - expected).norm() < 0.02 * expected.norm()
    for name in NAMES:
        assert (found[name] - wanted[name]).norm() < 0.03 * wanted[name].norm(), name
