"""Completions that passed, kept to be read again.

Reference solutions of training tasks open the buffer and stay, so that it is never empty; what the
model wrote later is dropped when it is old, or when there is no room, the oldest first. Equal texts
are kept once: a later one takes the place of an earlier. Tasks of the validation and test splits
are refused. Replay of a model's own successes: ExGRPO 2510.02245.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from training.rl.tasks import Task, TaskSampler, split_of

NUM_REFERENCES = 32
MAX_AGE_STEPS = 2000
DRAWS_PER_REFERENCE = 20  # levels with few tasks repeat themselves
RARE, COMMON = 1 / 3, 2 / 3


class Encoder(Protocol):
    """The part of a tokenizer that items need."""

    end_id: int

    def encode(self, text: str) -> list[int]: ...


@dataclass(slots=True, kw_only=True, frozen=True)
class ReplayItem:
    """A prompt, which opens with the end-of-text token, and a completion of it that passed.

    digest: of the normalised text. step: at which it was written. share: of its task's verified
    candidates that passed, None for a reference solution. mean_log_prob: nats per token when it was
    sampled, None where it is not known.
    """

    family: str
    level: int
    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    digest: str
    step: int = 0
    share: float | None = None
    mean_log_prob: float | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.completion

    @property
    def is_reference(self) -> bool:
        return self.share is None

    @property
    def cluster(self) -> str:
        """Items whose effect is estimated together: family, level, how often the task passes."""
        share = self.share
        if share is None:
            correctness = "reference"
        else:
            correctness = "rare" if share < RARE else "some" if share < COMMON else "most"
        return f"{self.family}/{self.level}/{correctness}"


class ReplayBuffer:
    """At most `capacity` items, no two of equal text, the oldest first."""

    def __init__(self, *, capacity: int, max_age: int = MAX_AGE_STEPS) -> None:
        if capacity < 1:
            raise ValueError("--replay-capacity must be at least 1")
        self.capacity = capacity
        self.max_age = max_age
        self._items: dict[str, ReplayItem] = {}

    def __len__(self) -> int:
        return len(self._items)

    @property
    def items(self) -> list[ReplayItem]:
        return list(self._items.values())

    def admit(self, item: ReplayItem) -> bool:
        """Keep the item as the newest; False when there is no room beside reference solutions, or
        its text is that of one."""
        known = self._items.get(item.digest)
        if known is not None and known.is_reference:
            return False
        self._items.pop(item.digest, None)
        if len(self._items) == self.capacity:
            oldest = next((own for own in self._items.values() if not own.is_reference), None)
            if oldest is None:
                return False
            del self._items[oldest.digest]
        self._items[item.digest] = item
        return True

    def expire(self, step: int) -> None:
        """Drop what was written more than `max_age` steps before."""
        old = [
            item.digest
            for item in self._items.values()
            if not item.is_reference and step - item.step > self.max_age
        ]
        for digest in old:
            del self._items[digest]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"items": [asdict(item) for item in self._items.values()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; of more items than there is room for now, the newest."""
        self._items = {}
        for saved in state["items"]:
            item = ReplayItem(
                **saved | {name: tuple(saved[name]) for name in ("prompt", "completion")}
            )
            self.admit(item)


def make_item(
    task: Task,
    *,
    prompt: list[int],
    completion: list[int],
    text: str,
    step: int = 0,
    share: float | None = None,
    mean_log_prob: float | None = None,
) -> ReplayItem:
    """The item of a completion `text`; ValueError for a task that is not for training."""
    if split_of(task.prompt) != "train":
        raise ValueError(f"the task {task.prompt!r} is not of the training split")
    return ReplayItem(
        family=task.family,
        level=task.level,
        prompt=tuple(prompt),
        completion=tuple(completion),
        digest=digest_of(task.prompt + text),
        step=step,
        share=share,
        mean_log_prob=mean_log_prob,
    )


def digest_of(text: str) -> str:
    """Hash of a text without regard to case and white space."""
    normalised = " ".join(text.casefold().split())
    return hashlib.blake2b(normalised.encode("utf-8"), digest_size=8).hexdigest()


def reference_items(
    sampler: TaskSampler, tokenizer: Encoder, *, count: int = NUM_REFERENCES
) -> list[ReplayItem]:
    """Distinct reference solutions, `count` unless the sampler knows fewer tasks."""
    found: dict[str, ReplayItem] = {}
    for _ in range(DRAWS_PER_REFERENCE * count):
        if len(found) == count:
            break
        task = sampler.draw()
        item = make_item(
            task,
            prompt=[tokenizer.end_id, *tokenizer.encode(task.prompt)],
            completion=tokenizer.encode(task.solution),
            text=task.solution,
        )
        found.setdefault(item.digest, item)
    return list(found.values())
