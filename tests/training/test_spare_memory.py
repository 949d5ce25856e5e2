"""Work beside training is done with fewer rows when memory is short, and other errors are not."""

import pytest
import torch

from training.spare_memory import within_memory


def limited(most, asked):
    def work(rows):
        asked.append(rows)
        if rows > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows

    return work


def test_rows_are_halved_until_they_fit():
    asked, said = [], []
    assert within_memory(limited(3, asked), rows=13, what="evaluation", say=said.append) == 3
    assert asked == [13, 6, 3] and len(said) == 2 and "evaluation" in said[0]


def test_what_does_not_fit_at_all_is_left_out_and_said():
    asked, said = [], []
    assert within_memory(limited(0, asked), rows=4, what="sample", say=said.append) is None
    assert asked == [4, 2, 1] and "left out" in said[-1]


def test_another_error_is_not_taken_for_short_memory():
    def work(rows):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="size mismatch"):
        within_memory(work, rows=4, what="evaluation", say=print)
