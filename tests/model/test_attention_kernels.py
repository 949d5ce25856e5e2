"""The attention kernels against the definition, on outputs and every gradient by name.

On a machine without a GPU they run under Triton's interpreter, in fp32.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from model import attention_kernels, reference_ops, sigma_kernel_src
from model.attention_kernels import AttentionTiles, attend_parts
from model.mla import MLA
from model.sequence import SequenceContext
from tests.model.test_mla import _context, _mla, _random, _starts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, CONTENT, ROPE, WIDTH = 2, 12, 6, 10
NAMES = ("q", "q_rope", "k", "k_rope", "v", "lam")
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds values that would show if a kernel left an element unwritten."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poisoned(*args, make=make, **options):
            made = make(*args, **options)
            return made.fill_(float("nan") if made.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, poisoned)


def draw(queries: int, keys: int | None = None, *, maps: int = 2, batch: int = 1) -> dict:
    keys = queries if keys is None else keys
    shapes = {
        "q": (batch, queries, HEADS, maps, CONTENT),
        "q_rope": (batch, queries, HEADS, maps, ROPE),
        "k": (batch, keys, HEADS, CONTENT),
        "k_rope": (batch, keys, ROPE),
        "v": (batch, keys, HEADS, WIDTH),
    }
    if maps == 2:
        shapes["lam"] = (batch, queries, HEADS)
    drawn = {name: _random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    if maps == 2:
        drawn["lam"] = drawn["lam"].transpose(1, 2)  # (B, H, T), not contiguous
    return {name: value.to(DEVICE) for name, value in drawn.items()}


def define(q, q_rope, k, k_rope, v, lam=None, documents=None) -> Tensor:
    """The definition on concatenated parts, for the last T of S positions."""
    queries, keys, heads = q.shape[1], k.shape[1], q.shape[2]
    q = torch.cat((q, q_rope), -1).transpose(2, 3)  # (B, T, P, H, d)
    k = torch.cat((k, k_rope.unsqueeze(2).expand(-1, -1, heads, -1)), -1)
    ahead = keys - queries
    q = torch.cat((q.new_zeros(len(q), ahead, *q.shape[2:]), q), 1)
    if lam is not None:
        lam = lam.transpose(1, 2)
        lam = torch.cat((lam.new_zeros(len(lam), ahead, heads), lam), 1)
    valid = None if documents is None else documents >= 0
    out = reference_ops.attention(q, k, v, lam=lam, documents=documents, valid=valid)
    return out[:, ahead:]


def compute(q, q_rope, k, k_rope, v, lam=None, documents=None, **settings) -> Tensor:
    scale = (q.shape[-1] + q_rope.shape[-1]) ** -0.5
    return attend_parts(
        q, q_rope, k, k_rope, v, scale=scale, lam=lam, documents=documents, **settings
    )


def with_gradients(function, inputs: dict, documents: Tensor | None = None) -> dict:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    out = function(*leaves.values(), documents=documents)
    weight = _random(*out.shape, seed=99).to(out.device)
    grads = torch.autograd.grad((out * weight).sum(), list(leaves.values()))
    return {"out": out.detach()} | {f"d {name}": g for name, g in zip(leaves, grads)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / (1 + expected.abs().max()))


def assert_equals_definition(inputs: dict, documents: Tensor | None = None, **settings) -> None:
    expected = with_gradients(define, inputs, documents)
    found = with_gradients(
        lambda *args, **more: compute(*args, **more, **settings), inputs, documents
    )
    for name, value in expected.items():
        assert relative_error(found[name], value) < TOLERANCE, name


def packed(length: int, batch: int = 1) -> Tensor:
    """Documents of several lengths, padding inside and at the end."""
    documents = torch.zeros(batch, length, dtype=torch.int32)
    documents[:, length // 5 :] = 1
    documents[:, length // 2 : length // 2 + 3] = -1
    documents[:, length // 2 + 3 :] = 2
    documents[-1, -2:] = -1
    return documents.to(DEVICE)


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize(("length", "tile"), [(1, 32), (63, 32), (100, 64), (500, 256)])
def test_kernels_equal_the_definition(length, tile, maps):
    assert_equals_definition(draw(length, maps=maps), tiles=AttentionTiles(tile, tile, 4, 1))


@pytest.mark.parametrize(("queries", "tiles"), [(50, (16, 16)), (50, (32, 16)), (21, (16, 32))])
def test_documents_padding_and_earlier_tokens(queries, tiles):
    """21 queries: the last of 50 positions, the others being a cache."""
    inputs, documents = draw(queries, 50, batch=2), packed(50, batch=2)
    assert_equals_definition(inputs, documents, tiles=AttentionTiles(*tiles, 4, 1))
    assert_equals_definition(draw(queries, 50), tiles=AttentionTiles(*tiles, 4, 1))


def test_documents_make_a_difference():
    inputs = draw(50)
    assert relative_error(compute(**inputs), compute(**inputs, documents=packed(50))) > 0.1


def test_memory_layout_does_not_matter():
    inputs, documents = draw(20, batch=2), packed(20, batch=2)
    expected = with_gradients(compute, inputs, documents)
    strided = {
        name: value.transpose(0, -1).contiguous().transpose(0, -1) for name, value in inputs.items()
    }
    wide = {name: torch.cat((value, value), -1) for name, value in inputs.items()}
    sliced = {name: value.chunk(2, -1)[0] for name, value in wide.items()}
    for layout in (strided, sliced):
        for name, value in with_gradients(compute, layout, documents).items():
            assert torch.equal(value, expected[name]), name


def test_changing_the_future_or_another_document_changes_nothing_to_the_bit():
    inputs, documents = draw(50), packed(50)
    before = compute(**inputs, documents=documents)
    for first in (1, 25, 33, 49):
        changed = {name: value.clone() for name, value in inputs.items()}
        for name in ("k", "k_rope", "v"):
            changed[name][:, first:] += 1.0
        after = compute(**changed, documents=documents)
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])
    changed = {name: value.clone() for name, value in inputs.items()}
    changed["v"][:, :25] += 1.0  # documents 0 and 1
    after = compute(**changed, documents=documents)
    assert torch.equal(after[:, 28:], before[:, 28:])


def test_a_row_is_the_same_alone_and_in_a_batch_to_the_bit():
    inputs = draw(30, batch=3)
    together = compute(**inputs)
    alone = compute(**{name: value[1:2] for name, value in inputs.items()})
    assert torch.equal(alone, together[1:2])


def test_lambda_zero_is_the_single_map_to_the_bit():
    inputs = draw(40)
    inputs["lam"] = torch.zeros_like(inputs["lam"])
    single = {name: inputs[name] for name in NAMES[:5]}
    single |= {name: inputs[name][:, :, :, :1] for name in ("q", "q_rope")}
    assert torch.equal(compute(**inputs), compute(**single))


def test_large_scores_stay_finite():
    inputs = draw(40)
    inputs["q"] = inputs["q"] * 1e4
    found = with_gradients(compute, inputs, packed(40))
    for name, value in found.items():
        assert value.isfinite().all(), name
    assert relative_error(found["out"], define(**inputs, documents=packed(40))) < 1e-4


def run_layer(layer: MLA, context: SequenceContext, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    leaf = x.detach().requires_grad_()
    y, _ = layer(leaf, context)
    (y * _random(*y.shape, seed=5).to(y.device)).sum().backward()
    found = {"y": y.detach(), "d x": leaf.grad}
    found |= {f"d {name}": p.grad for name, p in layer.named_parameters()}
    return found | {name: torch.tensor(value) for name, value in layer.metrics().items()}


@pytest.mark.parametrize("settings", [{}, {"diff_attention_enabled": False}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_layer_is_the_same_with_either_backend(settings, masked):
    reset = valid = None
    if masked:
        reset, valid = _starts((0, 7), (1, 0), (1, 30)), torch.ones(2, 40, dtype=torch.bool)
        valid[0, :3] = False
    layer, x = _mla(**settings).train(), _random(2, 40, 48)
    expected = run_layer(layer, _context(reset_mask=reset, valid_mask=valid), x)
    layer.backend = "triton"
    found = run_layer(layer, _context(reset_mask=reset, valid_mask=valid), x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(found[name], value) < 1e-5, name


def test_a_continued_row_equals_the_whole_row():
    layer, x = _mla().eval(), _random(2, 40, 48)
    layer.backend = "triton"
    reset = _starts((0, 7), (1, 30))
    with torch.no_grad():
        whole, _ = layer(x, _context(reset_mask=reset))
        first, state = layer(
            x[:, :23], _context(23, reset_mask=reset[:, :23], use_cache=True), absorb=False
        )
        context = _context(17, reset_mask=reset[:, 23:], use_cache=True, start=23)
        rest, _ = layer(x[:, 23:], context, state=state, absorb=False)
    assert relative_error(torch.cat((first, rest), 1), whole) < 1e-5


def test_what_the_kernels_cannot_take_is_refused():
    inputs = draw(4)
    with pytest.raises(ValueError, match="two query maps need lam"):
        compute(**{name: inputs[name] for name in NAMES[:5]})
    with pytest.raises(ValueError, match="--kernel-backend torch takes fp64"):
        compute(**{name: value.double() for name, value in inputs.items()})
    inputs["v"] = inputs["v"][..., :1].expand(1, 4, HEADS, 257)
    with pytest.raises(ValueError, match="257 wide"):
        compute(**inputs)


def test_tiles_follow_the_architecture(monkeypatch):
    """What the launcher chooses is what a kernel is compiled with."""
    tiles = AttentionTiles(16, 64, 4, 1)
    monkeypatch.setattr(attention_kernels, "attention_tiles", lambda *_, **__: tiles)
    shape, seen = attention_kernels.AttentionShape, []
    constants_of = shape.constants_of

    def noted(self, kernel):
        seen.append(constants_of(self, kernel))
        return seen[-1]

    monkeypatch.setattr(shape, "constants_of", noted)
    compute(**draw(20))
    assert [(found["BLOCK_M"], found["BLOCK_N"]) for found in seen] == [(16, 64)]


@pytest.mark.skipif(DEVICE == "cuda", reason="the test on the GPU does it in bf16")
def test_sixteen_bit_operands_cost_what_their_rounding_costs(monkeypatch):
    """float16 for bf16, which the interpreter lacks: 2^-11 of a value, and nothing amplifies it."""
    monkeypatch.setattr(sigma_kernel_src, "_SHORT", tl.constexpr(tl.float16))
    monkeypatch.setattr(attention_kernels, "SHORT_TYPE", torch.float16)
    inputs, documents = draw(50), packed(50)
    expected = with_gradients(define, inputs, documents)
    found = with_gradients(
        lambda *args, **more: compute(*args, **more, in_bf16=True).float(), inputs, documents
    )
    for name, value in found.items():
        error = (value - expected[name]).norm() / expected[name].norm()
        assert error < 3e-3, name
    assert not torch.equal(found["out"], with_gradients(compute, inputs, documents)["out"])


@pytest.mark.gpu
@pytest.mark.parametrize("in_bf16", [False, True])
def test_on_a_gpu(in_bf16):
    """Default sizes of a head; bf16 keeps 8 bits of every operand."""
    shapes = {"q": (2, 300, 3, 2, 64), "q_rope": (2, 300, 3, 2, 32), "k": (2, 300, 3, 64)}
    shapes |= {"k_rope": (2, 300, 32), "v": (2, 300, 3, 64), "lam": (2, 3, 300)}
    inputs = {n: _random(*s, seed=i).cuda() for i, (n, s) in enumerate(shapes.items())}
    expected = with_gradients(define, inputs, packed(300, batch=2))
    found = with_gradients(
        lambda *args, **more: compute(*args, **more, in_bf16=in_bf16).float(),
        *(inputs, packed(300, batch=2)),
    )
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < (2e-2 if in_bf16 else 1e-4), name
