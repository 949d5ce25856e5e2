"""A row with an item in it: what the model sees, and what loss and gradients that gives."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.rl.small_learner import TOKENIZER, small_model
from training.replay.buffer import reference_items
from training.replay.injection import inject, item_loss
from training.rl.tasks import TaskSampler
from training.stream.batch import IGNORED_LABEL, Batch

ITEM = reference_items(TaskSampler(("add",), seed=1), TOKENIZER, count=1)[0]
SIZE = len(ITEM.tokens)


def batch_of(rows=3, length=24):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, TOKENIZER.vocab_size, (rows, length + 1), generator=generator)
    tokens[:, min(7, length - 1)] = TOKENIZER.end_id
    inputs = tokens[:, :-1].contiguous()
    return Batch(
        input_ids=inputs,
        labels=tokens[:, 1:].contiguous(),
        reset_mask=inputs == TOKENIZER.end_id,
        source_ids=torch.arange(rows * length, dtype=torch.int16).view(rows, length),
        num_bytes=rows * length,
    )


def test_only_row_0_changes_and_the_stream_s_batch_does_not():
    batch, before = batch_of(), batch_of()
    found = inject(batch, ITEM)
    names = ("input_ids", "labels", "reset_mask", "source_ids")
    for name in names:
        assert torch.equal(getattr(batch, name), getattr(before, name))
        assert torch.equal(getattr(found, name)[1:], getattr(before, name)[1:])
        assert torch.equal(getattr(found, name)[0, SIZE:], getattr(before, name)[0, :-SIZE]) or (
            name == "reset_mask"
        )
    assert tuple(found.input_ids[0, :SIZE].tolist()) == ITEM.tokens
    assert found.labels[0, :SIZE].eq(IGNORED_LABEL).all()
    resets = found.reset_mask[0].nonzero().flatten().tolist()
    assert resets == [0, SIZE, SIZE + 7]


def test_the_text_behind_an_item_is_read_as_if_the_row_began_there():
    """Nothing of the item reaches it, though no end-of-text token stands between them."""
    model = small_model().eval()
    batch = batch_of()
    found = inject(batch, ITEM)
    with torch.no_grad():
        plain = model(batch.input_ids, reset_mask=batch.reset_mask).hidden
        after = model(found.input_ids, reset_mask=found.reset_mask).hidden
    torch.testing.assert_close(after[0, SIZE:], plain[0, :-SIZE], rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_completion_alone_with_all_gradients():
    model = small_model().eval()
    found = inject(batch_of(), ITEM)
    loss = item_loss(model, model(found.input_ids, reset_mask=found.reset_mask).hidden, ITEM)
    loss.backward()
    ours = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()  # lets go of the gradients
    logits = model(torch.tensor([ITEM.tokens])).logits[0]
    first = len(ITEM.prompt) - 1
    wanted = F.cross_entropy(logits[first:-1], torch.tensor(ITEM.completion))
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for name, param in model.named_parameters():
        torch.testing.assert_close(ours[name], param.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_an_item_that_leaves_no_room_for_text_is_refused():
    inject(batch_of(length=SIZE + 1), ITEM)
    with pytest.raises(ValueError, match="does not fit"):
        inject(batch_of(length=SIZE), ITEM)
