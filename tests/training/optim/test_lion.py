"""Lion in bf16 loses no updates; GaLore-Lion projects as it says and costs what it says."""

import pytest
import torch
from torch import nn

from training.optim.galore_lion import GaloreLion, leading_basis, state_bytes
from training.optim.lion import Lion

BF16 = torch.bfloat16


def generator(seed):
    return torch.Generator().manual_seed(seed)


def run(optimizer, params, steps, *, seed=1):
    source = generator(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=source)
        optimizer.step()


def low_rank(shape, rank, seed):
    left = torch.randn(*shape[:-1], rank, generator=generator(seed))
    return left @ torch.randn(*shape[:-2], rank, shape[-1], generator=generator(seed + 1))


def test_a_constant_gradient_reaches_the_bf16_momentum():
    """m approaches 1 in steps of 0.01 (1 - m): rounding to nearest stops where they are lost."""
    param = nn.Parameter(torch.zeros(2000))
    optimizer = Lion([param], lr=1e-4, state_dtype=BF16)
    nearest = torch.zeros(2000, dtype=BF16)
    for _ in range(400):
        param.grad = torch.ones(2000)
        optimizer.step()
        nearest.copy_(nearest.float() * 0.99 + 0.01)
    expected = 1 - 0.99**400
    assert optimizer.state[param]["momentum"].dtype == BF16
    assert abs(float(optimizer.state[param]["momentum"].float().mean()) - expected) < 0.005
    assert abs(float(nearest.float().mean()) - expected) > 0.05  # the control


def test_bf16_momentum_stays_with_fp32_momentum():
    fp32, bf16 = (nn.Parameter(torch.zeros(64, 64)) for _ in range(2))
    run(one := Lion([fp32], lr=1e-3), [fp32], 200)
    run(two := Lion([bf16], lr=1e-3, state_dtype=BF16), [bf16], 200)
    exact, stored = one.state[fp32]["momentum"], two.state[bf16]["momentum"].float()
    assert (exact - stored).norm() / exact.norm() < 0.05


def test_two_parameters_get_different_roundings():
    params = [nn.Parameter(torch.zeros(512)) for _ in range(2)]
    optimizer = Lion(params, lr=1e-3, state_dtype=BF16)
    for param in params:
        param.grad = torch.full((512,), 1.003)
    optimizer.step()
    first, second = (optimizer.state[param]["momentum"] for param in params)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40), (24, 24)])
def test_full_rank_is_lion(shape):
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    galore = GaloreLion([ours], lr=0.01, rank=24, weight_decay=0.1)
    run(galore, [ours], 12)
    run(Lion([theirs], lr=0.01, weight_decay=0.1), [theirs], 12)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40)])
def test_gradients_inside_the_subspace_give_lions_steps(shape):
    """The projection itself: gradients of rank 5 lose nothing in rank 5."""
    ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
    galore, lion = GaloreLion([ours], lr=0.01, rank=5, refresh=4), Lion([theirs], lr=0.01)
    base = low_rank(shape, 5, 3)
    for step in range(10):
        for param in (ours, theirs):
            wide = shape[-2] <= shape[-1]
            side = shape[-1] if wide else shape[-2]
            mix = torch.randn(side, side, generator=generator(step))
            param.grad = base @ mix if wide else mix @ base
        galore.step()
        lion.step()
    # A sign near zero may turn: at most one entry in a thousand.
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 1e-3
    assert galore.metrics()["galore_energy_captured"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("rank", [3, 30])
def test_a_refresh_keeps_the_best_subspace_of_its_rank(rank):
    """Rank 3 of 64 is found by the randomised way, rank 30 by decomposition."""
    spectrum = torch.logspace(0, -2, 64)
    u, _, vh = torch.linalg.svd(torch.randn(64, 90, generator=generator(4)), full_matrices=False)
    matrix = u @ torch.diag(spectrum) @ vh
    basis = leading_basis(matrix, rank=rank, generator=generator(5))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank), atol=1e-5, rtol=0)
    kept = (basis.mT @ matrix).square().sum() / matrix.square().sum()
    best = spectrum[:rank].square().sum() / spectrum.square().sum()
    assert best - 0.01 < kept <= best + 1e-5


def test_the_momentum_turns_with_the_subspace():
    """A refresh onto the same subspace, seen through other axes, changes nothing."""
    base = low_rank((16, 30), 4, 6)
    param = nn.Parameter(torch.zeros(16, 30))
    optimizer = GaloreLion([param], lr=0.0, rank=4, refresh=3)
    whole = torch.zeros(16, 30)
    for step in range(7):
        grad = base @ torch.randn(30, 30, generator=generator(step))
        param.grad = grad
        optimizer.step()
        whole = 0.99 * whole + 0.01 * grad
    state = optimizer.state[param]
    torch.testing.assert_close(state["basis"] @ state["momentum"], whole, rtol=1e-4, atol=1e-5)
    assert optimizer.metrics()["galore_refreshes"] == 3


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (BF16, 2)])
def test_the_state_has_the_predicted_bytes(dtype, size):
    params = [nn.Parameter(torch.ones(s)) for s in ((64, 96), (96, 64), (4, 32, 48), (8, 90), (7,))]
    optimizer = GaloreLion(params, lr=0.01, rank=16, state_dtype=dtype)
    run(optimizer, params, 2)
    predicted = [state_bytes(p.shape, rank=16, bytes_per_moment=size) for p in params]
    assert optimizer.metrics()["galore_state_bytes"] == sum(predicted)
    assert predicted[0] == size * 16 * 96 + 4 * 64 * 16 == predicted[1]
    assert predicted[3:] == [size * 8 * 90, size * 7]  # nothing to project
    plain = Lion(copies := [nn.Parameter(p.detach()) for p in params], lr=0.01, state_dtype=dtype)
    run(plain, copies, 1)
    whole = sum(s["momentum"].numel() * size for s in plain.state.values())
    assert sum(predicted) < 0.8 * whole
