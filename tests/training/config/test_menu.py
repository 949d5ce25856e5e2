"""The menu leads somewhere whatever is typed, and takes its default when nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.config.cli import parse_args
from training.config.menu import COUNTDOWN_S, Profile, choose_profile, list_profiles

PROJECT = Path(__file__).parents[3]
PROFILES = [
    Profile(path=Path(f"profiles/{name}.txt"), description=f"the {name}")
    for name in ("quickstart", "Perf", "proof")
]


class Person:
    """Types the given lines in turn; None = types nothing for as long as is waited."""

    def __init__(self, *lines: str | None) -> None:
        self.lines = list(lines)
        self.limits: list[float | None] = []
        self.shown: list[str] = []

    def read(self, seconds: float | None) -> str | None:
        self.limits.append(seconds)
        if not self.lines:
            raise EOFError
        line = self.lines.pop(0)
        assert line is not None or seconds is not None, "would wait for ever"
        return line

    def choose(self) -> str | None:
        chosen = choose_profile(PROFILES, read_line=self.read, show=self.shown.append)
        return chosen.name if chosen else None


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        ([None], "quickstart"),
        ([""], "quickstart"),
        (["  "], "quickstart"),
        (["1"], "quickstart"),
        (["2"], "Perf"),
        ([" 3 "], "proof"),
        (["proof"], "proof"),
        (["PERF"], "Perf"),
        (["q"], None),
        (["Quit"], None),
        ([], None),
        (["4", "0", "-1", "pro", "2"], "Perf"),
        (["x", "q"], None),
        (["x"], None),
        (["\x00\x1b[A", ""], "quickstart"),
    ],
)
def test_every_answer_leads_somewhere(lines, name):
    assert Person(*lines).choose() == name


def test_the_countdown_ends_with_the_first_answer():
    person = Person("nonsense", "2")
    assert person.choose() == "Perf"
    assert person.limits == [COUNTDOWN_S, None]


def test_what_can_be_chosen_and_what_happens_otherwise_is_shown():
    person = Person("nonsense", "q")
    person.choose()
    text = "\n".join(person.shown)
    for words in ("1  quickstart  the quickstart", "3  proof", "q  quit", "starts in 10 s"):
        assert words in text
    assert "'nonsense' is none of them: 1 to 3" in person.shown[-1]


def test_the_default_comes_first_and_each_is_described_by_its_first_comment(tmp_path):
    (tmp_path / "zeta.txt").write_bytes(b"\xef\xbb\xbf# Zeta run\r\n--steps 5\r\n")
    (tmp_path / "alpha.txt").write_text("--steps 5\n#\n#   For a test.\n# More.\n")
    (tmp_path / "quickstart.txt").write_text("--steps 5\n")
    (tmp_path / "broken.txt").write_bytes(b"\xff\xff")
    (tmp_path / "notes.md").write_text("# no profile")
    (tmp_path / "folder.txt").mkdir()
    profiles = list_profiles(tmp_path)
    assert [profile.name for profile in profiles] == ["quickstart", "alpha", "broken", "zeta"]
    assert profiles[0].description == ""
    assert profiles[1].description == "For a test."
    assert "no UTF-8 text" in profiles[2].description
    assert profiles[3].description == "Zeta run"
    assert list_profiles(tmp_path / "nowhere") == []


def test_every_shipped_profile_can_be_chosen_and_run():
    profiles = list_profiles(PROJECT / "profiles")
    assert profiles[0].name == "quickstart"
    for profile in profiles:
        assert profile.description
        parse_args([f"@{profile.path}"])
