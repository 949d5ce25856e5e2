"""The menu of a start without arguments and without an args file: which profile shall run?

Plain text and plain functions: what reads a line and what shows one is passed in, so that the
countdown needs no terminal to be tested. The default is taken when nobody answers, because a
double-click must lead somewhere.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.config.args_file import read_text
from training.config.fields import ConfigError

DEFAULT_PROFILE = "quickstart"
COUNTDOWN_S = 10.0
QUIT = ("q", "quit", "exit")
DESCRIPTION_CHARS = 55  # with its name on one line of a narrow console


@dataclass(slots=True, kw_only=True, frozen=True)
class Profile:
    """An args file that can be chosen; `description` is its first comment."""

    path: Path
    description: str

    @property
    def name(self) -> str:
        return self.path.stem


def list_profiles(directory: Path) -> list[Profile]:
    """The args files in `directory`, the default first, the others by name; [] without any."""
    paths = sorted(directory.glob("*.txt"), key=lambda path: (path.stem != DEFAULT_PROFILE, path))
    return [Profile(path=path, description=describe(path)) for path in paths if path.is_file()]


def describe(path: Path) -> str:
    """The first comment of an args file, or why it cannot be read."""
    try:
        lines = read_text(path).splitlines()
    except ConfigError as error:
        return str(error)
    comments = (line.lstrip("# ").rstrip() for line in lines if line.startswith("#"))
    return textwrap.shorten(next(filter(None, comments), ""), DESCRIPTION_CHARS, placeholder=" ...")


def choose_profile(
    profiles: Sequence[Profile],
    *,
    read_line: Callable[[float | None], str | None],
    show: Callable[[str], None],
    countdown_s: float = COUNTDOWN_S,
) -> Profile | None:
    """Let a person choose; None when they would rather not.

    read_line: the next typed line, None when nothing came within the given seconds (None = wait
    for ever), EOFError at the end of input. The first profile is taken by Enter and by waiting.
    """
    width = max(len(profile.name) for profile in profiles)
    for number, profile in enumerate(profiles, start=1):
        show(f"  {number}  {profile.name:{width}}  {profile.description}".rstrip())
    show("  q  quit")
    show(f"Number or name, then Enter; {profiles[0].name} starts in {countdown_s:.0f} s.")
    limit: float | None = countdown_s
    while True:
        try:
            answer = read_line(limit)
        except EOFError:
            return None
        if answer is None or not answer.strip():
            return profiles[0]
        answer = answer.strip().lower()
        if answer in QUIT:
            return None
        chosen = _find(profiles, answer)
        if chosen is not None:
            return chosen
        show(f"{answer[:40]!r} is none of them: 1 to {len(profiles)}, a name, or q")
        limit = None  # somebody is there


def _find(profiles: Sequence[Profile], answer: str) -> Profile | None:
    for number, profile in enumerate(profiles, start=1):
        if answer in (str(number), profile.name.lower()):
            return profile
    return None
