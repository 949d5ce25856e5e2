"""The scan's kernels against the recurrence, on outputs, states and every gradient by name.

On a machine without a GPU they run under Triton's interpreter, in fp32.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl

from model import sigma_kernel_src, sigma_kernels
from model.reference_mamba import mamba_scan_reference
from model.sigma_kernels import ScanTiles, scan_chunks
from model.ssd import MambaState, ScanInputs, mamba_scan
from tests.model.test_ssd import (
    draw_inputs,
    draw_mask,
    draw_state,
    named_tensors,
    relative_error,
    run_with_gradients,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds values that would show if a kernel left an element unwritten."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **options):
            made = make(*args, **options)
            return made.fill_(float("nan") if made.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, poisoned)


def draw(length: int, **settings) -> ScanInputs:
    """Two heads: the interpreter takes milliseconds for every program of a kernel."""
    settings = {"batch": 1, "dtype": torch.float32} | settings
    inputs = draw_inputs(length, **settings)
    for name in ("x", "dt", "log_decay", "trap"):
        value = getattr(inputs, name)
        setattr(inputs, name, None if value is None else value[:, :, :2])
    inputs.skip = inputs.skip[:2]
    inputs.rank_in = None if inputs.rank_in is None else inputs.rank_in[:2]
    return on_device(inputs)


def on_device(value, device=DEVICE):
    moved = {name: tensor.to(device) for name, tensor in named_tensors(value).items()}
    empty = {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(value)
        if field.name not in moved
    }
    moved |= {name: None if t is None else t.to(device) for name, t in empty.items()}
    return type(value)(**moved)


def run(inputs: ScanInputs, *, chunk_len: int, state: MambaState | None = None, **masks):
    """Values and gradients by name from the kernels."""
    return run_with_gradients(
        lambda i, s: mamba_scan(i, chunk_len=chunk_len, state=s, backend="triton", **masks),
        *(inputs, state, masks.get("valid_mask")),
    )


def use_tiles(monkeypatch, steps: int, entries: int = 16):
    tiles = ScanTiles(steps, entries, 4, 1)
    monkeypatch.setattr(sigma_kernels, "scan_tiles", lambda *_, **__: tiles)


def assert_equals_definition(inputs, *, chunk_len, state=None, **masks):
    expected = run_with_gradients(
        lambda i, s: mamba_scan_reference(i, state=s, **masks),
        *(inputs, state, masks.get("valid_mask")),
    )
    found = run(inputs, chunk_len=chunk_len, state=state, **masks)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value.numel():
            assert relative_error(found[name], value) < TOLERANCE, name


@pytest.mark.parametrize(
    ("length", "rank", "chunk_len", "tile"),
    [
        *((1, 2, 64, None), (63, 3, 40, None), (100, 2, 100, 64), (500, 1, 256, 128)),
        pytest.param(500, 4, 128, None, marks=pytest.mark.soak),
    ],
)
def test_kernels_equal_the_recurrence(length, rank, chunk_len, tile, monkeypatch):
    if tile is not None:
        use_tiles(monkeypatch, tile)
    assert_equals_definition(draw(length, rank=rank), chunk_len=chunk_len)


@pytest.mark.parametrize("settings", [{"rank": 1, "angles": 0, "trapezoid": False}, {"rank": 2}])
def test_resets_padding_and_a_given_state(settings, monkeypatch):
    use_tiles(monkeypatch, 16)
    inputs = draw(50, **settings)
    rows = len(inputs.x)
    reset, valid = (
        draw_mask(50, share, seed=seed, batch=rows).to(DEVICE)
        for share, seed in ((0.08, 1), (0.8, 2))
    )
    reset[0, 16] = reset[0, 31] = True  # a chunk's first and another's last step
    state = on_device(draw_state(inputs))
    assert_equals_definition(inputs, chunk_len=32, state=state, reset_mask=reset, valid_mask=valid)


def test_a_state_without_masks_and_rows_without_any_valid_step():
    inputs = draw(20, batch=2, rank=1)
    state = on_device(draw_state(inputs))
    assert_equals_definition(inputs, chunk_len=16, state=state)
    valid = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    valid[0] = False
    assert_equals_definition(inputs, chunk_len=16, state=state, valid_mask=valid)


def test_memory_layout_and_tile_sizes_do_not_matter(monkeypatch):
    inputs = draw(40)
    expected = run(inputs, chunk_len=32)
    strided = ScanInputs(
        **{
            name: value if value.dim() < 3 else value.transpose(0, -1).contiguous().transpose(0, -1)
            for name, value in named_tensors(inputs).items()
        }
    )
    for name, value in run(strided, chunk_len=32).items():
        assert relative_error(value, expected[name]) < 1e-6, name
    use_tiles(monkeypatch, 16)
    for name, value in run(inputs, chunk_len=32).items():
        assert relative_error(value, expected[name]) < 1e-6, name


def test_gradient_of_stride_zero_is_taken():
    inputs = draw(20)
    x = inputs.x.requires_grad_()
    mamba_scan(inputs, chunk_len=16, backend="triton")[0].sum().backward()
    found, x.grad = x.grad, None
    mamba_scan_reference(inputs)[0].sum().backward()
    assert relative_error(found, x.grad) < TOLERANCE


def test_gradient_of_the_final_state_alone():
    inputs = draw(20)
    for value in named_tensors(inputs).values():
        value.requires_grad_()
    mamba_scan(inputs, chunk_len=16, backend="triton")[1].h.square().sum().backward()
    found = {name: value.grad for name, value in named_tensors(inputs).items()}
    for value in named_tensors(inputs).values():
        value.grad = None
    mamba_scan_reference(inputs)[1].h.square().sum().backward()
    for name, value in named_tensors(inputs).items():
        expected = torch.zeros_like(value) if value.grad is None else value.grad
        assert relative_error(found[name], expected) < TOLERANCE, name


def test_changing_the_future_changes_nothing_before_it_to_the_bit():
    inputs, other = draw(50), draw(50, seed=1)
    before, _ = mamba_scan(inputs, chunk_len=32, backend="triton")
    for cut in (1, 31, 32, 47):
        mixed = {
            name: value
            if name in ("skip", "rank_in")
            else torch.cat([value[:, :cut], getattr(other, name)[:, cut:]], 1)
            for name, value in named_tensors(inputs).items()
        }
        after, _ = mamba_scan(ScanInputs(**mixed), chunk_len=32, backend="triton")
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


def test_a_row_is_the_same_alone_and_in_a_batch_and_twice_to_the_bit():
    inputs = draw(20, batch=2)
    together, again = (run(inputs, chunk_len=16) for _ in range(2))
    for name, value in together.items():
        assert torch.equal(value, again[name]), name
    alone = {
        name: value if name in ("skip", "rank_in") else value[1:2]
        for name, value in named_tensors(inputs).items()
    }
    y, state = mamba_scan(ScanInputs(**alone), chunk_len=16, backend="triton")
    assert torch.equal(y, together["y"][1:2]) and torch.equal(state.h, together["h"][1:2])


def test_a_closed_gate_costs_later_steps_no_digits():
    """Decays e^-1e5 leave cum near 1e5 for the rest of the chunk, unless a step's is bounded."""
    inputs = draw(32, rank=1)
    inputs.log_decay = inputs.log_decay.clone()
    inputs.log_decay[:, 3] = -1e5
    assert_equals_definition(inputs, chunk_len=32)
    unbounded, _ = mamba_scan(inputs, chunk_len=32)
    expected, _ = mamba_scan_reference(inputs)
    assert relative_error(unbounded, expected) > TOLERANCE  # as it would be without the bound


