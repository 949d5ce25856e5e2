"""The common interface: plain arithmetic when undisturbed, scales and adjustments when asked."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from training.optim.adamw import AdamW
from training.optim.base import ScaledOptimizer, Update
from training.optim.muon import Muon, orthogonalize

SHAPES = ((12, 8), (12, 8), (8, 20), (3, 6, 4))


def parameters(seed, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params, generator):
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def run(optimizer, params, *, steps=4, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        give_gradients(params, generator)
        optimizer.step()
    return [param.detach().clone() for param in params]


class Descent(ScaledOptimizer):
    """p <- decayed p - lr * gradient: the smallest optimizer on the interface."""

    def __init__(self, params, *, lr=0.1, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def propose(self, params, group):
        return Update(
            params=params, directions=[p.grad.clone() for p in params], gain=1.0, group=group
        )


KINDS = {
    "descent": lambda params: Descent(params, weight_decay=0.1),
    "adamw": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
    "muon": lambda params: Muon(params, lr=0.02, weight_decay=0.1),
}


def test_undisturbed_adamw_is_torchs_to_the_bit():
    ours, theirs = parameters(0), parameters(0)
    options = {"lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    found = run(AdamW(ours, **options), ours, steps=20)
    expected = run(torch.optim.AdamW(theirs, **options), theirs, steps=20)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_undisturbed_muon_is_the_plain_arithmetic_to_the_bit():
    params, expected = parameters(1), [p.detach().clone() for p in parameters(1)]
    optimizer = Muon(params, lr=0.02, weight_decay=0.1)
    buffers = [torch.zeros_like(p) for p in expected]
    generator = torch.Generator().manual_seed(7)
    for _ in range(3):
        give_gradients(params, generator)
        grads = [param.grad.clone() for param in params]
        optimizer.step()
        for members in ((0, 1), (2,), (3,)):  # of one matrix shape
            rows, cols = expected[members[0]].shape[-2:]
            looks_ahead = []
            for i in members:
                buffers[i].lerp_(grads[i], 1 - 0.95)
                looks_ahead.append(grads[i].lerp(buffers[i], 0.95).reshape(-1, rows, cols))
            pieces = orthogonalize(torch.cat(looks_ahead), num_steps=5)
            pieces = pieces.split([len(matrices) for matrices in looks_ahead])
            for i, piece in zip(members, pieces):
                expected[i].mul_(1.0 - 0.02 * 0.1)
                scale = max(1.0, rows / cols) ** 0.5
                expected[i].add_(piece.reshape(expected[i].shape), alpha=-0.02 * scale)
    assert all(torch.equal(a, b) for a, b in zip(params, expected))


@pytest.mark.parametrize("name", KINDS)
def test_a_scale_multiplies_the_step_and_not_the_decay(name):
    plain, scaled, still = parameters(2), parameters(2), parameters(2)
    run(KINDS[name](plain), plain, steps=1)
    optimizer = KINDS[name](scaled)
    optimizer.set_scales({scaled[0]: 0.5, scaled[2]: torch.full((8, 1), 2.0)})
    run(optimizer, scaled, steps=1)
    optimizer = KINDS[name](still)
    optimizer.set_scales(dict.fromkeys(still, 0.0))
    run(optimizer, still, steps=1)
    for index, scale in enumerate((0.5, 1.0, 2.0, 1.0)):
        expected = still[index] + scale * (plain[index] - still[index])
        torch.testing.assert_close(scaled[index], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_scales_of_one_and_foreach_change_only_roundings(name):
    plain, ones, alone = parameters(3), parameters(3), parameters(3)
    run(KINDS[name](plain), plain)
    optimizer = KINDS[name](ones)
    optimizer.set_scales(dict.fromkeys(ones, 1.0))
    run(optimizer, ones)
    optimizer = KINDS[name](alone)
    optimizer.foreach = False
    run(optimizer, alone)
    for expected, *found in zip(plain, ones, alone):
        for value in found:
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_ending_the_scales_ends_them_to_the_bit(name):
    plain, params = parameters(4), parameters(4)
    optimizer = KINDS[name](params)
    optimizer.set_scales({params[0]: 3.0})
    optimizer.set_scales(None)
    assert all(
        torch.equal(a, b) for a, b in zip(run(KINDS[name](plain), plain), run(optimizer, params))
    )


@pytest.mark.parametrize("name", KINDS)
def test_an_adjustment_sees_and_bounds_every_update(name):
    params = parameters(5)
    before = [param.detach().clone() for param in params]
    optimizer = KINDS[name](params)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0

    def bound(update):
        for direction in update.directions:
            norm = abs(update.gain) * direction.norm()
            direction.mul_((0.01 / norm).clamp(max=1.0))

    optimizer.set_adjustment(bound)
    run(optimizer, params, steps=1)
    lr = optimizer.param_groups[0]["lr"]
    for param, old in zip(params, before):
        torch.testing.assert_close((param - old).norm(), torch.tensor(0.01 * lr), rtol=1e-3, atol=0)


def test_a_scale_of_a_strangers_parameter_is_refused():
    params = parameters(6)
    with pytest.raises(ValueError, match="another optimizer"):
        Descent(params).set_scales({parameters(6)[0]: 1.0})


@pytest.mark.parametrize("name", KINDS)
def test_what_has_no_gradient_is_left_alone(name):
    params = parameters(7)
    optimizer = KINDS[name](params)
    run(optimizer, params, steps=2)
    values = [param.detach().clone() for param in params]
    state = {
        k: v.clone() if isinstance(v, torch.Tensor) else v
        for k, v in optimizer.state[params[1]].items()
    }
    give_gradients(params, torch.Generator().manual_seed(1))
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], values[1]) and not torch.equal(params[0], values[0])
    assert all(
        torch.equal(torch.as_tensor(optimizer.state[params[1]][k]), torch.as_tensor(v))
        for k, v in state.items()
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_dormant_slice_of_a_stack_is_left_alone(name):
    params, free = parameters(8), parameters(8)
    optimizer, other = KINDS[name](params), KINDS[name](free)
    optimizer.watch_stacks([params[3]])
    run(optimizer, params, steps=2)
    run(other, free, steps=2)
    before = params[3].detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[params[3]].items() if v.dim()}
    for those in (params, free):
        give_gradients(those, torch.Generator().manual_seed(2))
        those[3].grad[1] = 0.0
    optimizer.step()
    other.step()
    assert torch.equal(params[3][1], before[1])
    assert not torch.equal(free[3][1], before[1])  # the control: unwatched, it drifts
    for kept in (0, 2):
        assert torch.equal(params[3][kept], free[3][kept])
    for key, value in state.items():
        assert torch.equal(optimizer.state[params[3]][key][1], value[1])


def test_state_keeps_its_dtype():
    params, again = parameters(9), parameters(9)
    optimizer = AdamW(params, lr=0.1)
    run(optimizer, params, steps=1)
    for state in optimizer.state.values():
        state["exp_avg"] = state["exp_avg"].bfloat16()
    resumed = AdamW(again, lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for old, new in zip(params, again):
        assert resumed.state[new]["exp_avg"].dtype == torch.bfloat16
        assert torch.equal(resumed.state[new]["exp_avg"], optimizer.state[old]["exp_avg"])
        assert resumed.state[new]["exp_avg"] is not optimizer.state[old]["exp_avg"]


def test_an_optimizer_does_not_load_the_compiler():
    """Or every start would take half as long again."""
    code = (
        "import sys, torch\n"
        "from training.optim.adamw import AdamW\n"
        "def use(kind):\n"
        "    weight = torch.nn.Parameter(torch.zeros(2, 2))\n"
        "    optimizer = kind([weight], lr=0.1)\n"
        "    weight.grad = torch.ones(2, 2)\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad()\n"
        "    optimizer.load_state_dict(optimizer.state_dict())\n"
        "    return 'torch._dynamo' in sys.modules\n"
        "assert not use(AdamW)\n"
        "assert use(torch.optim.AdamW)  # the control\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True)
