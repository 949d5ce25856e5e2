"""Stochastic rounding keeps the mean, holds what bf16 holds, and repeats itself by key."""

import torch

from training.optim.rounding import keyed_generator, round_stochastically


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_mean_over_many_roundings_is_the_value():
    values = torch.randn(200, generator=generator())
    trials = 4000
    roundings = round_stochastically(values.expand(trials, -1).contiguous(), generator=generator(1))
    spacing = values.abs() * 2**-7  # at least the distance of the two neighbours
    errors = (roundings.float().mean(0) - values) / spacing
    # A rounding has a standard deviation of at most half a spacing; 5 of the mean's.
    assert errors.abs().max() < 5 * 0.5 / trials**0.5


def test_only_the_two_neighbours_occur():
    value = torch.full((1000,), 1.0 + 2**-9)
    rounded = round_stochastically(value, generator=generator(2)).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert round_stochastically(-value, generator=generator(2)).float().equal(-rounded)


def test_what_bf16_holds_stays():
    held = torch.randn(500, generator=generator(3)).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    values = torch.cat([held, special])
    assert round_stochastically(values, generator=generator(4)).float().equal(values)
    nan = round_stochastically(torch.full((9,), float("nan")), generator=generator(5))
    assert nan.isnan().all()


def test_the_stream_depends_on_every_part_of_the_key():
    def draw(*key):
        return torch.randint(2**30, (4,), generator=keyed_generator(torch.device("cpu"), *key))

    assert draw(1, 2, 3).equal(draw(1, 2, 3))
    others = [(0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 2, 4)]
    assert not any(draw(1, 2, 3).equal(draw(*key)) for key in others)
