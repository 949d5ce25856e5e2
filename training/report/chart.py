"""Charts as inline SVG with HTML labels: sharp and legible at any width, without a script.

Curves are drawn in a fixed coordinate box that is stretched to the figure's size with strokes that
do not scale; labels are HTML, placed in per cent, so text keeps its size on a phone and on a wall.
Hovering a column of the plot shows its values as a native tooltip.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from training.report.record import Floats, bin_means, downsample
from training.runtime.text import format_number, format_quantity

WIDTH, HEIGHT = 1200, 480
LINE_BINS = 240
STACK_BINS = 120
HOVER_COLUMNS = 48
FEW_POINTS = 60
LABEL_GAP = 0.085  # of the plot's height, between labels of reference lines


@dataclass(slots=True, kw_only=True)
class Curve:
    """One line. style: a CSS class (c1..c6, raw); its points are marked when they are few."""

    label: str
    steps: Floats
    values: Floats
    style: str
    marked: bool = False


@dataclass(slots=True, kw_only=True)
class Reference:
    """A horizontal line to compare with."""

    label: str
    value: float


@dataclass(slots=True, kw_only=True)
class LegendEntry:
    label: str
    style: str
    value: str


@dataclass(slots=True, kw_only=True)
class Tick:
    """A label at `percent` of the axis."""

    percent: float
    label: str


@dataclass(slots=True, kw_only=True)
class Chart:
    """What the template needs of a figure."""

    title: str
    unit: str
    caption: str
    svg: Markup
    legend: list[LegendEntry] = field(default_factory=list)
    x_ticks: list[Tick] = field(default_factory=list)
    y_ticks: list[Tick] = field(default_factory=list)
    references: list[Tick] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Axis:
    """Maps values to [0, 1], linearly or by logarithm."""

    low: float
    high: float
    logarithmic: bool = False

    def place(self, values: Floats) -> Floats:
        """Values as shares of the axis, 0 at `low`; others lie outside, but a log axis puts less at
        0."""
        low, high = self.low, self.high
        if self.logarithmic:
            values = np.log10(np.maximum(values, low))
            low, high = math.log10(low), math.log10(high)
        return (np.asarray(values, dtype=float) - low) / (high - low)

    def ticks(self, *, count: int) -> list[float]:
        """About `count` round values within the axis, rising."""
        if not self.logarithmic:
            return nice_ticks(self.low, self.high, count=count)
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        decades = [10.0**power for power in range(first, last + 1)]
        if len(decades) < 2:
            spread = [
                digit * 10.0**power for power in range(first - 1, last + 1) for digit in (1, 2, 5)
            ]
            return [value for value in spread if self.low <= value <= self.high]
        return decades[:: max(1, len(decades) // count)]


def line_chart(
    *,
    title: str,
    unit: str,
    caption: str,
    curves: Sequence[Curve],
    span: tuple[float, float],
    references: Sequence[Reference] = (),
    logarithmic: bool = False,
    from_zero: bool = False,
) -> Chart | None:
    """Curves over the training steps of `span`; None when no curve has a point.

    `logarithmic` is followed when the values span a factor of ten.
    """
    curves = [curve for curve in curves if len(curve.values)]
    if not curves:
        return None
    x_axis = _step_axis(span)
    levels = np.concatenate(
        [curve.values for curve in curves] + [np.array([r.value for r in references])]
    )
    y_axis = _value_axis(levels, logarithmic=logarithmic, from_zero=from_zero)
    parts = [_grid(y_axis)]
    for reference in references:
        y = _y(y_axis, np.array([reference.value]))[0]
        parts.append(f'<path class="ref" d="M0 {y}H{WIDTH}"/>')
    for curve in curves:
        steps, values = downsample(curve.steps, curve.values, bins=LINE_BINS)
        x, y = _x(x_axis, steps), _y(y_axis, values)
        weight = " dense" if len(x) > LINE_BINS else ""
        parts.append(f'<path class="line {curve.style}{weight}" d="{_polyline(x, y)}"/>')
        if curve.marked and len(x) <= FEW_POINTS:
            dots = "".join(f"M{a} {b}h0" for a, b in zip(x, y, strict=True))
            parts.append(f'<path class="dot {curve.style}" d="{dots}"/>')
    rows = [(curve.label, curve.steps, curve.values) for curve in curves]
    parts.append(_hover(x_axis, rows, unit=unit))
    return Chart(
        title=title,
        unit=f"{unit}, logarithmic".lstrip(", ") if y_axis.logarithmic else unit,
        caption=caption,
        svg=_svg(parts, title=title),
        legend=[
            LegendEntry(label=c.label, style=c.style, value=format_number(float(c.values[-1])))
            for c in curves
        ],
        x_ticks=_x_ticks(x_axis),
        y_ticks=_y_ticks(y_axis),
        references=_reference_labels(y_axis, references),
    )


def stacked_chart(
    *,
    title: str,
    unit: str,
    caption: str,
    steps: Floats,
    layers: Sequence[tuple[str, Floats]],
    span: tuple[float, float],
) -> Chart | None:
    """Layers on top of each other over the steps of `span`; None when all of them are empty."""
    layers = [(label, values) for label, values in layers if np.nansum(values) > 0.0]
    if not layers or len(steps) == 0:
        return None
    centres, means = bin_means(steps, np.stack([v for _, v in layers]), bins=STACK_BINS)
    tops = np.cumsum(means, axis=0)  # (layers, bins)
    x_axis = _step_axis(span)
    y_axis = _value_axis(tops[-1], logarithmic=False, from_zero=True)
    x = _x(x_axis, centres)
    bottom = _y(y_axis, np.zeros_like(centres))
    parts, legend, floor = [_grid(y_axis)], [], bottom
    for number, (label, values) in enumerate(layers):
        top = _y(y_axis, tops[number])
        outline = _polyline(x, top) + _polyline(x[::-1], floor[::-1]).replace("M", "L", 1) + "Z"
        parts.append(f'<path class="area c{number + 1}" d="{outline}"/>')
        present = values[np.isfinite(values)]
        shown = format_number(float(np.median(present)))
        legend.append(LegendEntry(label=label, style=f"c{number + 1}", value=shown))
        floor = top
    rows = [(label, centres, means[number]) for number, (label, _) in enumerate(layers)]
    parts.append(_hover(x_axis, rows, unit=unit))
    return Chart(
        title=title,
        unit=unit,
        caption=caption,
        svg=_svg(parts, title=title),
        legend=legend,
        x_ticks=_x_ticks(x_axis),
        y_ticks=_y_ticks(y_axis),
    )


def nice_ticks(low: float, high: float, *, count: int) -> list[float]:
    """At most `count` + 1 round values within [low, high], in steps of 1, 2 or 5 times 10^k.

    count: 2 or more.
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    sizes = [m * power for m in (0.5, 1.0, 2.0, 5.0, 10.0)]
    wide = next(number for number, size in enumerate(sizes) if size >= raw * (1 - 1e-9))
    # With two ticks wanted, both may lie outside; the next smaller step then has two or three.
    for step in (sizes[wide], sizes[wide - 1]):
        first = math.ceil(low / step - 1e-9)
        last = math.floor(high / step + 1e-9)
        if first <= last:
            break
    return [number * step for number in range(first, last + 1)]


