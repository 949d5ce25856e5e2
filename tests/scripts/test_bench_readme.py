"""bench/README.md leads from every result to its command, and names every script that is run."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench/results"
MAP = (ROOT / "bench/README.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `([\w.-]+\.json)` \|", re.MULTILINE)
SCRIPT = re.compile(r"(?:\bpython -m scripts\.(\w+)|([\w/]+\.(?:py|sh))\b)")
COMMAND = re.compile(r"`(?:nice -n \S+ )?python (?:-m scripts\.|scripts/)(\w+)(?:\.py)?([^`]*)`")
RUN = re.compile(r"""^if __name__ == ["']__main__["']""", re.MULTILINE)


def rows(text: str) -> Counter[str]:
    """The result files that a table of `text` has a row for, and how many."""
    return Counter(ROW.findall(text))


def named_scripts(text: str) -> set[Path]:
    """Every script that `text` names: train_sigma.py, else one below scripts/."""
    found = (f"{module}.py" if module else path for module, path in SCRIPT.findall(text))
    names = {path.removeprefix("scripts/") for path in found}
    return {ROOT / ("" if name == "train_sigma.py" else "scripts") / name for name in names}


def options_of(text: str) -> list[tuple[str, str]]:
    """Script and option of every command in `text`; what stands in quotes is for train_sigma.py."""
    return [
        (script, option)
        for script, rest in COMMAND.findall(text)
        for option in re.findall(r"(?<!\S)--[\w-]+", re.sub(r'"[^"]*"', "", rest))
    ]


def test_every_result_has_exactly_one_row():
    assert rows(MAP) == Counter(path.name for path in RESULTS.glob("*.json"))


def test_every_script_that_is_named_exists():
    missing = [path for path in named_scripts(MAP) if not path.is_file()]
    assert not missing


def test_every_script_that_is_run_is_named():
    scripts = (ROOT / "scripts").rglob("*.py")
    run = {path for path in scripts if RUN.search(path.read_text(encoding="utf-8"))}
    assert len(run) > 40
    assert not run - named_scripts(MAP)


def test_commands_use_options_that_their_scripts_have():
    common = (ROOT / "scripts/bench_common.py").read_text(encoding="utf-8")
    found = [pair for pair in options_of(MAP) if pair != ("ablate", "--eval-tokens")]
    assert len(found) > 80
    for script, option in found:
        source = (ROOT / f"scripts/{script}.py").read_text(encoding="utf-8")
        assert f'"{option}"' in source + common, f"{script}: {option}"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("| `a.json` | x |\n| `a.json` | y |\n", Counter({"a.json": 2})),
        ("`a.json` in a sentence\n", Counter()),
    ],
)
def test_rows_are_counted_as_rows(text: str, wrong: Counter[str]):
    assert rows(text) == wrong


def test_names_and_options_are_seen_in_each_form():
    text = '`python -m scripts.soak_rl --runs 3`, `python scripts/gone.py --no "--own"`, `soak.py`'
    assert named_scripts(text) == {
        ROOT / f"scripts/{name}.py" for name in ("soak_rl", "gone", "soak")
    }
    assert options_of(text) == [("soak_rl", "--runs"), ("gone", "--no")]
