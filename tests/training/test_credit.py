"""Credit on functions whose credits are known, and the rules of the factors made of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.credit import (
    BlockLayout,
    CreditSettings,
    UpdateTrial,
    block_scales,
    inner_products,
    leave_one_block_out,
    masked_credit,
    mean_one,
    observe_credit,
    scale_free,
)

CPU = torch.device("cpu")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_blocks_are_slices_of_one_tensor_each():
    tensors = [drawn(3, 5), drawn(4), drawn(2, 2, 2)]
    layout = BlockLayout(tensors, block_size=6)
    assert layout.sizes.tolist() == [6, 6, 3, 4, 6, 2]
    expected = [piece.sum() for t in tensors for piece in t.flatten().split(6)]
    torch.testing.assert_close(layout.sums(tensors), torch.stack(expected))
    norms = [piece.norm() for t in tensors for piece in t.flatten().split(6)]
    torch.testing.assert_close(layout.norms(tensors), torch.stack(norms))


def test_scaling_multiplies_every_block_by_its_own_factor():
    tensors = [drawn(3, 5), drawn(4)]
    layout = BlockLayout(tensors, block_size=6)
    factors = torch.tensor([2.0, 3.0, 4.0, 5.0])
    expected = [
        torch.cat([p * f for p, f in zip(t.flatten().split(6), own)]).view_as(t)
        for t, own in zip(tensors, factors.split([3, 1]))
    ]
    layout.scale_(tensors, factors)
    for found, wanted in zip(tensors, expected):
        assert torch.equal(found, wanted)


def test_inner_products_of_a_transposed_tensor_follow_its_rows():
    left, right = drawn(4, 3).T, drawn(3, 4, seed=1)
    layout = BlockLayout([left], block_size=5)
    products = (left * right).flatten().split(5)
    expected = torch.stack([p.sum() for p in products])
    torch.testing.assert_close(inner_products(layout, [left], [right]), expected)


def linear_trial(*, num_blocks=12, block=4):
    """L = <g, p>: the credit of a block is <g_b, -step_b>, and blocks do not interact."""
    gradient, step = drawn(num_blocks * block, seed=3), drawn(num_blocks * block, seed=4)
    param = torch.nn.Parameter(drawn(num_blocks * block, seed=5))
    layout = BlockLayout([param], block_size=block)
    trial = UpdateTrial(
        [param], [step], layout=layout, evaluate=lambda: (gradient * param.detach()).sum()
    )
    return trial, param, inner_products(layout, [gradient], [step])


def test_exact_credit_is_that_of_a_linear_loss_and_parameters_return():
    trial, param, known = linear_trial()
    before = param.detach().clone()
    found = leave_one_block_out(trial, num_blocks=12, device=CPU)
    torch.testing.assert_close(found, known, atol=1e-4, rtol=1e-4)
    assert torch.equal(param, before)


def test_parameters_return_when_the_measurement_fails():
    _, param, _ = linear_trial()

    def fail():
        raise RuntimeError("out of memory")

    layout = BlockLayout([param], block_size=4)
    before = param.detach().clone()
    trial = UpdateTrial([param], [drawn(48)], layout=layout, evaluate=fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        trial.loss(torch.zeros(12))
    assert torch.equal(param, before)


def test_masked_credit_is_unbiased_and_its_errors_are_as_stated():
    """Over repeated estimates the mean stays within 5 standard errors, and their spread is the
    stated one within 15 %."""
    trial, _, known = linear_trial()
    generator = torch.Generator().manual_seed(0)
    runs = [
        masked_credit(trial.loss, num_blocks=12, draws=60, generator=generator, device=CPU)
        for _ in range(150)
    ]
    estimates = torch.stack([estimate for estimate, _ in runs])
    stated = torch.stack([error for _, error in runs]).square().mean(0).sqrt()
    spread = estimates.std(0)
    assert ((estimates.mean(0) - known).abs() < 5 * spread / 150**0.5).all()
    assert 0.85 < float((stated / spread).mean()) < 1.15


def test_masked_credit_needs_two_draws():
    with pytest.raises(ValueError, match="--c3o-credit-draws"):
        masked_credit(
            lambda row: row.sum(),
            num_blocks=2, draws=1, generator=torch.Generator(), device=CPU,
        )  # fmt: skip


def test_scale_free_credit_is_a_cosine_and_zero_without_a_step():
    credit, grads, steps = torch.tensor([2.0, -3.0, 0.0]), torch.ones(3), torch.tensor([4.0, 3, 0])
    assert scale_free(credit, grads, steps).tolist() == [0.5, -1.0, 0.0]


def test_unseen_and_non_finite_observations_change_nothing():
    mean, count = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])
    credit, seen = torch.tensor([2.0, 2.0, float("nan")]), torch.tensor([True, False, True])
    moved, counted = observe_credit(mean, count, credit, seen, beta=0.5)
    assert moved.tolist() == [1.5, 1.0, 1.0] and counted.tolist() == [3.0, 2.0, 2.0]


def test_scales_follow_the_bias_corrected_credit():
    """z of two equal groups is +-1, so the factors are exp(+-gain), made mean one."""
    own = CreditSettings(ema=0.9)
    mean = torch.tensor([0.1, 0.1, 0.3 * 0.19, 0.3 * 0.19])  # after 1 and 2 observations
    count = torch.tensor([1.0, 1.0, 2.0, 2.0])
    scales, active = block_scales(mean, count, torch.ones(4), settings=own)
    high, low = torch.exp(torch.tensor([own.gain, -own.gain]))
    expected = torch.stack([high, high, low, low]) * 2 / (high + low)
    torch.testing.assert_close(scales, expected, atol=1e-5, rtol=0)
    assert bool(active)


def test_small_spread_and_unobserved_blocks_mean_no_factor():
    own = CreditSettings(skip_threshold=0.01)
    flat = torch.tensor([0.5, 0.509, 0.5, 0.505]) * (1 - own.ema)
    scales, active = block_scales(flat, torch.ones(4), torch.ones(4), settings=own)
    assert torch.equal(scales, torch.ones(4)) and not bool(active)
    scales, active = block_scales(torch.zeros(4), torch.zeros(4), torch.ones(4), settings=own)
    assert torch.equal(scales, torch.ones(4)) and not bool(active)


def test_the_placebo_hands_out_the_same_factors_to_other_blocks():
    mean, ones = drawn(50) * 0.01, torch.ones(50)
    permutation = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    real, _ = block_scales(mean, ones, ones, settings=CreditSettings())
    placebo, _ = block_scales(mean, ones, ones, settings=CreditSettings(), permutation=permutation)
    torch.testing.assert_close(placebo, real[permutation])
    assert not torch.allclose(placebo, real)


@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(
        st.tuples(st.floats(-8, 8, width=32), st.integers(1, 10**6)), min_size=1, max_size=60
    )
)
def test_the_mean_over_elements_is_one_within_the_bounds(data):
    scales = torch.tensor([value for value, _ in data]).exp()
    sizes = torch.tensor([float(size) for _, size in data])
    found = mean_one(scales, sizes, least=0.6, most=1.8)
    mean = float((found.double() * sizes.double()).sum() / sizes.double().sum())
    assert abs(mean - 1.0) < 1e-3
    assert float(found.min()) >= 0.6 - 1e-6 and float(found.max()) <= 1.8 + 1e-6
    order = scales.argsort()
    assert (found[order].diff() >= -1e-6).all()
