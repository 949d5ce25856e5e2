"""The long trials of reliability, each with a seed, a time limit and a report.

`python scripts/soak.py R2 --trials 1000 --minutes 30` runs one suite until it has its number of
trials or its time is up, and writes `bench/results/reliability_<suite>.json`: what was tried, how
often, what failed, on which code and machine. A failure is recorded with the trial it came from
and ends the suite with exit code 1; zero failures in N trials bound the rate at 3/N (95 %).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MEMORY_DIRECTORY = Path("/dev/shm")


@dataclass(slots=True, kw_only=True)
class Trials:
    """What a suite is given, and what it reports back."""

    home: Path
    seed: int
    wanted: int
    deadline: float
    done: int = 0
    failures: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether another trial may start."""
        return self.done < self.wanted and time.monotonic() < self.deadline

    def check(self, passed: bool, what: str, *, count: int = 1) -> None:
        """Record `count` trials, and what went wrong if they did not pass."""
        self.done += count
        if not passed:
            self.failures.append(what)


def kills_of_a_run(trials: Trials) -> None:
    """R2: SIGKILL at random moments of runs that together hold every feature; after restarts all
    ends as in an unharmed run."""
    from tests.integration.full_runs import SETTINGS

    kill_runs(trials, list(SETTINGS))


def kills_of_one_run(trials: Trials) -> None:
    """R2 of one run that holds all that can be on at once: all but the adaptive mixture, programs
    and tiles by the clock."""
    from tests.integration.full_runs import WHOLE

    kill_runs(trials, [WHOLE])


def kill_runs(trials: Trials, names: Sequence[str]) -> None:
    """Lives of these `full_runs` in turn, killed and restarted, each compared with its twin."""
    from tests.integration.full_runs import open_full, write_sources
    from tests.integration.lives import begin_life, live_under_fire, reap
    from tests.integration.runs import differences, metrics_rows

    draw, sources = random.Random(trials.seed), write_sources(trials.home)
    calls: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for name in names:
        started = time.monotonic()
        if reap(begin_life(open_full(name, trials.home / name, sources))):
            raise RuntimeError(f"the unharmed run failed: {name}")
        seconds[name] = time.monotonic() - started
        row = metrics_rows(trials.home / name)[-1]
        for column, value in row.items():
            feature, _, counted = column.rpartition("_effective_")
            if counted == "calls" and row[f"{feature}_enabled"]:
                calls[column] = calls.get(column, 0) + value
    trials.facts |= {"runs": 0, "effective calls": calls, "kills": dict.fromkeys(names, 0)}
    trials.check(all(calls.values()), f"features without an effect: {calls}", count=0)
    while trials.open:
        number = int(trials.facts["runs"])
        name = names[number % len(names)]
        directory = trials.home / "harmed"
        hits = live_under_fire(
            open_full(name, directory, sources),
            draw,
            kills=min(25, trials.wanted - trials.done),
            within_s=seconds[name] / 4,
        )
        found = differences(trials.home / name, directory)
        trials.check(found == [], f"run {number}, {name}: {found[:3]}", count=hits)
        trials.facts["kills"][name] += hits
        trials.facts["runs"] += 1
        remove(directory)


def power_losses(trials: Trials) -> None:
    """R3: a power loss before every block write of saving, each state mounted and resumed."""
    from tests.training.runtime.real_disks import FILE_SYSTEMS, obstacle, try_states

    counts: dict[str, int] = {}
    for system in FILE_SYSTEMS:
        wanted, seed = round(trials.wanted * system.share), trials.seed
        count = 0
        if reason := obstacle(system):
            trials.facts[f"not tried: {system.name}"] = reason
            continue

        while count < wanted and trials.open:
            seed += 1
            home = trials.home / f"{system.name}{seed}"
            home.mkdir()
            for wrong in try_states(home, system, seed=seed):
                count += 1
                trials.check(not wrong, f"{system.name}, seed {seed}: {wrong}")
                if count >= wanted or not trials.open:
                    break
            remove(home)
        counts[system.name] = count
    trials.facts["states"] = counts