def _step_axis(span: tuple[float, float]) -> Axis:
    low, high = span
    return Axis(low=low, high=high if high > low else low + 1.0)


def _value_axis(values: Floats, *, logarithmic: bool, from_zero: bool) -> Axis:
    low, high = float(np.min(values)), float(np.max(values))
    positive = values[values > 0.0]
    if logarithmic and len(positive) and high >= 10.0 * positive.min():
        low = float(positive.min())
        return Axis(low=low / 1.15, high=high * 1.15, logarithmic=True)
    if from_zero:
        return Axis(low=0.0, high=high * 1.06 if high > 0.0 else 1.0)
    margin = 0.06 * (high - low) or max(abs(high) * 0.1, 0.5)
    return Axis(low=low - margin, high=high + margin)


def _x(axis: Axis, steps: Floats) -> list[int]:
    return np.rint(axis.place(steps) * WIDTH).astype(int).tolist()


def _y(axis: Axis, values: Floats) -> list[int]:
    return np.rint((1.0 - axis.place(values)) * HEIGHT).astype(int).tolist()


def _polyline(x: Sequence[int], y: Sequence[int]) -> str:
    points = [f"{a} {b}" for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(points) + ("h0" if len(points) == 1 else "")


def _grid(axis: Axis) -> str:
    levels = _y(axis, np.array(axis.ticks(count=4)))
    return f'<path class="grid" d="{"".join(f"M0 {y}H{WIDTH}" for y in levels)}"/>'


def _hover(axis: Axis, rows: Sequence[tuple[str, Floats, Floats]], *, unit: str) -> str:
    """Invisible columns whose tooltips tell the values nearest to them."""
    longest = max((steps for _, steps, _ in rows), key=len)
    columns = min(HOVER_COLUMNS, len(longest))
    chosen = longest[np.unique(np.linspace(0, len(longest) - 1, columns).round().astype(int))]
    centres = axis.place(chosen) * WIDTH
    edges = np.concatenate(([0.0], (centres[1:] + centres[:-1]) / 2.0, [WIDTH]))
    parts = []
    for number, step in enumerate(chosen):
        lines = [f"step {step:,.0f}"]
        for label, steps, values in rows:
            nearest = int(np.abs(steps - step).argmin())
            lines.append(f"{label} {format_number(float(values[nearest]))} {unit}".rstrip())
        left, width = round(edges[number]), round(edges[number + 1]) - round(edges[number])
        text = Markup.escape("\n".join(lines))
        parts.append(
            f'<g><rect x="{left}" width="{width}" height="{HEIGHT}"/>'
            f'<path d="M{round(centres[number])} 0V{HEIGHT}"/><title>{text}</title></g>'
        )
    return f'<g class="hover">{"".join(parts)}</g>'


def _svg(parts: Sequence[str], *, title: str) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{Markup.escape(title)}">{"".join(parts)}</svg>'
    )


