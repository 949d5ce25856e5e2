"""The tables in README_ALGORITHMS.md are what the results say, and a changed result shows."""

import copy

import pytest

from scripts import bench_table
from scripts.bench_table import BEGIN, END, load_results, put_between, render, short

RESULT = {
    "date": "2026-01-01",
    "machine": {"cpu": "X", "vector": "AVX2", "cpus": 2},
    "versions": {"torch": "2.13.0"},
    "threads": 1,
    "clock": "cpu time",
    "rounds": 7,
    "load_before": [0.5, 0.5, 0.5],
    "load_after": None,
    "ceilings": {"product_gflops": 88.12, "copy_gb_per_s": 19.4},
    "rows": [
        {"bench": "b", "case": "c", "unit": "tokens/s", "way": "SIGMA", "median": 4778.0,
         "min": 4688.0, "max": 4915.0, "sol_percent": 42.06},
        {"bench": "b", "case": "c", "unit": "tokens/s", "way": "plain", "median": 4182.0,
         "min": 4119.0, "max": 4281.0,
         "ours_over_it": {"median": 1.138, "min": 1.121, "max": 1.18}},
        {"bench": "b", "case": "c", "unit": "tokens/s", "way": "gone", "failed": "ImportError: no"},
        {"bench": "d", "case": "e", "unit": "x/s", "way": "SIGMA", "not_measured": "needs cuda"},
    ],
}  # fmt: skip


def test_the_document_holds_the_tables_of_the_results():
    assert load_results(bench_table.RESULTS)
    assert bench_table.main(["--check"]) == 0, "run python scripts/bench_table.py"


def test_rows_become_lines():
    text = render([("r.json", RESULT)])
    assert "| c | SIGMA | 4,780 (4,690 to 4,920) |  | 42.1 |\n" in text
    assert "| c | plain | 4,180 (4,120 to 4,280) | 1.14 (1.12 to 1.18) |  |\n" in text
    assert "| c | gone | failed: ImportError: no |  |  |\n" in text
    assert "| e | SIGMA | not measured: needs cuda |  |  |\n" in text
    assert text.count("**b**") == text.count("**d**") == 1
    assert "88.12 GFLOP/s" in text and "load 0.5." in text


def test_another_figure_is_another_text():
    changed = copy.deepcopy(RESULT)
    changed["rows"][0]["median"] = 4900.0
    assert render([("r.json", changed)]) != render([("r.json", RESULT)])


def test_only_the_part_between_the_marks_changes():
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert (
        put_between(document, "new\n", begin=BEGIN, end=END)
        == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    )
    for broken in ("no marks", document + document):
        with pytest.raises(ValueError, match="marks"):
            put_between(broken, "new\n", begin=BEGIN, end=END)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.1234, "0.123"), (1.0, "1"), (88123.0, "88,100"), (2.5e8, "250M"), (1.329e9, "1,330M")],
)
def test_numbers_are_short(value, text):
    assert short(value) == text