def modelled_power_losses(trials: Trials) -> None:
    """R3 on a model of a disk: states after a power loss before every operation of saving."""
    from tests.training.runtime.power_loss import RecordingOps
    from tests.training.runtime.test_power_loss import check_crashes, record_run
    from training.runtime.checkpoint import CheckpointStore

    seed = trials.seed
    trials.facts["model"] = (
        "file operations recorded, states generated in order and as random subsets with torn "
        "sectors; any file system is allowed that keeps what was flushed"
    )
    while trials.open:
        seed += 1
        base = trials.home / f"seed{seed}"
        (base / "scratch").mkdir(parents=True)
        trace = record_run(base / "run", CheckpointStore, RecordingOps())
        try:
            states = check_crashes(trace, base / "run", base / "scratch", seed=seed)
            trials.check(True, "", count=states)
        except AssertionError as error:
            trials.check(False, f"seed {seed}: {error}")
        remove(base)


def damaged_checkpoints(trials: Trials) -> None:
    """R6: damage of eleven kinds; each found, set aside, the checkpoint before it resumed."""
    from tests.training.runtime.test_checkpoint_corruption import (
        OTHER_DAMAGE,
        DamagedStore,
        flip_bit,
    )

    logging.disable(logging.WARNING)
    store, draw = DamagedStore(trials.home / "store"), random.Random(trials.seed)
    counts: dict[str, int] = {}
    while trials.open:
        damage = draw.choice((flip_bit, *OTHER_DAMAGE))
        try:
            trials.check(store.survives(damage, draw), f"{trials.done}: {damage.__name__}")
        except AssertionError:
            trials.check(False, f"{trials.done}: {damage.__name__}: other values")
        counts[damage.__name__] = counts.get(damage.__name__, 0) + 1
    store.store.close()
    trials.facts["kinds"] = counts


def signals_of_a_run(trials: Trials) -> None:
    """R10: SIGINT and SIGTERM at random moments; exit within 10 s, the last step saved."""
    from tests.integration.test_signals_at_random import check_runs

    seed = trials.seed
    while trials.open:
        seed += 1
        count = min(25, trials.wanted - trials.done)
        try:
            check_runs(trials.home / f"seed{seed}", count=count, seed=seed)
            trials.check(True, "", count=count)
        except AssertionError as error:
            trials.check(False, f"seed {seed}: {error}")
        remove(trials.home / f"seed{seed}")


def resumes(trials: Trials) -> None:
    """R8: resumed at every step of 64, over optimizers and features, bit for bit."""
    from tests.integration.test_resume_pairwise import CONFIGURATIONS, every_resume

    trials.wanted = 63 * len(CONFIGURATIONS)
    tried: dict[str, int] = {}
    for name, flags in CONFIGURATIONS.items():
        if not trials.open:
            break
        for step, found in every_resume(trials.home / name, flags):
            trials.check(found == [], f"{name}, step {step}: {found[:3]}")
            tried[name] = tried.get(name, 0) + 1
            if not trials.open:
                break
        remove(trials.home / name)
    trials.facts["resumed steps by configuration"] = tried


def hour_of_chaos(trials: Trials) -> None:
    """R24: a fault a minute; no manual action, and the end is that of an unharmed twin."""
    from tests.integration.chaos import torment

    trials.facts, failures = torment(
        trials.home,
        faults=trials.wanted,
        minutes=(trials.deadline - time.monotonic()) / 60.0,
        pace_s=0.5,
        seed=trials.seed,
    )
    trials.check(not failures, "; ".join(failures), count=sum(trials.facts["faults"].values()))


