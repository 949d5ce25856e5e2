"""What every optimizer of the family owes: zeros, dormant parts, buckets, exact resume."""

import copy

import pytest
import torch
from torch import nn

from training.optim.adamuon import AdaMuon
from training.optim.adamw import AdamW
from training.optim.galore_lion import GaloreLion
from training.optim.gnprox import GNProx
from training.optim.lion import Lion
from training.optim.muon import Muon
from training.optim.normuon import NorMuon
from training.optim.soap import Soap

SHAPES = ((12, 8), (12, 8), (8, 20), (3, 6, 4))
FAMILY = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "muon": lambda p: Muon(p, lr=0.02, weight_decay=0.1),
    "muon, polar express": lambda p: Muon(
        p, lr=0.02, weight_decay=0.1, num_steps=3, iteration="polar-express"
    ),
    "normuon": lambda p: NorMuon(p, lr=0.02, weight_decay=0.1),
    "adamuon": lambda p: AdaMuon(p, lr=0.02, weight_decay=0.1),
    "soap": lambda p: Soap(p, lr=0.01, weight_decay=0.1, refresh=3),
    "soap, one side": lambda p: Soap(p, lr=0.01, weight_decay=0.1, refresh=3, max_side=8),
    "lion": lambda p: Lion(p, lr=0.01, weight_decay=0.1),
    "lion, bf16": lambda p: Lion(p, lr=0.01, weight_decay=0.1, state_dtype=torch.bfloat16),
    "galore-lion": lambda p: GaloreLion(p, lr=0.01, weight_decay=0.1, rank=3, refresh=3),
    "galore-lion, bf16": lambda p: GaloreLion(
        p, lr=0.01, weight_decay=0.1, rank=3, refresh=3, state_dtype=torch.bfloat16
    ),
    "gnprox": lambda p: GNProx(p, lr=0.01, weight_decay=0.1),
}


def parameters(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_steps(optimizer, params, steps):
    """Steps numbered `steps`, each with gradients of its own."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def tensors_of(state):
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("name", FAMILY)
def test_a_saved_and_loaded_state_goes_on_to_the_bit(name, tmp_path):
    whole, params = parameters(0), parameters(0)
    take_steps(FAMILY[name](whole), whole, range(11))
    optimizer = FAMILY[name](params)
    take_steps(optimizer, params, range(5))
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [nn.Parameter(param.detach()) for param in saved["params"]]
    optimizer = FAMILY[name](resumed)
    optimizer.load_state_dict(saved["optimizer"])
    take_steps(optimizer, resumed, range(5, 11))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed))


@pytest.mark.parametrize("name", FAMILY)
def test_without_its_state_a_run_goes_elsewhere(name):
    """The control: the state is what the test above saves."""
    whole, params = parameters(0), parameters(0)
    take_steps(FAMILY[name](whole), whole, range(8))
    take_steps(FAMILY[name](params), params, range(5))
    take_steps(FAMILY[name](params), params, range(5, 8))
    assert not any(torch.equal(a, b) for a, b in zip(whole, params))


@pytest.mark.parametrize("name", FAMILY)
def test_buckets_change_only_roundings(name):
    together, alone = parameters(1), parameters(1)
    take_steps(FAMILY[name](together), together, range(4))
    optimizer = FAMILY[name](alone)
    optimizer.foreach = False
    take_steps(optimizer, alone, range(4))
    for a, b in zip(together, alone):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", FAMILY)
def test_zero_gradients_from_the_start_move_nothing_but_by_decay(name):
    params = parameters(2)
    before = [param.detach().clone() for param in params]
    optimizer = FAMILY[name](params)
    lr = optimizer.param_groups[0]["lr"]
    for _ in range(4):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    for param, old in zip(params, before):
        torch.testing.assert_close(param.detach(), old * (1 - lr * 0.1) ** 4)


@pytest.mark.parametrize("name", FAMILY)
def test_a_zero_matrix_beside_live_ones_gives_no_nan(name):
    params = parameters(3)
    optimizer = FAMILY[name](params)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(params):
            size = (0.0, 1e-20, 1e4, 1.0)[index]
            param.grad = size * torch.randn(param.shape, generator=generator)
        params[3].grad[1] = 0.0
        optimizer.step()
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("name", FAMILY)
def test_a_parameter_without_gradient_keeps_value_and_state(name):
    params = parameters(4)
    optimizer = FAMILY[name](params)
    take_steps(optimizer, params, range(4))
    value = params[0].detach().clone()
    state = copy.deepcopy(optimizer.state[params[0]])
    params[0].grad = None
    take_steps(optimizer, params[1:], range(4, 8))
    assert torch.equal(params[0], value)
    for key, old in state.items():
        new = optimizer.state[params[0]][key]
        assert torch.equal(torch.as_tensor(new), torch.as_tensor(old)), key


@pytest.mark.parametrize("name", FAMILY)
def test_a_dormant_expert_keeps_value_and_state(name):
    params, never = parameters(5), parameters(5)
    optimizer = FAMILY[name](params)
    optimizer.watch_stacks([params[3]])
    take_steps(optimizer, params, range(4))
    take_steps(FAMILY[name](never), never, range(4))
    assert all(torch.equal(a, b) for a, b in zip(params, never))  # watching alone changes nothing
    value = params[3].detach().clone()
    state = copy.deepcopy(tensors_of(optimizer.state[params[3]]))
    for step in range(4, 8):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        params[3].grad[1] = 0.0
        optimizer.step()
    assert torch.equal(params[3][1], value[1])
    assert not torch.equal(params[3][0], value[0])
    for key, old in state.items():
        if old.dim() and len(old) == 3:
            assert torch.equal(optimizer.state[params[3]][key][1], old[1]), key


@pytest.mark.parametrize("name", FAMILY)
def test_a_step_goes_downhill(name):
    """Three hundred steps on a quadratic with condition number 100 come closer to its minimum."""
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(12, 8, generator=generator)
    weight = torch.logspace(-1, 1, 96).view(12, 8)
    param = nn.Parameter(torch.zeros(12, 8))
    optimizer = FAMILY[name]([param])
    optimizer.param_groups[0]["weight_decay"] = 0.0
    losses = []
    for _ in range(300):
        param.grad = None
        loss = (weight * (param - target).square()).sum() / 96
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]
