"""What the adapter of a domain practises on, and what its rewards are.

Math and code are the generated tasks of reinforcement learning, judged by the strict verifier.
Text has two kinds of items. A cloze asks for a word that its passage has used before; there is one
right answer, so it is verified. A continuation has none: what it says is compared with how the text
went on, and since no verifier stands behind that number it is capped, so that no amount of overlap
is worth what a verified answer is. Gates look at cloze items only.

Items to learn from and items of the gate are of different prompts and different documents. The
language model may have read either; both versions that a gate compares have it in common.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from training.rl.tasks import Task, TaskSampler, num_levels
from training.rl.verifier import Verifier

CONTEXT_CHARS = 160
CONTINUATION_CHARS = 60
CLOZE_SHARE = 0.5
WORD = re.compile(r"[A-Za-z]{4,}")
VAL_PART, PARTS = 9, 10  # one document of ten is for gates
MAX_DRAWS = 1000


@dataclass(slots=True, kw_only=True, frozen=True)
class Item:
    """prompt: what the model reads. solution: a completion that earns `solution_reward`. task: what
    the source judges by."""

    prompt: str
    solution: str
    solution_reward: float
    task: Any


class Source(Protocol):
    """Items of one domain."""

    def draw(self) -> Item:
        """The next item to practise on, which follows from settings and state alone."""
        ...

    def gate_items(self, count: int) -> list[Item]:
        """The same distinct items at every call, never among those drawn."""
        ...

    def rewards(
        self, items: Sequence[Item], texts: Sequence[str], *, rng: random.Random
    ) -> list[float]:
        """In [0, 1]; 1 = verified to be right."""
        ...

    def observe(self, items: Sequence[Item], rewards: Sequence[float]) -> None:
        """What came of items that were drawn, for the choice of later ones."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where `draw` goes on, as small plain values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on drawing where a source of the same settings was."""
        ...

    def close(self) -> None:
        """End the processes that judge; called once."""
        ...


class TaskSource:
    """Generated tasks. Levels follow the verdicts on what was drawn at the present level; gates ask
    the lowest three levels of every family, in turn."""

    GATE_LEVELS = (1, 2, 3)

    def __init__(self, sampler: TaskSampler, val_sampler: TaskSampler, verifier: Verifier) -> None:
        self._sampler, self._val_sampler = sampler, val_sampler
        self._verifier = verifier

    def draw(self) -> Item:
        return _task_item(self._sampler.draw())

    def gate_items(self, count: int) -> list[Item]:
        start = self._val_sampler.state_dict()
        families = self._val_sampler.families
        asked = itertools.cycle(
            [(f, level) for level in self.GATE_LEVELS for f in families if level <= num_levels(f)]
        )

        def draw() -> Item:
            family, level = next(asked)
            return _task_item(self._val_sampler.draw(family=family, level=level))

        found = _distinct(draw, count)
        self._val_sampler.load_state_dict(start)
        return found

    def rewards(
        self, items: Sequence[Item], texts: Sequence[str], *, rng: random.Random
    ) -> list[float]:
        judged = self._verifier.verify([item.task for item in items], texts, rng=rng)
        return [float(judgement.passed) for judgement in judged]

    def observe(self, items: Sequence[Item], rewards: Sequence[float]) -> None:
        for item, reward in zip(items, rewards, strict=True):
            task: Task = item.task
            if task.level == self._sampler.level(task.family):
                self._sampler.observe_val(task.family, [reward == 1.0])

    def state_dict(self) -> dict[str, Any]:
        return self._sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        self._verifier.close()


def _task_item(task: Task) -> Item:
    return Item(prompt=task.prompt, solution=task.solution, solution_reward=1.0, task=task)


def _distinct(draw: Callable[[], Item], count: int) -> list[Item]:
    """`count` items of different prompts, fewer where 1,000 draws in a row bring nothing new."""
    found: dict[str, Item] = {}
    repeats = 0
    while len(found) < count and repeats < MAX_DRAWS:
        item = draw()
        repeats = repeats + 1 if item.prompt in found else 0
        found.setdefault(item.prompt, item)
    return list(found.values())


