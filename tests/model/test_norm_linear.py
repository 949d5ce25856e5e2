"""RMSNorm fused with the rounding of a ternary layer, against the norm and the layer apart."""

import pytest
import torch

from model import reference_ops
from model.bitlinear import BitLinear
from model.norm_rope import RMSNorm
from tests.model.kernel_inputs import DEVICE, poisoned_empty, random

pytest.importorskip("triton")

from model.norm_linear import norm_gradient, norm_quantize, norm_ternary_linear

SHAPES = [(1, 1, 1), (1, 63, 17), (63, 100, 64), (100, 500, 9), (500, 63, 20)]  # M, K, N
EPS = 1e-6


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    with poisoned_empty(monkeypatch):
        yield


def evaluate(x, gain, weight, grad):
    leaves = [value.detach().requires_grad_() for value in (x, gain, weight)]
    y = norm_ternary_linear(*leaves, eps=EPS, dtype=torch.float32)
    y.backward(grad)
    return {"y": y.detach()} | dict(zip(("x", "gain", "weight"), (leaf.grad for leaf in leaves)))


def defined(x, gain, weight, grad):
    """Norm by autograd, product by its definition with rounded gradients."""
    x, gain = x.detach().requires_grad_(), gain.detach().requires_grad_()
    n = reference_ops.rms_norm(x, gain, eps=EPS)
    grad_n, grad_weight = reference_ops.ternary_linear_backward(grad, n.detach(), weight)
    n.backward(grad_n)
    y = reference_ops.norm_bit_linear(x.detach(), gain.detach(), weight, eps=EPS)
    return {"y": y, "x": x.grad, "gain": gain.grad, "weight": grad_weight}


def assert_close(found, expected):
    """Equal but for codes on the edge between two steps, which fp32's last bit may move by one."""
    for name, value in expected.items():
        error = (found[name] - value).abs() / value.abs().max().clamp_min(1e-2)
        assert error.max() < 2e-2 and error.mean() < 2e-5, (name, error.max(), error.mean())


@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_layer_equals_the_definition_on_values_and_gradients(rows, inputs, outputs):
    x, gain = random(rows, inputs, seed=1), random(inputs, seed=2)
    weight, grad = random(outputs, inputs, seed=3), random(rows, outputs, seed=4)
    assert_close(evaluate(x, gain, weight, grad), defined(x, gain, weight, grad))


@pytest.mark.parametrize("width", [1, 63, 100, 500, 5000])
@pytest.mark.parametrize("with_gain", [True, False])
def test_norm_and_its_gradient_row_by_row(width, with_gain):
    x, grad = random(70, width, seed=5), random(70, width, seed=6)
    gain = random(width, seed=7).requires_grad_() if with_gain else None
    codes, step, rate = norm_quantize(x, None if gain is None else gain.detach(), eps=EPS)
    leaf = x.clone().requires_grad_()
    n = reference_ops.rms_norm(leaf, gain, eps=EPS)
    expected, expected_step = reference_ops.round_rows(n.detach())
    assert (codes.float() - expected).abs().max() <= 1  # on the edge between two codes
    assert (codes.float() != expected).float().mean() < 1e-3
    torch.testing.assert_close(step, expected_step, rtol=1e-5, atol=0.0)
    n.backward(grad)
    found, found_gain = norm_gradient(grad, x, None if gain is None else gain.detach(), rate)
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5)
    if gain is None:
        assert found_gain is None
    else:
        torch.testing.assert_close(found_gain, gain.grad, rtol=1e-4, atol=1e-4)


def test_a_gain_of_zero_can_still_learn():
    x, gain = random(30, 20, seed=8), random(20, seed=9)
    gain[3] = 0.0
    weight, grad = random(10, 20, seed=10), random(30, 10, seed=11)
    found = evaluate(x, gain, weight, grad)
    assert found["gain"][3] != 0.0
    assert_close(found, defined(x, gain, weight, grad))


def test_a_row_of_zeros_stays_finite():
    x, gain = random(5, 20, seed=12), random(20, seed=13)
    x[2] = 0.0
    found = evaluate(x, gain, random(7, 20, seed=14), random(5, 7, seed=15))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not found["y"][2].any()


def test_strided_inputs_and_gradients():
    x, gain = random(9, 40, seed=16), random(20, seed=17)
    weight, grad = random(11, 20, seed=18), random(9, 22, seed=19)
    found = evaluate(x[:, ::2], gain, weight, grad[:, ::2])
    assert_close(found, defined(x[:, ::2], gain, weight, grad[:, ::2]))
    rows = evaluate(x[:, :20], gain, weight, grad[:, :11])
    assert_close(rows, defined(x[:, :20], gain, weight, grad[:, :11]))


def test_no_rows():
    y = norm_ternary_linear(
        random(2, 0, 8, seed=20), None, random(4, 8, seed=21), eps=EPS, dtype=torch.float32
    )
    assert y.shape == (2, 0, 4)


@pytest.mark.parametrize("learnable", [True, False])
def test_module_is_the_same_function_on_every_backend(learnable):
    norm, layer = RMSNorm(48, learnable=learnable).to(DEVICE), BitLinear(48, 24).to(DEVICE)
    x = random(2, 5, 48, seed=22)
    expected = layer(norm(x))
    assert torch.equal(layer.after_norm(x, norm), expected)
    layer.backend = "triton"
    found = layer.after_norm(x, norm)
    assert_close({"y": found.detach()}, {"y": expected.detach()})
    layer.group_size = 16  # scales inside the product are not the kernels'
    assert torch.equal(layer.after_norm(x, norm), layer(norm(x)))


def test_normalised_values_are_not_kept_for_backward():
    saved = []
    x, weight = random(6, 32, seed=23).requires_grad_(), random(8, 32, seed=24).requires_grad_()
    gain = torch.ones(32, device=DEVICE).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        norm_ternary_linear(x, gain, weight, eps=EPS, dtype=torch.float32)
    wide = [t for t in saved if t.shape == x.shape and t.is_floating_point()]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]
    assert sum(t.dtype == torch.int8 and t.shape == x.shape for t in saved) == 1


@pytest.mark.gpu
def test_on_a_device_in_bf16():
    x, gain = random(2048, 768, seed=25), random(768, seed=26)
    weight, grad = random(768, 768, seed=27), random(2048, 768, seed=28)
    expected = defined(x, gain, weight, grad)
    x16 = x.bfloat16().requires_grad_()
    leaves = gain.clone().requires_grad_(), weight.clone().requires_grad_()
    y = norm_ternary_linear(x16, *leaves, eps=EPS, dtype=torch.bfloat16)
    y.backward(grad.bfloat16())
    found = {"y": y.detach(), "x": x16.grad, "gain": leaves[0].grad, "weight": leaves[1].grad}
    for name, value in expected.items():
        assert (found[name] - value).norm() < 0.03 * value.norm(), name
