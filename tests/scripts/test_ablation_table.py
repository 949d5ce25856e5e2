"""The table of ablations is what the results say, and a changed result shows."""

import copy

import pytest

from scripts import ablation_table
from scripts.ablation_table import BEGIN, END, load_results, render
from scripts.bench_table import put_between

PART = {"mean": -0.0123, "interval": [-0.02, -0.001], "num_seeds": 2, "verdict": "helps"}
RESULT = {
    "steps": 200,
    "is_complete": True,
    "equal_tokens": {
        seed: {"off": {"seconds": 10.0}, "on": {"seconds": seconds}}
        for seed, seconds in (("0", 11.0), ("1", 12.0))
    },
    "comparisons": {
        "on": {
            "equal tokens, against off": PART,
            "equal time, against off": PART | {"mean": 0.5, "interval": [0.4, 0.6]},
            "equal tokens, against placebo": PART,
            "verdict": "harms",
        }
    },
}


def test_the_document_holds_the_table_of_the_results():
    assert load_results(ablation_table.RESULTS)
    assert ablation_table.main(["--check"]) == 0, "run python scripts/ablation_table.py"


def test_an_arm_has_a_line_for_each_rival():
    text = render([("f", RESULT)])
    figures = "-0.012 (-0.020 to -0.001)"
    assert (
        f"| f | on | off | {figures} | +0.500 (+0.400 to +0.600) | 1.15 | 2, 200 | harms |\n"
        in text
    )
    assert f"| f | on | placebo | {figures} | not run | 1.15 | 2, 200 | harms |\n" in text


def test_a_changed_result_shows():
    other = copy.deepcopy(RESULT)
    other["comparisons"]["on"]["equal tokens, against off"]["mean"] = 0.3
    assert render([("f", other)]) != render([("f", RESULT)])
    assert "stopped early" in render([("f", RESULT | {"is_complete": False})])


def test_only_the_part_between_the_marks_is_written():
    document = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert (
        put_between(document, "new\n", begin=BEGIN, end=END)
        == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    )
    with pytest.raises(ValueError, match="marks"):
        put_between("nothing", "new", begin=BEGIN, end=END)
