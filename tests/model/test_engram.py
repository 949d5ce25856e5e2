"""n-gram memory: hashing, collisions, causality, document boundaries, streaming, learning."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from model.config import SigmaModelConfig
from model.engram import (
    CONV_KERNEL,
    Engram,
    EngramState,
    canonical_token_map,
    hash_multipliers,
    merge_canonical_ids,
    nearest_primes,
)
from model.sequence import SequenceContext

VOCAB = 60


def make_engram(*, seed: int = 0, layer: int = 1, **changes) -> Engram:
    values = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "engram_enabled": True,
        "engram_buckets": 97,
        "engram_dim": 8,
        "engram_heads": 2,
    }
    torch.manual_seed(seed)
    engram = Engram(SigmaModelConfig(**(values | changes)).validate(), layer=layer)
    torch.nn.init.normal_(engram.conv_weight, std=0.5)  # zero at start, which would hide its part
    torch.nn.init.normal_(engram.key_value.weight, std=0.5)
    return engram


def make_rows(batch: int, length: int, *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length), generator=generator)
    return torch.randn(batch, length, 32, generator=generator), ids


def run(engram: Engram, hidden, ids, *, state: EngramState | None = None, **masks):
    context = SequenceContext.create(*ids.shape, device="cpu", use_cache=True, **masks)
    return engram(hidden, ids, context, state=state)


def test_table_sizes_are_distinct_primes_near_the_wish_over_heads_orders_and_layers():
    tables = [make_engram(layer=layer, engram_layers=(1, 3)).table_sizes for layer in (1, 3)]
    sizes = torch.cat([t.flatten() for t in tables]).tolist()
    assert len(set(sizes)) == len(sizes) == 2 * 3 * 2
    assert all(all(size % f for f in range(2, size)) for size in sizes)
    assert max(abs(size - 97) for size in sizes) <= 40
    assert nearest_primes(10, 4) == [11, 7, 13, 5]
    with pytest.raises(ValueError, match="engram-buckets"):
        nearest_primes(1, 5)


def test_rows_of_different_tables_never_overlap():
    engram = make_engram()
    starts, sizes = engram.table_starts.flatten(), engram.table_sizes.flatten()
    assert torch.equal(starts[1:], (starts + sizes)[:-1])
    assert starts[-1] + sizes[-1] == engram.table.shape[0]


def test_hash_factors_do_not_depend_on_any_seed():
    assert torch.equal(hash_multipliers(1, (2, 3)), hash_multipliers(1, (2, 3)))
    factors = torch.cat([hash_multipliers(layer, (2, 3, 4)).flatten() for layer in (1, 2)])
    assert factors.unique().numel() == factors.numel()
    assert (factors % 2 == 1).all() and factors.max() < 2**40


def test_collision_rate_meets_the_birthday_bound_per_head_and_jointly():
    engram = make_engram(vocab_size=5000, engram_buckets=3072, engram_heads=3)
    ids = torch.randint(0, 5000, (1, 4000), generator=torch.Generator().manual_seed(3))
    context = SequenceContext.create(*ids.shape, device="cpu")
    previous = torch.full((1, 3), 5000)
    keys, _ = engram._ngram_keys(ids, context, previous)
    expected = 1 - (1 - 1 / 3072) ** (4000 - 1)
    assert engram.collision_rate(keys) == pytest.approx(expected, rel=0.03)
    distinct = keys[0, :, 0].unique()
    assert distinct.numel() >= 3999  # the 64-bit mix itself does not collide
    joint = torch.stack([distinct % size for size in engram.table_sizes[0].tolist()], dim=1)
    # Two n-grams share all heads with probability 3072^-3: none among 8 million pairs.
    assert joint.unique(dim=0).shape[0] == distinct.numel()
    # Negative control: one shared modulus makes heads collide together.
    shared = torch.stack([distinct % 3072] * 3, dim=1)
    assert shared.unique(dim=0).shape[0] < 0.8 * distinct.numel()


def test_output_never_depends_on_later_tokens():
    engram = make_engram()
    hidden, ids = make_rows(2, 50)
    reference, _ = run(engram, hidden, ids)
    changed_ids, changed_hidden = ids.clone(), hidden.clone()
    changed_ids[:, 30:] = (changed_ids[:, 30:] + 7) % VOCAB
    changed_hidden[:, 30:] += 1.0
    changed, _ = run(engram, changed_hidden, changed_ids)
    assert torch.equal(changed[:, :30], reference[:, :30])
    assert (changed[:, 30:] != reference[:, 30:]).any(-1).all()


def test_output_depends_on_exactly_the_last_max_order_tokens_when_the_convolution_is_off():
    engram = make_engram()
    torch.nn.init.zeros_(engram.conv_weight)
    hidden, ids = make_rows(1, 20)
    reference, _ = run(engram, hidden, ids)
    changed = ids.clone()
    changed[0, 5] = (ids[0, 5] + 1) % VOCAB
    moved = (run(engram, hidden, changed)[0] != reference).any(-1)[0].nonzero().flatten()
    assert moved.tolist() == [5, 6, 7, 8]


def test_packed_documents_equal_separate_documents():
    engram = make_engram()
    hidden, ids = make_rows(1, 45)
    bounds = [0, 1, 14, 16, 45]
    reset = torch.zeros(1, 45, dtype=torch.bool)
    reset[0, bounds[:-1]] = True
    packed, _ = run(engram, hidden, ids, reset_mask=reset)
    for start, stop in itertools.pairwise(bounds):
        alone, _ = run(engram, hidden[:, start:stop], ids[:, start:stop])
        torch.testing.assert_close(packed[:, start:stop], alone, atol=1e-6, rtol=0)
    unmarked, _ = run(engram, hidden, ids)
    assert (unmarked[:, 14:] - packed[:, 14:]).abs().max() > 1e-2


@pytest.mark.parametrize("resets", [False, True])
def test_streaming_in_pieces_equals_the_whole_row(resets):
    engram = make_engram()
    hidden, ids = make_rows(2, 40)
    reset = None
    if resets:
        reset = torch.rand(2, 40, generator=torch.Generator().manual_seed(5)) < 0.15
    whole, final = run(engram, hidden, ids, reset_mask=reset)
    state, pieces = None, []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 21), (21, 22), (22, 40)):
        masks = {} if reset is None else {"reset_mask": reset[:, start:stop]}
        piece, state = run(engram, hidden[:, start:stop], ids[:, start:stop], state=state, **masks)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-6, rtol=0)
    assert torch.equal(state.ids, final.ids)
    torch.testing.assert_close(state.tail, final.tail, atol=1e-6, rtol=0)
    assert state.ids.shape == (2, 3) and state.tail.shape[1] == (CONV_KERNEL - 1) * 4
    swapped = state.reorder(torch.tensor([1, 0]))
    assert torch.equal(swapped.ids[0], state.ids[1])


def test_left_padding_changes_nothing_for_the_real_tokens():
    engram = make_engram()
    hidden, ids = make_rows(1, 12)
    alone, _ = run(engram, hidden, ids)
    padded_ids = F.pad(ids, (5, 0), value=9)
    padded_hidden = torch.cat((torch.randn(1, 5, 32), hidden), dim=1)
    valid = torch.arange(17).unsqueeze(0) >= 5
    padded, state = run(engram, padded_hidden, padded_ids, valid_mask=valid)
    torch.testing.assert_close(padded[:, 5:], alone, atol=1e-6, rtol=0)
    hidden, ids = make_rows(1, 4, seed=8)
    _, expected = run(engram, *make_rows(1, 12))
    continued, _ = run(engram, hidden, ids, state=state)
    torch.testing.assert_close(
        continued, run(engram, hidden, ids, state=expected)[0], atol=1e-6, rtol=0
    )


def test_every_parameter_gets_a_gradient_and_only_touched_rows_do():
    engram = make_engram()
    hidden, ids = make_rows(2, 10)
    y, _ = run(engram, hidden, ids)
    y.square().sum().backward()
    for name, parameter in engram.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    touched = engram.table.grad.abs().sum(1) > 0
    assert 0 < touched.sum() <= 2 * 10 * 3 * 2


def test_gate_lies_between_0_and_1_and_follows_the_agreement_of_query_and_key():
    engram = make_engram()
    direction = torch.randn(1, 1, 32)
    gates = [engram._gate(direction * sign, direction).item() for sign in (-1.0, 1.0)]
    assert 0.0 < gates[0] < 0.2 and 0.8 < gates[1] < 1.0
    assert engram._gate(torch.zeros(1, 1, 32), direction).item() == pytest.approx(0.5, abs=1e-3)
    engram.gate_scale.data.fill_(-50.0)
    root = 32**0.25
    expected = 1 / (1 + math.exp(-0.1 * root))
    assert engram._gate(direction, direction).item() == pytest.approx(expected, abs=1e-3)


def test_memory_rows_alone_memorise_a_random_bigram_table():
    """Everything but the rows is frozen: a random successor of each token is learnt by lookup."""
    engram = make_engram(engram_orders=(1, 2), engram_buckets=211, quant_mode="none")
    for name, parameter in engram.named_parameters():
        parameter.requires_grad_(name == "table")
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(VOCAB, 32, generator=generator)
    successor = torch.randperm(VOCAB, generator=generator)
    ids = torch.randint(0, VOCAB, (4, 128), generator=generator)
    hidden = torch.randn(4, 128, 32, generator=generator)
    optimizer = torch.optim.Adam([engram.table], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        logits = run(engram, hidden, ids)[0] @ head.T
        loss = F.cross_entropy(logits.flatten(0, 1), successor[ids].flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * math.log(VOCAB)
    assert (logits.argmax(-1) == successor[ids]).float().mean() > 0.95


def test_metrics_describe_the_last_training_forward():
    engram = make_engram()
    assert engram.metrics() == {}
    run(engram, *make_rows(2, 30))
    figures = engram.metrics()
    assert set(figures) == {"eng_gate_mean", "eng_gate_std", "eng_gate_sat", "eng_collision_rate"}
    assert 0 < figures["eng_gate_mean"] < 1 and figures["eng_gate_std"] > 0
    assert 0 < figures["eng_collision_rate"] < 1


def test_canonical_map_merges_what_reads_the_same():
    pieces = ["The", " the", "thé", "THE ", "x", "\ufffd", "", "  ", "\n", "ﬁ", "fi", "\ufffd"]
    mapped = canonical_token_map(pieces).tolist()
    assert mapped == [0, 0, 0, 0, 4, 5, 6, 7, 7, 9, 9, 11]
    engram = make_engram(vocab_size=len(pieces))
    merge_canonical_ids(torch.nn.Sequential(engram), pieces)
    hidden = torch.randn(1, 3, 32)
    first, _ = run(engram, hidden, torch.tensor([[0, 4, 9]]))
    second, _ = run(engram, hidden, torch.tensor([[3, 4, 10]]))
    assert torch.equal(first, second)
