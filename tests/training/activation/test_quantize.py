"""Codes of activations: unbiased, half a step off at most, exact where they can be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.activation.quantize import (
    Codes,
    as_integers,
    encode,
    encode_low_rank,
    find_basis,
    group_size,
    relative_error,
    uniform,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def values(size=261, seed=1):
    x = torch.randn(size, generator=generator(seed))
    x[:64] *= 100.0
    x[64] = 1e4  # one outlier in a later group
    return x


def per_number(by_group, codes: Codes):
    return by_group.float().repeat_interleave(group_size(codes.bits))[: codes.size]


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_thousand_roundings_average_to_the_value(bits):
    """Bias below 4.5 standard errors for each of 261 numbers, and 3 for their mean z."""
    x = values()
    decoded = torch.stack([encode(x, bits=bits, seed=draw).decode() for draw in range(1000)])
    error = decoded.double().mean(0) - x.double()
    z = error / (decoded.double().std(0) / math.sqrt(1000))
    assert z.abs().max() < 4.5
    assert abs(float(z.mean())) * math.sqrt(len(z)) < 3.0
    assert 0.8 < float(z.std()) < 1.2


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_the_error_is_uniform_in_half_a_step_whatever_the_number(bits):
    """Stochastic rounding's would be twice as large in the square, and depend on the number."""
    x = torch.randn(400 * 64, generator=generator(4))
    codes = encode(x, bits=bits, seed=1)
    steps = per_number(codes.step, codes)
    error = (codes.decode() - x) / steps
    assert error.abs().max() < 0.5 + 1e-4
    counts = torch.histc(error, bins=50, min=-0.5, max=0.5)
    assert float(((counts - 512) ** 2 / 512).sum()) < 100  # chi square, 49 degrees of freedom
    place = (x - per_number(codes.low, codes)) / steps
    for part in (place, (place % 1 - 0.5).abs()):  # where in the group, and how near to a code
        for moment in (error, error.square()):
            found = torch.corrcoef(torch.stack((part, moment)))[0, 1]
            assert abs(float(found)) < 4.5 / math.sqrt(x.numel())


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_zeros_below_all_others_stay_zeros(bits):
    """Those numbers are rounded stochastically: a code off at most, 1/6 of a step squared."""
    x = torch.rand(400, 64, generator=generator())
    x[:, 8::9] = 0.0
    codes = encode(x.view(-1), bits=bits, seed=0)
    error = (codes.decode() - x.view(-1)) / per_number(codes.step, codes).abs()
    assert (error[x.view(-1) == 0.0] == 0.0).all() and (codes.step < 0.0).all()
    assert error.abs().max() <= 1.001
    assert error[x.view(-1) > 0.0].square().mean() == pytest.approx(1 / 6, rel=0.05)
    noisy = encode((x + 0.01).view(-1), bits=bits, seed=0)
    assert (noisy.step > 0.0).all()