@dataclass(slots=True, kw_only=True, frozen=True)
class Passage:
    """A piece of text and how it goes on. word: what a cloze asks for, None = a continuation."""

    text: str
    following: str
    word: str | None


class TextSource:
    """Passages of documents, `read(number)` of `count`. cap: most that a continuation can earn."""

    def __init__(self, read: Callable[[int], str], count: int, *, cap: float, seed: int) -> None:
        self._read, self._cap, self._seed = read, cap, seed
        parts = [_part(number) for number in range(count)]
        self._train = [n for n, part in enumerate(parts) if part != VAL_PART]
        self._val = [n for n, part in enumerate(parts) if part == VAL_PART]
        if not self._train or not self._val:
            raise ValueError(
                f"--hydra-domains text: {count} documents are too few to hold some out"
            )
        self._num_draws = 0

    def draw(self) -> Item:
        rng = random.Random(f"{self._seed} text {self._num_draws}")
        self._num_draws += 1
        return self._draw(rng, self._train, cloze=rng.random() < CLOZE_SHARE)

    def gate_items(self, count: int) -> list[Item]:
        rng = random.Random(f"{self._seed} text gate")
        return _distinct(lambda: self._draw(rng, self._val, cloze=True), count)

    def rewards(
        self, items: Sequence[Item], texts: Sequence[str], *, rng: random.Random
    ) -> list[float]:
        return [
            passage_reward(item.task, text, cap=self._cap)
            for item, text in zip(items, texts, strict=True)
        ]

    def observe(self, items: Sequence[Item], rewards: Sequence[float]) -> None:
        """Text has no levels."""

    def state_dict(self) -> dict[str, Any]:
        return {"num_draws": self._num_draws}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_draws = state["num_draws"]

    def close(self) -> None:
        """Nothing is held."""

    def _draw(self, rng: random.Random, numbers: Sequence[int], *, cloze: bool) -> Item:
        for _ in range(MAX_DRAWS):
            passage = draw_passage(self._read(rng.choice(numbers)), rng, cloze=cloze)
            if passage is not None:
                reward = 1.0 if passage.word else min(1.0, self._cap)
                solution = passage.following
                return Item(
                    prompt=passage.text, solution=solution, solution_reward=reward, task=passage
                )
        raise ValueError("--hydra-domains text: no document has a passage to ask about")


def _part(number: int) -> int:
    digest = hashlib.blake2b(f"document {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % PARTS


def draw_passage(text: str, rng: random.Random, *, cloze: bool) -> Passage | None:
    """A passage of a text of one line or more; None where the text has none.

    A cloze ends before a word of four letters or more that stands in the passage already.
    """
    if not cloze:
        if len(text) < CONTEXT_CHARS + CONTINUATION_CHARS:
            return None
        start = rng.randrange(len(text) - CONTEXT_CHARS - CONTINUATION_CHARS + 1)
        end = start + CONTEXT_CHARS
        following = text[end : end + CONTINUATION_CHARS].partition("\n")[0]
        if len(following.split()) < 3:
            return None
        return Passage(text=text[start:end], following=following, word=None)
    places = [
        match
        for match in WORD.finditer(text, min(len(text), CONTEXT_CHARS))
        if text[match.start() - 1] == " "
        and match[0] in text[match.start() - CONTEXT_CHARS : match.start() - 1].split()
    ]
    if not places:
        return None
    place = rng.choice(places)
    before = text[place.start() - CONTEXT_CHARS : place.start() - 1]
    return Passage(text=before, following=f" {place[0]}", word=place[0])


def passage_reward(passage: Passage, said: str, *, cap: float) -> float:
    """1 or 0 for the word of a cloze; for a continuation its overlap, at most `cap`."""
    if passage.word is None:
        return min(overlap(passage.following, said), cap)
    first = WORD.search(said.partition("\n")[0])
    return float(
        first is not None and first[0] == passage.word and not said[: first.start()].strip()
    )


def overlap(expected: str, said: str) -> float:
    """F1 of the words of two texts, 0 to 1, of `said` as many as are expected."""
    one = Counter(expected.lower().split())
    two = Counter(said.lower().split()[: one.total()])
    common = (one & two).total()
    return 2.0 * common / (one.total() + two.total()) if common else 0.0
