"""What every bench shares: command line, interleaved timing, measured ceilings, the result file.

A case is one piece of work that several ways do. Its ways run in turns (forwards, then backwards,
and so on), so that a busy machine hits all alike, and a ratio is taken inside each round. Ceilings
(fp32 products, copies) are measured in the same run. On one CPU thread the clock counts this
process's processor time: what others do on the machine still costs cache and clock rate, but not
waiting. A peer that cannot be made or run keeps its row, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from training.runtime.environment import keep_freed_memory, versions

WARMUP_RUNS = 2
FEWEST_ROUNDS = 7
COMPILED = "torch.compile"  # in the name of every way that compiles
Run = Callable[[], object]
aten = torch.ops.aten


@dataclass(slots=True, kw_only=True)
class Case:
    """One comparison. `ways` make what is timed; the first one is ours, the others its peers.

    amount: units of work (tokens, parameters) of one call. flop_way: the way whose matrix products
    are counted to state a share of the peak. bytes_moved: of one call, for what memory bounds.
    on: "cpu", "cuda" or "any". facts: what else the row should say; may be filled by a way.
    """

    bench: str
    name: str
    unit: str
    amount: float
    ways: Mapping[str, Callable[[], Run]]
    count_products: bool = False
    bytes_moved: float = 0.0
    on: str = "any"
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True, frozen=True)
class BenchOptions:
    """rounds per case; threads of torch; clock "cpu" or "wall"; only: part of a case's name;
    compiled: whether ways under torch.compile are measured, which takes minutes. resumes: whether
    cases that the file has are left as they are.
    """

    rounds: int
    threads: int
    clock: str
    device: torch.device
    only: str = ""
    compiled: bool = True
    resumes: bool = False

    def now(self) -> float:
        """Seconds on the chosen clock, after the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.process_time() if self.clock == "cpu" else time.perf_counter()


def parse_options(description: str, arguments: Sequence[str]) -> tuple[BenchOptions, Path | None]:
    """The one face of all benches; ValueError names the flag and the mend."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, metavar="N")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--clock", choices=("auto", "cpu", "wall"), default="auto")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds TEXT")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows of --json's file, measure the others"
    )
    given = parser.parse_args(arguments)
    if given.rounds < FEWEST_ROUNDS:
        raise ValueError(
            f"--rounds {given.rounds} is too few for a median: {FEWEST_ROUNDS} at least"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    device = device if given.device == "auto" else given.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device; use --device cpu")
    clock = given.clock
    if clock == "auto":
        clock = "cpu" if given.threads == 1 and device == "cpu" else "wall"
    options = BenchOptions(
        rounds=given.rounds,
        threads=given.threads,
        clock=clock,
        device=torch.device(device),
        only=given.only,
        compiled=not given.no_compile,
        resumes=given.resume,
    )
    if given.resume and given.json is None:
        raise ValueError("--resume continues a file: name it with --json")
    return options, given.json


def run_bench(
    description: str,
    cases: Callable[[BenchOptions], list[Case]],
    arguments: Sequence[str] | None = None,
) -> int:
    """Measure all cases, print a line per row, write the file; 1 if a row failed."""
    try:
        options, output = parse_options(
            description, sys.argv[1:] if arguments is None else arguments
        )
        head = describe_run(description, options)
        kept, parts = kept_rows(output, head) if options.resumes else ([], [])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    started = time.perf_counter()
    ceilings = measure_ceilings(options)
    measured = {(row["bench"], row["case"]) for row in kept}
    rows: list[dict[str, Any]] = []

    def record(*, complete: bool) -> None:
        result = head | {
            "complete": complete,
            "ceilings": ceilings,
            "load_after": load_average(),
            "seconds": round(time.perf_counter() - started, 1),
            "earlier_parts": parts,
            "rows": [*kept, *(state_share(row, ceilings) for row in rows)],
        }
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    for case in cases(options):
        is_known = (case.bench, case.name) in measured
        if options.only in f"{case.bench} {case.name}" and not is_known:
            rows += measure_case(case, options)
            for row in rows[-len(case.ways) :]:
                print(json.dumps(state_share(row, ceilings)), flush=True)
            record(complete=False)  # a run that is stopped keeps what it has measured
    later = measure_ceilings(options)
    ceilings = {name: max(ceilings[name], later[name]) for name in ceilings}
    record(complete=True)
    return int(any("failed" in row for row in rows))


def kept_rows(
    output: Path | None, head: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the cases that the file has in full, and when and under what they were measured.

    ValueError when the file comes from another machine, other versions or another way to measure.
    """
    if output is None or not output.is_file():
        return [], []
    before = json.loads(output.read_text(encoding="utf-8"))
    for name in ("what", "machine", "versions", "threads", "clock", "rounds"):
        if before[name] != head[name]:
            raise ValueError(f"{output} was measured with another {name}: leave --resume out")
    part = {name: before[name] for name in ("date", "ceilings", "load_before", "load_after")}
    failed = {(row["bench"], row["case"]) for row in before["rows"] if "failed" in row}
    rows = [row for row in before["rows"] if (row["bench"], row["case"]) not in failed]
    return rows, [*before.get("earlier_parts", []), part]


