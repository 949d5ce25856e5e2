"""Bits per byte against arithmetic done by hand, and the promises about the model's mode."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from training.data import Batch
from training.evaluation import bits_per_byte, evaluate_bpb

VOCAB = 7
BYTES_OF_TOKEN = np.array([0, 1, 2, 3, 1, 4, 2])  # token 0 is the end of text


class BigramModel(nn.Module):
    """Predicts from the current token by a fixed table; dropout acts in training mode only."""

    def __init__(self, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, VOCAB, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5)
        self.frozen.eval()

    def forward(self, input_ids, *, reset_mask=None, labels=None):
        logits = self.dropout(self.table[input_ids])
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss)


def make_batch(input_ids, labels) -> Batch:
    inputs, targets = torch.tensor(input_ids), torch.tensor(labels)
    counted = targets[targets != -100].numpy()
    return Batch(
        input_ids=inputs,
        labels=targets,
        reset_mask=inputs == 0,
        source_ids=torch.zeros_like(inputs, dtype=torch.int16),
        num_bytes=int(BYTES_OF_TOKEN[counted].sum()),
    )


def summed_nats(model: BigramModel, pairs: list[tuple[int, int]]) -> float:
    table = model.table.detach().double().numpy()
    return sum(
        float(np.log(np.exp(table[given]).sum()) - table[given, wanted]) for given, wanted in pairs
    )


def test_bits_per_byte_of_a_known_code():
    # 10 fair bits for 4 bytes.
    assert bits_per_byte(10 * math.log(2.0), 4) == pytest.approx(2.5, rel=1e-15)
    with pytest.raises(ValueError, match="at least one byte"):
        bits_per_byte(1.0, 0)


def test_result_equals_the_hand_computation_over_uneven_batches():
    model = BigramModel(seed=1)
    batches = [
        make_batch([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 0]]),
        make_batch([[0, 6, 0]], [[6, 1, -100]]),
    ]
    pairs = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 6), (6, 1)]
    nats = summed_nats(model, pairs)
    num_bytes = 1 + 2 + 3 + 1 + 4 + 0 + 2 + 1
    result = evaluate_bpb(model, batches, device="cpu")
    assert (result.num_tokens, result.num_bytes) == (8, num_bytes)
    assert result.loss == pytest.approx(nats / 8, rel=1e-6)
    assert result.bpb == pytest.approx(nats / math.log(2.0) / num_bytes, rel=1e-6)


def test_predicting_the_end_of_a_document_costs_bits_and_gives_no_bytes():
    model = BigramModel(seed=2)
    without = evaluate_bpb(model, [make_batch([[0, 1]], [[1, -100]])], device="cpu")
    with_end = evaluate_bpb(model, [make_batch([[0, 1]], [[1, 0]])], device="cpu")
    assert with_end.num_bytes == without.num_bytes == 1
    assert with_end.bpb == pytest.approx(without.bpb + summed_nats(model, [(1, 0)]) / math.log(2))


def test_the_split_into_batches_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, VOCAB, (12, 5), generator=generator)
    labels = torch.randint(0, VOCAB, (12, 5), generator=generator)
    labels[7:, 2:] = -100
    model = BigramModel(seed=3)
    results = []
    for size in (1, 5, 12):
        batches = [
            make_batch(inputs[first : first + size].tolist(), labels[first : first + size].tolist())
            for first in range(0, 12, size)
        ]
        results.append(evaluate_bpb(model, batches, device="cpu"))
    for other in results[1:]:
        assert (other.num_tokens, other.num_bytes) == (
            results[0].num_tokens,
            results[0].num_bytes,
        )
        assert other.bpb == pytest.approx(results[0].bpb, rel=1e-6)


def test_evaluation_is_deterministic_and_gives_every_module_its_mode_back():
    model = BigramModel(seed=4)
    batches = [make_batch([[0, 1, 2, 3]], [[1, 2, 3, 0]])]
    assert model.training and not model.frozen.training
    first = evaluate_bpb(model, batches, device="cpu")
    assert evaluate_bpb(model, batches, device="cpu") == first  # dropout would differ
    assert model.training and model.dropout.training and not model.frozen.training
    model.eval()
    assert evaluate_bpb(model, batches, device="cpu") == first
    assert not any(module.training for module in model.modules())


def test_mode_is_restored_when_a_batch_cannot_be_read():
    def broken():
        yield make_batch([[0, 1]], [[1, 2]])
        raise OSError("the text is gone")

    model = BigramModel(seed=5)
    with pytest.raises(OSError, match="gone"):
        evaluate_bpb(model, broken(), device="cpu")
    assert model.training and not model.frozen.training


def test_no_graph_is_kept_and_the_autocast_context_is_entered():
    entered = []

    class Recorder:
        def __enter__(self):
            entered.append(torch.is_grad_enabled())

        def __exit__(self, *error):
            return None

    batches = [make_batch([[0, 1]], [[1, 2]])] * 2
    evaluate_bpb(BigramModel(seed=6), batches, device="cpu", autocast=Recorder)
    assert entered == [False, False]


def test_nothing_to_predict_is_said_in_words():
    masked = [make_batch([[0, 1]], [[-100, -100]])]
    for batches in ([], masked):
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate_bpb(BigramModel(seed=7), batches, device="cpu")
