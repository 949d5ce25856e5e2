"""Muon: orthogonalisation is judged by singular values, the update by torch's own Muon."""

import math

import pytest
import torch

from training.optim.muon import ITERATIONS, Muon, orthogonalize


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 48, 96), (2, 96, 48)])
def test_singular_values_come_close_to_one(shape):
    """Condition number 20: five steps lift a singular value by 485 at most."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, values, vh = torch.linalg.svd(noise, full_matrices=False)
    spectrum = torch.linspace(0.05, 1.0, values.size(-1)).expand_as(values)
    updates = u @ torch.diag_embed(spectrum) @ vh
    values = torch.linalg.svdvals(orthogonalize(updates, num_steps=5))
    assert values.min() > 0.6 and values.max() < 1.25


def with_spectrum(shape, spectrum, seed=0):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(noise, full_matrices=False)
    return (u @ torch.diag_embed(spectrum.expand_as(values)) @ vh).float()


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 48, 96), (2, 96, 48), (1, 200, 7)])
@pytest.mark.parametrize(("num_steps", "smallest"), [(3, 0.1), (4, 0.05), (5, 0.005), (12, 3e-5)])
def test_polar_express_keeps_singular_values_within_its_bounds(shape, num_steps, smallest):
    """`smallest`: smallest over largest singular value, down to a condition number of 33,000."""
    short = min(shape[-2:])
    spectrum = torch.logspace(0, math.log10(smallest), short, dtype=torch.float64)
    updates = with_spectrum(shape, 1e-3 * spectrum)
    found = orthogonalize(updates, num_steps=num_steps, iteration="polar-express")
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.7 and values.max() < 1.2


@pytest.mark.parametrize("shape", [(4, 64, 128), (4, 128, 64), (2, 33, 100)])
@pytest.mark.parametrize("iteration", ITERATIONS)
def test_random_matrices_become_nearly_orthogonal(shape, iteration):
    updates = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    values = torch.linalg.svdvals(orthogonalize(updates, num_steps=5, iteration=iteration))
    lowest = 0.7 if iteration == "polar-express" else 0.67  # the quintic's own lower bound
    assert values.min() > lowest and values.max() < 1.2


def test_a_matrix_of_one_rank_keeps_its_rank():
    generator = torch.Generator().manual_seed(8)
    updates = torch.randn(1, 40, 1, generator=generator) @ torch.randn(
        1, 1, 30, generator=generator
    )
    for iteration in ITERATIONS:
        values = torch.linalg.svdvals(orthogonalize(updates, num_steps=5, iteration=iteration))[0]
        assert values[0] > 0.65 and values[1] < 1e-3


def test_an_unknown_iteration_is_refused():
    with pytest.raises(ValueError, match="quintic, polar-express"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, iteration="cubic")


def test_directions_are_kept():
    updates = torch.randn(1, 40, 24, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(updates, full_matrices=False)
    aligned = u.mT @ orthogonalize(updates, num_steps=5) @ vh.mT  # (1, 24, 24)
    off_diagonal = aligned - torch.diag_embed(aligned.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


def test_zero_matrix_stays_zero_beside_a_live_one():
    updates = torch.zeros(2, 16, 16)
    updates[1] = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    result = orthogonalize(updates, num_steps=5)
    assert result[0].abs().max() == 0
    assert torch.linalg.svdvals(result[1]).max() > 0.6


def test_stacking_changes_nothing():
    updates = torch.randn(4, 32, 24, generator=torch.Generator().manual_seed(3))
    together = orthogonalize(updates, num_steps=5)
    alone = torch.cat([orthogonalize(u[None], num_steps=5) for u in updates])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_steps_follow_torch_muon():
    """torch iterates in bf16, hence the tolerance of a few of its last places."""
    start = torch.randn(48, 32, generator=torch.Generator().manual_seed(4))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    muon = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.05)
    oracle = torch.optim.Muon(
        [theirs], lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True, adjust_lr_fn="original"
    )
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        grad = torch.randn(48, 32, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        muon.step()
        oracle.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() / moved < 0.03


def test_experts_are_updated_one_by_one():
    generator = torch.Generator().manual_seed(6)
    stack = torch.nn.Parameter(torch.randn(3, 24, 16, generator=generator))
    single = torch.nn.Parameter(stack[1].detach().clone())
    stack.grad = torch.randn(3, 24, 16, generator=generator)
    single.grad = stack.grad[1].clone()
    Muon([stack], lr=0.1).step()
    Muon([single], lr=0.1).step()
    torch.testing.assert_close(stack[1], single, rtol=1e-5, atol=1e-6)
