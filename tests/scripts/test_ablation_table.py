"""The tables of ablations are what the results say, and a changed result shows."""

from dataclasses import replace

import pytest

from scripts import ablation_table
from scripts.ablate_features import Finding, Row
from scripts.ablation_table import BEGIN, END, line, look_up
from scripts.bench_table import put_between
from scripts.paired import Comparison

PART = Comparison(mean=-0.0123, low=-0.02, high=-0.001, num_seeds=3)
WORSE = Comparison(mean=0.5, low=0.4, high=0.6, num_seeds=3)
FINDING = Finding(tokens=PART, timed=WORSE, placebo=PART, cost=1.15, is_complete=True)
ROW = Row(feature="f", off="base", on="on", placebo="p")


def test_the_document_holds_the_tables_of_the_results():
    assert ablation_table.main(["--check"]) == 0, "run python scripts/ablation_table.py"


def test_a_row_has_a_cell_for_each_comparison():
    figures = "-0.012 (-0.020 to -0.001)"
    assert line(ROW, FINDING) == (
        f"| f | {figures} | +0.500 (+0.400 to +0.600) | {figures} | 1.15 | harms |\n"
    )


def test_what_is_missing_is_said():
    unfinished = line(ROW, replace(FINDING, timed=None, is_complete=False))
    assert "| not run |" in unfinished and "helps (3 seeds, unfinished)" in unfinished
    bare = Row(feature="f", off="off", on="base", note="why")
    nothing = Finding(tokens=None, timed=None, placebo=None, cost=2.0, is_complete=False)
    assert line(bare, nothing) == "| f (why) | not run | not run | - | 2.00 | not run |\n"


def test_values_are_looked_up_in_an_experiments_own_file():
    content = {"summary": [{"arm": "on", "n": 1}, {"arm": "off", "n": [2, 3]}]}
    assert look_up(content, "summary/arm=off/n/1") == 3
    with pytest.raises(KeyError, match="0 entries"):
        look_up(content, "summary/arm=placebo/n")
    with pytest.raises(KeyError):
        look_up(content, "nowhere")


def test_only_the_part_between_the_marks_is_written():
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert (
        put_between(document, "new\n", begin=BEGIN, end=END)
        == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    )
    with pytest.raises(ValueError, match="marks"):
        put_between("nothing", "new", begin=BEGIN, end=END)
