"""Tasks whose answers can be checked, graded by level, and a sampler that finds the right level.

A task is what the model reads, what a right answer is, and one completion that passes, which
reinforcement learning never shows. Tasks of the three splits are disjoint: the hash of its prompt
decides where a task belongs, whatever the seed. The level follows the pass rate on validation
tasks, so that some but not all completions pass (teacher-student curricula, 1707.00183).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from training.rl.arithmetic_tasks import OPERAND_DIGITS, SIGNS, draw_arithmetic
from training.rl.code_tasks import (
    EXPRESSION_LEVELS,
    FUNCTION_LEVELS,
    draw_expression,
    draw_function,
)
from training.rl.polynomials import SYMBOLIC_LEVELS, draw_symbolic
from training.rl.verdict import CodeTask

SPLITS = {"train": range(0, 80), "val": range(80, 90), "test": range(90, 100)}  # of 100 parts
LEVELS = {
    **dict.fromkeys(SIGNS, len(OPERAND_DIGITS)),
    "expression": EXPRESSION_LEVELS,
    "function": FUNCTION_LEVELS,
    "symbolic": SYMBOLIC_LEVELS,
}
FAMILIES = tuple(LEVELS)
CODE_FAMILIES = ("expression", "function")
GYM = "gym:"
LEVEL_MIX = (0.7, 0.2, 0.1)  # the current level, the one below, the one above
LEVEL_WINDOW = 64
RISE_ABOVE, FALL_BELOW = 0.7, 0.2
MAX_DRAWS = 10_000


@dataclass(slots=True, kw_only=True, frozen=True)
class Task:
    """`solution` is a completion of `prompt` that passes; `answer` is None for code."""

    family: str
    domain: str  # "math" or "code"
    level: int
    prompt: str
    answer: str | None
    code: CodeTask | None
    solution: str


def num_levels(family: str) -> int:
    """Levels are 1 to this; ValueError for an unknown family."""
    if family.startswith(GYM):
        from training.rl.gym_tasks import gym_levels

        return gym_levels(family.removeprefix(GYM))
    if family not in LEVELS:
        raise ValueError(f"no task family {family!r}: there are {', '.join(FAMILIES)} and gym:NAME")
    return LEVELS[family]


def draw_task(family: str, *, level: int, rng: random.Random) -> Task:
    """A task of the family at that level; ValueError for a family or level there is not."""
    if not 1 <= level <= num_levels(family):
        raise ValueError(f"{family} has levels 1 to {num_levels(family)}, not {level}")
    if family in CODE_FAMILIES:
        made = (draw_expression if family == "expression" else draw_function)(level=level, rng=rng)
        return Task(
            family=family,
            domain="code",
            level=level,
            prompt=made.prompt,
            answer=None,
            code=made.code,
            solution=made.solution,
        )
    if family.startswith(GYM):
        from training.rl.gym_tasks import draw_gym

        prompt, answer = draw_gym(family.removeprefix(GYM), level=level, rng=rng)
    elif family == "symbolic":
        prompt, answer = draw_symbolic(level=level, rng=rng)
    else:
        prompt, answer = draw_arithmetic(family, level=level, rng=rng)
    return Task(
        family=family,
        domain="math",
        level=level,
        prompt=prompt,
        answer=answer,
        code=None,
        solution=f"{answer}\n",
    )


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to, the same in every run."""
    digest = hashlib.blake2b(prompt.encode("utf-8"), digest_size=8).digest()
    part = int.from_bytes(digest, "little") % 100
    return next(name for name, parts in SPLITS.items() if part in parts)


class TaskSampler:
    """Draws tasks of one split and follows the level of each family; exact after a resume.

    The level is that of the training sampler: validation tasks are drawn by another sampler with
    `draw(family=..., level=...)` and what came of them is told to `observe_val`.
    """

    def __init__(self, families: Sequence[str], *, split: str = "train", seed: int = 0) -> None:
        if not families:
            raise ValueError("no task family is left: enable math or code tasks")
        if split not in SPLITS:
            raise ValueError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        self.families = tuple(families)
        self.split = split
        self._seed = seed
        self._max_levels = {family: num_levels(family) for family in self.families}
        self._levels = dict.fromkeys(self.families, 1)
        self._recent: dict[str, list[bool]] = {family: [] for family in self.families}
        self._num_draws = 0

    def draw(self, *, family: str | None = None, level: int | None = None) -> Task:
        """The next task: of a random family at its level mix, or as asked for."""
        rng = random.Random(f"{self._seed} {self.split} {self._num_draws}")
        self._num_draws += 1
        chosen = rng.choice(self.families) if family is None else family
        wanted = self._mixed_level(chosen, rng) if level is None else level
        for _ in range(MAX_DRAWS):
            task = draw_task(chosen, level=wanted, rng=rng)
            if split_of(task.prompt) == self.split:
                return task
        raise ValueError(f"{chosen} at level {wanted} has no task in the split {self.split}")

    def observe_val(self, family: str, passed: Sequence[bool]) -> None:
        """Validation verdicts at the family's level; 64 of them may move it by one."""
        for verdict in passed:
            recent = self._recent[family]
            recent.append(bool(verdict))
            if len(recent) < LEVEL_WINDOW:
                continue
            rate = sum(recent) / len(recent)
            change = (rate > RISE_ABOVE) - (rate < FALL_BELOW)
            level = self._levels[family] + change
            self._levels[family] = min(max(level, 1), self._max_levels[family])
            recent.clear()

    def level(self, family: str) -> int:
        """Between 1 and the family's number of levels; KeyError for a family that is not drawn."""
        return self._levels[family]

    def mean_level(self) -> float:
        """The metric verifier_task_level."""
        return sum(self._levels.values()) / len(self._levels)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "families": list(self.families),
            "split": self.split,
            "seed": self._seed,
            "num_draws": self._num_draws,
            "levels": dict(self._levels),
            "recent": {family: list(recent) for family, recent in self._recent.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError for the state of a sampler that draws other tasks."""
        for name, own in (
            ("families", list(self.families)),
            ("split", self.split),
            ("seed", self._seed),
        ):
            if state[name] != own:
                raise ValueError(f"the saved tasks have {name} {state[name]}, these {own}")
        self._num_draws = int(state["num_draws"])
        self._levels = {family: int(state["levels"][family]) for family in self.families}
        self._recent = {family: list(state["recent"][family]) for family in self.families}

    def _mixed_level(self, family: str, rng: random.Random) -> int:
        step = rng.choices((0, -1, 1), weights=LEVEL_MIX)[0]
        return min(max(self._levels[family] + step, 1), self._max_levels[family])
