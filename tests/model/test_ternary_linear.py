"""The int8 kernels against their plain definitions, under Triton's interpreter."""

import pytest
import torch

from model import reference_ops
from model.bitlinear import bit_linear

pytest.importorskip("triton")

from model.ternary_linear import (
    int8_product,
    quantize_rows,
    ternarize_rows,
    ternary_linear,
    weight_gradient,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on a CPU: Triton's interpreter
SHAPES = [(1, 1, 1), (1, 64, 63), (63, 100, 64), (100, 63, 500), (500, 17, 100)]  # M, N, K


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Every torch.empty holds values that would show if a kernel left an element unwritten."""
    empty = torch.empty

    def poisoned(*size, **options):
        made = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned)


def random(*shape, seed, dtype=torch.float32):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device=DEVICE, dtype=dtype)


@pytest.mark.parametrize(("rows", "_outputs", "columns"), [*SHAPES, (3, 1, 5000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_rounded_as_defined(rows, _outputs, columns, dtype):
    x = random(rows, columns, seed=rows, dtype=dtype)
    codes, scale = quantize_rows(x)
    expected, expected_scale = reference_ops.round_rows(x.float())
    assert torch.equal(codes.float(), expected)
    assert torch.equal(scale, expected_scale)


def test_row_of_zeros_stays_zero_and_ties_go_to_even():
    x = torch.tensor([[0.0, 0.0, 0.0], [127.0, 0.5, 1.5], [-127.0, 2.5, -3.5]], device=DEVICE)
    codes, scale = quantize_rows(x)
    assert codes.tolist() == [[0, 0, 0], [127, 0, 2], [-127, 2, -4]]
    assert torch.isfinite(scale).all()


def test_column_scales_enter_before_rounding():
    x, columns = random(63, 100, seed=1), random(100, seed=2).abs()
    codes, scale = quantize_rows(x, columns)
    expected, expected_scale = reference_ops.round_rows(x * columns)
    assert torch.equal(codes.float(), expected) and torch.equal(scale, expected_scale)


@pytest.mark.parametrize(("_rows", "outputs", "inputs"), SHAPES)
def test_weights_become_the_ternary_codes_of_the_definition(_rows, outputs, inputs):
    weight = random(outputs, inputs, seed=inputs)
    ternary = ternarize_rows(weight)
    codes, scale = reference_ops.ternarize(weight)
    # The mean is summed in another order, so a weight on the threshold itself may fall either way.
    gamma = weight.abs().mean(1, keepdim=True)
    doubtful = ((weight.abs() / gamma) - 0.5).abs() < 1e-5
    assert torch.equal(ternary.codes.float()[~doubtful], codes[~doubtful])
    assert torch.equal(ternary.codes_t, ternary.codes.T)
    if not doubtful.any():
        torch.testing.assert_close(ternary.scale, scale[:, 0], rtol=1e-6, atol=0.0)


def test_weights_of_zero_get_scale_zero():
    weight = random(4, 40, seed=3)
    weight[1] = 0.0
    ternary = ternarize_rows(weight)
    assert ternary.scale[1] == 0.0 and not ternary.codes[1].any()


@pytest.mark.parametrize(("rows", "outputs", "depth"), SHAPES)
def test_int8_product_is_exact(rows, outputs, depth):
    generator = torch.Generator().manual_seed(depth)
    a = torch.randint(-127, 128, (rows, depth), dtype=torch.int8, generator=generator)
    b = torch.randint(-1, 2, (outputs, depth), dtype=torch.int8, generator=generator)
    exact = (a.long() @ b.long().T).float().to(DEVICE)
    a, b, ones = a.to(DEVICE), b.to(DEVICE), torch.ones(max(rows, outputs), device=DEVICE)
    product = int8_product(a, b, a_scale=ones[:rows], b_scale=ones[:outputs], dtype=torch.float32)
    assert torch.equal(product, exact)
    a_scale, b_scale = random(rows, seed=4), random(outputs, seed=5)
    scaled = int8_product(a, b, a_scale=a_scale, b_scale=b_scale, dtype=torch.float32)
    torch.testing.assert_close(scaled, product * a_scale[:, None] * b_scale, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("processors", [1, 108])
@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
def test_weight_gradient_equals_the_sum_whatever_the_split(rows, outputs, inputs, processors):
    grad, scale = random(rows, outputs, seed=6), random(rows, seed=7)
    codes = quantize_rows(random(rows, inputs, seed=8))[0]
    found = weight_gradient(grad, codes, scale, in_bf16=False, processors=processors)
    expected = (grad.double() * scale.double()[:, None]).T @ codes.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("rows", "outputs", "inputs"), SHAPES)
def test_layer_equals_the_definition_on_values_and_gradients(rows, outputs, inputs):
    x = random(rows, inputs, seed=9).requires_grad_()
    weight = random(outputs, inputs, seed=10).requires_grad_()
    grad = random(rows, outputs, seed=11)
    y = ternary_linear(x, weight, dtype=torch.float32)
    torch.testing.assert_close(y, bit_linear(x, weight).detach(), rtol=1e-6, atol=1e-6)
    y.backward(grad)
    grad_x, grad_weight = reference_ops.ternary_linear_backward(grad, x.detach(), weight.detach())
    torch.testing.assert_close(x.grad, grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, grad_weight, rtol=1e-5, atol=1e-3)


def test_rounded_input_gradient_is_close_to_the_exact_one():
    x, weight = random(100, 64, seed=12).requires_grad_(), random(80, 64, seed=13)
    grad = random(100, 80, seed=14)
    ternary_linear(x, weight, dtype=torch.float32).backward(grad)
    exact = x.detach().clone().requires_grad_()
    bit_linear(exact, weight).backward(grad)
    cosine = torch.nn.functional.cosine_similarity(x.grad.flatten(), exact.grad.flatten(), dim=0)
    assert cosine > 0.9999
    assert not torch.equal(x.grad, exact.grad)  # or nothing was rounded


def test_strided_inputs_and_leading_dimensions():
    x = random(3, 7, 2 * 40, seed=15)[:, :, ::2]
    weight = random(40, 2 * 33, seed=16)[:, ::2].T
    y = ternary_linear(x, weight, dtype=torch.float32)
    assert y.shape == (3, 7, 33)
    expected = bit_linear(x.contiguous(), weight.contiguous())
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)


def test_expanded_gradient_is_taken():
    """sum() hands backward a gradient of stride 0."""
    x, weight = random(5, 40, seed=17).requires_grad_(), random(33, 40, seed=18).requires_grad_()
    ternary_linear(x, weight, dtype=torch.float32).sum().backward()
    expected = reference_ops.ternary_linear_backward(
        torch.ones(5, 33, device=DEVICE), x.detach(), weight.detach()
    )
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, expected[1], rtol=1e-5, atol=1e-4)


def test_no_tokens():
    y = ternary_linear(
        torch.zeros(2, 0, 8, device=DEVICE), random(4, 8, seed=19), dtype=torch.float32
    )
    assert y.shape == (2, 0, 4)


def test_whole_model_trains_as_with_torch():
    """Loss of one step, and the direction of every gradient, with only input gradients rounded."""
    from tests.model.test_weight_cache import loss_of, small_model

    plain, fast = small_model(), small_model()
    fast.use_kernels("triton")
    loss, expected = loss_of(fast, 1), loss_of(plain, 1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, found), wanted in zip(fast.named_parameters(), plain.parameters()):
        cosine = torch.nn.functional.cosine_similarity(
            found.grad.flatten(), wanted.grad.flatten(), dim=0
        )
        assert cosine > 0.995, name
    assert any(
        not torch.equal(found.grad, wanted.grad)
        for found, wanted in zip(fast.parameters(), plain.parameters())
    )


@pytest.mark.gpu
def test_on_a_device_in_bf16():
    x, weight = random(2048, 768, seed=20), random(1024, 768, seed=21)
    grad = random(2048, 1024, seed=22)
    leaves = x.bfloat16().requires_grad_(), weight.clone().requires_grad_()
    y = ternary_linear(*leaves, dtype=torch.bfloat16)
    y.backward(grad.bfloat16())
    expected = (bit_linear(x, weight), *reference_ops.ternary_linear_backward(grad, x, weight))
    for found, wanted in zip((y.detach(), leaves[0].grad, leaves[1].grad), expected):
        assert (found - wanted).norm() < 0.03 * wanted.norm()
