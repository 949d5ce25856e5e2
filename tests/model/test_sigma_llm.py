"""The whole model: causality, streaming, documents, padding, gradients, counts, determinism."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from model.config import SigmaModelConfig
from model.moe import MoE
from model.sequence import SequenceContext
from model.sigma_llm import SigmaLLM
from tests.tiny_model import tiny_config
from tests.trainable import patched

VOCAB = 61
KINDS = {
    "mamba": {"mamba_ratio": 1, "attention_ratio": 0},
    "attention": {"mamba_ratio": 0, "attention_ratio": 1},
    "hybrid": {"mamba_ratio": 2, "attention_ratio": 1},
}
LAYOUTS = ("standard", "two-stream")
QUANT_MODES = ("bitnet_1_58", "none")


def make_config(**changes) -> SigmaModelConfig:
    """Ternary as by default, without n-gram memory."""
    values = {
        "vocab_size": VOCAB,
        "quant_mode": "bitnet_1_58",
        "engram_enabled": False,
        "engram_heads": 2,
        "mamba_chunk_len": 16,
    }
    return tiny_config(**(values | changes))


def make_model(*, seed: int = 0, **changes) -> SigmaLLM:
    return patched(SigmaLLM(make_config(**changes), seed=seed))


def make_ids(batch: int, length: int, *, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, *, quant_mode: str) -> None:
    """Equal to 1e-4 without rounding; with int8 activations up to a few flipped codes.

    Two orders of the same fp32 sum differ in the last bit, and where such a value lies on the edge
    between two int8 codes the difference becomes one code. That is rare and small, not a leak.
    """
    difference = (actual - expected).abs()
    if quant_mode == "none":
        assert difference.max() <= 1e-4
    else:
        assert difference.median() <= 1e-4
        assert difference.max() <= 0.1 * expected.std()


def decode_by_token(model: SigmaLLM, ids: torch.Tensor, *, prefill: int = 0) -> torch.Tensor:
    outputs, state = [], None
    if prefill:
        out = model(ids[:, :prefill], use_cache=True)
        outputs, state = [out.logits], out.state
    for t in range(prefill, ids.shape[1]):
        out = model(ids[:, t : t + 1], state=state, use_cache=True)
        outputs.append(out.logits)
        state = out.state
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("engram", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_never_depend_on_later_tokens(kind, layout, engram, training):
    """To the bit without experts, and with them too: their products do not depend on row counts."""
    for experts in (0, 4):
        model = make_model(
            residual_layout=layout,
            engram_enabled=engram,
            n_routed_experts=experts,
            **KINDS[kind],
        ).train(training)
        ids = make_ids(2, 50)
        changed = ids.clone()
        changed[:, 29:] = (changed[:, 29:] + 11) % VOCAB
        with torch.no_grad():
            first, second = model(ids).logits, model(changed).logits
        difference = (first[:, :29] - second[:, :29]).abs().max()
        assert difference == 0 if experts == 0 else difference <= 1e-5
        assert ((first[:, 29:] - second[:, 29:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_incremental_logits_never_depend_on_later_tokens(layout):
    model = make_model(residual_layout=layout, engram_enabled=True).eval()
    ids = make_ids(2, 14)
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 11) % VOCAB
    with torch.no_grad():
        first = decode_by_token(model, ids, prefill=4)
        second = decode_by_token(model, changed, prefill=4)
    assert torch.equal(first[:, :9], second[:, :9])
    assert not torch.equal(first[:, 9], second[:, 9])


@pytest.mark.parametrize("quant_mode", QUANT_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_equals_token_by_token(layout, quant_mode):
    model = make_model(residual_layout=layout, engram_enabled=True, quant_mode=quant_mode).eval()
    ids = make_ids(2, 40)
    with torch.no_grad():
        whole = model(ids).logits
        for prefill in (0, 17):
            assert_same(decode_by_token(model, ids, prefill=prefill), whole, quant_mode=quant_mode)


@pytest.mark.parametrize("quant_mode", QUANT_MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_documents_equal_separate_documents(layout, kind, quant_mode):
    model = make_model(
        residual_layout=layout, engram_enabled=True, quant_mode=quant_mode, **KINDS[kind]
    ).eval()
    ids = make_ids(1, 48)
    bounds = [0, 5, 6, 30, 48]
    reset = torch.zeros(1, 48, dtype=torch.bool)
    reset[0, bounds[:-1]] = True
    with torch.no_grad():
        packed = model(ids, reset_mask=reset).logits
        for start, stop in itertools.pairwise(bounds):
            alone = model(ids[:, start:stop]).logits
            assert_same(packed[:, start:stop], alone, quant_mode=quant_mode)
        assert (model(ids).logits[:, 31:] - packed[:, 31:]).abs().max() > 1e-3


@pytest.mark.parametrize("quant_mode", QUANT_MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_no_real_logit_and_no_continuation(kind, quant_mode):
    model = make_model(engram_enabled=True, quant_mode=quant_mode, **KINDS[kind]).eval()
    ids = make_ids(1, 20)
    padded = torch.cat((torch.full((1, 7), 3), ids), dim=1)
    valid = torch.arange(27).unsqueeze(0) >= 7
    with torch.no_grad():
        alone = model(ids, use_cache=True)
        out = model(padded, valid_mask=valid, use_cache=True)
        assert_same(out.logits[:, 7:], alone.logits, quant_mode=quant_mode)
        more = make_ids(1, 5, seed=9)
        expected = model(more, state=alone.state).logits
        continued = model(more, state=out.state).logits
    assert_same(continued, expected, quant_mode=quant_mode)


def test_sequence_scores_do_not_depend_on_the_batch_around_them():
    model = make_model(engram_enabled=True, quant_mode="none").eval()
    ids = make_ids(6, 33)
    labels = ids.roll(-1, 1)
    with torch.no_grad():
        for row in range(6):
            alone = model(ids[row : row + 1], labels=labels[row : row + 1]).loss
            logits = model(ids).logits[row]
            assert abs(alone - F.cross_entropy(logits, labels[row])) < 1e-6


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_trainable_tensor_learns_and_acts(layout, tie):
    """A gradient within two steps, and a changed output when the tensor alone is moved."""
    model = make_model(residual_layout=layout, engram_enabled=True, tie_embeddings=tie)
    ids, labels = make_ids(2, 24), make_ids(2, 24, seed=2)
    reached = set()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        out = model(ids, labels=labels)
        (out.loss + sum(out.aux.values())).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            if parameter.grad.abs().sum() > 0:
                reached.add(name)
        optimizer.step()
        model.after_optimizer_step()
    assert reached == {name for name, _ in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        for name, parameter in model.named_parameters():
            kept = parameter.clone()
            parameter += 0.3 * torch.randn(parameter.shape) * parameter.abs().mean().clamp_min(0.1)
            assert not torch.equal(model(ids).logits, before), name
            parameter.copy_(kept)


def test_train_and_eval_compute_the_same_function_without_noise():
    model = make_model(router_jitter_noise=0.0, engram_enabled=True)
    ids = make_ids(2, 30)
    with torch.no_grad():
        trained = model.train()(ids).logits
        assert torch.equal(model.eval()(ids).logits, trained)


def test_loss_is_the_cross_entropy_of_the_logits():
    model = make_model().eval()
    ids, labels = make_ids(3, 20), make_ids(3, 20, seed=4)
    labels[:, ::4] = -100
    out = model(ids, labels=labels)
    assert out.logits is None and out.aux == {}
    logits = model(ids).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    kept = model(ids, labels=labels, num_logits_to_keep=3).logits
    torch.testing.assert_close(kept, logits[:, -3:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "engram_enabled": True}])
def test_parameter_counts_match_a_count_by_hand(changes):
    model = make_model(n_layers=3, engram_layers=(0, 2), **changes)
    counts = model.num_parameters()
    width, hidden = 32, 48 // (1 + 2)
    expert = 3 * width * hidden
    moe = 4 * expert + expert + 4 * width  # routed, shared, router
    embedding = VOCAB * width * (1 if model.config.tie_embeddings else 2)
    mixers = sum(p.numel() for b in model.blocks for p in b.mixer.parameters())
    total = embedding + mixers + 3 * (moe + 2 * width) + width
    active = total - 3 * 2 * expert
    if model.config.engram_enabled:
        tables = 3 * 2
        dense = tables * 8 * 2 * width + 3 * width + 4 * width + 1
        for layer in (0, 2):
            rows = int(model.blocks[layer].engram.table_sizes.sum())
            total += dense + rows * 8
            active += dense + tables * 8
    assert counts == {"total": total, "active": active, "embedding": embedding}
    assert total == sum(p.numel() for p in model.parameters())


def test_tied_head_is_the_embedding_and_an_untied_one_is_not():
    tied, untied = make_model(), make_model(tie_embeddings=False)
    assert tied.head_weight is tied.embed.weight
    assert "lm_head.weight" not in tied.state_dict()
    assert untied.head_weight is untied.state_dict(keep_vars=True)["lm_head.weight"]
    ids = make_ids(1, 8)
    before = untied(ids).logits.detach()
    untied.lm_head.weight.data.mul_(2.0)
    torch.testing.assert_close(untied(ids).logits.detach(), 2 * before)


def test_seed_fixes_the_weights_and_construction_keeps_the_global_random_state():
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    first = make_model(seed=7, engram_enabled=True)
    assert torch.equal(torch.rand(1), expected)
    second, other = make_model(seed=7, engram_enabled=True), make_model(seed=8, engram_enabled=True)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert not torch.equal(other.embed.weight, first.embed.weight)


def test_initial_loss_is_near_uniform_and_the_stream_does_not_grow_with_depth():
    losses, norms = [], []
    for layers in (3, 12):
        model = make_model(n_layers=layers).eval()
        ids = make_ids(4, 32)
        context = SequenceContext.create(4, 32, device="cpu")
        streams = (model.embed(ids),)
        with torch.no_grad():
            for block in model.blocks:
                streams, _, _ = block(streams, ids, context)
            norms.append(streams[0].square().mean().sqrt())
            losses.append(model(ids, labels=make_ids(4, 32, seed=5)).loss)
    uniform = torch.tensor(float(VOCAB)).log()
    assert all(abs(loss - uniform) < 0.15 for loss in losses)
    assert norms[1] < 2 * norms[0]


@pytest.mark.parametrize("quant_mode", QUANT_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_falls_on_a_repeated_batch(layout, quant_mode):
    model = make_model(residual_layout=layout, quant_mode=quant_mode, engram_enabled=True)
    ids = make_ids(2, 32)
    labels = ids.roll(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = model(ids, labels=labels)
        (out.loss + sum(out.aux.values())).backward()
        optimizer.step()
        model.after_optimizer_step()
        losses.append(float(out.loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_stream_inputs_follow_from_its_outputs(layout):
    """The reversible layout is inverted by subtraction; the standard one is not of that form."""
    model = make_model(residual_layout=layout, engram_enabled=True).eval()
    ids = make_ids(1, 12)
    context = SequenceContext.create(1, 12, device="cpu")
    block = model.blocks[1]
    if layout == "standard":
        assert len(block((model.embed(ids),), ids, context)[0]) == 1
        return
    first, second = torch.randn(2, 1, 12, 32).double().unbind()
    block = block.double()
    with torch.no_grad():
        (y1, y2), _, _ = block((first, second), ids, context)
        x2_after_memory = y2 - block.ffn(block.ffn_norm(y1), context)[0]
        x1 = y1 - block.mixer(block.mixer_norm(x2_after_memory), context)[0]
        x2 = x2_after_memory - block.engram(x1, ids, context)[0]
    torch.testing.assert_close(x1, first, atol=1e-9, rtol=0)
    torch.testing.assert_close(x2, second, atol=1e-9, rtol=0)


def test_recomputing_blocks_gives_the_same_gradients():
    model = make_model(engram_enabled=True)
    ids, labels = make_ids(2, 20), make_ids(2, 20, seed=3)
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        out = model(ids, labels=labels)
        (out.loss + sum(out.aux.values())).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name


def test_dropout_follows_the_global_random_state_and_is_off_in_eval():
    model = make_model(dropout=0.3)
    ids = make_ids(1, 16)
    torch.manual_seed(1)
    first, second = model(ids).logits, model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_state_reorder_moves_rows():
    model = make_model(engram_enabled=True, quant_mode="none").eval()
    ids, more = make_ids(3, 10), make_ids(3, 2, seed=6)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        state = model(ids, use_cache=True).state
        moved = model(more, state=state.reorder(order)).logits
        expected = model(more, state=model(ids[order], use_cache=True).state).logits
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=0)
    fresh = model.initial_state(3)
    assert fresh.num_tokens == 0
    with torch.no_grad():
        torch.testing.assert_close(model(ids, state=fresh).logits, model(ids).logits)


def test_metrics_have_the_families_and_follow_the_step():
    model = make_model(engram_enabled=True)
    ids = make_ids(2, 20)
    out = model(ids, labels=ids)
    out.loss.backward()
    model.after_optimizer_step()
    figures = model.metrics()
    families = {name.split("_")[0] for name in figures}
    assert families >= {"bitlinear", "moe", "eng", "mamba", "mla", "diff", "last"}
    assert all(isinstance(value, float) for value in figures.values())
    assert 0.15 < figures["bitlinear_zero_fraction"] < 0.4
    moes = [module for module in model.modules() if isinstance(module, MoE)]
    assert figures["moe_usage_max"] == max(float(m.last_usage.max()) for m in moes)
    names = model.ternary_weights()
    assert {"blocks.0.ffn.experts.gate_up", "blocks.0.ffn.shared.down"} <= set(names)
    assert not any("router" in name or "embed" in name for name in names)


def test_wrong_inputs_are_refused_in_one_line():
    model = make_model()
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.zeros(2, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.zeros(5, dtype=torch.int64))
