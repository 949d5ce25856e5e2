"""The world of the RL experiment: what its text says, what is held out, how gains are stated."""

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from scripts.rl_learns import ARMS, Arm, reinforce, run_arm, summarize, supervise
from scripts.rl_text import (
    COMMON_SLIP,
    FAMILIES,
    FURTHER,
    LEVELS,
    MISLED,
    MISLED_SLIP,
    MORE,
    PRODUCTS,
    SLIP_SHARE,
    TORN,
    FixedLevels,
    byte_tokenizer,
    held_out_tasks,
    new_model,
    solution_rows,
    written_answer,
)
from training.rl.tasks import draw_task

TOKENIZER = byte_tokenizer()


def test_the_text_errs_as_often_as_it_says():
    rng = random.Random(0)
    task = draw_task("add", level=2, rng=rng)
    answers = Counter(written_answer(task, rng) for _ in range(4000))
    assert answers[task.answer or ""] / 4000 == pytest.approx(1.0 - SLIP_SHARE, abs=0.03)
    assert answers.most_common(1)[0][0] == task.answer


@pytest.mark.parametrize(
    ("family", "text", "slip", "clear"),
    [
        (PRODUCTS, MORE, COMMON_SLIP, False),
        ("add", MISLED, MISLED_SLIP, True),
        ("add", TORN, MISLED_SLIP, False),
    ],
)
def test_where_the_majority_is_wrong_the_right_answer_comes_second(family, text, slip, clear):
    rng = random.Random(0)
    task = draw_task(family, level=1, rng=rng)
    misled = FURTHER[text][1]
    answers = Counter(written_answer(task, rng, misled=misled) for _ in range(4000))
    (top, votes), (second, _) = answers.most_common(2)
    assert (top, second) == (str(int(task.answer or "") + slip), task.answer)
    assert (votes > 2000) == clear


def test_what_is_examined_is_not_trained_on():
    for family in FAMILIES:
        examined = {task.prompt for task in held_out_tasks(family)}
        sampler = FixedLevels((family,), seed=3)
        trained = {sampler.draw().prompt for _ in range(1500)}
        assert len(examined) > 60 and len(trained) > 400
        assert not examined & trained
        assert all(task.level == LEVELS[family] for task in held_out_tasks(family))


def test_solutions_are_learned_and_prompts_are_not():
    task = draw_task("add", level=2, rng=random.Random(1))
    inputs, labels = solution_rows(TOKENIZER, [task])
    learned = labels[labels >= 0].tolist()
    assert TOKENIZER.decode(learned) == task.solution
    assert TOKENIZER.decode(inputs[0].tolist()).startswith(task.prompt)


def test_arms_train_and_are_examined(monkeypatch):
    monkeypatch.setattr("scripts.rl_learns.scores_of", lambda *args: {})
    for name, arm in ARMS.items():
        monkeypatch.setitem(ARMS, name, replace(arm, ticks=1, tasks=4))
    for name in ("verifier", "random", "majority"):
        model = new_model(0, TOKENIZER)
        before = [param.detach().clone() for param in model.parameters()]
        found = run_arm(name, model, TOKENIZER, seed=0, budget_s=0.0)
        assert found["cpu_s"] > 0.0 and set(found) == {"curve", "cpu_s", "wall_s", "scores"}
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        assert moved or name != "random"
    assert supervise(new_model(0, TOKENIZER), TOKENIZER, seconds=0.2, seed=0) >= 1


def test_a_run_is_repeated_to_the_bit():
    ends = []
    for _ in range(2):
        model = new_model(1, TOKENIZER)
        arm = Arm(settings=ARMS["random"].settings, tasks=2, ticks=2)
        reinforce(model, TOKENIZER, arm, seed=1)
        ends.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_gains_are_paired_over_seeds():
    def score(value):
        return {name: {"sampled": value, "greedy": value, "majority": value} for name in FAMILIES}

    seeds = {
        str(seed): {"start": score(start), "arms": {"verifier": {"scores": score(end)}}}
        for seed, (start, end) in enumerate([(0.2, 0.4), (0.3, 0.6), (0.4, 0.5)])
    }
    rows = summarize(seeds)
    assert len(rows) == 2 * 3 and {row["arm"] for row in rows} == {"verifier"}
    assert rows[0]["gain"] == pytest.approx(0.2) and rows[0]["seeds"] == 3
    low, high = rows[0]["interval"]
    # Student over 0.2, 0.3, 0.1: 4.303 x 0.1 / sqrt(3)
    assert (low, high) == (pytest.approx(0.2 - 0.2484, abs=1e-3), pytest.approx(0.4484, abs=1e-3))
