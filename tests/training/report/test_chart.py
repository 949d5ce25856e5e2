"""Charts are drawn where the numbers say, read back from the SVG."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from training.report.chart import (
    HEIGHT,
    WIDTH,
    Curve,
    Reference,
    line_chart,
    nice_ticks,
    stacked_chart,
)


def curve(values, *, steps=None, label="loss", **more) -> Curve:
    values = np.array(values, dtype=float)
    steps = np.arange(len(values)) * 10.0 if steps is None else np.array(steps, dtype=float)
    return Curve(label=label, steps=steps, values=values, style="c1", **more)


def draw(curves, **more):
    ends = [float(c.steps[place]) for c in curves for place in (0, -1) if len(c.steps)]
    span = (min(ends, default=0.0), max(ends, default=0.0))
    return line_chart(title="T", unit="u", caption="c", curves=curves, span=span, **more)


def paths(chart, css: str) -> list[list[tuple[int, int]]]:
    root = ElementTree.fromstring(chart.svg)
    found = [e.attrib["d"] for e in root.iter("path") if css in e.attrib.get("class", "").split()]
    return [[(int(x), int(y)) for x, y in re.findall(r"(-?\d+) (-?\d+)", d)] for d in found]


def test_points_are_placed_linearly_between_the_ticks():
    chart = draw([curve([2.0, 4.0, 3.0])])
    (line,) = paths(chart, "line")
    assert [x for x, _ in line] == [0, WIDTH // 2, WIDTH]
    # y grows downwards, and 3 lies halfway between 2 and 4.
    low, high, middle = (y for _, y in line)
    assert high < middle < low and abs(2 * middle - high - low) <= 1
    by_label = {tick.label: tick.percent for tick in chart.y_ticks}
    for label, y in (("2", low), ("3", middle), ("4", high)):
        assert by_label[label] == pytest.approx(100 * (1 - y / HEIGHT), abs=0.3)


def test_logarithmic_axis_gives_decades_equal_room():
    chart = draw([curve([0.1, 1.0, 10.0])], logarithmic=True)
    (line,) = paths(chart, "line")
    (_, low), (_, middle), (_, high) = line
    assert abs((low - middle) - (middle - high)) <= 1
    assert [tick.label for tick in chart.y_ticks] == ["0.1", "1", "10"]


def test_a_narrow_range_is_drawn_linearly():
    narrow, wide = draw([curve([2.0, 3.0])], logarithmic=True), draw([curve([1.0, 20.0])])
    assert narrow.unit == wide.unit == "u"
    assert draw([curve([1.0, 20.0])], logarithmic=True).unit == "u, logarithmic"


def test_charts_of_a_run_share_their_steps():
    chart = line_chart(
        title="T",
        unit="u",
        caption="c",
        curves=[curve([1.0, 2.0], steps=[50, 100])],
        span=(0.0, 100.0),
    )
    (line,) = paths(chart, "line")
    assert [x for x, _ in line] == [WIDTH // 2, WIDTH]
    assert (chart.x_ticks[0].label, chart.x_ticks[0].percent) == ("0", 0.0)


def test_zero_in_a_logarithmic_chart_stays_inside():
    (line,) = paths(draw([curve([0.0, 1.0, 5.0])], logarithmic=True), "line")
    assert all(0 <= y <= HEIGHT for _, y in line)
    assert draw([curve([0.0, 0.0])], logarithmic=True) is not None


def test_references_are_lines_with_labels_that_do_not_overlap():
    references = [Reference(label="b", value=1.5), Reference(label="a", value=1.51)]
    chart = draw([curve([3.0, 1.0])], references=references)
    assert [tick.label for tick in chart.references] == ["b 1.500", "a 1.510"]
    lower, upper = (tick.percent for tick in chart.references)
    assert upper - lower >= 8.0
    levels = re.findall(r'class="ref" d="M0 (\d+)H', chart.svg)
    assert len(levels) == 2 and abs(int(levels[0]) - int(levels[1])) <= 4


def test_few_marked_points_get_dots_and_many_do_not():
    assert len(paths(draw([curve([1, 2, 3], marked=True)]), "dot")[0]) == 3
    assert paths(draw([curve(range(500), marked=True)]), "dot") == []
    assert paths(draw([curve([1, 2, 3])]), "dot") == []


@pytest.mark.parametrize("values", [[5.0], [2.0, 2.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [1e9, 3e9]])
def test_degenerate_curves_are_drawn_inside_the_box(values):
    for more in ({}, {"from_zero": True}):
        chart = draw([curve(values)], **more)
        (line,) = paths(chart, "line")
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)
        assert chart.y_ticks and all(0 <= tick.percent <= 100 for tick in chart.y_ticks)


def test_nothing_to_draw_is_no_chart():
    assert draw([curve([])]) is None and draw([]) is None
    empty = stacked_chart(
        title="T",
        unit="u",
        caption="c",
        steps=np.array([1.0]),
        layers=[("a", np.zeros(1))],
        span=(0.0, 1.0),
    )
    assert empty is None


def test_tooltips_tell_the_values_at_their_step():
    chart = draw([curve([4.0, 3.0, 2.0]), curve([3.5], steps=[10], label="held-out")])
    titles = [e.text for e in ElementTree.fromstring(chart.svg).iter("title")]
    assert titles[1] == "step 10\nloss 3 u\nheld-out 3.500 u"
    rects = list(ElementTree.fromstring(chart.svg).iter("rect"))
    assert sum(int(rect.attrib["width"]) for rect in rects) == WIDTH


def test_labels_are_escaped():
    chart = draw([curve([1.0, 2.0], label="<b>&")])
    assert "<b>" not in chart.svg
    ElementTree.fromstring(chart.svg)


def test_layers_stand_on_each_other():
    steps = np.array([0.0, 10.0])
    layers = [("one", np.array([1.0, 1.0])), ("none", np.zeros(2)), ("two", np.array([2.0, 2.0]))]
    chart = stacked_chart(
        title="T", unit="ms", caption="c", steps=steps, layers=layers, span=(0.0, 10.0)
    )
    first, second = (
        ElementTree.fromstring(chart.svg).findall(f"path[@class='area c{number}']")[0].attrib["d"]
        for number in (1, 2)
    )
    levels = [[int(y) for _, y in re.findall(r"(\d+) (\d+)", d)] for d in (first, second)]
    assert max(levels[0]) == HEIGHT and max(levels[1]) == min(levels[0])
    height_one = HEIGHT - min(levels[0])
    assert min(levels[0]) - min(levels[1]) == pytest.approx(2 * height_one, abs=2)
    assert [(entry.label, entry.value) for entry in chart.legend] == [("one", "1"), ("two", "2")]


@settings(max_examples=100, deadline=None)
@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-3, 1e6),
    count=st.integers(2, 8),
)
@example(low=1.03125, span=0.4375, count=2)
def test_ticks_are_round_and_few(low, span, count):
    ticks = nice_ticks(low, low + span, count=count)
    assert 1 <= len(ticks) <= count + 1
    tolerance = 1e-6 * max(1.0, abs(low), span)
    assert ticks[0] >= low - tolerance and ticks[-1] <= low + span + tolerance
    if len(ticks) > 1:
        step = ticks[1] - ticks[0]
        digit = step / 10.0 ** np.floor(np.log10(step) + 1e-6)
        assert min(abs(digit - wanted) for wanted in (1, 2, 5)) < 1e-3