def test_vanishing_and_zero_steps_have_finite_gradients():
    inputs = draw(30)
    inputs.dt = inputs.dt.clone()
    inputs.dt[:, ::3] = 0.0
    inputs.dt[:, 1::3] = 1e-42
    inputs.log_decay = -inputs.dt
    for name, value in run(inputs, chunk_len=16).items():
        assert value.isfinite().all(), name


def test_a_scan_without_the_trapezoids_share_is_caught():
    inputs = draw(30, rank=1, angles=0)
    gamma = inputs.trap * inputs.dt
    arguments = {"rank_in": None, "b": inputs.b, "c": inputs.c, "log_decay": inputs.log_decay}
    arguments |= {"gamma": gamma, "skip": inputs.skip, "chunk_len": 16}
    expected, _ = mamba_scan_reference(inputs)
    wrong, _ = scan_chunks(inputs.x, weight=gamma, **arguments)
    assert relative_error(wrong, expected) > 1e-2
    following = torch.nn.functional.pad((inputs.dt - gamma)[:, 1:], (0, 0, 0, 1))
    right, _ = scan_chunks(inputs.x, weight=gamma + following, **arguments)
    assert relative_error(right, expected) < TOLERANCE


def test_what_the_kernels_cannot_take_is_refused():
    with pytest.raises(ValueError, match="--kernel-backend torch"):
        mamba_scan(draw(4, dtype=torch.float64), chunk_len=16, backend="triton")
    wide = draw(4, rank=1)
    wide.x = wide.x[..., :1].expand(*wide.x.shape[:3], 257)
    with pytest.raises(ValueError, match="--mamba-head-dim is 257"):
        mamba_scan(wide, chunk_len=16, backend="triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="the test on the GPU does it in bf16")
def test_sixteen_bit_operands_cost_what_their_rounding_costs(monkeypatch):
    """float16 for bf16, which the interpreter lacks: 2^-11 of a value, and nothing amplifies it."""
    monkeypatch.setattr(sigma_kernel_src, "_SHORT", tl.constexpr(tl.float16))
    monkeypatch.setattr(sigma_kernels, "SHORT_TYPE", torch.float16)
    inputs, reset = draw(50), torch.zeros(1, 50, dtype=torch.bool)
    reset[0, 20] = True
    expected = run_with_gradients(
        lambda i, s: mamba_scan_reference(i, state=s, reset_mask=reset), inputs, None, None
    )
    for name, value in run(inputs, chunk_len=32, reset_mask=reset, in_bf16=True).items():
        error = (value - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert error < 4e-3, name
    exact = run(inputs, chunk_len=32, reset_mask=reset)
    assert (exact["y"] - expected["y"]).norm() / expected["y"].norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("in_bf16", [False, True])
def test_on_a_gpu(in_bf16):
    """Default sizes of a head; bf16 keeps 8 bits of every operand."""
    generator = torch.Generator().manual_seed(0)
    small = draw_inputs(300, rank=4, dtype=torch.float32)
    small.x = torch.randn(2, 300, 3, 64, generator=generator)
    small.b, small.c = torch.randn(2, 2, 300, 4, 128, generator=generator).unbind()
    small.rank_in = torch.randn(3, 4, 64, generator=generator)
    small.theta = torch.randn(2, 300, 32, generator=generator)
    reset = draw_mask(300, 0.02, seed=1).cuda()
    inputs = on_device(small, "cuda")
    expected = run_with_gradients(
        lambda i, s: mamba_scan_reference(i, state=s, reset_mask=reset), inputs, None, None
    )
    found = run_with_gradients(
        lambda i, s: mamba_scan(
            i, chunk_len=128, state=s, reset_mask=reset, backend="triton", in_bf16=in_bf16
        ),
        *(inputs, None, None),
    )
    for name, value in expected.items():
        if value.numel():
            error = (found[name] - value).norm() / value.norm().clamp_min(1e-6)
            assert error < (2e-2 if in_bf16 else 1e-4), name
