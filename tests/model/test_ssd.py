"""The chunked scan against its definition, and the properties of a causal scan."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import model.ssd_core as ssd_core
import model.ssd_slabs as ssd_slabs
from model.reference_mamba import mamba_scan_reference
from model.ssd import MambaState, ScanInputs, mamba_scan, mamba_step, running_angles

BATCH, HEADS, WIDTH, SIZE, ANGLES = 2, 3, 5, 8, 2
STATE_FIELDS = ("h", "prev_b", "prev_x", "angle")


def draw_inputs(
    length: int,
    *,
    rank: int = 2,
    angles: int = ANGLES,
    trapezoid: bool = True,
    dtype: torch.dtype = torch.float64,
    batch: int = BATCH,
    seed: int = 0,
) -> ScanInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    dt = F.softplus(normal(batch, length, HEADS) - 1)
    return ScanInputs(
        x=normal(batch, length, HEADS, WIDTH),
        b=normal(batch, length, rank, SIZE),
        c=normal(batch, length, rank, SIZE),
        dt=dt,
        log_decay=-dt * normal(batch, length, HEADS).exp(),
        skip=normal(HEADS),
        trap=normal(batch, length, HEADS).sigmoid() if trapezoid else None,
        theta=normal(batch, length, angles) if angles else None,
        rank_in=normal(HEADS, rank, WIDTH) if rank > 1 else None,
    )


def draw_state(inputs: ScanInputs, *, seed: int = 7) -> MambaState:
    generator = torch.Generator().manual_seed(seed)
    zeros = MambaState.zeros(inputs)
    values = {
        name: torch.randn(getattr(zeros, name).shape, generator=generator, dtype=torch.float64)
        for name in STATE_FIELDS
    }
    return MambaState(**{name: value.to(inputs.x.dtype) for name, value in values.items()})


def draw_mask(length: int, probability: float, *, seed: int, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, length, generator=generator) < probability


def select_steps(inputs: ScanInputs, start: int, stop: int, row: int | None = None) -> ScanInputs:
    """Steps start to stop of all rows, or of one."""
    rows = slice(None) if row is None else slice(row, row + 1)
    parts = {}
    for field in dataclasses.fields(inputs):
        value = getattr(inputs, field.name)
        timed = field.name not in ("skip", "rank_in") and value is not None
        parts[field.name] = value[rows, start:stop] if timed else value
    return ScanInputs(**parts)


def named_tensors(value: ScanInputs | MambaState) -> dict[str, Tensor]:
    pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    return {name: tensor for name, tensor in pairs if tensor is not None and tensor.numel()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / (1 + expected.abs().max()))


def run_with_gradients(scan, inputs: ScanInputs, state: MambaState | None, valid: Tensor | None):
    """Outputs, final state and all gradients by name of a fixed random functional of them."""
    leaves = {
        name: t.detach().clone().requires_grad_() for name, t in named_tensors(inputs).items()
    }
    arguments = ScanInputs(**{f.name: leaves.get(f.name) for f in dataclasses.fields(inputs)})
    if state is not None:
        starts = {n: getattr(state, n).detach().clone() for n in STATE_FIELDS}
        used = [n for n in STATE_FIELDS if starts[n].numel()]
        if inputs.trap is None:  # the previous step has no second term then
            used = [n for n in used if not n.startswith("prev")]
        leaves |= {f"state.{n}": starts[n].requires_grad_() for n in used}
        state = MambaState(**starts)
    y, final = scan(arguments, state)
    if valid is not None:
        y = y * valid[..., None, None, None].to(y.dtype)
    generator = torch.Generator().manual_seed(3)
    loss = y.new_zeros(())
    for value in (y, final.h, final.prev_b, final.prev_x):
        loss = loss + (value * torch.randn(value.shape, generator=generator, dtype=y.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    values = {"y": y, "h": final.h, "prev_b": final.prev_b, "prev_x": final.prev_x}
    values |= {"cos": final.angle.cos(), "sin": final.angle.sin()}
    return values | {f"d {name}": grad for name, grad in zip(leaves, gradients, strict=True)}


def assert_equals_definition(
    inputs: ScanInputs,
    *,
    chunk_len: int,
    tolerance: float,
    reset: Tensor | None = None,
    valid: Tensor | None = None,
    state: MambaState | None = None,
) -> None:
    masks = {"reset_mask": reset, "valid_mask": valid}
    expected = run_with_gradients(
        lambda i, s: mamba_scan_reference(i, state=s, **masks), inputs, state, valid
    )
    actual = run_with_gradients(
        lambda i, s: mamba_scan(i, chunk_len=chunk_len, state=s, **masks), inputs, state, valid
    )
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.numel():
            assert relative_error(actual[name], value) < tolerance, name


PRECISIONS = ((torch.float64, 1e-10), (torch.float32, 1e-4))


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("length", [1, 7, 63, 100, 257])
@pytest.mark.parametrize("rank, chunk_len", [(1, 64), (2, 16), (4, 32)])
def test_chunked_equals_recurrence(length, rank, chunk_len, dtype, tolerance):
    inputs = draw_inputs(length, rank=rank, dtype=dtype)
    assert_equals_definition(inputs, chunk_len=chunk_len, tolerance=tolerance)


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("trapezoid", [False, True])
@pytest.mark.parametrize("angles", [0, 4])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_variants_equal_recurrence_with_resets_padding_and_state(
    rank, angles, trapezoid, dtype, tolerance
):
    inputs = draw_inputs(63, rank=rank, angles=angles, trapezoid=trapezoid, dtype=dtype)
    state = draw_state(inputs)
    common = {"chunk_len": 16, "tolerance": tolerance}
    assert_equals_definition(inputs, state=state, **common)
    reset, valid = draw_mask(63, 0.08, seed=1), draw_mask(63, 0.8, seed=2)
    assert_equals_definition(inputs, reset=reset, **common)
    assert_equals_definition(inputs, reset=reset, valid=valid, state=state, **common)


@pytest.mark.parametrize("rank, chunk_len", [(1, 16), (3, 8)])
@pytest.mark.parametrize("share", [0, 1, 7])
def test_slabs_of_chunks_and_heads_equal_the_definition(rank, chunk_len, share, monkeypatch):
    """share: pairs of this many heads fit a slab; 0: of none, 7: of two chunks of three heads."""
    monkeypatch.setattr(ssd_slabs, "_SLAB", share * (rank * chunk_len) ** 2)
    inputs, reset = draw_inputs(53, rank=rank), draw_mask(53, 0.1, seed=1)
    masks = {"reset": reset, "valid": draw_mask(53, 0.8, seed=2), "state": draw_state(inputs)}
    assert_equals_definition(inputs, chunk_len=chunk_len, tolerance=1e-10, **masks)


def test_rows_without_any_valid_step_and_resets_at_the_ends():
    inputs = draw_inputs(20)
    reset, valid = torch.zeros(BATCH, 20, dtype=torch.bool), torch.ones(BATCH, 20, dtype=torch.bool)
    valid[0] = False
    reset[1, 0] = reset[1, -1] = True
    valid[1, -1] = False
    for masks in ({"valid": valid}, {"valid": valid, "reset": reset}):
        assert_equals_definition(
            inputs, chunk_len=8, tolerance=1e-10, state=draw_state(inputs), **masks
        )


def test_gradcheck():
    inputs = draw_inputs(5, rank=2, angles=1, batch=1)
    state = draw_state(inputs)
    leaves = named_tensors(inputs) | named_tensors(state)
    names = list(leaves)
    reset = torch.tensor([[False, False, False, True, False]])

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, values, strict=True))
        start = MambaState(**{n: given.pop(n) for n in STATE_FIELDS})
        y, final = mamba_scan(ScanInputs(**given), chunk_len=2, reset_mask=reset, state=start)
        return y, final.h

    values = tuple(value.detach().clone().requires_grad_() for value in leaves.values())
    assert torch.autograd.gradcheck(scan, values)


def test_changing_the_future_changes_nothing_before_it_to_the_bit():
    inputs = draw_inputs(100, dtype=torch.float32)
    other = draw_inputs(100, dtype=torch.float32, seed=1)
    before, _ = mamba_scan(inputs, chunk_len=32)
    for cut in (1, 31, 32, 33, 70, 99):
        mixed = {
            name: value if name in ("skip", "rank_in") else torch.cat(
                [value[:, :cut], getattr(other, name)[:, cut:]], 1
            )
            for name, value in named_tensors(inputs).items()
        }  # fmt: skip
        after, _ = mamba_scan(ScanInputs(**mixed), chunk_len=32)
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


def test_impulse_moves_forward_only_and_mixes_ranks():
    inputs = draw_inputs(40, rank=2)
    inputs.skip = torch.zeros_like(inputs.skip)
    inputs.rank_in = inputs.rank_in.clone()
    inputs.rank_in[:, 1] = 0.0  # only the first rank receives input
    inputs.x = torch.zeros_like(inputs.x)
    inputs.x[:, 13] = 1.0
    y, _ = mamba_scan(inputs, chunk_len=8)
    assert (y[:, :13] == 0).all()
    assert (y[:, 13:].abs().amax((0, 2, 4)) > 0).all()  # every later step, both output ranks


def test_steps_equal_the_scan():
    inputs = draw_inputs(37)
    reset, valid = draw_mask(37, 0.1, seed=1), draw_mask(37, 0.8, seed=2)
    start = draw_state(inputs)
    y, final = mamba_scan(
        inputs, chunk_len=8, reset_mask=reset, valid_mask=valid, state=start
    )  # fmt: skip
    state, steps = start, []
    for t in range(37):
        step, state = mamba_step(
            select_steps(inputs, t, t + 1),
            state,
            reset_mask=reset[:, t : t + 1],
            valid_mask=valid[:, t : t + 1],
        )
        steps.append(step)
    assert relative_error(torch.cat(steps, 1)[valid], y[valid]) < 1e-10
    for name in ("h", "prev_b", "prev_x"):
        assert relative_error(getattr(state, name), getattr(final, name)) < 1e-10


@pytest.mark.parametrize("cut", [1, 16, 29])
def test_a_row_continued_from_its_state_equals_the_whole_row(cut):
    inputs = draw_inputs(50)
    whole, final = mamba_scan(inputs, chunk_len=16)
    first, state = mamba_scan(select_steps(inputs, 0, cut), chunk_len=16)
    second, last = mamba_scan(select_steps(inputs, cut, 50), chunk_len=16, state=state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-10
    assert relative_error(last.h, final.h) < 1e-10


def test_packed_documents_equal_separate_documents():
    inputs = draw_inputs(60, batch=1)
    starts = [0, 5, 6, 33, 48, 60]
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, starts[:-1]] = True
    packed, final = mamba_scan(inputs, chunk_len=16, reset_mask=reset)
    for start, stop in itertools.pairwise(starts):
        alone, state = mamba_scan(select_steps(inputs, start, stop), chunk_len=16)
        assert relative_error(packed[:, start:stop], alone) < 1e-10
    assert relative_error(final.h, state.h) < 1e-10
    leaky, _ = mamba_scan(inputs, chunk_len=16)
    assert relative_error(leaky[:, 5:], packed[:, 5:]) > 1e-3


def test_padding_on_the_left_changes_nothing():
    inputs = draw_inputs(41, batch=1)
    valid = torch.ones(1, 41, dtype=torch.bool)
    valid[:, :11] = False
    padded, final = mamba_scan(inputs, chunk_len=16, valid_mask=valid)
    alone, state = mamba_scan(select_steps(inputs, 11, 41), chunk_len=16)
    assert padded.isfinite().all()
    assert relative_error(padded[:, 11:], alone) < 1e-10
    for name in ("h", "prev_b", "prev_x", "angle"):
        assert relative_error(getattr(final, name), getattr(state, name)) < 1e-10


@pytest.mark.parametrize("decay", [1e-4, 10.0])
def test_long_rows_with_large_steps_stay_finite(decay):
    length = 4096
    inputs = draw_inputs(length, rank=1, dtype=torch.float32, batch=1)
    inputs.dt = torch.full_like(inputs.dt, 10.0)
    inputs.log_decay = -inputs.dt * decay
    for name, value in named_tensors(inputs).items():
        setattr(inputs, name, value.requires_grad_())
    y, state = mamba_scan(inputs, chunk_len=64)
    y.square().mean().backward()
    assert y.isfinite().all() and state.h.isfinite().all()
    for name, value in named_tensors(inputs).items():
        assert value.grad.isfinite().all(), name


def test_vanishing_and_zero_steps_have_finite_gradients():
    inputs = draw_inputs(30, dtype=torch.float32)
    inputs.dt = inputs.dt.clone()
    inputs.dt[:, ::3] = 0.0
    inputs.dt[:, 1::3] = 1e-42
    inputs.log_decay = (-inputs.dt).requires_grad_()
    inputs.dt = inputs.dt.requires_grad_()
    y, _ = mamba_scan(inputs, chunk_len=8)
    y.sum().backward()
    assert inputs.dt.grad.isfinite().all() and inputs.log_decay.grad.isfinite().all()


def test_memory_layout_and_uninitialised_memory_do_not_matter():
    inputs = draw_inputs(50)
    expected = run_with_gradients(lambda i, s: mamba_scan(i, chunk_len=16), inputs, None, None)
    strided = ScanInputs(
        **{
            name: value if value.dim() < 3 else value.transpose(0, -1).contiguous().transpose(0, -1)
            for name, value in named_tensors(inputs).items()
        }
    )
    actual = run_with_gradients(lambda i, s: mamba_scan(i, chunk_len=16), strided, None, None)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        poisoned = run_with_gradients(lambda i, s: mamba_scan(i, chunk_len=16), inputs, None, None)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-12, name
        assert relative_error(poisoned[name], value) < 1e-12, name


def test_autocast_does_not_lower_the_precision_of_the_scan():
    inputs = draw_inputs(50, dtype=torch.float32)
    expected = run_with_gradients(lambda i, s: mamba_scan(i, chunk_len=16), inputs, None, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_with_gradients(lambda i, s: mamba_scan(i, chunk_len=16), inputs, None, None)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        assert relative_error(actual[name], value) < 1e-5, name


def test_reorder_picks_rows():
    state = draw_state(draw_inputs(1))
    picked = state.reorder(torch.tensor([1, 1, 0]))
    for name in STATE_FIELDS:
        assert torch.equal(getattr(picked, name), getattr(state, name)[[1, 1, 0]])


# Negative controls: each breaks one thing that a wrong scan gets wrong.


def test_a_viewed_scan_is_caught():
    """[B, T, H, P] read as [B, H, T, P] without a transpose: lanes hold other steps' numbers."""
    inputs = draw_inputs(24, rank=1)
    wrong = dataclasses.replace(
        inputs, x=inputs.x.contiguous().view(BATCH, HEADS, 24, WIDTH).transpose(1, 2)
    )
    expected, _ = mamba_scan_reference(inputs)
    viewed, _ = mamba_scan(wrong, chunk_len=8)
    assert relative_error(viewed, expected) > 0.1
    changed = dataclasses.replace(inputs, x=inputs.x.clone())
    changed.x[:, 20:] += 1.0
    leaked = changed.x.view(BATCH, HEADS, 24, WIDTH).transpose(1, 2)
    after, _ = mamba_scan(dataclasses.replace(inputs, x=leaked), chunk_len=8)
    assert not torch.equal(after[:, :20], viewed[:, :20])  # the future reaches the past


