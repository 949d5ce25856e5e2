"""Tasks of reasoning-gym are graded, repeatable and judged here; without it the flag is named."""

import random
import sys

import pytest

from training.rl.gym_tasks import GENERATORS, GYM_LEVELS, draw_gym
from training.rl.tasks import GYM, TaskSampler, draw_task, num_levels, split_of
from training.rl.verifier import Verifier


@pytest.fixture
def gym():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym")


@pytest.fixture
def verifier():
    opened = Verifier(code=False, timeout_ms=2500)
    yield opened
    opened.close()


def drawn(generator, level, *, count=4, seed=0):
    rng = random.Random(seed)
    return [draw_task(f"{GYM}{generator}", level=level, rng=rng) for _ in range(count)]


@pytest.mark.parametrize("generator", GENERATORS)
def test_its_own_solution_passes_and_nothing_else(generator, gym, verifier):
    for level in range(1, GYM_LEVELS + 1):
        tasks = drawn(generator, level)
        assert [(task.prompt, task.answer) for task in tasks] == [
            (task.prompt, task.answer) for task in drawn(generator, level)
        ]
        assert all(task.domain == "math" and task.level == level for task in tasks)
        assert not any(task.prompt.endswith(f"{task.answer}") for task in tasks)

        def passed(texts, tasks=tasks):
            judged = verifier.verify(tasks, texts, rng=random.Random(1))
            return [one.passed for one in judged]

        assert all(passed([task.solution for task in tasks]))
        assert not any(passed(["", "", "", ""])) and not any(passed([t.prompt for t in tasks]))
        assert not any(passed([f"{task.answer}0" for task in tasks]))


def test_levels_are_harder_and_splits_apart(gym):
    def length(level):
        tasks = drawn("chain_sum", level, count=30)
        return sum(len(task.prompt) for task in tasks)

    assert length(1) < length(2) < length(3)
    for split in ("train", "val", "test"):
        sampler = TaskSampler((f"{GYM}gcd",), split=split)
        assert {split_of(sampler.draw().prompt) for _ in range(5)} == {split}


def test_a_generator_that_is_not_offered_is_refused():
    with pytest.raises(ValueError, match=r"gym:sudoku: there are gym:\{basic_arithmetic"):
        num_levels(f"{GYM}sudoku")


def test_the_missing_package_is_named_with_the_flag(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(RuntimeError, match=r"pip install reasoning-gym==.*--ttrl-task-families"):
        draw_gym("gcd", level=1, rng=random.Random(0))
