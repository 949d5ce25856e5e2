"""BitLinear: the rounding, its scale, the straight-through gradient and their traps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model import reference_ops
from model.bitlinear import (
    BitLinear,
    bit_linear,
    expand_scale,
    fused_linear,
    quantize_tokens,
    ternarize,
    ternary_weight,
)
from model.ternary_statistics import TernaryStatistics, ternary_parameters


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _layer(inputs: int, outputs: int, **settings) -> BitLinear:
    return BitLinear(inputs, outputs, generator=torch.Generator().manual_seed(7), **settings)


SHAPES = [(100, 500, 0), (100, 500, 128), (500, 100, 128), (63, 7, 0), (256, 64, 128), (1, 1, 0)]


@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
def test_values_and_gradients_equal_the_definition(inputs: int, outputs: int, group: int) -> None:
    """fp64, so that no value sits on the other side of a rounding threshold."""
    x = _random(3, 11, inputs, dtype=torch.float64).requires_grad_()
    weight = _random(outputs, inputs, seed=1, dtype=torch.float64).requires_grad_()
    grad = _random(3, 11, outputs, seed=2, dtype=torch.float64)
    for quantize in (True, False):
        results = []
        for function in (bit_linear, reference_ops.bit_linear):
            y = function(x, weight, group_size=group, quantize_activations=quantize)
            results.append([y, *torch.autograd.grad(y, (x, weight), grad)])
        for ours, theirs in zip(*results):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("inputs", "outputs", "group"), SHAPES)
def test_forward_weight_has_three_values_per_group(inputs: int, outputs: int, group: int) -> None:
    layer = _layer(inputs, outputs, group_size=group)
    # The matrix that the forward pass applies, read off by feeding unit vectors.
    applied = layer(torch.eye(inputs)).T  # (out, in)
    for start in range(0, inputs, group or inputs):
        for row in applied[:, start : start + (group or inputs)]:
            values = row.abs()[row != 0]
            if values.numel():
                torch.testing.assert_close(values, values[:1].expand_as(values))
    codes, scale = ternarize(layer.weight, group)
    assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    width = group or inputs
    assert scale.shape == (outputs, -(-inputs // width))


@pytest.mark.parametrize("group", [0, 128])
def test_gaussian_weights_round_to_31_percent_zeros(group: int) -> None:
    codes, _ = ternarize(_random(512, 1024), group)
    assert abs(float((codes == 0).float().mean()) - 0.31) < 0.02


@pytest.mark.parametrize("group", [0, 128])
def test_scale_is_the_least_squares_optimum(group: int) -> None:
    weight = _random(32, 500, dtype=torch.float64)
    codes, scale = ternarize(weight, group)

    def error(factor: float) -> torch.Tensor:
        used = codes * expand_scale(scale * factor, 500, group)
        return (weight - used).square().sum(1)  # per row

    best = error(1.0)
    for factor in (0.97, 0.999, 1.001, 1.03):
        assert (error(factor) > best).all()
    # Negative control: absmean, which shrinks the output, is a worse scale.
    absmean = weight.abs().mean(1, keepdim=True)
    assert ((weight - codes * absmean).square().sum(1) > error(1.0)).all()


def test_weight_gradient_is_that_of_the_surrogate() -> None:
    """dL/dW = dL/d(alpha q): finite differences of L around the rounded weight, rel < 1e-4."""
    x, weight = _random(6, 10, dtype=torch.float64), _random(4, 10, seed=1, dtype=torch.float64)
    target = _random(6, 4, seed=2, dtype=torch.float64)
    latent = weight.clone().requires_grad_()
    inputs = x.clone().requires_grad_()
    (bit_linear(inputs, latent) - target).square().sum().backward()
    rounded_x, rounded_w = quantize_tokens(x), ternary_weight(weight)

    def slopes(values: torch.Tensor, loss) -> torch.Tensor:
        result = torch.empty_like(values)
        for i in range(values.numel()):
            step = torch.zeros_like(values).view(-1)
            step[i] = 1e-5
            step = step.view_as(values)
            result.view(-1)[i] = (loss(values + step) - loss(values - step)) / 2e-5
        return result

    slope_w = slopes(rounded_w, lambda w: (rounded_x @ w.T - target).square().sum())
    slope_x = slopes(rounded_x, lambda v: (v @ rounded_w.T - target).square().sum())
    assert latent.grad is not None and inputs.grad is not None
    assert (latent.grad - slope_w).norm() / slope_w.norm() < 1e-4
    assert (inputs.grad - slope_x).norm() / slope_x.norm() < 1e-4


def test_activations_take_at_most_255_levels_per_token() -> None:
    x = _random(5, 4000) * torch.tensor([1e-6, 1e-2, 1.0, 1e2, 1e6])[:, None]
    rounded = quantize_tokens(x)
    peak = x.abs().amax(1, keepdim=True)
    levels = rounded / peak * 127
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert ((rounded - x).abs() <= peak / 254 * 1.0001).all()
    assert (levels.abs().amax(1) - 127).abs().max() < 1e-4


def test_train_and_eval_agree_to_the_bit_and_updates_are_seen() -> None:
    layer, x = _layer(64, 32), _random(8, 64)
    layer.train()
    before = layer(x)
    layer.eval()
    with torch.no_grad():
        assert torch.equal(layer(x), before)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before.square().sum().backward()
    optimizer.step()
    after = layer(x)
    assert not torch.equal(after, before)
    # Writes through .data do not bump the version counter; a cache keyed on it would miss them.
    layer.weight.data.neg_()
    assert torch.equal(layer(x), -after)


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_a_token_has_the_same_output_in_any_batch(rows: int) -> None:
    """To the bit: sums of integer codes do not depend on the order in which a kernel adds them."""
    weight, x = _random(96, 1000, seed=1), _random(40, 1000)
    assert torch.equal(bit_linear(x[:rows], weight), bit_linear(x, weight)[:rows])
    assert torch.equal(bit_linear(x[rows], weight), bit_linear(x, weight)[rows])


def test_zero_group_and_zero_row() -> None:
    weight = _random(4, 256)
    weight[1] = 0.0
    weight[2, :128] = 0.0
    weight.requires_grad_()
    x = _random(3, 256, seed=1)
    x[1] = 0.0
    x.requires_grad_()
    for group in (0, 128):
        y = bit_linear(x, weight, group_size=group)
        grads = torch.autograd.grad(y.sum(), (x, weight))
        assert y.isfinite().all() and all(g.isfinite().all() for g in grads)
        assert (y[:, 1] == 0).all() and (y[1] == 0).all()
        assert (grads[1][1] != 0).any(), "a zero row must be able to leave zero"
    assert ternarize(weight.detach(), 128)[1][2, 0] == 0


def test_non_contiguous_inputs() -> None:
    x, weight = _random(40, 6, 5).permute(1, 2, 0), _random(40, 30, seed=1).T
    expected = bit_linear(x.contiguous(), weight.contiguous())
    torch.testing.assert_close(bit_linear(x, weight), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [0, 32])
def test_stacked_weights_equal_one_call_per_expert(group: int) -> None:
    x = _random(3, 7, 100).requires_grad_()
    weight = _random(3, 50, 100, seed=1).requires_grad_()
    grad = _random(3, 7, 50, seed=2)
    stacked = bit_linear(x, weight, group_size=group)
    single = torch.stack([bit_linear(x[e], weight[e], group_size=group) for e in range(3)])
    torch.testing.assert_close(stacked, single, rtol=1e-5, atol=1e-5)
    stacked_grads = torch.autograd.grad(stacked, (x, weight), grad)
    single_grads = torch.autograd.grad(single, (x, weight), grad)
    for ours, theirs in zip(stacked_grads, single_grads):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["bitnet_1_58", "none"])
def test_fused_layers_equal_separate_layers(mode: str) -> None:
    layers = [_layer(64, n, group_size=16, quant_mode=mode) for n in (32, 8, 1)]
    x = _random(2, 9, 64).requires_grad_()
    weights = [layer.weight for layer in layers]
    fused = torch.cat(fused_linear(x, layers), -1)
    apart = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(fused, apart, rtol=1e-5, atol=1e-6)
    grad = _random(2, 9, 41, seed=3)
    for ours, theirs in zip(
        torch.autograd.grad(fused, [x, *weights], grad),
        torch.autograd.grad(apart, [x, *weights], grad),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("quantize", [True, False])
def test_products_in_16_bits_stay_near_fp32(dtype: torch.dtype, group: int, quantize: bool) -> None:
    """Autocast computes on the codes. fp16's range must hold sums of 2048 codes (2048 * 127)."""
    x = (_random(4, 2048).abs() + 1.0).requires_grad_()
    weight = (_random(64, 2048, seed=1).abs() + 0.5).mul(0.02).requires_grad_()
    grad = _random(4, 64, seed=2)
    exact = bit_linear(x, weight, group_size=group, quantize_activations=quantize)
    exact_grads = torch.autograd.grad(exact, (x, weight), grad)
    with torch.autocast("cpu", dtype=dtype):
        y = bit_linear(x, weight, group_size=group, quantize_activations=quantize)
    assert y.dtype == dtype and y.isfinite().all()
    grads = torch.autograd.grad(y, (x, weight), grad.to(dtype))
    for ours, theirs in zip((y.float(), *grads), (exact, *exact_grads)):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() / theirs.norm() < 0.02


