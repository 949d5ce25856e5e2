"""The questions of the hidden evaluation, drawn from a seed: eight families of four choices each.

Small models can be measured by ranking: which of four continuations is likeliest after a prompt?
Families are made so that a model that ignores the prompt stays at chance (25 %): either each of the
same four continuations is the true one equally often, or the true one is drawn from words that the
prompt itself holds. Every prompt opens with a random scene, so that its thirteen-word passages
occur nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

NUM_CHOICES = 4
GENERATOR_VERSION = "sigma-hidden-1"

NAMES = (
    "Anna Peter Mary John Ruth David Sarah Thomas Helen James Martha Simon Clara Paul Laura "
    "Mark Esther Jacob Alice Henry"
).split()
PLACES = (
    "garden river market temple house city village field harbour kitchen library tower bridge "
    "forest valley street mill station"
).split()
ADJECTIVES = (
    "old small great quiet dark bright heavy narrow broken simple strange golden empty warm cold "
    "careful distant gentle"
).split()
NOUNS = (
    "stone lamp table book letter key coin bell boat chair wheel cloak basket mirror window hammer "
    "ladder drum rope needle bottle blanket candle pillow"
).split()
NUMBERS = "two three four five six seven eight nine ten twelve".split()
OPENINGS = ("In", "Near", "Behind", "Beside", "Beyond")
FINDINGS = ("saw", "found", "kept", "left", "sold", "counted", "carried", "cleaned")
VERBS = (
    "go goes going gone|take takes taking taken|give gives giving given|see sees seeing seen|"
    "write writes writing written|eat eats eating eaten|know knows knowing known|"
    "speak speaks speaking spoken|break breaks breaking broken|fall falls falling fallen|"
    "hide hides hiding hidden|draw draws drawing drawn|show shows showing shown|"
    "choose chooses choosing chosen|drive drives driving driven"
).split("|")
FORM_FRAMES = (
    ("did not", "wanted to", "must", "will"),
    ("who every day", "that always", "who often"),
    ("was still", "is now", "kept on"),
    ("had already", "has never", "had just"),
)
PRONOUNS = {
    "himself": "king man boy father brother prince".split(),
    "herself": "queen woman girl mother sister princess".split(),
    "itself": "house river city stone tree ship".split(),
    "themselves": "kings women children brothers soldiers people".split(),
}
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}

T = TypeVar("T")


@dataclass(slots=True, kw_only=True, frozen=True)
class HiddenItem:
    """A prompt, its four continuations in drawn order, and which of them is true."""

    family: str
    prompt: str
    choices: tuple[str, ...]
    truth: int


class Draw:
    """Random numbers that depend on the seed alone, on every version of Python."""

    def __init__(self, seed: bytes) -> None:
        self._seed = seed
        self._counter = 0

    def below(self, limit: int) -> int:
        """In [0, limit); the remainder of 512 bits, whose bias is far below what could be seen."""
        self._counter += 1
        digest = hashlib.blake2b(self._counter.to_bytes(8, "little"), key=self._seed).digest()
        return int.from_bytes(digest, "little") % limit

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different places of `options` in random order, which stays as it is."""
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]

    def salt(self) -> bytes:
        """16 bytes."""
        return bytes(self.below(256) for _ in range(16))


def generate_items(seed: bytes, count: int) -> list[HiddenItem]:
    """`count` different items, the families in turn; `seed` has 32 bytes."""
    draw = Draw(seed)
    families = tuple(FAMILIES.items())
    items: list[HiddenItem] = []
    known: set[str] = set()
    while len(items) < count:
        name, make = families[len(items) % len(families)]
        prompt, choices, truth = make(draw)
        if prompt in known:
            continue
        known.add(prompt)
        order = draw.sample(range(NUM_CHOICES), NUM_CHOICES)
        items.append(
            HiddenItem(
                family=name,
                prompt=prompt,
                choices=tuple(f" {choices[index]}" for index in order),
                truth=order.index(truth),
            )
        )
    return items


