"""Products in bytes against the fp32 products that define them: equal to the bit."""

import pytest
import torch

from model import byte_product
from model.bitlinear import BitLinear, fused_linear
from model.byte_product import code_dtype, code_product
from model.dispatch import DispatchPlan
from model.swiglu import SwigluSettings, swiglu
from model.weight_cache import TernaryCache

needs_bytes = pytest.mark.skipif(
    not byte_product.multiplies_bytes(), reason="this CPU multiplies no bytes"
)


@pytest.fixture
def both(monkeypatch):
    """Runs a function with and without byte products; its results must be the same tensors."""

    def run(function) -> None:
        results = []
        for answer in (True, False):
            monkeypatch.setattr(byte_product, "multiplies_bytes", lambda answer=answer: answer)
            results.append(function())
        for ours, defined in zip(*results, strict=True):
            assert ours.dtype == defined.dtype and torch.equal(ours, defined)

    return run


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [1, 63, 100, 500])
@pytest.mark.parametrize("widths", [(1, 1), (63, 5), (192, 832)])
def test_linear_layers_and_their_gradients(both, rows, widths):
    layer = BitLinear(*widths, generator=torch.Generator().manual_seed(1))
    x = random(2, rows, widths[0])

    def passes():
        leaf = x.clone().requires_grad_()
        layer.weight.grad = None
        y = layer(leaf)
        y.backward(random(*y.shape, seed=2))
        return y.detach(), leaf.grad, layer.weight.grad

    both(passes)


def test_fused_layers_rows_that_are_not_contiguous_and_kept_codes(both):
    layers = [BitLinear(96, size, generator=torch.Generator().manual_seed(size)) for size in (7, 9)]
    x = random(96, 40).T.unsqueeze(0).expand(3, -1, -1)

    def forward():
        cache = TernaryCache()
        with torch.no_grad(), cache.held():
            twice = [*fused_linear(x, layers), *fused_linear(x, layers), layers[0](x), layers[0](x)]
        assert cache.hits > 0
        return twice

    both(forward)


@pytest.mark.parametrize("routed", [False, True])
def test_experts_and_their_gradients(both, routed):
    settings = SwigluSettings()
    x = random(100, 48)
    weights = (random(4, 64, 48, seed=1), random(4, 48, 32, seed=2))
    # Expert 3 gets no token.
    chosen = torch.arange(100).remainder(3).unsqueeze(1).add(torch.tensor([0, 1])).remainder(3)
    gates = torch.rand(100, 2, generator=torch.Generator().manual_seed(3))

    def passes():
        leaves = [value.clone().requires_grad_() for value in (x, *weights, gates)]
        if routed:
            plan = DispatchPlan.create(chosen, 4)
            y = swiglu(*leaves[:3], settings=settings, plan=plan, gates=leaves[3])
        else:
            y = swiglu(leaves[0], leaves[1][0], leaves[2][0], settings=settings)
        y.backward(random(*y.shape, seed=4))
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    both(passes)


@needs_bytes
def test_a_cpu_with_byte_products_uses_them():
    codes = torch.ones(2, 3)
    assert code_dtype(codes) == torch.int8
    assert code_product(codes, torch.ones(4, 3), torch.ones(4, 3)).dtype == torch.int32


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (2, 3, 24)])
def test_single_tokens_and_none(both, shape):
    layer = BitLinear(24, 5, generator=torch.Generator().manual_seed(1))
    both(lambda: [layer(random(*shape)).detach()])


def test_other_types_and_stacks_keep_their_product():
    for dtype in (torch.float64, torch.bfloat16):
        assert code_dtype(torch.ones(2, dtype=dtype)) == dtype
    assert code_product(torch.ones(5, 2, 3), torch.ones(5, 4, 3), torch.ones(1)).shape == (5, 2, 4)
    assert code_product(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1))[0, 0] == 3


def test_extreme_codes_do_not_overflow(both):
    """The largest sum of the widest layer that keeps below 2^24."""
    width = 2**24 // 127 - 1

    def product():
        layer_codes = torch.ones(1, width)
        return [code_product(torch.full((1, width), 127.0), layer_codes, layer_codes).double()]

    both(product)