def _x_ticks(axis: Axis) -> list[Tick]:
    values = [value for value in axis.ticks(count=5) if value == int(value)]
    return _labelled(axis, values, [_short(value) for value in values])


def _y_ticks(axis: Axis) -> list[Tick]:
    values = axis.ticks(count=4)
    # One number of decimals for the whole axis, so that the labels line up.
    step = min(np.diff(values)) if len(values) > 1 else 1.0
    if axis.logarithmic or max(map(abs, values), default=0.0) >= 1e5:
        labels = [_short(value) for value in values]
    else:
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        labels = [f"{value:,.{decimals}f}" for value in values]
    return _labelled(axis, values, labels)


def _short(value: float) -> str:
    """A round number with a unit prefix: `50k`, `1.5M`."""
    if abs(value) < 1.0:
        return f"{value:g}"
    return re.sub(r"\.0+(?=[kMBT]$)|(?<=\.\d)0(?=[kMBT]$)", "", format_quantity(value))


def _labelled(axis: Axis, values: Sequence[float], labels: Sequence[str]) -> list[Tick]:
    places = axis.place(np.array(values)) * 100.0
    return [
        Tick(percent=round(float(place), 2), label=label)
        for place, label in zip(places, labels, strict=True)
    ]


def _reference_labels(axis: Axis, references: Sequence[Reference]) -> list[Tick]:
    """Labels just above their lines, moved up where they would overlap."""
    ticks: list[Tick] = []
    lowest = 0.0
    for reference in sorted(references, key=lambda reference: reference.value):
        place = max(float(axis.place(np.array([reference.value]))[0]), lowest)
        lowest = place + LABEL_GAP
        text = f"{reference.label} {format_number(reference.value)}"
        ticks.append(Tick(percent=round(100.0 * place, 2), label=text))
    return ticks
