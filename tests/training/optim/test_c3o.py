"""C3O's arithmetic: bases, trust region, packed moments, factors, and a state that continues."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.training.credit_models import c3o_for, chain_batch, small_model, train_step
from training.config.sections import OptimConfig
from training.optim.base import Update
from training.optim.c3o_bases import C3OAdam, C3OAdamW, C3OMuon, DampedAdam
from training.optim.trust import TrustRegion
from training.optimizer import build_optimizer
from training.probe import Probe

CPU = torch.device("cpu")


def feed(model, optimizer, seed, *, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = scale * torch.randn(param.shape, generator=generator)
    optimizer.step()


def weights(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(left, right, *, atol=0.0):
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0.0, msg=name)


def probed_step(model, optimizer, seed):
    """One training step with a probe; what decides is a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    held_out = chain_batch(generator, rows=4)
    probe = Probe([held_out], device=CPU)
    optimizer.control.begin_probe()
    train_step(model, optimizer, chain_batch(generator, rows=4))
    _, gradients = probe.gradient(model, held_out)
    return optimizer.control.finish_probe(
        gradients, evaluate=lambda: probe.loss(model, held_out), generator=generator
    )


@pytest.mark.parametrize(("base", "name"), [("muon", "muon"), ("soap", "soap")])
def test_without_credit_and_inside_the_region_c3o_is_its_base(base, name):
    plain, ours = small_model(), small_model()
    settings = OptimConfig(optimizer=name, lr=1e-3, adam_lr=1e-3, weight_decay=0.0)
    reference = build_optimizer(plain, settings)
    optimizer = c3o_for(
        ours, lr=1e-3, adam_lr=1e-3, base=base, credit_enabled=False, trust_radius=1e6,
        grad_clip=0.0,
    )  # fmt: skip
    for seed in range(4):
        feed(plain, reference, seed)
        feed(ours, optimizer, seed)
    # AdamW's plain path is torch's single-tensor one, whose roots round differently.
    assert_equal(weights(plain), weights(ours), atol=1e-6)
    taken = [p for part in optimizer.parts if not isinstance(part, C3OAdamW)
             for g in part.param_groups for p in g["param_names"]]  # fmt: skip
    assert taken
    for key in taken:
        assert torch.equal(weights(plain)[key], weights(ours)[key]), key


def test_damped_adam_follows_its_formula():
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = DampedAdam([param], lr=0.1, betas=(0.9, 0.98), eps=1e-8, damping=1e-4)
    expected, m, v = param.detach().double().clone(), torch.zeros(3).double(), torch.zeros(3)
    v = v.double()
    for step in range(1, 6):
        grad = torch.randn(3, generator=torch.Generator().manual_seed(step))
        param.grad = grad.clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * grad
        v = 0.98 * v + 0.02 * grad.double() ** 2
        root = (v / (1 - 0.98**step) + 1e-4 + 1e-8).sqrt()
        expected -= 0.1 * (m / (1 - 0.9**step)) / root
    torch.testing.assert_close(param.detach().double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", ["muon", "adam", "soap"])
def test_foreach_equals_tensor_by_tensor(base):
    together, apart = small_model(), small_model()
    first = c3o_for(together, base=base)
    second = c3o_for(apart, base=base, foreach_fused=False)
    for seed in range(3):
        probed_step(together, first, seed)
        probed_step(apart, second, seed)
    assert_equal(weights(together), weights(apart), atol=1e-6)
    assert first.metrics()["c3o_foreach_groups"] < second.metrics()["c3o_foreach_groups"]


@pytest.mark.parametrize("radius", [0.001, 0.05])
def test_no_tensor_moves_further_than_its_region(radius):
    model = small_model()
    optimizer = c3o_for(model, lr=1.0, adam_lr=1.0, credit_enabled=False, trust_radius=radius)
    before = weights(model)
    feed(model, optimizer, 0)
    moved = {name: (p - before[name]).norm() for name, p in weights(model).items()}
    for name, length in moved.items():
        floor = 0.01 * before[name].numel() ** 0.5
        limit = radius * max(float(before[name].norm()), floor)
        assert float(length) <= limit * (1 + 1e-4) + 1e-7, name
    assert any(float(before[name].norm()) == 0.0 < float(moved[name]) for name in before), (
        "the floor lets tensors that are zero move"
    )
    length = optimizer.metrics()["c3o_update_norm"]
    total = torch.stack(list(moved.values())).square().sum().sqrt()
    assert length == pytest.approx(float(total), rel=1e-3)


class Region:
    """A trust region over one parameter of norm 1."""

    def __init__(self, **changes):
        self.param = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
        self.region = TrustRegion(radius=0.5, **changes)

    def confine(self, length):
        update = Update(
            params=[self.param], directions=[torch.tensor([length, 0.0])], gain=1.0,
            group={"lr": 1.0},
        )  # fmt: skip
        self.region.confine(update)
        return float(update.directions[0].detach().norm())


def test_norms_are_refreshed_every_so_many_updates():
    own = Region(refresh_steps=3)
    found = []
    for _ in range(5):
        found.append(own.confine(10.0))
        with torch.no_grad():
            own.param.mul_(2.0)
    assert found == pytest.approx([0.5, 0.5, 0.5, 4.0, 4.0])
    assert own.region.num_norms_taken == 2 and own.region.num_steps_unmeasured == 0


def test_a_margin_above_the_drift_saves_measurements_until_the_refresh():
    own = Region(refresh_steps=4, drift=0.5)
    assert own.confine(0.1) == pytest.approx(0.1)  # margin 0.8: the next three are not measured
    assert [own.confine(10.0) for _ in range(3)] == [10.0] * 3
    assert own.confine(10.0) == pytest.approx(0.5)
    assert own.confine(10.0) == pytest.approx(0.5)  # no margin: measured
    assert own.region.num_steps_unmeasured == 3


def test_packed_moments_follow_changes_below_their_resolution():
    """A mean of 1 that should become 1.004: the step to the next bf16 number is 0.0078, and the
    mean moves by a tenth of what is left. Rounded to nearest it would stay at 1."""
    param = torch.nn.Parameter(torch.zeros(20_000))
    optimizer = C3OAdam([param], lr=0.0)
    optimizer.state_dtype = torch.bfloat16
    for step in range(120):
        param.grad = torch.full_like(param, 1.0 if step < 40 else 1.004)
        optimizer.step()
    state = optimizer.state[param]
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.bfloat16}
    assert float(state["exp_avg"].float().mean()) == pytest.approx(1.004, abs=4e-4)
    nearest = torch.ones((), dtype=torch.bfloat16)
    assert (nearest.float() * 0.9 + 0.1 * 1.004).bfloat16() == nearest


