"""Every feature off, on and as a placebo, over the same seeds: the runs behind the table.

    python scripts/ablate_features.py --json bench/results/ablation_cpu.json
    python scripts/ablation_table.py

scripts/ablations.toml lists the arms and the rows that compare them; rows share arms, so the plain
network runs once per seed. An arm runs for the same number of steps as all others (equal tokens),
and once more for as many steps as the arm it is compared with could have made in the same time
(equal time). What a step costs is measured apart, both side by side, in processor time. A run that
the file holds is not made again; several processes may work on one file, each on arms of its own
(`--arms`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from scripts.ablate import SAME_COST
from scripts.ablation import Arm, Outcome, run_side_by_side
from scripts.bench_common import cpu_name, load_average
from scripts.paired import Comparison, compare
from scripts.placebos import PLACEBOS
from training.config.cli import parse_args
from training.runtime.environment import versions

LIST = Path(__file__).resolve().parent / "ablations.toml"
LOCK_WAIT_S = 60.0
TURN_STEPS = 4


@dataclass(slots=True, kw_only=True, frozen=True)
class Row:
    """One comparison of the table, by names of arms; `against` is whose time the others get."""

    feature: str
    off: str
    on: str
    placebo: str = ""
    against: str = "base"
    note: str = ""

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.off, self.on, self.placebo)))


@dataclass(slots=True, kw_only=True, frozen=True)
class Plan:
    """The list of arms and rows, as scripts/ablations.toml holds it."""

    flags: tuple[str, ...]
    steps: int
    cost_steps: int
    seeds: tuple[int, ...]
    arms: dict[str, Arm]
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path = LIST) -> Plan:
        """ValueError where a row names an arm that is not there, or an arm cannot be run."""
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        arms = {
            name: Arm(
                name=name,
                flags=tuple(own.get("flags", "").split()),
                placebo=own.get("placebo", ""),
            )
            for name, own in found["arms"].items()
        }
        plan = cls(
            flags=tuple(found["flags"].split()),
            steps=found["steps"],
            cost_steps=found["cost_steps"],
            seeds=tuple(found["seeds"]),
            arms=arms,
            rows=tuple(Row(**row) for row in found["rows"]),
        )
        plan.check()
        return plan

    def check(self) -> None:
        """ValueError for an unknown arm or placebo, or flags that no run takes; the first one
        found."""
        for row in self.rows:
            for name in (*row.arms, row.against):
                if name not in self.arms:
                    raise ValueError(f"row {row.feature}: there is no arm {name!r}")
            if row.against not in row.arms:
                raise ValueError(f"row {row.feature}: against names none of its own arms")
        for arm in self.arms.values():
            if arm.placebo and arm.placebo not in PLACEBOS:
                raise ValueError(f"arm {arm.name}: there is no placebo {arm.placebo!r}")
            parse_args([*self.flags, *arm.flags])

    def rival(self, name: str) -> str:
        """The arm whose time `name` is given; itself for one that no row gives another's."""
        rivals = [row.against for row in self.rows if name in row.arms and row.against != name]
        return rivals[0] if rivals else name

    def is_placebo(self, name: str) -> bool:
        return any(row.placebo == name for row in self.rows)

    def key(self, name: str) -> str:
        """What a run of the arm depends on besides seed and steps."""
        arm = self.arms[name]
        return " ".join((*arm.flags, *([f"[{arm.placebo}]"] if arm.placebo else []))) or "nothing"


class Record:
    """The result file: runs by arm, seed and steps, and what a step of an arm costs."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._about = about
        self.runs: dict[str, dict[str, Any]] = {}
        self.costs: dict[str, float] = {}
        self._refresh()

    def outcome(self, key: str, *, seed: int, steps: int) -> Outcome | None:
        """What `add_run` has kept of this very run, None if it is still to be made."""
        found = self.runs.get(key, {}).get(f"{seed}, {steps} steps")
        if found is None:
            return None
        return Outcome(bpb=found["bpb"], steps=steps, seconds=found["cpu_s"])

    def add_run(self, key: str, outcome: Outcome, *, seed: int) -> None:
        """Keep a run and write the file at once, together with what other processes added."""
        found = {"bpb": outcome.bpb, "cpu_s": round(outcome.seconds, 2)}
        with self._updated():
            self.runs.setdefault(key, {})[f"{seed}, {outcome.steps} steps"] = found

    def add_cost(self, pair: str, cost: float) -> None:
        """Keep the ratio of two arms' step times and write the file at once; `pair` is that of
        `pair_of`."""
        with self._updated():
            self.costs[pair] = cost

    @contextmanager
    def _updated(self) -> Iterator[None]:
        """What other processes have added meanwhile, and then this."""
        lock = self._path.with_suffix(".lock")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _take(lock)
        try:
            self._refresh()
            yield
            text = json.dumps(self._about | {"costs": self.costs, "runs": self.runs}, indent=1)
            part = self._path.with_suffix(".part")
            part.write_text(text + "\n", encoding="utf-8", newline="\n")
            os.replace(part, self._path)
        finally:
            lock.unlink()

    def _refresh(self) -> None:
        if not self._path.is_file():
            return
        found = json.loads(self._path.read_text(encoding="utf-8"))
        for name in ("flags", "cost_steps"):
            if found[name] != self._about[name]:
                raise ValueError(f"{self._path} holds runs with other common {name}")
        self.runs, self.costs = found["runs"], found["costs"]


def _take(lock: Path) -> None:
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL))
            return
        except FileExistsError:
            if time.monotonic() > end:
                raise RuntimeError(f"{lock} is held; delete it if no process writes") from None
            time.sleep(0.05)


def pair_of(plan: Plan, name: str) -> str:
    """Key of a cost: what the arm runs, over what the arm runs that it is timed against."""
    return f"{plan.key(name)} / {plan.key(plan.rival(name))}"


def equal_time_steps(plan: Plan, record: Record, name: str) -> int | None:
    """Steps of an arm in its rival's time; None while its cost is not known."""
    if plan.rival(name) == name:
        return plan.steps
    cost = record.costs.get(pair_of(plan, name))
    if cost is None:
        return None
    return plan.steps if abs(cost - 1.0) < SAME_COST else max(1, round(plan.steps / cost))


