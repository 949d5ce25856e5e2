"""Make the speed tables of README_ALGORITHMS.md from bench/results/*.json.

python scripts/bench_table.py            rewrite the part between the marks
python scripts/bench_table.py --check    1 if the document is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "README_ALGORITHMS.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- bench tables: scripts/bench_table.py -->", "<!-- end of bench tables -->"
HEAD = "| case | way | {unit} (min to max) | ours / it (min to max) | % of the ceiling |\n"
RULE = "|---|---|---|---|---|\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    before = DOCUMENT.read_text(encoding="utf-8")
    after = put_between(before, render(load_results(RESULTS)), begin=BEGIN, end=END)
    if options.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8", newline="\n")
    return 0


def load_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Name and content of every result with rows of the benches' one form."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and {"rows", "ceilings"} <= content.keys():
            found.append((path.name, content))
    return found


def put_between(document: str, tables: str, *, begin: str, end: str) -> str:
    """The document with `tables` between two marks; ValueError if it has not each of them once."""
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"{DOCUMENT.name} must hold each of the marks {begin} and {end} once")
    head, _, rest = document.partition(begin)
    return f"{head}{begin}\n{tables}{end}{rest.partition(end)[2]}"


def render(results: list[tuple[str, dict[str, Any]]]) -> str:
    """Markdown of all results: what was measured where, then a table per bench."""
    return "".join(f"\n{describe(name, content)}{tables(content)}" for name, content in results)


def describe(name: str, content: dict[str, Any]) -> str:
    """One Markdown line on the machine, the versions and the ceilings of a result file."""
    machine, ceilings = content["machine"], content["ceilings"]
    load = [content["load_before"], content["load_after"]]
    loads = " to ".join(f"{value[0]:g}" for value in load if value)
    return (
        f"`bench/results/{name}`, {content['date']}: {machine['cpu']} ({machine['vector']}, "
        f"{machine['cpus']} CPUs), torch {content['versions']['torch']}, {content['threads']} "
        f"thread(s), {content['clock']}, medians of {content['rounds']} interleaved rounds, load "
        f"{loads or 'unknown'}. Ceilings of the same run: {ceilings['product_gflops']:g} GFLOP/s "
        f"(matrix product), {ceilings['copy_gb_per_s']:g} GB/s (copy)."
        f"{'' if content.get('complete', True) else ' Stopped before its last case.'}\n"
    )


def tables(content: dict[str, Any]) -> str:
    """A Markdown table for every run of rows that belong to one bench."""
    text = ""
    for bench, rows in groupby(content["rows"], key=lambda row: row["bench"]):
        measured = list(rows)
        text += f"\n**{bench}**\n\n{HEAD.format(unit=measured[0]['unit'])}{RULE}"
        text += "".join(line(row) for row in measured)
    return text


def line(row: dict[str, Any]) -> str:
    """One row of a table; a case that was not measured says why."""
    cells = [row["case"], row["way"]]
    if "median" not in row:
        return "| " + " | ".join([*cells, why_empty(row), "", ""]) + " |\n"
    share = f"{row['sol_percent']:.3g}" if "sol_percent" in row else ""
    ratio = figure(row["ours_over_it"]) if "ours_over_it" in row else ""
    return "| " + " | ".join([*cells, figure(row), ratio, share]) + " |\n"


def why_empty(row: dict[str, Any]) -> str:
    return f"failed: {row['failed']}" if "failed" in row else f"not measured: {row['not_measured']}"


def figure(values: dict[str, float]) -> str:
    """ "median (min to max)", shortened."""
    return f"{short(values['median'])} ({short(values['min'])} to {short(values['max'])})"


def short(value: float) -> str:
    """Three digits, with thousands, or millions as M."""
    unit = "M" if value >= 1e6 else ""
    return f"{float(f'{value / 1e6 if unit else value:.3g}'):,.10g}{unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
