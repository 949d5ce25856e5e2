"""R25: breaks the crash-safety modules one small way at a time, and counts what no test notices.

`python -m scripts.mutants --minutes 30 --seed 0` makes mutants (a comparison turned, a condition
negated, a call left out, a constant shifted, a return emptied) of checkpoint, manifest, restore,
file operations, locks and verdict, and runs the tests of that module against each in a fork of
this process, until one fails. Survivors are listed with their line in
`bench/results/reliability_r25.json`; those that change nothing a test could see are named, with the
reason, in equivalent_mutants.py. A mutant that makes the tests hang is killed: it is noticed. With
`--state PATH` a later call goes on where an earlier one ended.
After DeMillo, Lipton and Sayward 1978; the operators are the sufficient set of Offutt et al. 1996.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from scripts.mutation import Mutant, mutants_of

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240.0
RUNTIME = "tests/training/runtime"
CORNERS = f"{RUNTIME}/test_store_corners.py"
STORE_TESTS = (
    f"{RUNTIME}/test_manifest.py", CORNERS, f"{RUNTIME}/test_store_failures.py",
    f"{RUNTIME}/test_checkpoint.py",
    f"{RUNTIME}/test_atomic_io.py", f"{RUNTIME}/test_save_schedule.py",
    f"{RUNTIME}/test_checkpoint_faults.py", f"{RUNTIME}/test_power_loss.py",
    f"{RUNTIME}/test_checkpoint_corruption.py",
)  # fmt: skip
TESTS: dict[str, tuple[str, ...]] = {
    "training.runtime.checkpoint": STORE_TESTS,
    "training.runtime.manifest": STORE_TESTS,
    "training.runtime.restore": STORE_TESTS,
    "training.runtime.snapshot": STORE_TESTS,
    "training.runtime.atomic_io": (
        CORNERS, f"{RUNTIME}/test_atomic_io.py", f"{RUNTIME}/test_windows_retries.py",
        *STORE_TESTS[2:],
    ),
    "training.runtime.locks": (
        f"{RUNTIME}/test_locks_and_signals.py", f"{RUNTIME}/test_run_lock_race.py",
    ),
    "training.rl.verdict": ("tests/training/rl/test_verdict.py",),
    "training.rl.verifier": (
        "tests/training/rl/test_verifier_parts.py", "tests/training/rl/test_verifier.py",
    ),
}  # fmt: skip


class MutantFinder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module from its mutated tree."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> Any:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_loader(name, self)

    def get_filename(self, fullname: str) -> str:
        return str(source_of(fullname))

    def get_data(self, path: Any) -> bytes:
        if Path(path) != source_of(self.mutant.module):
            raise FileNotFoundError(path)  # its bytecode, which is of the unbroken module
        return ast.unparse(self.mutant.tree).encode()


def source_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


@dataclass(slots=True, kw_only=True)
class Trial:
    """The tests of a module in a fork of this process, with a mutant (None: without any)."""

    mutant: Mutant | None
    process: int
    deadline: float

    @classmethod
    def start(cls, mutant: Mutant | None, tests: Sequence[str]) -> Trial:
        """Fork and begin; the child never returns from here, and is given LIMIT_S seconds."""
        process = os.fork()
        if process == 0:
            _run_tests(mutant, tests)
        return cls(mutant=mutant, process=process, deadline=time.monotonic() + LIMIT_S)

    def is_noticed(self) -> bool | None:
        """Whether a test failed; None while they run. Tests that hang have noticed."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if done:
            return status != 0
        if time.monotonic() < self.deadline:
            return None
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        return True


def _run_tests(mutant: Mutant | None, tests: Sequence[str]) -> NoReturn:
    status = 1
    try:
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        if mutant is not None:
            sys.meta_path.insert(0, MutantFinder(mutant))
        import pytest

        for path in tests:  # the cheap ones first: most mutants end there
            status = int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", path]))
            if status:
                break
    finally:
        os._exit(status)


