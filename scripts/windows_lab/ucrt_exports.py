"""Write the .def file of the proxy ucrtbase.dll: our complex functions, all else forwarded.

Usage: ucrt_exports.py <text of objdump -p ucrtbase.dll> <text of nm on our object> <name of the
renamed original, without .dll>; the .def file goes to stdout.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

EXPORT = re.compile(r"^\s*\[\s*\d+\]\s+\+base\[\s*\d+\]\s+[0-9a-f]+\s+(\S+)$", re.MULTILINE)
OURS = re.compile(r" T ms_(\w+)$", re.MULTILINE)


def definition(exports: str, symbols: str, *, original: str) -> str:
    """Text of the .def file; ValueError where there is nothing to forward or to replace."""
    names = sorted(set(EXPORT.findall(exports)))
    ours = set(OURS.findall(symbols))
    if not names or not ours & set(names):
        raise ValueError("no exports of ucrtbase.dll, or none of ours, in what objdump and nm say")
    lines = [
        f"  {name} = ms_{name}" if name in ours else f"  {name} = {original}.{name}"
        for name in names
    ]
    return "\n".join(["LIBRARY ucrtbase.dll", "EXPORTS", *lines, ""])


if __name__ == "__main__":
    exports_file, symbols_file, original_name = sys.argv[1:]
    texts = [Path(file).read_text(encoding="utf-8") for file in (exports_file, symbols_file)]
    sys.stdout.write(definition(*texts, original=original_name))