def test_gradients_are_clamped_element_by_element():
    model = small_model()
    clamped, plain = copy.deepcopy(model), copy.deepcopy(model)
    first = c3o_for(clamped, credit_enabled=False, grad_clip=0.5)
    second = c3o_for(plain, credit_enabled=False, grad_clip=0.0)
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(clamped.parameters(), plain.parameters()):
        grad = torch.randn(ours.shape, generator=generator)
        ours.grad, theirs.grad = grad.clone(), grad.clamp(-0.5, 0.5)
    first.step()
    second.step()
    assert_equal(weights(clamped), weights(plain))
    assert first.metrics()["c3o_grad_clip_foreach_groups"] > 0
    assert second.metrics()["c3o_grad_clip_foreach_groups"] == 0


@pytest.mark.parametrize(
    ("base", "estimator", "dtype"),
    [("muon", "first_order", "bf16"), ("adam", "mask", "fp32"), ("soap", "first_order", "bf16")],
)
def test_a_restored_state_continues_to_the_bit(base, estimator, dtype):
    changes = {
        "base": base, "credit_estimator": estimator, "state_dtype": dtype, "block_size": 1024,
        "trust_norm_refresh_steps": 3, "trust_norm_refresh_drift": 0.2, "credit_draws": 2,
    }  # fmt: skip
    model = small_model()
    optimizer = c3o_for(model, **changes)
    for seed in range(4):
        probed_step(model, optimizer, seed)
    saved = copy.deepcopy((model, optimizer.state_dict()))
    for seed in range(4, 7):
        probed_step(model, optimizer, seed)
    resumed, state = saved
    other = c3o_for(resumed, **changes)
    other.load_state_dict(state)
    for seed in range(4, 7):
        probed_step(resumed, other, seed)
    assert_equal(weights(model), weights(resumed))
    assert torch.equal(optimizer.control.scales, other.control.scales)
    assert optimizer.metrics() == other.metrics()
    assert float(other.control.scales.std()) > 0.0


def test_other_blocks_are_refused():
    model = small_model()
    state = c3o_for(model).state_dict()
    with pytest.raises(ValueError, match="--c3o-block-size"):
        c3o_for(model, block_size=512).load_state_dict(state)


def test_factors_scale_the_steps_of_their_blocks():
    """Two equal optimizers, one without factors: the steps differ by just those."""
    plain, scaled = small_model(), small_model()
    first, second = c3o_for(plain, block_size=512), c3o_for(scaled, block_size=512)
    probed_step(plain, first, 0)
    probed_step(scaled, second, 0)
    first.control.settings = replace(first.control.settings, credit=None)
    first.control._rescale()
    before = weights(plain)
    feed(plain, first, 1)
    feed(scaled, second, 1)
    names = second.control._names
    for param, name in names.items():
        factors = second.control.scales_of(param)
        sizes = [len(piece) for piece in before[name].flatten().split(512)]
        spread = torch.repeat_interleave(factors, torch.tensor(sizes)).view_as(before[name])
        expected = before[name] + spread * (weights(plain)[name] - before[name])
        torch.testing.assert_close(weights(scaled)[name], expected, atol=2e-6, rtol=0, msg=name)
    assert 0.6 <= float(second.control.scales.min()) < 1.0 < float(second.control.scales.max())


def test_exact_and_masked_estimators_leave_the_update_as_it_was():
    results = []
    for estimator in ("first_order", "mask", "exact"):
        model = small_model()
        optimizer = c3o_for(model, block_size=4096, credit_estimator=estimator, credit_draws=2)
        credit = probed_step(model, optimizer, 0)
        results.append((weights(model), credit))
    for found, credit in results[1:]:
        assert_equal(results[0][0], found)
        assert not torch.equal(results[0][1], credit)


def test_a_probe_must_be_begun():
    control = c3o_for(small_model()).control
    with pytest.raises(RuntimeError, match="begin_probe"):
        control.finish_probe({}, evaluate=lambda: torch.zeros(()), generator=torch.Generator())


def test_an_unrouted_expert_is_not_touched():
    model = small_model()
    optimizer = c3o_for(model)
    stack = dict(model.named_parameters())["blocks.0.ffn.experts.gate_up"]
    before = stack[1].detach().clone()
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        stack.grad[1] = 0.0
        optimizer.step()
    assert torch.equal(stack[1], before)
    assert not torch.equal(stack[0], before)


def test_parts_are_what_the_base_says():
    model = small_model()
    assert [type(part) for part in c3o_for(model).parts] == [C3OMuon, C3OAdamW]
    assert [type(part) for part in c3o_for(model, base="adam").parts] == [C3OAdam]
