"""Make the tables of ablations in README_ALGORITHMS.md from what was measured.

Rows and arms are those of scripts/ablations.toml, figures those of bench/results/ablation_cpu.json
(scripts/ablate_features.py). What has an experiment of its own is a row of the second table, whose
figures are looked up in that experiment's file.

python scripts/ablation_table.py            rewrite the part between the marks
python scripts/ablation_table.py --check    1 if the document is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.ablate_features import LIST, Finding, Plan, Record, Row, about, find
from scripts.bench_table import put_between
from scripts.paired import Comparison, overall_verdict

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "README_ALGORITHMS.md"
RESULTS = ROOT / "bench" / "results"
RUNS = RESULTS / "ablation_cpu.json"
BEGIN = "<!-- ablations: scripts/ablation_table.py -->"
END = "<!-- end of ablations -->"
HEAD = (
    "| feature | on less off, equal tokens | on less off, equal time | on less placebo | "
    "a step on / off | verdict |\n|---|---|---|---|---|---|\n"
)
HEAD_ELSEWHERE = (
    "\n| feature | what was measured | verdict | `bench/results/` |\n|---|---|---|---|\n"
)
NOT_RUN, NO_PLACEBO = "not run", "-"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing")
    options = parser.parse_args(arguments)
    before = DOCUMENT.read_text(encoding="utf-8")
    after = put_between(before, render(), begin=BEGIN, end=END)
    if options.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8", newline="\n")
    return 0


def render() -> str:
    """Both tables."""
    plan = Plan.read()
    record = Record(RUNS, about(plan))
    rows = "".join(line(row, find(plan, record, row)) for row in plan.rows)
    listed = tomllib.loads(LIST.read_text(encoding="utf-8"))["elsewhere"]
    return HEAD + rows + HEAD_ELSEWHERE + "".join(map(line_elsewhere, listed))


def line(row: Row, finding: Finding) -> str:
    """One row of the first table."""
    placebo = shown(finding.placebo) if row.placebo else NO_PLACEBO
    cost = NOT_RUN if finding.cost is None else f"{finding.cost:.2f}"
    parts = finding.comparisons
    verdict = overall_verdict(parts) if parts else NOT_RUN
    if parts and not finding.is_complete:
        verdict += f" ({min(part.num_seeds for part in parts)} seeds, unfinished)"
    note = f" ({row.note})" if row.note else ""
    cells = (shown(finding.tokens), shown(finding.timed), placebo, cost, verdict)
    return f"| {row.feature}{note} | {' | '.join(cells)} |\n"


def shown(part: Comparison | None) -> str:
    """A cell: mean and interval with signs, NOT_RUN where nothing was measured."""
    if part is None:
        return NOT_RUN
    return f"{part.mean:+.3f} ({part.low:+.3f} to {part.high:+.3f})"


def line_elsewhere(entry: dict[str, Any]) -> str:
    """One row of the second table: its text with the values that its file has."""
    content = json.loads((RESULTS / entry["file"]).read_text(encoding="utf-8"))
    text = entry["text"].format(*(look_up(content, path) for path in entry["values"]))
    return f"| {entry['feature']} | {text} | {entry['verdict']} | `{entry['file']}` |\n"


def look_up(content: Any, path: str) -> Any:
    """What lies at a path such as `summary/arm=on,score=greedy/interval/0`: keys, places in a list,
    or the one entry of a list whose fields are these. KeyError where there is none or several."""
    for part in path.split("/"):
        if isinstance(content, dict):
            content = content[part]
        elif part.isdigit():
            content = content[int(part)]
        else:
            wanted = dict(pair.split("=", 1) for pair in part.split(","))
            found = [
                entry
                for entry in content
                if all(str(entry.get(name)) == value for name, value in wanted.items())
            ]
            if len(found) != 1:
                raise KeyError(f"{path}: {len(found)} entries are {part}")
            content = found[0]
    return content


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
