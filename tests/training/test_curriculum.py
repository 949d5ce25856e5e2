"""The sequence-length curriculum cuts rows; it neither drops nor reorders tokens."""

import pytest
import torch

from training.curriculum import sequence_divisor, shorten_rows
from training.data import Batch


def test_levels_follow_the_fractions():
    levels = [
        sequence_divisor(step, total_steps=100, boundaries=(0.15, 0.40)) for step in range(1, 101)
    ]
    assert levels == [4] * 15 + [2] * 25 + [1] * 60


def test_rows_are_cut_in_place():
    ids = torch.arange(16).reshape(2, 8)
    batch = Batch(
        input_ids=ids, labels=ids + 1, reset_mask=ids % 5 == 0, source_ids=ids * 0, num_bytes=9
    )
    short = shorten_rows(batch, 4)
    assert short.input_ids.shape == (8, 2) and short.num_bytes == 9
    for name in ("input_ids", "labels", "reset_mask", "source_ids"):
        assert torch.equal(getattr(short, name).flatten(), getattr(batch, name).flatten())


def test_an_odd_length_names_the_flag():
    ids = torch.zeros(1, 6, dtype=torch.long)
    batch = Batch(input_ids=ids, labels=ids, reset_mask=ids == 1, source_ids=ids, num_bytes=0)
    with pytest.raises(ValueError, match="--curriculum-phases"):
        shorten_rows(batch, 4)