@dataclass(slots=True, kw_only=True, frozen=True)
class Finding:
    """A row's comparisons of `on`, None where runs are missing, and what its step costs over `off`.

    The placebo does the same work in the same time, so equal tokens are equal time between it and
    `on`.
    """

    tokens: Comparison | None
    timed: Comparison | None
    placebo: Comparison | None
    cost: float | None
    is_complete: bool

    @property
    def comparisons(self) -> list[Comparison]:
        return [part for part in (self.tokens, self.timed, self.placebo) if part is not None]


def find(plan: Plan, record: Record, row: Row) -> Finding:
    """What the record has for a row."""
    tokens = _compared(plan, record, row, row.off, timed=False)
    timed = _compared(plan, record, row, row.off, timed=True)
    placebo = _compared(plan, record, row, row.placebo, timed=False)
    wanted = [tokens, timed, *([placebo] if row.placebo else [])]
    costs = [
        1.0 if name == row.against else record.costs.get(pair_of(plan, name))
        for name in (row.on, row.off)
    ]
    return Finding(
        tokens=tokens,
        timed=timed,
        placebo=placebo,
        cost=None if costs[0] is None or costs[1] is None else costs[0] / costs[1],
        is_complete=all(part and part.num_seeds == len(plan.seeds) for part in wanted),
    )


def _compared(
    plan: Plan, record: Record, row: Row, rival: str, *, timed: bool
) -> Comparison | None:
    """`on` less a rival, over the seeds that have both."""
    if not rival:
        return None
    pairs = []
    for seed in plan.seeds:
        found = []
        for name in (row.on, rival):
            steps = equal_time_steps(plan, record, name) if timed else plan.steps
            if timed and name == row.against:
                steps = plan.steps
            if steps is not None:
                found.append(record.outcome(plan.key(name), seed=seed, steps=steps))
        whole = [outcome.bpb for outcome in found if outcome is not None]
        if len(whole) == 2:
            pairs.append(whole)
    if len(pairs) < 2:
        return None
    return compare([ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def measure_cost(plan: Plan, name: str, directory: Path) -> float:
    """Processor time of a step over that of the rival's, both runs side by side."""
    rival = plan.arms[plan.rival(name)]
    found = run_side_by_side(
        plan.flags, [rival, plan.arms[name]], seed=plan.seeds[0],
        steps={rival.name: plan.cost_steps, name: plan.cost_steps},
        directory=directory, clock=time.process_time, turn_steps=TURN_STEPS,
    )  # fmt: skip
    return round(found[name].seconds / found[rival.name].seconds, 4)


def make_runs(plan: Plan, record: Record, names: Sequence[str]) -> None:
    """Equal tokens of all arms seed by seed, then costs, then equal time."""
    for seed in plan.seeds:
        for name in names:
            _make_run(plan, record, name, seed=seed, steps=plan.steps)
    dear = [name for name in names if plan.rival(name) != name and not plan.is_placebo(name)]
    for name in dear:
        if pair_of(plan, name) in record.costs:
            continue
        with tempfile.TemporaryDirectory() as directory:
            cost = measure_cost(plan, name, Path(directory))
        print(f"{name}: a step costs {cost:.3f} of {plan.rival(name)}'s", flush=True)
        record.add_cost(pair_of(plan, name), cost)
    for seed in plan.seeds:
        for name in dear:
            steps = equal_time_steps(plan, record, name)
            assert steps is not None
            _make_run(plan, record, name, seed=seed, steps=steps)


def _make_run(plan: Plan, record: Record, name: str, *, seed: int, steps: int) -> None:
    if record.outcome(plan.key(name), seed=seed, steps=steps) is not None:
        return
    with tempfile.TemporaryDirectory() as directory:
        outcome = run_side_by_side(
            plan.flags, [plan.arms[name]], seed=seed, steps={name: steps},
            directory=Path(directory), clock=time.process_time,
        )[name]  # fmt: skip
    record.add_run(plan.key(name), outcome, seed=seed)
    print(f"{name}, seed {seed}, {steps} steps: {outcome.bpb:.4f} ({outcome.seconds:.1f} s)",
          flush=True)  # fmt: skip


def about(plan: Plan) -> dict[str, Any]:
    """Head of the result file: how it came about and on which machine. Asks the machine's load
    now."""
    return {
        "what": "Every feature off, on and as a placebo; scripts/ablations.toml names the arms.",
        "command": "python scripts/ablate_features.py --json bench/results/ablation_cpu.json",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "load": load_average(), "threads": 1},
        "versions": versions(),
        "flags": list(plan.flags),
        "cost_steps": plan.cost_steps,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--list", type=Path, default=LIST, metavar="FILE")
    parser.add_argument("--arms", default="", metavar="NAMES", help="with ';' between; all if none")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    plan = Plan.read(options.list)
    names = [name.strip() for name in options.arms.split(";")] if options.arms else list(plan.arms)
    unknown = sorted(set(names) - set(plan.arms))
    if unknown:
        parser.error(f"--arms: there is no arm {unknown[0]!r}")
    make_runs(plan, Record(options.json, about(plan)), names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