def test_a_code_is_read_with_the_dither_of_its_seed():
    x = torch.randn(1000, generator=generator())
    codes = encode(x, bits=4, seed=3)
    assert torch.equal(codes.decode(), codes.decode())
    assert torch.equal(codes.decode(), encode(x, bits=4, seed=3).decode())
    right, wrong = relative_error(codes, x), relative_error(codes._replace(seed=4), x)
    assert wrong > 1.5 * right


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_codes_take_as_many_bits_as_they_say(bits):
    codes = encode(values(), bits=bits, seed=0)
    width = group_size(bits)
    assert codes.num_bytes == -(-261 // width) * (width * bits / 8 + 4)
    assert relative_error(codes, values()) < 3.0 / 2**bits


def test_rounding_to_the_nearest_would_fail_the_test_of_a_thousand():
    x = values()
    codes = encode(x, bits=4, seed=2)
    low, steps = per_number(codes.low, codes), per_number(codes.step, codes)
    nearest = ((x - low) / steps).round() * steps + low
    spread = steps / math.sqrt(12 * 1000)
    assert ((nearest - x) / spread).abs().max() > 4.5


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_decoded_number_is_half_a_step_away_at_most(bits, dtype):
    x = values().clamp(-6e4, 6e4).to(dtype)
    codes = encode(x, bits=bits, seed=0)
    back = codes.decode()
    assert back.dtype == dtype and back.shape == x.shape
    rounding = x.float().abs() * torch.finfo(dtype).eps
    gap = (back.float() - x.float()).abs()
    assert (gap <= per_number(codes.step, codes) * 0.501 + rounding).all()


def test_blocks_of_a_large_tensor_draw_on():
    """Numbers are coded some 262,000 at a time; each has noise of its own all the same."""
    x = torch.full((2**18 + 200,), 0.5).uniform_(generator=generator())
    error = encode(x, bits=4, seed=0).decode() - x
    assert error[: 2**18].abs().max() < 0.05 and error[2**18 :].abs().max() < 0.05
    assert not torch.equal(error[:200], error[2**18 :])


def test_sizes_are_what_the_format_says():
    x = values(100 * 64)
    assert encode(x, bits=8, seed=0).num_bytes == x.numel() * 8.5 / 8
    assert encode(x, bits=4, seed=0).num_bytes == x.numel() * 5.0 / 8


def test_more_bits_make_a_smaller_error():
    x = torch.randn(400 * 64, generator=generator(4))
    error = {b: relative_error(encode(x, bits=b, seed=0), x) for b in (4, 5, 8)}
    assert 0.06 < error[4] < 0.1 and 0.0045 < error[8] < 0.0065
    assert 14 < error[5] / error[8] * 31 / 15 < 20  # 255 / 31 steps in groups of one length
    # A group of 32 normal numbers spans 4.14 deviations, one of 64 spans 4.75.
    assert error[4] / error[5] == pytest.approx(31 / 15 * 4.14 / 4.75, rel=0.03)


def test_equal_and_non_finite_groups():
    flat = torch.full((64,), -3.7)
    assert relative_error(encode(flat, bits=4, seed=0), flat) < 0.01
    assert (encode(torch.zeros(70), bits=4, seed=0).decode() == 0).all()
    bad = torch.randn(2 * 64, generator=generator())
    bad[3] = float("nan")
    back = encode(bad, bits=8, seed=0).decode()
    assert back[:64].isnan().any() and back[64:].isfinite().all()


def test_small_integers_are_kept_exactly_and_others_refused():
    codes = torch.randint(-127, 128, (500,), generator=generator()).float()
    assert torch.equal(as_integers(codes).decode(), codes)
    assert as_integers(codes).num_bytes == 500
    halves = (codes / 128).bfloat16()
    assert torch.equal(as_integers(halves).decode(), halves)
    for wrong in (codes + 0.5, codes * 3, torch.full((4,), float("nan"))):
        assert as_integers(wrong) is None


def test_a_low_rank_part_makes_the_rest_small_and_stays_unbiased():
    draws = generator(5)
    basis = torch.linalg.qr(torch.randn(96, 8, generator=draws)).Q
    x = torch.randn(600, 8, generator=draws) @ basis.T * 5 + 0.1 * torch.randn(
        600, 96, generator=draws
    )
    found = find_basis(x, rank=8, seed=5)
    torch.testing.assert_close(found.T @ found, torch.eye(8), atol=1e-5, rtol=0)
    assert (x - x @ found @ found.T).norm() < 0.2 * x.norm()
    packed = encode_low_rank(x.view(-1), basis=found, bits=4, seed=6)
    plain = encode(x.view(-1), bits=4, seed=6)
    assert relative_error(packed, x.view(-1)) < 0.2 * relative_error(plain, x.view(-1))
    mean = sum(
        encode_low_rank(x.view(-1), basis=found, bits=4, seed=seed).decode() for seed in range(200)
    )
    error = (mean / 200 - x.view(-1)).norm() / (packed.decode() - x.view(-1)).norm()
    assert error < 1.3 / math.sqrt(200)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(size=st.integers(1, 1000))
def test_uniform_numbers_are_in_the_unit_interval(size):
    u = uniform(torch.Size((size,)), generator=generator(size))
    assert u.shape == (size,) and (u >= 0).all() and (u < 1).all()


def test_uniform_numbers_are_uniform():
    u = uniform(torch.Size((100_000,)), generator=generator())
    counts = torch.histc(u, bins=50, min=0, max=1)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 100  # 49 degrees of freedom: 5 standard deviations
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5
