"""The judge of the crash-safety tests: what it changes, and that it tells good tests from poor."""

from __future__ import annotations

import ast
import sys
import time
from pathlib import Path

import pytest

from scripts import mutants, mutation

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="mutants run in forks")

SOURCE = '''
"""A module."""

LIMIT: int = 3


def clip(value: int) -> int:
    if value > LIMIT and value != 0:
        return LIMIT
    return value if value < 0 else value + 2
'''
TESTS = {
    "good": "assert [clip(n) for n in (-3, -1, 0, 2, 3, 4)] == [-3, -1, 2, 4, 5, 3]",
    "poor": "assert clip(4) == 3",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "clipped_values.py").write_text(SOURCE, encoding="utf-8")
    for name, check in TESTS.items():
        text = f"from clipped_values import clip\ndef test_it():\n    {check}\n"
        (tmp_path / f"test_{name}.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def try_with(project: Path, test: str) -> dict[str, bool]:
    pool = list(mutation.mutants_of("clipped_values", SOURCE))
    suites = {"clipped_values": (str(project / f"test_{test}.py"),)}
    assert not mutants.fails_without_mutant(suites["clipped_values"])
    found = mutants.try_all(pool, suites, jobs=2, minutes=5)
    return {mutant.name: noticed for mutant, noticed in found}


def test_each_mutant_is_one_other_program() -> None:
    pool = list(mutation.mutants_of("clipped_values", SOURCE))
    texts = [ast.unparse(mutant.tree) for mutant in pool]
    assert len({*texts, ast.unparse(ast.parse(SOURCE))}) == len(pool) + 1
    assert len({mutant.key for mutant in pool}) == len(pool)
    assert {mutant.what for mutant in pool} >= {
        "Gt -> GtE", "Lt -> LtE", "and -> or", "Add -> Sub", "3 plus 1", "return None",
    }  # fmt: skip


def test_what_was_noticed_stays_so_while_only_words_change() -> None:
    def keys(source: str) -> list[str]:
        return [mutant.key for mutant in mutation.mutants_of("clipped_values", source)]

    assert keys(SOURCE.replace("A module.", "The module.\n\nIn two lines.")) == keys(SOURCE)
    assert keys(SOURCE.replace("-> int:", '-> int:\n    """At most LIMIT."""')) == keys(SOURCE)
    assert not set(keys(SOURCE.replace("3", "4"))) & set(keys(SOURCE))


def test_good_tests_notice_what_poor_ones_do_not(project: Path) -> None:
    """A value above the limit is neither nothing nor one: which of them is asked makes no odds."""
    good, poor = try_with(project, "good"), try_with(project, "poor")
    assert good.keys() == poor.keys()
    assert {name for name, noticed in good.items() if not noticed} == {"clipped_values:8 0 plus 1"}
    assert sum(poor.values()) <= sum(good.values()) / 2


def test_tests_that_hang_have_noticed(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutants, "LIMIT_S", 3.0)
    (project / "test_slow.py").write_text("import time\ndef test_it(): time.sleep(600)\n", "utf-8")
    begun = time.monotonic()
    assert mutants.fails_without_mutant((str(project / "test_slow.py"),))
    assert time.monotonic() - begun < 300


def test_no_mutant_is_started_once_the_time_is_over(project: Path) -> None:
    pool = list(mutation.mutants_of("clipped_values", SOURCE))
    assert list(mutants.try_all(pool, {}, jobs=2, minutes=0)) == []
