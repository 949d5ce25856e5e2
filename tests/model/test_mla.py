"""Latent attention: definition, cache and differential form."""

from __future__ import annotations

import pytest
import torch

from model import reference_ops
from model.config import SigmaModelConfig
from model.mla import MLA
from model.sequence import SequenceContext

BATCH, LENGTH, WIDTH = 2, 40, 48


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _config(**settings) -> SigmaModelConfig:
    values = dict(d_model=WIDTH, n_heads=3, kv_latent_dim=24, rope_dim=8, mamba_head_dim=16)
    values |= settings
    return SigmaModelConfig(**values).validate()


def _mla(seed: int = 0, **settings) -> MLA:
    layer = MLA(_config(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return layer


def _context(length: int = LENGTH, *, batch: int = BATCH, **settings) -> SequenceContext:
    return SequenceContext.create(batch, length, device="cpu", **settings)


def _starts(*places: tuple[int, int], length: int = LENGTH) -> torch.Tensor:
    reset = torch.zeros(BATCH, length, dtype=torch.bool)
    for row, position in places:
        reset[row, position] = True
    return reset


def _close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


VARIANTS = [
    dict(diff_attention_enabled=False),
    dict(diff_attention_enabled=True),
    dict(diff_attention_enabled=True, bitlinear_group_size=16, sub_norm=False),
    dict(diff_attention_enabled=False, quant_mode="none"),
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_equal_the_definition(variant: dict, packed: bool) -> None:
    """In fp64, where no activation lies close enough to a rounding step to fall on either side."""
    layer = _mla(**variant).double()
    x = _random(BATCH, LENGTH, WIDTH).double().requires_grad_()
    context = _context(reset_mask=_starts((0, 7), (1, 20), (1, 21)) if packed else None)
    y, state = layer(x, context)
    assert state is None
    config = _config(**variant)
    expected = reference_ops.mla(
        x,
        dict(layer.named_parameters()),
        heads=3,
        ternary=config.quant_mode != "none",
        group_size=config.bitlinear_group_size,
        lambda_range=(0.05, 1.20) if config.diff_attention_enabled else None,
        documents=context.document_ids,
    )
    _close(y, expected, 1e-5)  # RoPE tables are fp32
    inputs = [x, *layer.parameters()]
    grad = _random(*y.shape, seed=1).double()
    for ours, theirs in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad)
    ):
        _close(ours, theirs, 1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_gradient_and_moves_the_output(variant: dict) -> None:
    layer = MLA(_config(**variant))
    x = _random(BATCH, LENGTH, WIDTH)
    before = layer(x, _context())[0]
    before.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    for name, parameter in layer.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.sub_(0.05 * parameter.grad / parameter.grad.abs().max())
        changed = layer(x, _context())[0]
        assert not torch.equal(changed, before), f"{name} does not act"
        with torch.no_grad():
            parameter.copy_(kept)


def _decode(layer: MLA, x: torch.Tensor, sizes: list[int], *, absorb=None, reset=None, valid=None):
    """Outputs of feeding x in pieces, and the final state."""
    outputs, state, start = [], None, 0
    for size in sizes:
        piece = slice(start, start + size)
        context = _context(
            size,
            batch=x.shape[0],
            start=start,
            use_cache=True,
            reset_mask=None if reset is None else reset[:, piece],
            valid_mask=None if valid is None else valid[:, piece],
        )
        y, state = layer(x[:, piece], context, state=state, absorb=absorb if start else None)
        outputs.append(y)
        start += size
    return torch.cat(outputs, 1), state


PIECES = [[1] * LENGTH, [17] + [1] * 23, [5, 1, 20, 3, 11]]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", PIECES)
@pytest.mark.parametrize("absorb", [None, True, False])
@torch.no_grad()
def test_decode_equals_prefill(variant: dict, sizes: list[int], absorb: bool | None) -> None:
    """fp64: in fp32 a last-bit difference can move an activation over an int8 step of out_proj."""
    layer = _mla(**variant).double().eval()
    x = _random(BATCH, LENGTH, WIDTH).double()
    for reset in (None, _starts((0, 9), (1, 17), (1, 30))):
        whole = layer(x, _context(reset_mask=reset))[0]
        pieces, state = _decode(layer, x, sizes, absorb=absorb, reset=reset)
        _close(pieces, whole, 1e-5)
        assert state is not None and state.length == LENGTH


@torch.no_grad()
def test_decode_equals_prefill_in_fp32_without_int8_steps() -> None:
    for variant in (dict(quant_mode="none"), dict(quant_mode="none", sub_norm=False)):
        layer, x = _mla(**variant), _random(BATCH, LENGTH, WIDTH)
        whole = layer(x, _context())[0]
        for absorb in (True, False):
            assert (_decode(layer, x, [10] + [1] * 30, absorb=absorb)[0] - whole).abs().max() < 1e-4


@torch.no_grad()
def test_activation_rounding_before_the_up_projections_would_break_absorption() -> None:
    """Negative control of the decision that k_content_up and v_up see unrounded latents."""
    layer, x = _mla().double(), _random(BATCH, LENGTH, WIDTH).double()
    whole = layer(x, _context())[0]
    layer.k_content_up.quantize_activations = layer.v_up.quantize_activations = True
    explicit = layer(x, _context())[0]
    absorbed = _decode(layer, x, [1] * LENGTH, absorb=True)[0]
    assert (absorbed - explicit).abs().max() > 1e-4
    assert (explicit - whole).abs().max() > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_future_changes_nothing_to_the_bit(variant: dict) -> None:
    layer, x = _mla(**variant), _random(BATCH, 130, WIDTH)
    before = layer(x, _context(130))[0]
    for cut in (1, 64, 100):
        changed = x.clone()
        changed[:, cut:] = _random(BATCH, 130 - cut, WIDTH, seed=5)
        after = layer(changed, _context(130))[0]
        assert torch.equal(after[:, :cut], before[:, :cut])
        assert not torch.equal(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("differential", [False, True])
@torch.no_grad()
def test_packed_documents_equal_separate_documents(differential: bool) -> None:
    layer = _mla(diff_attention_enabled=differential).double()
    x = _random(1, LENGTH, WIDTH).double()
    reset = torch.zeros(1, LENGTH, dtype=torch.bool)
    reset[0, [0, 13, 14]] = True
    packed = layer(x, _context(batch=1, reset_mask=reset))[0]
    apart = [
        layer(x[:, a:b], _context(b - a, batch=1))[0] for a, b in ((0, 13), (13, 14), (14, LENGTH))
    ]
    _close(packed, torch.cat(apart, 1), 1e-5)
    unmasked = layer(x, _context(batch=1))[0]
    assert (unmasked - packed).abs().max() > 1e-2, "without the mask documents do leak"


@pytest.mark.parametrize("differential", [False, True])
@torch.no_grad()
def test_left_padding_changes_nothing(differential: bool) -> None:
    layer = _mla(diff_attention_enabled=differential).double()
    x = _random(BATCH, LENGTH, WIDTH).double()
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid[0, :11] = False
    alone = layer(x[:1, 11:], _context(LENGTH - 11, batch=1))[0]
    whole = layer(x, _context(valid_mask=valid))[0]
    _close(whole[:1, 11:], alone, 1e-5)
    assert whole.isfinite().all()
    for sizes in ([20] + [1] * 20, [5] * 8):
        _close(_decode(layer, x, sizes, valid=valid)[0][:1, 11:], alone, 1e-5)


@torch.no_grad()
def test_document_that_starts_during_decoding_forgets_the_past() -> None:
    """The prefill has no boundary, so the cache has to learn of documents later."""
    layer, x = _mla().double(), _random(BATCH, LENGTH, WIDTH).double()
    reset = _starts((0, 30), (1, 35))
    pieces, state = _decode(layer, x, [28] + [1] * 12, reset=reset)
    _close(pieces, layer(x, _context(reset_mask=reset))[0], 1e-5)
    assert state is not None and state.documents is not None
    later = layer(x[:, 30:], _context(10))[0]
    _close(pieces[:1, 30:], later[:1], 1e-5)


@torch.no_grad()
def test_cache_holds_latent_and_rotary_numbers_and_nothing_else() -> None:
    sizes = {}
    for differential in (False, True):
        layer = _mla(diff_attention_enabled=differential)
        x = _random(BATCH, LENGTH, WIDTH)
        _, state = _decode(layer, x, [20] + [1] * 20)
        assert state is not None
        sizes[differential] = state.bytes_per_token()
        assert state.latent.shape[1] >= LENGTH
        assert layer.metrics()["mla_cache_bytes_per_token"] == sizes[differential]
    assert sizes[False] == sizes[True] == (24 + 8) * 4


@torch.no_grad()
def test_states_are_values() -> None:
    """Two continuations of one state, step by step in turn, although buffers are shared."""
    layer, x = _mla().double(), _random(BATCH, LENGTH, WIDTH).double()
    other = _random(BATCH, 6, WIDTH, seed=8).double()
    _, prefix = _decode(layer, x[:, :10], [8, 1, 1])
    branches = {"same": (x[:, 10:16], prefix, []), "other": (other, prefix, [])}
    for i in range(6):
        for name, (tokens, state, outputs) in branches.items():
            y, state = layer(tokens[:, i : i + 1], _context(1, start=10 + i), state=state)
            branches[name] = (tokens, state, [*outputs, y])
    for tokens, _, outputs in branches.values():
        whole = layer(torch.cat((x[:, :10], tokens), 1), _context(16))[0]
        _close(torch.cat(outputs, 1), whole[:, 10:], 1e-5)


@torch.no_grad()
def test_reorder_picks_rows() -> None:
    layer, x = _mla().double(), _random(BATCH, LENGTH, WIDTH).double()
    _, state = _decode(layer, x[:, :12], [12], reset=_starts((1, 5))[:, :12])
    assert state is not None
    index = torch.tensor([1, 1, 0])
    y, _ = layer(x[index, 12:13], _context(1, batch=3, start=12), state=state.reorder(index))
    expected, _ = layer(x[:, 12:13], _context(1, start=12), state=state)
    _close(y, expected[index], 1e-9)


def test_gradients_flow_through_a_state() -> None:
    """A cached prefix is part of the graph in training; nothing is detached."""
    layer, x = _mla().double(), _random(BATCH, LENGTH, WIDTH).double().requires_grad_()
    whole = layer(x, _context())[0]
    pieces, _ = _decode(layer, x, [25, 15], absorb=True)
    grad = _random(*whole.shape, seed=1).double()
    (direct,) = torch.autograd.grad(whole, x, grad)
    (through,) = torch.autograd.grad(pieces, x, grad)
    _close(through, direct, 1e-4)


def test_generating_from_a_training_state_leaves_its_graph_intact() -> None:
    layer, x = _mla(), _random(BATCH, LENGTH, WIDTH).requires_grad_()
    y, state = _decode(layer, x, [10, 10, 1])
    with torch.no_grad():
        for i in range(5):
            _, state = layer(x[:, 21 + i : 22 + i], _context(1, start=21 + i), state=state)
    y.sum().backward()
    assert x.grad is not None and x.grad[:, :21].any() and not x.grad[:, 21:].any()


def test_inference_mode_state_continues_outside_of_it() -> None:
    layer, x = _mla(), _random(BATCH, LENGTH, WIDTH)
    with torch.inference_mode():
        _, state = _decode(layer, x, [10, 1, 1])
    with torch.no_grad():
        y, _ = layer(x[:, 12:13], _context(1, start=12), state=state)
    assert y.isfinite().all()


def _plain_twin(layer: MLA, **settings) -> MLA:
    """MLA without the second map, with the kept map's queries and all other weights."""
    twin = _mla(diff_attention_enabled=False, **settings)
    weights = dict(layer.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            source = weights[name]
            if name.startswith("q_"):
                source = source.view(3, 2, -1, WIDTH)[:, 0].reshape(parameter.shape)
            parameter.copy_(source)
    return twin


@torch.no_grad()
def test_lambda_zero_is_plain_attention_to_the_bit() -> None:
    """Possible because products of codes are exact: the fused product here has more columns."""
    layer, x = _mla(), _random(BATCH, LENGTH, WIDTH)
    twin = _plain_twin(layer)
    differing = (layer(x, _context())[0] - twin(x, _context())[0]).abs().max()
    assert differing > 1e-2
    layer.lambda_min = layer.lambda_max = 0.0
    assert torch.equal(layer(x, _context())[0], twin(x, _context())[0])


def test_lambda_starts_at_its_flag_and_its_gate_learns() -> None:
    layer = MLA(_config(diff_attention_lambda_init=0.5))
    x = _random(BATCH, LENGTH, WIDTH)
    assert layer.metrics().keys() == {"mla_cache_bytes_per_token"}
    assert not layer.differential_active()
    layer(x, _context())[0].square().sum().backward()
    figures = layer.metrics()
    for name in ("mean", "min", "max"):
        assert figures[f"diff_attn_lambda_{name}"] == pytest.approx(0.5, abs=1e-6)
    assert figures["diff_attn_output_delta"] > 0.05
    for parameter in layer.gate_lambda.parameters():
        assert parameter.grad is not None and parameter.grad.any()
    assert layer.differential_active()
    with torch.no_grad():
        layer.gate_lambda.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    layer(x, _context())
    moved = layer.metrics()
    low, high = moved["diff_attn_lambda_min"], moved["diff_attn_lambda_max"]
    assert 0.05 <= low < moved["diff_attn_lambda_mean"] < high <= 1.20


def test_differential_activity_needs_effect_and_gradient() -> None:
    """Negative controls of the feature counter."""
    layer, x = MLA(_config()), _random(BATCH, LENGTH, WIDTH)
    y = layer(x, _context())[0]
    assert not layer.differential_active(), "a forward alone is no evidence"
    y.square().sum().backward()
    assert layer.differential_active()
    layer.gate_lambda.weight.grad = torch.zeros_like(layer.gate_lambda.weight)
    assert not layer.differential_active(), "a gate without gradient does not learn"
    layer.zero_grad()
    layer.lambda_min = layer.lambda_max = 0.0
    layer(x, _context())[0].square().sum().backward()
    assert not layer.differential_active(), "nothing was subtracted"
    assert not _mla(diff_attention_enabled=False).differential_active()


def test_evaluation_leaves_no_trace() -> None:
    layer, x = MLA(_config()), _random(BATCH, LENGTH, WIDTH)
    with torch.no_grad():
        layer(x, _context())
    layer.eval()
    layer(x, _context())
    assert layer.metrics().keys() == {"mla_cache_bytes_per_token"}


def test_train_and_eval_agree_to_the_bit() -> None:
    layer, x = _mla(), _random(BATCH, LENGTH, WIDTH)
    trained = layer.train()(x, _context())[0]
    with torch.no_grad():
        assert torch.equal(layer.eval()(x, _context())[0], trained)


@pytest.mark.parametrize("cached", [False, True])
def test_bf16_stays_near_fp32(cached: bool) -> None:
    layer, x = _mla(quant_mode="none"), _random(BATCH, LENGTH, WIDTH)
    exact = layer(x, _context())[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _decode(layer, x, [30] + [1] * 10)[0] if cached else layer(x, _context())[0]
    assert y.dtype == torch.bfloat16
    assert (y - exact).norm() / exact.norm() < 0.03
    half = _mla().bfloat16()
    out = half(x.bfloat16(), _context())[0]
    out.float().square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())


def test_state_dict_has_the_written_names() -> None:
    expected = {"q_content", "q_rope", "kv_down", "k_rope_up", "k_content_up", "v_up", "out_proj"}
    names = {name.split(".")[0] for name in _mla().state_dict()}
    assert names == expected | {"latent_norm", "sub_norm", "gate_lambda"}
    bare = _mla(diff_attention_enabled=False, sub_norm=False).state_dict()
    assert {name.split(".")[0] for name in bare} == expected | {"latent_norm"}