def test_16_bit_stacked_weights_have_the_gradient_of_single_ones() -> None:
    x = _random(2, 5, 64).bfloat16().requires_grad_()
    weight = _random(2, 16, 64, seed=1).requires_grad_()
    grad = _random(2, 5, 16, seed=2).bfloat16()
    stacked = bit_linear(x, weight)
    single = torch.stack([bit_linear(x[e], weight[e]) for e in range(2)])
    for ours, theirs in zip(
        (stacked, *torch.autograd.grad(stacked, (x, weight), grad)),
        (single, *torch.autograd.grad(single, (x, weight), grad)),
    ):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.02, atol=0.02)


def test_quant_mode_none_is_a_plain_linear_layer() -> None:
    layer, x = _layer(20, 10, quant_mode="none"), _random(4, 20)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert torch.equal(layer.effective_weight(), layer.weight)
    assert ternary_parameters([("a", layer), ("b", _layer(20, 10))]).keys() == {"b"}
    with pytest.raises(ValueError, match="--quant-mode"):
        _layer(2, 2, quant_mode="int4")


def test_non_finite_activations_are_not_hidden() -> None:
    """A NaN or inf must reach the trainer's non-finite guard."""
    layer = _layer(16, 4)
    for bad in (float("nan"), float("inf")):
        x = _random(2, 16)
        x[0, 3] = bad
        y = layer(x)
        assert not y[0].isfinite().any() and y[1].isfinite().all()


def test_statistics_measure_zeros_scale_and_churn() -> None:
    layer = _layer(256, 300)
    statistics = TernaryStatistics()
    weights = ternary_parameters([("layer", layer)])
    first = statistics.measure(weights)
    assert abs(first["bitlinear_zero_fraction"] - 0.31) < 0.02
    scale = ternarize(layer.weight)[1]
    assert first["bitlinear_scale_mean"] == pytest.approx(float(scale.mean()), rel=0.02)
    assert "bitlinear_code_churn" not in first
    assert statistics.measure(weights)["bitlinear_code_churn"] == 0.0
    saved = TernaryStatistics()
    saved.load_state_dict(statistics.state_dict())
    layer.weight.data.neg_()
    churn = statistics.measure(weights)["bitlinear_code_churn"]
    assert churn == pytest.approx(1.0 - first["bitlinear_zero_fraction"])
    assert saved.measure(weights)["bitlinear_code_churn"] == churn, "resume must not lose it"
    assert TernaryStatistics().measure({}) == {}