def scene(draw: Draw) -> str:
    """Nine random words or more: the start of every prompt."""
    return (
        f"{draw.pick(OPENINGS)} the {draw.pick(ADJECTIVES)} {draw.pick(PLACES)} "
        f"{draw.pick(NAMES)} {draw.pick(FINDINGS)} {draw.pick(NUMBERS)} {draw.pick(ADJECTIVES)} "
        f"{draw.pick(NOUNS)}s"
    )


Question = tuple[str, Sequence[str], int]


def being(draw: Draw) -> Question:
    truth = draw.below(NUM_CHOICES)
    thing = f"the {draw.pick(ADJECTIVES)} {draw.pick(NOUNS)}"
    subject = ("I", thing, f"{thing}s", f"{thing} must")[truth]
    said = f"and {draw.pick(NAMES)} said that in the {draw.pick(PLACES)}"
    return f"{scene(draw)}, {said} {subject}", ("am", "is", "are", "be"), truth


def verb_form(draw: Draw) -> Question:
    truth = draw.below(NUM_CHOICES)
    # "draw" begins "drawing": only the word behind tells a model that the form is complete.
    forms = [f"{form} again" for form in draw.pick(VERBS).split()]
    person = f"the {draw.pick(ADJECTIVES)} man from the {draw.pick(PLACES)}"
    return f"{scene(draw)}, and {person} {draw.pick(FORM_FRAMES[truth])}", forms, truth


def reflexive(draw: Draw) -> Question:
    truth = draw.below(NUM_CHOICES)
    words = tuple(PRONOUNS)
    owner = f"the {draw.pick(ADJECTIVES)} {draw.pick(PRONOUNS[words[truth]])}"
    return f"{scene(draw)}, and after that {owner} could not save", words, truth


def retrieval(draw: Draw) -> Question:
    names, things = draw.sample(NAMES, NUM_CHOICES), draw.sample(NOUNS, NUM_CHOICES)
    truth = draw.below(NUM_CHOICES)
    facts = " ".join(f"{name} has the {thing}." for name, thing in zip(names, things, strict=True))
    return f"{scene(draw)}. {facts} Yes, {names[truth]} has the", things, truth


def induction(draw: Draw) -> Question:
    words = draw.sample(NOUNS, 8)
    # The last word is never the true one: it stands nearest and would be found without order.
    start = draw.below(3)
    listed, again = " ".join(words), " ".join(words[start : start + 3])
    others = [w for i, w in enumerate(words) if not start <= i <= start + 3]
    choices = [words[start + 3], *draw.sample(others, NUM_CHOICES - 1)]
    return f"{scene(draw)}: {listed}. Again: {listed}. Again: {again}", choices, 0


def succession(draw: Draw) -> Question:
    step, first = draw.pick((1, 1, 2, 5, 10)), 1 + draw.below(60)
    listed = [first + step * place for place in range(8)]
    truth = draw.below(NUM_CHOICES)
    following = first + step * 8
    choices = [str(following + place - truth) for place in range(NUM_CHOICES)]
    return f"{scene(draw)}: " + "".join(f"{number}, " for number in listed)[:-1], choices, truth


def word_order(draw: Draw) -> Question:
    words = (
        f"the {draw.pick(ADJECTIVES)} {draw.pick(NOUNS)} stood in the {draw.pick(PLACES)}"
    ).split()
    choices = [" ".join(words)]
    while len(choices) < NUM_CHOICES:
        other = " ".join(draw.sample(words, len(words)))
        if other not in choices and "stood in the" not in other:
            choices.append(other)
    return f"{scene(draw)}, and then, as {draw.pick(NAMES)} saw,", choices, 0


def brackets(draw: Draw) -> Question:
    openers = tuple(BRACKETS)
    truth = draw.below(NUM_CHOICES)
    inner = draw.pick([opener for opener in openers if opener != openers[truth]])
    a, b, c, d = draw.sample(NOUNS, 4)
    text = f"{openers[truth]} {a} {b} {inner} {c} {BRACKETS[inner]} {d}"
    return f"{scene(draw)}: {text}", tuple(BRACKETS.values()), truth


FAMILIES: dict[str, Callable[[Draw], Question]] = {
    "being": being,
    "verb_form": verb_form,
    "reflexive": reflexive,
    "retrieval": retrieval,
    "induction": induction,
    "succession": succession,
    "word_order": word_order,
    "brackets": brackets,
}