def test_a_constant_decay_between_chunks_is_caught(monkeypatch):
    inputs = draw_inputs(40)
    expected, _ = mamba_scan_reference(inputs)
    right = ssd_core._chunk_decays

    def constant(totals: Tensor, boundary: Tensor) -> Tensor:
        return right(totals.mean((0, 1, 2)).expand_as(totals), boundary)

    monkeypatch.setattr(ssd_core, "_chunk_decays", constant)
    assert relative_error(mamba_scan(inputs, chunk_len=8)[0], expected) > 1e-2


def test_ranks_as_independent_lanes_are_caught():
    inputs = draw_inputs(30, rank=2)
    expected, _ = mamba_scan_reference(inputs)
    lanes = []
    for r in range(2):
        lane = dataclasses.replace(
            inputs, b=inputs.b[:, :, r : r + 1], c=inputs.c[:, :, r : r + 1],
            x=inputs.x * inputs.rank_in[:, r], rank_in=None,
        )  # fmt: skip
        lanes.append(mamba_scan(lane, chunk_len=8)[0])
    assert relative_error(torch.cat(lanes, 3), expected) > 1e-2


def test_angles_do_not_lose_precision_on_long_rows():
    """After 20,000 steps of almost pi a fp32 running sum would be off by more than 1e-3."""
    theta = torch.full((1, 20_000, 1), 3.0)
    exact = torch.tensor(3.0 * 20_000 % (2 * math.pi))
    assert abs(float(running_angles(theta, None, None)[0, -1, 0]) - float(exact)) < 1e-5
