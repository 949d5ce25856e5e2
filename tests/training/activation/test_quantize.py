"""Codes of activations: unbiased, inside their group's range, exact where they can be."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.activation.quantize import (
    GROUP,
    Codes,
    as_integers,
    encode,
    encode_low_rank,
    find_basis,
    relative_error,
    uniform,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def values(size=4 * GROUP + 5, seed=1):
    x = torch.randn(size, generator=generator(seed))
    x[:GROUP] *= 100.0
    x[GROUP] = 1e4  # one outlier in the second group
    return x


def steps_of(codes: Codes):
    return codes.step.float().repeat_interleave(GROUP)[: codes.size]


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_thousand_roundings_average_to_the_value(bits):
    """Bias below 4.5 standard errors for each of 261 numbers, and 3 for their mean z."""
    x, draws = values(), generator(2)
    decoded = torch.stack([encode(x, bits=bits, generator=draws).decode() for _ in range(1000)])
    error = decoded.double().mean(0) - x.double()
    spread = decoded.double().std(0) / math.sqrt(1000)
    # Numbers on a code have no spread: they must be right up to fp32.
    still = spread < 1e-6 * x.abs().clamp_min(1.0)
    z = error / spread.clamp_min(1e-12)
    assert still.float().mean() < 0.1
    assert z[~still].abs().max() < 4.5
    assert abs(float(z[~still].mean())) * math.sqrt(float((~still).sum())) < 3.0
    assert 0.8 < float(z[~still].std()) < 1.2


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_codes_take_as_many_bits_as_they_say(bits):
    codes = encode(values(), bits=bits, generator=generator())
    groups = codes.low.numel()
    assert codes.num_bytes == groups * (GROUP * bits / 8 + 4)
    assert relative_error(codes, values()) < 3.0 / 2**bits


def test_rounding_to_the_nearest_would_fail_that_test():
    x = values()
    codes = encode(x, bits=4, generator=generator(2))
    low = codes.low.float().repeat_interleave(GROUP)[: codes.size]
    nearest = ((x - low) / steps_of(codes)).round() * steps_of(codes) + low
    spread = steps_of(codes) / math.sqrt(4 * 1000)  # the largest that a rounding can have
    assert ((nearest - x) / spread).abs().max() > 4.5


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_decoded_number_is_a_step_away_at_most_and_inside_its_group(bits, dtype):
    x = values().clamp(-6e4, 6e4).to(dtype)
    codes = encode(x, bits=bits, generator=generator())
    back = codes.decode()
    assert back.dtype == dtype and back.shape == x.shape
    rounding = x.float().abs() * torch.finfo(dtype).eps
    assert ((back.float() - x.float()).abs() <= steps_of(codes) * 1.001 + rounding).all()
    padded = torch.cat((x, x[-1:].expand(-x.numel() % GROUP))).view(-1, GROUP).float()
    low, high = (
        bound.repeat_interleave(GROUP)[: x.numel()] for bound in torch.aminmax(padded, dim=1)
    )
    slack = 0.01 * (high - low) + 0.005 * low.abs()
    assert (back.float() >= low - slack).all() and (
        back.float() <= high + slack + steps_of(codes)
    ).all()


def test_positive_numbers_stay_positive():
    x = torch.rand(64 * GROUP, generator=generator(3)).pow(8) + 1e-6
    back = encode(x, bits=4, generator=generator()).decode()
    assert (back > 0).all()


def test_sizes_are_what_the_format_says():
    x = values(100 * GROUP)
    assert encode(x, bits=8, generator=generator()).num_bytes == x.numel() * 8.5 / 8
    assert encode(x, bits=4, generator=generator()).num_bytes == x.numel() * 4.5 / 8


def test_more_bits_make_a_smaller_error():
    x = torch.randn(400 * GROUP, generator=generator(4))
    error = {b: relative_error(encode(x, bits=b, generator=generator()), x) for b in (4, 8)}
    assert 0.1 < error[4] < 0.16 and 0.005 < error[8] < 0.01
    assert 14 < error[4] / error[8] < 20  # 255 / 15 = 17


def test_equal_and_non_finite_groups():
    flat = torch.full((GROUP,), -3.7)
    assert relative_error(encode(flat, bits=4, generator=generator()), flat) < 0.01
    assert (encode(torch.zeros(70), bits=4, generator=generator()).decode() == 0).all()
    bad = torch.randn(2 * GROUP, generator=generator())
    bad[3] = float("nan")
    back = encode(bad, bits=8, generator=generator()).decode()
    assert back[:GROUP].isnan().any() and back[GROUP:].isfinite().all()


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
    found = find_basis(x, rank=8, generator=draws)
    torch.testing.assert_close(found.T @ found, torch.eye(8), atol=1e-5, rtol=0)
    assert (x - x @ found @ found.T).norm() < 0.2 * x.norm()
    packed = encode_low_rank(x.view(-1), basis=found, bits=4, generator=draws)
    plain = encode(x.view(-1), bits=4, generator=draws)
    assert relative_error(packed, x.view(-1)) < 0.2 * relative_error(plain, x.view(-1))
    mean = sum(
        encode_low_rank(x.view(-1), basis=found, bits=4, generator=draws).decode()
        for _ in range(200)
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
