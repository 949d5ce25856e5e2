"""Merges against a plain numpy definition, written entry by entry; signs, drops, ranks, weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.hydra.merge import (
    MergeSettings,
    domain_weights,
    drop_and_rescale,
    factorise,
    merge_products,
    trim,
)

GENERATOR = torch.Generator()


def plain_ties(matrices, weights, density):
    """TIES of 2306.01708, section 4, one entry after the other."""
    trimmed = []
    for matrix in matrices:
        flat = [(-abs(value), place) for place, value in enumerate(matrix.ravel())]
        kept = {place for _, place in sorted(flat)[: max(1, math.ceil(density * matrix.size))]}
        values = [v if place in kept else 0.0 for place, v in enumerate(matrix.ravel())]
        trimmed.append(np.array(values).reshape(matrix.shape))
    result = np.zeros(matrices[0].shape)
    conflicts = kept_anywhere = 0
    for place in np.ndindex(result.shape):
        values = [float(matrix[place]) for matrix in trimmed]
        mass = sum(w * v for w, v in zip(weights, values))
        sign = 1.0 if mass >= 0.0 else -1.0
        agreeing = [(w, v) for w, v in zip(weights, values) if v * sign > 0.0]
        if agreeing:
            result[place] = sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing)
        conflicts += any(v > 0.0 for v in values) and any(v < 0.0 for v in values)
        kept_anywhere += any(v != 0.0 for v in values)
    return result, conflicts / kept_anywhere


def merged(matrices, weights, **settings):
    domains = [{"a": torch.from_numpy(matrix)} for matrix in matrices]
    return merge_products(domains, weights, MergeSettings(**settings), generator=GENERATOR)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_ties_is_the_plain_definition(density, count):
    rng = np.random.default_rng(7)
    matrices = [rng.standard_normal((7, 5)) for _ in range(count)]
    weights = [0.2, 0.7, 0.05][:count]
    expected, conflicts = plain_ties(matrices, weights, density)
    found = merged(matrices, weights, density=density)
    np.testing.assert_allclose(found.products["a"].numpy(), expected, rtol=0, atol=1e-14)
    assert found.conflicts == conflicts


def test_on_a_constructed_conflict_it_is_not_the_weighted_mean():
    """Two domains say +1 and +3, a third -9: by mass the sign is -, and only -9 is left."""
    matrices = [np.array([[1.0, 2.0]]), np.array([[3.0, 4.0]]), np.array([[-9.0, 6.0]])]
    found = merged(matrices, [1 / 3] * 3)
    np.testing.assert_allclose(found.products["a"].numpy(), [[-9.0, 4.0]], rtol=1e-15)
    mean = np.mean(matrices, axis=0)
    assert abs(found.products["a"].numpy()[0, 0] - mean[0, 0]) > 7.0
    assert found.conflicts == 0.5
    weighted = merged(matrices, [0.80, 0.80, 0.05])  # now + has the mass
    np.testing.assert_allclose(weighted.products["a"].numpy()[0, 0], 2.0, rtol=1e-15)


def test_a_trimmed_entry_is_no_vote_for_zero():
    matrices = [np.array([[8.0, 0.1]]), np.array([[0.1, 6.0]])]
    found = merged(matrices, [0.5, 0.5], density=0.5)
    np.testing.assert_allclose(found.products["a"].numpy(), [[8.0, 6.0]])
    assert found.conflicts == 0.0


def test_equal_magnitudes_are_trimmed_by_position_and_one_always_stays():
    matrix = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert trim(matrix, density=0.5).tolist() == [[1.0, -1.0, 0.0, 0.0]]
    assert trim(matrix, density=1e-9).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert torch.equal(trim(matrix, density=1.0), matrix)


def test_dare_keeps_the_expectation_and_then_elects_signs():
    stack = torch.randn(2, 300, 300, dtype=torch.float64, generator=GENERATOR.manual_seed(1))
    dropped = drop_and_rescale(stack, density=0.25, generator=GENERATOR.manual_seed(2))
    kept = dropped != 0.0
    assert abs(float(kept.double().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / stack.numel())
    assert torch.equal(dropped[kept], stack[kept] / 0.25)
    matrices = [matrix.numpy() for matrix in stack]
    GENERATOR.manual_seed(2)
    found = merged(matrices, [0.3, 0.6], method="dare_ties", density=0.25)
    expected, conflicts = plain_ties([m.numpy() for m in dropped], [0.3, 0.6], 1.0)
    np.testing.assert_allclose(found.products["a"].numpy(), expected, atol=1e-13)
    assert found.conflicts == conflicts
    GENERATOR.manual_seed(3)
    other = merged(matrices, [0.3, 0.6], method="dare_ties", density=0.25)
    assert not torch.equal(other.products["a"], found.products["a"])


def test_with_density_one_dare_is_ties():
    rng = np.random.default_rng(3)
    matrices = [rng.standard_normal((4, 6)) for _ in range(3)]
    one, two = (merged(matrices, [0.1, 0.4, 0.5], method=m) for m in ("ties", "dare_ties"))
    assert torch.equal(one.products["a"], two.products["a"])


def test_products_are_merged_and_not_factors():
    ups = [torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])]
    downs = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    domains = [{"a": up @ down} for up, down in zip(ups, downs)]
    found = merge_products(domains, [0.5, 0.5], MergeSettings(), generator=GENERATOR)
    assert torch.equal(found.products["a"], torch.eye(2).double())
    of_factors = torch.stack(ups).mean(0) @ torch.stack(downs).mean(0)
    assert not torch.allclose(found.products["a"].float(), of_factors)


def test_factors_of_a_merge_are_the_nearest_of_their_rank():
    product = torch.randn(9, 6, dtype=torch.float64, generator=GENERATOR.manual_seed(4))
    values = np.linalg.svd(product.numpy(), compute_uv=False)
    for rank in (1, 3, 6):
        down, up, kept = factorise(product, rank=rank, scale=2.0)
        assert down.shape == (rank, 6) and up.shape == (9, rank)
        error = float((up @ down * 2.0 - product).norm())
        assert error == pytest.approx(math.sqrt((values[rank:] ** 2).sum()), abs=1e-12)
        assert kept == pytest.approx((values[:rank] ** 2).sum() / (values**2).sum(), rel=1e-12)
    assert factorise(torch.zeros(3, 3).double(), rank=2, scale=2.0)[2] == 1.0


def test_weights_follow_the_gains_within_their_bounds():
    found = domain_weights({"math": 0.03, "code": 0.01, "text": -0.2})
    assert found == {"math": 0.75, "code": 0.25, "text": 0.05}
    assert domain_weights({"math": 0.5, "code": 0.0}) == {"math": 0.80, "code": 0.05}
    assert domain_weights({"math": -0.1, "code": 0.0}) == {"math": 0.5, "code": 0.5}
    assert domain_weights({"math": 0.1}) == {"math": 0.80}


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="choose ties or dare_ties"):
        merged([np.eye(2)], [1.0], method="mean")