def damaged_material(trials: Trials) -> None:
    """R17: mutated PDFs (two in seven), then damaged WET and WARC archives; no crash, no endless
    reading, and what survived comes out byte for byte."""
    from tests.fakeworld.server import FakeWorld
    from tests.training.sources.test_damaged_archives import faults_of
    from tests.training.sources.test_pdf import faults_of_mutated
    from training.sources.pdf import PdfSource

    num_pdfs = trials.wanted * 2 // 7
    while trials.open and trials.done < num_pdfs:
        count = min(500, num_pdfs - trials.done)
        seed = trials.seed + trials.done
        folder, opened = trials.home / f"pdf{seed}", []

        def open_source(paths: list[Path], opened: list[PdfSource] = opened) -> PdfSource:
            opened.append(PdfSource(paths))
            return opened[-1]

        folder.mkdir()
        found = faults_of_mutated(folder, open_source, count=count, seed=seed)
        trials.check(found == [], f"PDFs, seed {seed}: {found}", count=count)
        for source in opened:
            source.close()
        remove(folder)
    trials.facts["mutated_pdfs"] = trials.done
    with FakeWorld() as world:
        while trials.open:
            found = faults_of(world, trials.seed + trials.done)
            trials.check(found == [], "; ".join(found))
    trials.facts["damaged_archives"] = trials.done - trials.facts["mutated_pdfs"]


def stream_under_faults(trials: Trials) -> None:
    """R18: each HTTP fault by itself under the whole hybrid stream; not a token changes."""
    from tests.fakeworld.server import FakeWorld
    from tests.integration.test_stream_under_faults import KINDS, FailingNetwork

    struck: dict[str, int] = dict.fromkeys(KINDS, 0)
    with FakeWorld() as world:
        network = FailingNetwork(world, trials.home)
        while trials.open:
            round_, index = divmod(trials.done, len(KINDS))
            found, hit = network.faults_of(KINDS[index], trials.seed + round_)
            struck[KINDS[index]] += hit
            trials.check(found == [], "; ".join(found))
    trials.facts["trials_struck_by_kind"] = struck


SUITES: dict[str, tuple[int, Callable[[Trials], None]]] = {
    "R2": (1000, kills_of_a_run),
    "R2-one": (200, kills_of_one_run),
    "R3": (5000, power_losses),
    "R3-model": (5000, modelled_power_losses),
    "R6": (100_000, damaged_checkpoints),
    "R8": (10_000, resumes),
    "R10": (500, signals_of_a_run),
    "R17": (7000, damaged_material),
    "R18": (32 * 50, stream_under_faults),
    "R24": (60, hour_of_chaos),
}


def run_suite(name: str, *, wanted: int, minutes: float, seed: int) -> dict[str, Any]:
    """Run one suite; the report, as it is written."""
    _, suite = SUITES[name]
    start = time.monotonic()
    place = MEMORY_DIRECTORY if MEMORY_DIRECTORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=place, prefix="sigma_soak_") as directory:
        trials = Trials(
            home=Path(directory), seed=seed, wanted=wanted, deadline=start + 60.0 * minutes
        )
        suite(trials)
    return {
        "suite": name,
        "what": " ".join((suite.__doc__ or "").split()),
        "seed": seed,
        "trials": trials.done,
        "trials_wanted": trials.wanted,
        "failures": trials.failures,
        "failure_rate_at_most": 3.0 / trials.done if trials.done and not trials.failures else None,
        "complete": trials.done >= trials.wanted,
        "seconds": round(time.monotonic() - start, 1),
        "facts": trials.facts,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": code_version(),
        "machine": machine_text(),
    }


def code_version() -> str:
    """Commit of the code, with a plus sign if files differ from it; "" without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def machine_text() -> str:
    """What a report says of the machine it was made on."""
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return f"{machine}, Python {platform.python_version()}"


def remove(directory: Path) -> None:
    """Delete what a finished trial left, so that a long soak does not fill the disk."""
    import shutil

    shutil.rmtree(directory, ignore_errors=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("suite", choices=[*SUITES, "all"], help="which promise to try")
    parser.add_argument("--trials", type=int, default=0, help="0 = the suite's own number")
    parser.add_argument("--minutes", type=float, default=60.0, help="time limit of each suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    failed = False
    for name in SUITES if options.suite == "all" else [options.suite]:
        wanted = options.trials or SUITES[name][0]
        report = run_suite(name, wanted=wanted, minutes=options.minutes, seed=options.seed)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path = options.output_dir / f"reliability_{name.lower()}.json"
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {report['trials']} trials, {len(report['failures'])} failed -> {path}")
        failed |= bool(report["failures"])
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main(sys.argv[1:]))
