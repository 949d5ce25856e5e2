"""R15: thousands of hostile and honest programs through one sandbox; writes a report.

`python -m scripts.soak_sandbox --runs 10000 --seed 0 --report PATH`. It fails when an honest
program is not rewarded, a hostile one is, or a process is left over; it measures how long after
its limit an endless program is gone, and what an honest run costs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.rl.sandbox import Sandbox, open_sandbox
from training.rl.verdict import CodeTask, Verdict, draw_exam, judge_many

ENDLESS_LIMIT_S = 0.5
LIMIT_S = 10.0
BATCH = 40
HONEST = (
    "def f(x): return sorted(x)",
    "def f(x):\n    x.sort()\n    return x",
    "import heapq\ndef f(x):\n    heapq.heapify(x)\n    return [heapq.heappop(x) for _ in x[:]]",
    "import bisect\ndef f(x):\n    out = []\n    for n in x: bisect.insort(out, n)\n    return out",
)
HOSTILE = (
    "",
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "def f(x): return x",
    "def f(x): return tuple(sorted(x))",
    "import os\nwhile True: os.fork()",
    "import threading\nwhile True: threading.Thread(target=print).start()",
    "a = [0] * 10 ** 11",
    "a = []\nwhile True: a.append(bytes(2 ** 20))",
    "def f(x): return 'x' * 2 ** 22",
    "import os\nwhile True: os.write(3, b'x' * 65536)",
    "n = 0\nwhile True:\n    n += 1\n    open('/tmp/%d' % n, 'wb').write(bytes(2 ** 20))",
    "import os\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
    "import socket\nsocket.create_connection(('127.0.0.1', 1))",
    "import ctypes\nctypes.string_at(0)",
    "def f(x): return f(x)",
    "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)",
    "import os\nfor fd in range(64):\n    try: os.close(fd)\n    except OSError: pass",
    "def f(x): raise KeyboardInterrupt",
    "import gc, sys\nsys.modules.clear()\ngc.collect()",
)
ENDLESS = (
    "while True: pass",
    "import signal\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\nwhile True: pass",
    "def f(x):\n    while True:\n        try:\n            while True: pass\n"
    "        except BaseException: pass",
    "import time\ntime.sleep(3600)",
)
TASK = CodeTask(
    function="f",
    reference=sorted,
    draw=lambda rng: ([rng.randrange(-99, 99) for _ in range(8)],),
    num_cases=4,
)


def batches(runs: int, rng: random.Random) -> Iterator[tuple[list[str], list[str]]]:
    """Kinds and programs, half of them honest and one in twenty endless."""
    pools = {"honest": HONEST, "hostile": HOSTILE, "endless": ENDLESS}
    while runs > 0:
        size = min(BATCH, runs)
        kinds = rng.choices(list(pools), weights=(50, 45, 5), k=size)
        yield kinds, [rng.choice(pools[kind]) for kind in kinds]
        runs -= size


def processes_below(pid: int) -> list[int]:
    """All descendants of a process, zombies included."""
    found = []
    try:
        for task in list(Path(f"/proc/{pid}/task").iterdir()):
            for word in (task / "children").read_text().split():
                found += [int(word), *processes_below(int(word))]
    except (FileNotFoundError, ProcessLookupError):
        # A thread or a process ended while it was looked at; what it left is under another one.
        return processes_below(pid) if Path(f"/proc/{pid}").exists() else found
    return found


def judge_batch(
    sandbox: Sandbox, kinds: list[str], programs: list[str], rng: random.Random
) -> list[Verdict]:
    """Verdicts in order; the endless ones have a limit of their own."""
    verdicts: dict[int, Verdict] = {}
    for limit_s, wanted in ((ENDLESS_LIMIT_S, {"endless"}), (LIMIT_S, {"honest", "hostile"})):
        numbers = [number for number, kind in enumerate(kinds) if kind in wanted]
        entries = [(TASK, programs[number]) for number in numbers]
        found = judge_many(entries, sandbox=sandbox, rng=rng, limit_s=limit_s)
        verdicts.update(zip(numbers, found, strict=True))
    return [verdicts[number] for number in range(len(kinds))]


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile and maximum, in milliseconds."""
    ranked = sorted(values) or [float("nan")]
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    last = len(ranked) - 1
    return {name: round(1e3 * ranked[round(share * last)], 2) for name, share in at.items()}


def soak(*, runs: int, seed: int, num_workers: int, time_limit_s: float) -> dict[str, Any]:
    """Run the mixture; the report. RuntimeError at the first breach."""
    rng, begun = random.Random(seed), time.monotonic()
    reasons: Counter[str] = Counter()
    over, honest = [], []
    with open_sandbox(num_workers=num_workers) as sandbox:
        judge_batch(sandbox, ["honest"] * num_workers, [HONEST[0]] * num_workers, rng)
        before = len(processes_below(os.getpid()))  # the zygotes
        for kinds, programs in batches(runs, rng):
            verdicts = judge_batch(sandbox, kinds, programs, rng)
            for kind, program, verdict in zip(kinds, programs, verdicts, strict=True):
                if verdict.passed != (kind == "honest"):
                    raise RuntimeError(f"{kind} program {program!r}: {verdict}")
                reasons[f"{kind} {verdict.reason}"] += 1
                if kind == "endless":
                    over.append(verdict.elapsed_s - ENDLESS_LIMIT_S)
                elif kind == "honest":
                    honest.append(verdict.elapsed_s)
            if (left := len(processes_below(os.getpid()))) > before:
                raise RuntimeError(f"{left - before} processes are left over")
            if time.monotonic() - begun > time_limit_s:
                break
        return {
            "suite": "R15",
            "sandbox": sandbox.kind,
            "runs": sum(reasons.values()),
            "runs_asked": runs,
            "seed": seed,
            "num_workers": num_workers,
            "orphans": 0,
            "lost_workers": sandbox.num_lost_workers,
            "outcomes": dict(sorted(reasons.items())),
            "kill_latency_is": "seconds from an endless program's start until no process of it was "
            f"left, by the clock of the process that kills it, less its limit of {ENDLESS_LIMIT_S}",
            "kill_latency_ms": quantiles(over),
            "honest_run_ms": quantiles(honest),
            "seconds": round(time.monotonic() - begun, 1),
        }


def idle_cost_ms(*, count: int) -> dict[str, float]:
    """What an honest run costs one after another, in each kind of sandbox; nan where it is none."""
    rng = random.Random(0)
    costs = {}
    for kind in ("bubblewrap", "landlock"):
        with open_sandbox(kind=kind) as sandbox:
            jobs = [draw_exam(TASK, HONEST[0], rng=rng).job for _ in range(count)]
            elapsed = [sandbox.run(job, limit_s=LIMIT_S).elapsed_s for job in jobs]
        costs[kind] = quantiles(elapsed)["p50"]
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit-s", type=float, default=3600.0)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    report = soak(
        runs=arguments.runs,
        seed=arguments.seed,
        num_workers=arguments.workers,
        time_limit_s=arguments.time_limit_s,
    )
    report["median_run_ms"] = idle_cost_ms(count=40)
    report["load_average"] = [round(load, 1) for load in os.getloadavg()]
    report["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
    report["machine"] = {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    arguments.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
