"""Numbers, times and a model's text in the form in which a person reads them.

Shared by the live display and the report, so that both write the same units.
"""

from __future__ import annotations

import math
import re

# C0 and C1 control characters and bidirectional overrides: a terminal or a browser obeys them.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def printable(text: str) -> str:
    """`text` with control characters (but for tab and newline) made visible as U+FFFD."""
    return _CONTROLS.sub("\ufffd", text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """`text` printable, with every run of white space as one space."""
    return " ".join(printable(text).split())


def format_duration(seconds: float) -> str:
    """The two largest units that matter: `42 s`, `3 min 5 s`, `2 h 40 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def format_quantity(value: float) -> str:
    """Three significant digits with a unit prefix: `950`, `12.3k`, `3.44M`, `1.20B`."""
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{unit}"
    return f"{value:.0f}" if value == int(value) else f"{value:.3g}"


def format_number(value: float) -> str:
    """A measured value in up to four significant digits; powers of ten when far from 1."""
    magnitude = abs(value)
    if magnitude >= 1e6 or (0.0 < magnitude < 1e-3):
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    if magnitude >= 1000.0:
        return f"{value:,.0f}"
    if value == int(value):
        return f"{value:.0f}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(max(1.0, magnitude))))}f}"
