"""gnprox: the damping follows what its steps bring."""

import pytest
import torch
from torch import nn

from training.optim.gnprox import Damping, GNProx


def descend(slope, *, lr, steps=120, noise=0.0, damping=None):
    """Follow -slope(p) from 0.25; returns the optimizer and the parameter."""
    param = nn.Parameter(torch.full((50,), 0.25))
    optimizer = GNProx([param], lr=lr, betas=(0.0, 0.9), damping=damping)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        grad = slope(param.detach())
        param.grad = grad + noise * torch.randn(50, generator=generator)
        optimizer.step()
    return optimizer, param


def kink(p):
    """Slope of |p| / 100: all of its curvature is at zero, where g^2 says nothing of it."""
    return 0.01 * p.sign()


def bowl(p):
    """Slope of a shallow quadratic: any small step brings what its slope promises."""
    return 0.01 * p


def test_damping_rises_where_the_curvature_was_underestimated():
    """Steps of a half jump over the kink and bring nothing, until damping shortens them."""
    optimizer, param = descend(kink, lr=0.01)
    assert optimizer.state[param]["damping"] > 3 * optimizer.damping.initial
    assert param.abs().max() < 0.15
    _, still = descend(kink, lr=0.01, damping=Damping(maximum=1e-4))
    assert still.abs().max() > 0.2  # the control


def test_damping_falls_where_steps_keep_their_promise():
    optimizer, param = descend(bowl, lr=1e-3, damping=Damping(initial=0.1))
    assert optimizer.state[param]["damping"] < 0.05


def test_noise_alone_moves_the_damping_little():
    optimizer, param = descend(torch.zeros_like, lr=1e-4, noise=0.01, damping=Damping(initial=0.01))
    assert 0.25 < optimizer.state[param]["ratio"] < 0.75
    assert optimizer.state[param]["damping"] == pytest.approx(0.01, rel=0.5)


def test_damping_stays_within_its_bounds():
    wild = Damping(maximum=1.5e-4, gain=0.5)
    optimizer, param = descend(kink, lr=0.01, damping=wild)
    assert optimizer.state[param]["damping"] == pytest.approx(1.5e-4)
    calm = Damping(initial=0.1, minimum=0.09, maximum=1.0, gain=0.5)
    optimizer, param = descend(bowl, lr=1e-3, damping=calm)
    assert optimizer.state[param]["damping"] == pytest.approx(0.09)


def test_the_first_step_is_the_proximal_minimiser():
    param = nn.Parameter(torch.zeros(3))
    optimizer = GNProx([param], lr=0.1, eps=1e-8)
    param.grad = torch.tensor([0.02, -0.5, 0.0])
    optimizer.step()
    grad = param.grad
    torch.testing.assert_close(param.detach(), -0.1 * grad / (grad.square() + 1e-4 + 1e-8))


def test_the_clamp_bounds_every_element_of_the_gradient():
    param = nn.Parameter(torch.zeros(2))
    optimizer = GNProx([param], lr=1.0, clip_grad=0.1)
    param.grad = torch.tensor([5.0, -0.05])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["mean"], torch.tensor([0.01, -0.005]))
    assert optimizer.metrics()["gnprox_damping"] == pytest.approx(1e-4)
