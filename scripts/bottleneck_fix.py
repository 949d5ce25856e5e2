"""Does a change of flags make training faster? Two configurations step by step in turns.

    python scripts/bottleneck_fix.py @profiles/quickstart.txt --output-dir runs/fix \\
        --fix "--mamba-chunk-len 128" --measure-steps 40

Three runs share a process and take a step each, in an order that rotates: before, after, and before
once more, whose distance from the first is what the machine alone does (the placebo). The second
half of their steps counts. Ratios are after / before of the same round, below 1 is faster. The
result is `<output-dir>/perf/latest_bottleneck_fix_report.json`. Of two settings that change the
number of tokens of a step, compare the tokens per second.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.ablation import CLOCKS, Arm, Lane
from scripts.bench_common import cpu_name
from scripts.paired import compare
from training.config.cli import parse_args
from training.config.sigma_config import SigmaConfig
from training.runtime.environment import versions

FILE_NAME = "latest_bottleneck_fix_report.json"
FEWEST_STEPS = 8
COLUMNS = {
    "step": "step",
    "forward": "phase_forward_s",
    "backward": "phase_backward_s",
    "optimizer": "phase_opt_step_s",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--fix", required=True, metavar="FLAGS", help="what the change adds")
    parser.add_argument("--measure-steps", type=int, default=40, help="of each; half of them count")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    options, common = parser.parse_known_args(argv)
    if options.measure_steps < FEWEST_STEPS:
        parser.error(f"--measure-steps {options.measure_steps}: at least {FEWEST_STEPS}")
    fix = tuple(options.fix.split())
    try:
        config, changed = parse_args(list(common)), parse_args([*common, *fix])
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as directory:
        lanes = {
            arm.name: Lane(
                common, arm, seed=0, steps=options.measure_steps, directory=Path(directory)
            )
            for arm in (Arm(name="before"), Arm(name="after", flags=fix), Arm(name="placebo"))
        }
        take_turns(list(lanes.values()), clock=options.clock)
        for lane in lanes.values():
            lane.close()
    times = {name: lane.times for name, lane in lanes.items()}
    tokens = {"before": tokens_per_step(config), "after": tokens_per_step(changed)}
    report = describe(common, fix, options.clock) | summarize(times, tokens)
    path = Path(config.run.output_dir) / "perf" / FILE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    step = report["after_over_before"]["step"]
    print(f"step {step['median']:.3f} ({step['low']:.3f} to {step['high']:.3f}); {path}")
    return 0


def take_turns(lanes: list[Lane], *, clock: str) -> None:
    while not lanes[0].is_done:
        for lane in lanes:
            lane.advance(1, clock=CLOCKS[clock])
        lanes = [*lanes[1:], lanes[0]]


def tokens_per_step(config: SigmaConfig) -> int:
    data = config.data
    return data.batch_size * data.grad_accum_steps * data.seq_len


def summarize(times: dict[str, list[dict[str, float]]], tokens: dict[str, int]) -> dict[str, Any]:
    """Medians of the tails of runs before, after and placebo, and the ratios of their rounds."""
    tails = {name: rows[len(rows) // 2 :] for name, rows in times.items()}
    medians = {
        name: {
            f"{part}_s": statistics.median(row[column] for row in rows)
            for part, column in COLUMNS.items()
        }
        for name, rows in tails.items()
    }
    for name, values in medians.items():
        count = tokens["after" if name == "after" else "before"]
        values["tokens_per_s"] = count / values["step_s"]
    return {
        "steps_measured": len(tails["before"]),
        "tail": medians,
        "after_over_before": ratios(tails["after"], tails["before"]),
        "placebo_over_before": ratios(tails["placebo"], tails["before"]),
    }


def ratios(
    rows: list[dict[str, float]], others: list[dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Median ratio per part, and the 95 % interval of the mean of its logarithm as a ratio."""
    found = {}
    for part, column in COLUMNS.items():
        pairs = [
            (math.log(row[column]), math.log(other[column]))
            for row, other in zip(rows, others, strict=True)
            if row[column] > 0 and other[column] > 0
        ]
        if len(pairs) < 2:
            continue
        interval = compare(*zip(*pairs, strict=True))
        found[part] = {
            "median": round(math.exp(statistics.median(a - b for a, b in pairs)), 4),
            "low": round(math.exp(interval.low), 4),
            "high": round(math.exp(interval.high), 4),
        }
    return found


def describe(common: Sequence[str], fix: Sequence[str], clock: str) -> dict[str, Any]:
    """Head of the result: both sets of flags, which clock timed what, machine and versions."""
    return {
        "flags": list(common),
        "fix": list(fix),
        "clock": f"{clock} for steps, wall for phases",
        "machine": cpu_name(),
        "versions": versions(),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    sys.exit(main())
