"""The buffer of completions that passed: no text twice, one split, never empty, exact state."""

import json
from dataclasses import replace

import pytest

from tests.training.rl.small_learner import TOKENIZER
from training.replay.buffer import (
    ReplayBuffer,
    digest_of,
    make_item,
    reference_items,
)
from training.rl.tasks import TaskSampler, split_of

FAMILIES = ("add", "subtract", "multiply", "expression", "function")
REFERENCES = reference_items(TaskSampler(FAMILIES, seed=3), TOKENIZER)


def written(number: int, *, step: int = 0):
    """An item of the model's own."""
    return replace(REFERENCES[0], digest=f"{number}", step=step, share=0.5, mean_log_prob=-1.0)


def test_references_are_distinct_solutions_of_training_tasks():
    assert len(REFERENCES) == len({item.digest for item in REFERENCES}) == 32
    assert {item.family for item in REFERENCES} == set(FAMILIES)
    for item in REFERENCES:
        assert item.prompt[0] == TOKENIZER.end_id
        assert split_of(TOKENIZER.decode(item.prompt[1:])) == "train"
        assert item.is_reference and item.cluster.endswith("/reference")
    sums = [TOKENIZER.decode(i.tokens[1:]) for i in REFERENCES if i.family == "add"]
    assert all(eval_sum(text) for text in sums)


def eval_sum(text: str) -> bool:
    question, answer = text.split("=")
    return sum(map(int, question.split("+"))) == int(answer)


@pytest.mark.parametrize("split", ["val", "test"])
def test_tasks_of_other_splits_are_refused(split):
    task = TaskSampler(("add",), split=split, seed=0).draw()
    with pytest.raises(ValueError, match="not of the training split"):
        make_item(task, prompt=[0, 1], completion=[2], text="3\n")


def test_equal_texts_are_kept_once_and_the_later_one_stays():
    buffer = ReplayBuffer(capacity=8)
    assert digest_of("1+2=3\n") == digest_of(" 1+2=3") == digest_of("1+2=3") != digest_of("1+2=4")
    assert digest_of("Return X") == digest_of("return  x")
    for step in (1, 2, 3):
        assert buffer.admit(written(7, step=step))
    assert [item.step for item in buffer.items] == [3]
    reference = REFERENCES[0]
    buffer.admit(reference)
    assert not buffer.admit(replace(written(0), digest=reference.digest))
    assert reference in buffer.items and len(buffer) == 2


def test_the_oldest_make_room_but_references_stay():
    buffer = ReplayBuffer(capacity=34)
    for item in REFERENCES:
        buffer.admit(item)
    for number in range(5):
        assert buffer.admit(written(number))
    assert [item.digest for item in buffer.items[32:]] == ["3", "4"]
    assert buffer.items[:32] == REFERENCES
    full = ReplayBuffer(capacity=2)
    assert [full.admit(item) for item in REFERENCES[:3]] == [True, True, False]
    assert not full.admit(written(1))


def test_what_is_old_goes_and_references_do_not():
    buffer = ReplayBuffer(capacity=8, max_age=10)
    buffer.admit(REFERENCES[0])
    buffer.admit(written(1, step=5))
    buffer.admit(written(2, step=6))
    buffer.expire(15)
    assert [item.step for item in buffer.items] == [0, 5, 6]
    buffer.expire(16)
    assert [item.step for item in buffer.items] == [0, 6]
    buffer.expire(10**6)
    assert buffer.items == REFERENCES[:1]


def test_clusters_are_family_level_and_how_often_the_task_passes():
    names = [replace(REFERENCES[0], share=share).cluster for share in (None, 0.0, 0.2, 0.5, 1.0)]
    kind = f"{REFERENCES[0].family}/{REFERENCES[0].level}/"
    assert names == [kind + end for end in ("reference", "rare", "rare", "some", "most")]


def test_the_state_is_exact_and_plain():
    buffer = ReplayBuffer(capacity=40)
    for item in (*REFERENCES, written(1, step=9), written(2, step=8)):
        buffer.admit(item)
    state = json.loads(json.dumps(buffer.state_dict()))
    again = ReplayBuffer(capacity=40)
    again.admit(written(99))
    again.load_state_dict(state)
    assert again.items == buffer.items
    smaller = ReplayBuffer(capacity=33)
    smaller.load_state_dict(state)
    assert smaller.items == [*REFERENCES, written(2, step=8)]


def test_a_buffer_without_room_is_refused():
    with pytest.raises(ValueError, match="--replay-capacity"):
        ReplayBuffer(capacity=0)