def describe_run(description: str, options: BenchOptions) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    cuda = options.device.type == "cuda"
    return {
        "what": description.partition("\n")[0],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": cpu_name(),
            "cpus": os.cpu_count(),
            "vector": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name(options.device) if cuda else "cpu",
            "system": platform.system(),
        },
        "versions": {name: value for name, value in versions().items() if value is not None},
        "threads": options.threads,
        "clock": f"{options.clock} time",
        "rounds": options.rounds,
        "load_before": load_average(),
    }


def measure_case(case: Case, options: BenchOptions) -> list[dict[str, Any]]:
    """One row per way: median, min and max of its speed, and our speed over its by rounds."""
    head = {"bench": case.bench, "case": case.name, "unit": case.unit}
    if case.on not in ("any", options.device.type):
        return [head | {"way": way, "not_measured": f"needs {case.on}"} for way in case.ways]
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    flops = 0.0
    left_out = [way for way in case.ways if COMPILED in way and not options.compiled]
    for way, make in case.ways.items():
        if way in left_out:
            continue
        try:
            run = make()
            for _ in range(WARMUP_RUNS):
                run()
        except (ImportError, RuntimeError) as error:
            failures[way] = f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        runs[way] = run
        if case.count_products and way == next(iter(case.ways)):
            flops = count_flops(run)
    seconds = time_in_turns(runs, options)
    ours = seconds.get(next(iter(case.ways)))
    rows = []
    for way in case.ways:
        if way in left_out:
            rows.append(head | {"way": way, "not_measured": "left out by --no-compile"})
            continue
        if way in failures:
            rows.append(head | {"way": way, "failed": failures[way]})
            continue
        speeds = [case.amount / value for value in seconds[way]]
        row: dict[str, Any] = head | {"way": way} | spread(speeds)
        if ours is not None and seconds[way] is not ours:
            pairs = zip(seconds[way], ours, strict=True)
            row["ours_over_it"] = spread([theirs / own for theirs, own in pairs])
        elif ours is not None:
            row |= {"flops": flops, "bytes": case.bytes_moved, **case.facts}
        row["seconds"] = significant(statistics.median(seconds[way]))
        rows.append(row)
    return rows


def time_in_turns(runs: Mapping[str, Run], options: BenchOptions) -> dict[str, list[float]]:
    """Seconds of every way in every round; every other round in reverse order."""
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for number in range(options.rounds):
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for way in order:
            start = options.now()
            runs[way]()
            seconds[way].append(max(1e-9, options.now() - start))
    return seconds


def count_flops(run: Run) -> float:
    """Operations of the matrix products of one call, in place and byte products too."""

    def product(left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * left[-2] * left[-1] * right[-1] * (left[0] if len(left) == 3 else 1)

    def added(total: Any, left: Any, right: Any, *args: Any, **kwargs: Any) -> int:
        return product(left, right)

    mapping = {aten.addmm_: added, aten.baddbmm_: added, aten._int_mm: product}
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        run()
    return float(counter.get_total_flops())


def measure_ceilings(options: BenchOptions) -> dict[str, float]:
    """The best fp32 product (GFLOP/s; bf16 on a GPU) and copy (GB/s) that this run has seen."""
    cuda = options.device.type == "cuda"
    size = 8192 if cuda else 1024
    place = {"device": options.device, "dtype": torch.bfloat16 if cuda else torch.float32}
    left, right = torch.randn(size, size, **place), torch.randn(size, size, **place)
    source = torch.randn(2**26, device=options.device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}
    for run in runs.values():
        run()
    best = {name: min(values) for name, values in time_in_turns(runs, options).items()}
    return {
        "product_gflops": significant(2 * size**3 / best["product"] / 1e9),
        "copy_gb_per_s": significant(2 * 4 * source.numel() / best["copy"] / 1e9),
    }


def state_share(row: Mapping[str, Any], ceilings: Mapping[str, float]) -> dict[str, Any]:
    """The row with its counted work as a share of the measured ceiling, in per cent."""
    stated = {name: value for name, value in row.items() if name not in ("flops", "bytes")}
    flops, moved = row.get("flops", 0.0), row.get("bytes", 0.0)
    if flops:
        stated["gflop"] = significant(flops / 1e9)
        rate, ceiling = flops / row["seconds"] / 1e9, ceilings["product_gflops"]
        stated["sol_percent"] = significant(100 * rate / ceiling)
    elif moved:
        rate, ceiling = moved / row["seconds"] / 1e9, ceilings["copy_gb_per_s"]
        stated["sol_percent"] = significant(100 * rate / ceiling)
    return stated


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes, rounded to the significant digits of a result file."""
    return {
        "median": significant(statistics.median(values)),
        "min": significant(min(values)),
        "max": significant(max(values)),
    }


def significant(value: float) -> float:
    """Four significant digits: more would pretend to be known."""
    return float(f"{value:.4g}")


def cpu_name() -> str:
    """The processor's model name where the system tells."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Processes that wanted to run in the last 1, 5 and 15 minutes; None where unknown."""
    read = getattr(os, "getloadavg", None)
    return None if read is None else [round(value, 1) for value in read()]