def try_all(
    mutants: Sequence[Mutant], suites: dict[str, tuple[str, ...]], *, jobs: int, minutes: float
) -> Iterator[tuple[Mutant, bool]]:
    """Each mutant with whether it was noticed, as they end, `jobs` at a time; none is started
    once the minutes are over."""
    end, waiting, running = time.monotonic() + 60.0 * minutes, list(reversed(mutants)), []
    while waiting or running:
        while waiting and len(running) < jobs and time.monotonic() < end:
            mutant = waiting.pop()
            running.append((mutant, Trial.start(mutant, suites[mutant.module])))
        if not running:
            return
        for mutant, trial in list(running):
            if (noticed := trial.is_noticed()) is not None:
                running.remove((mutant, trial))
                yield mutant, noticed
        time.sleep(0.05)


def fails_without_mutant(tests: Sequence[str]) -> bool:
    """Whether the unbroken module's own tests fail or hang, which would make every mutant look
    noticed."""
    trial = Trial.start(None, tests)
    while (noticed := trial.is_noticed()) is None:
        time.sleep(0.05)
    return noticed


def run(
    modules: Sequence[str],
    *,
    seed: int,
    minutes: float,
    count: int,
    jobs: int = 1,
    state: Path | None = None,
    num_files: int | None = None,
) -> dict[str, Any]:
    """Try mutants in a drawn order until there are no more, or no more time; the report.

    What `state` says was noticed is not tried again; survivors are, because tests may be new. With
    the first `num_files` test files of a module alone the share is a lower bound.
    """
    import pytest  # noqa: F401  loaded once, for all forks
    import torch

    torch.set_num_threads(1)
    start, tried = time.monotonic(), dict.fromkeys(modules, 0)
    pool = [m for name in modules for m in mutants_of(name, source_of(name).read_text("utf-8"))]
    suites = {name: TESTS[name][:num_files] for name in modules}
    for tests in dict.fromkeys(suites.values()):
        if fails_without_mutant(tests):
            raise RuntimeError(f"{tests[0]} and those after it fail without any mutant")
    random.Random(seed).shuffle(pool)
    known = set(state.read_text("utf-8").splitlines()) if state and state.exists() else set()
    chosen = pool[: count or None]
    for mutant in chosen:
        tried[mutant.module] += mutant.key in known
    survivors = []
    fresh = [mutant for mutant in chosen if mutant.key not in known]
    for mutant, noticed in try_all(fresh, suites, jobs=jobs, minutes=minutes):
        tried[mutant.module] += 1
        if not noticed:
            survivors.append(mutant)
            print(f"survived: {mutant.name}", flush=True)
        elif state:
            with state.open("a", encoding="utf-8") as file:
                file.write(f"{mutant.key}\n")
    return report_of(pool, tried, survivors) | {
        "seed": seed,
        "tests": suites,
        "seconds": round(time.monotonic() - start, 1),
    }


def report_of(
    pool: Sequence[Mutant], tried: dict[str, int], survivors: Sequence[Mutant]
) -> dict[str, Any]:
    """What became of a pool: survivors by name, those that are equivalent apart with the reason."""
    # Only now, when all forks have ended: it imports what the mutants are made of.
    from scripts.soak import code_version, machine_text

    total, missed = sum(tried.values()), [m for m in survivors if not m.equivalent]
    return {
        "suite": "R25",
        "what": "mutants of the crash-safety modules against their tests",
        "mutants": len(pool),
        "tried": tried,
        "trials": total,
        "killed_share": round(1.0 - len(missed) / max(1, total), 4),
        "survivors": sorted(mutant.name for mutant in missed),
        "equivalent": {m.name: m.equivalent for m in survivors if m.equivalent},
        "complete": total == len(pool),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "machine": machine_text(),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--modules", nargs="+", choices=[*TESTS], default=[*TESTS])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--count", type=int, default=0, help="at most so many mutants; 0 = all")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at once")
    parser.add_argument("--files", type=int, help="only a module's first (cheapest) test files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, help="file that remembers what was noticed")
    parser.add_argument("--report", type=Path, default=ROOT / "bench/results/reliability_r25.json")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    report = run(
        options.modules,
        seed=options.seed,
        minutes=options.minutes,
        count=options.count,
        jobs=options.jobs,
        state=options.state,
        num_files=options.files,
    )
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return int(report["killed_share"] < 0.95)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
