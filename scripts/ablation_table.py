"""Make the table of ablations in README_ALGORITHMS.md from bench/results/ablate_*_cpu.json.

python scripts/ablation_table.py            rewrite the part between the marks
python scripts/ablation_table.py --check    1 if the document is not what the results say
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.bench_table import put_between

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "README_ALGORITHMS.md"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- ablations: scripts/ablation_table.py -->"
END = "<!-- end of ablations -->"
HEAD = (
    "| feature | arm | less | equal tokens, bpb | equal time, bpb | time a step | seeds, steps | "
    "verdict of the arm |\n|---|---|---|---|---|---|---|---|\n"
)


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
    """Feature and result of every ablation."""
    return [
        (
            path.stem.removeprefix("ablate_").removesuffix("_cpu"),
            json.loads(path.read_text(encoding="utf-8")),
        )
        for path in sorted(folder.glob("ablate_*_cpu.json"))
    ]


def render(results: list[tuple[str, dict[str, Any]]]) -> str:
    return HEAD + "".join(line for name, result in results for line in lines(name, result))


def lines(name: str, result: dict[str, Any]) -> list[str]:
    """A line for each arm and each of its rivals."""
    found = []
    for arm, parts in result["comparisons"].items():
        labels = [label.partition(", against ") for label in parts if label != "verdict"]
        for rival in dict.fromkeys(label[2] for label in labels):
            tokens, timed = (
                shown(parts.get(f"{clock}, against {rival}"))
                for clock in ("equal tokens", "equal time")
            )
            seeds = len(result["equal_tokens"])
            unfinished = "" if result.get("is_complete", True) else " (stopped early)"
            found.append(
                f"| {name} | {arm} | {rival} | {tokens} | {timed} | {cost(result, arm):.2f} | "
                f"{seeds}, {result['steps']}{unfinished} | {parts['verdict']} |\n"
            )
    return found


def shown(part: dict[str, Any] | None) -> str:
    if part is None:
        return "not run"
    low, high = part["interval"]
    return f"{part['mean']:+.3f} ({low:+.3f} to {high:+.3f})"


def cost(result: dict[str, Any], arm: str) -> float:
    """Time of a step over that of the first arm; median over the seeds."""
    return statistics.median(
        runs[arm]["seconds"] / next(iter(runs.values()))["seconds"]
        for runs in result["equal_tokens"].values()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
