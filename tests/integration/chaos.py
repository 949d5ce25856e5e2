"""Suite R24: a run that is tormented while it trains, and a twin that is left alone.

The tormentor does what the world does (kills, signals, damaged files, failing disks, a second
start) and what a service manager does (the same command again, whenever it has ended). Both runs
live on the same misbehaving card (chaos_life.py); the twin follows a little behind, so that both
can end at the same step without knowing beforehand how far an hour reaches.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.integration import runs
from tests.integration.chaos_damage import flip_bit, tear_rows, truncate
from tests.integration.chaos_life import HOME, PACE

ROOT = Path(__file__).parents[2]
POLL_S = 0.1
TWIN_DISTANCE = 40
LAST_STEPS = 8
END_WITHIN_S = 1800.0
# What a process sees of its own past: queues, its memory, when it saved.
OF_THE_PROCESS = (
    "data_queue_depth", "data_wait", "data_timeouts", "checkpoint_step", "bitlinear_cache",
)  # fmt: skip
FLAGS = (
    "--steps", "100000", "--save-interval", "3", "--max-checkpoints", "4", "--eval-interval",
    "40", "--sample-interval", "0", "--grad-accum-steps", "1", "--seq-len", "16",
    "--no-curriculum-enabled", "--ema-start-fraction", "0.0001", "--data-backend", "local",
    "--near-dedup-window", "0", "--source-read-timeout-sec", "60", "--stream-shuffle-buffer", "16",
    "--bootstrap-seed-batches", "0", "--num-workers", "1",
)  # fmt: skip


def write_texts(directory: Path) -> Path:
    directory.mkdir(parents=True)
    for number in range(90):
        lines = [f"File {number} has a line {line} of its own kind." for line in range(12)]
        (directory / f"{number:02}.txt").write_text("\n".join(lines), encoding="utf-8")
    return directory


class Life:
    """A command that trains in `home`/run, started again whenever it has ended before its time."""

    def __init__(self, home: Path, texts: Path, *, pace_s: float, flags: tuple[str, ...]) -> None:
        self.home, self.run = home, home / "run"
        home.mkdir()
        self.flags = runs.tiny_flags(self.run, *FLAGS, "--local-path", str(texts), *flags)
        self.environment = {
            **os.environ, HOME: str(home), PACE: str(pace_s), "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "",  # a start finds its bytecode, as anywhere else
        }  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.exit_codes: Counter[int] = Counter()

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        with (self.home / "said.txt").open("ab") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.integration.chaos_life", *self.flags, *more],
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )

    def keep_alive(self) -> None:
        """Start the command again if it has ended: what a service manager does."""
        if self.process is not None and (code := self.process.poll()) is not None:
            self.exit_codes[code] += 1
            self.process = None
        if self.process is None and not self.is_over():
            self.process = self.start()

    def adopt(self, process: subprocess.Popen[bytes]) -> None:
        """Go on with another process: the one before has ended meanwhile."""
        if self.process is not None:
            self.exit_codes[self.process.wait()] += 1
        self.process = process

    def is_over(self) -> bool:
        """Whether the last step is reached and saved, and the process gone."""
        last = self.home / "last"
        if self.process is not None or not last.exists():
            return False
        name = f"checkpoint_step_{int(last.read_text(encoding='ascii')):08d}"
        return (self.run / "checkpoints" / name / "MANIFEST.json").exists()

    def trainer_pid(self) -> int | None:
        """The process that trains, below the one that was started."""
        try:
            owner = json.loads((self.run / "run.lock.json").read_text(encoding="utf-8"))
            command = Path(f"/proc/{owner['pid']}/cmdline").read_bytes()
        except (OSError, ValueError):
            return None
        return owner["pid"] if b"chaos_life" in command else None

    def is_training(self) -> bool:
        """Whether the process of now has done a step."""
        process, _ = self.newest()
        return process != 0 and process == self.trainer_pid()

    def timeline(self) -> list[tuple[int, int, float, float, float]]:
        """(process, step, begin, end, CPU seconds before it) of every step done, in order."""
        try:
            lines = (self.home / "steps.log").read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []
        whole = [line.split() for line in lines if len(line.split()) == 5]
        return [(int(p), int(step), *map(float, rest)) for p, step, *rest in whole]

    def has_saved(self) -> bool:
        """Whether a fault finds something to go back to; before that it only costs a start."""
        return any((self.run / "checkpoints").glob("checkpoint_step_*/MANIFEST.json"))

    def newest(self) -> tuple[int, int]:
        """Process and number of the newest step, (0, 0) before the first."""
        try:
            with (self.home / "steps.log").open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 400))
                lines = log.read().decode("ascii").splitlines(keepends=True)[1:]
        except FileNotFoundError:
            return 0, 0
        whole = [line.split() for line in lines if line.endswith("\n")]
        return (int(whole[-1][0]), int(whole[-1][1])) if whole else (0, 0)

    def end_for_good(self) -> None:
        for pid in (self.trainer_pid(), self.process and self.process.pid):
            if pid is not None:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if self.process is not None:
            self.process.wait()


class Tormentor:
    """Does one fault after another to a life; `notes` says what came of those with an answer."""

    def __init__(self, life: Life, draw: random.Random) -> None:
        self.life, self.draw = life, draw
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.damaged: set[str] = set()
        self.kills, self.frozen_s = 0, 0.0
        self.deck: list[str] = []
        self.faults: dict[str, Callable[[], None]] = {
            "kill": self.kill,
            "kill_of_the_supervisor": lambda: self.signal_parent(signal.SIGKILL),
            "sigterm": lambda: self.signal_trainer(signal.SIGTERM),
            "sigint_to_the_supervisor": lambda: self.signal_parent(signal.SIGINT),
            "stop_file": lambda: (self.life.run / "STOP").touch(),
            "flipped_bit": lambda: self.damage(flip_bit),
            "truncated_file": lambda: self.damage(truncate),
            "torn_metrics": self.tear_metrics,
            "kill_in_a_save": self.kill_in_a_save,
            "unexpected_exception": lambda: self.order("bug", "1"),
        }
        self.mild: dict[str, Callable[[], None]] = {
            "save_file": lambda: (self.life.run / "SAVE").touch(),
            "frozen": self.freeze,
            "second_start": lambda: self.start_another(),
            "start_with_other_settings": lambda: self.start_another("--d-ff", "96"),
            "weights_not_finite": lambda: self.order("weights", "1"),
            "disk_full": lambda: self.order("storage", "disk_full 3"),
            "medium_error": lambda: self.order("storage", "eio 1"),
            "read_only": lambda: self.order("storage", "read_only 2"),
        }

    def strike(self) -> str:
        """One fault; of 34 in a row ten end the process."""
        if not self.deck:
            self.shuffle()
        name = self.deck.pop()
        (self.faults | self.mild)[name]()
        self.done[name] += 1
        return name

    def shuffle(self) -> None:
        self.deck = [*self.faults, *self.mild, *self.mild, *self.mild]
        self.draw.shuffle(self.deck)

    def order(self, name: str, text: str) -> None:
        """Tell the life's card or disk to fail, by a file that appears whole."""
        path = self.life.home / f"{name}.tmp"
        path.write_text(text, encoding="ascii")
        path.replace(self.life.home / name)

    def signal_trainer(self, number: int) -> bool:
        pid = self.life.trainer_pid()
        if pid is None:
            return False
        os.kill(pid, number)
        return True

    def signal_parent(self, number: int) -> None:
        if self.life.process is not None:
            self.life.process.send_signal(number)

    def kill(self) -> bool:
        killed = self.signal_trainer(signal.SIGKILL)
        self.kills += killed
        return killed

    def kill_and_wait(self) -> bool:
        """Kill; the supervisor notices its child's death, says so and ends as well."""
        if not self.kill() or self.life.process is None:
            return False
        self.life.process.wait()
        return True

    def kill_in_a_save(self) -> None:
        (self.life.run / "SAVE").touch()
        time.sleep(self.draw.uniform(0.0, 1.5))
        self.kill()

    def damage(self, how: Callable[[Path, random.Random], None]) -> None:
        """Kill, then damage a file of the newest checkpoint as a medium would."""
        if not self.kill_and_wait():
            return
        found = sorted((self.life.run / "checkpoints").glob("checkpoint_step_*/MANIFEST.json"))
        if found:
            how(self.draw.choice(sorted(found[-1].parent.iterdir())), self.draw)
            self.damaged.add(found[-1].parent.name)

    def tear_metrics(self) -> None:
        if self.kill_and_wait():
            tear_rows(self.life.run, self.draw)

    def freeze(self) -> None:
        pid, start = self.life.trainer_pid(), time.monotonic()
        if pid is None:
            return
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3.0)
        os.kill(pid, signal.SIGCONT)
        self.frozen_s += time.monotonic() - start

    def start_another(self, *more: str) -> None:
        """A second start beside the running one is refused and changes nothing."""
        first, second = self.life.process, self.life.start(*more)
        while (code := second.poll()) is None:
            if first is None or first.poll() is not None:
                self.life.adopt(second)  # nobody is left whom it could disturb
                return
            time.sleep(POLL_S)
        if code != 2:
            self.failures.append(f"a second start ended with {code}")


def torment(
    home: Path, *, faults: int, minutes: float, pace_s: float, seed: int
) -> tuple[dict[str, Any], list[str]]:
    """Faults spread evenly over `minutes`, then the ends compared; facts, and what failed."""
    texts = write_texts(home / "texts")
    life = Life(home / "tormented", texts, pace_s=pace_s, flags=("--supervised",))
    twin = Life(home / "twin", texts, pace_s=0.0, flags=())
    tormentor, start = Tormentor(life, random.Random(seed)), time.monotonic()
    interval = 60.0 * minutes / faults
    (twin.home / "limit").write_text("0", encoding="ascii")
    try:
        while time.monotonic() - start < 60.0 * minutes:
            follow(life, twin)
            struck = sum(tormentor.done.values())
            due = struck < faults and time.monotonic() - start >= interval * (struck + 0.5)
            if due and life.is_training() and life.has_saved():
                tormentor.strike()
        for one in (life, twin):
            (one.home / "last").write_text(str(life.newest()[1] + LAST_STEPS), encoding="ascii")
        deadline = time.monotonic() + END_WITHIN_S
        while not life.is_over() and time.monotonic() < deadline:
            follow(life, twin)
        end = time.monotonic()
        while not twin.is_over() and time.monotonic() < deadline:
            follow(life, twin)
        failures = [*tormentor.failures, *compare(life, twin), *check_traces(tormentor)]
        return describe(tormentor, twin, seconds=end - start, pace_s=pace_s), failures
    finally:
        life.end_for_good()
        twin.end_for_good()


def follow(life: Life, twin: Life) -> None:
    """Keep both alive, the twin a little behind."""
    life.keep_alive()
    twin.keep_alive()
    limit = str(max(0, life.newest()[1] - TWIN_DISTANCE))
    (twin.home / "limit.tmp").write_text(limit, encoding="ascii")
    (twin.home / "limit.tmp").replace(twin.home / "limit")
    time.sleep(POLL_S)


def compare(life: Life, twin: Life) -> list[str]:
    """Names of what differs between the ends of both runs: every tensor, row and cursor."""
    if not (life.is_over() and twin.is_over()):
        return ["a run did not end"]
    found = [name for name in runs.differences(twin.run, life.run) if not name.startswith("row ")]
    ours, theirs = (rows_of(one.run) for one in (life, twin))
    if other := sorted(ours.keys() ^ theirs.keys()):
        found.append(f"recorded in one run only: steps {other[:10]}")
    for step in sorted(ours.keys() & theirs.keys()):
        one, two = ours[step], theirs[step]
        found += [f"step {step}: {name}" for name in one if one[name] != two.get(name)]
    return found[:20]


def rows_of(directory: Path) -> dict[int, dict[str, Any]]:
    rows = runs.metrics_rows(directory)
    assert len({row["step"] for row in rows}) == len(rows), "a step was recorded twice"
    left_out = (*runs.WALL_CLOCK, *OF_THE_PROCESS)
    return {
        row["step"]: {
            name: value for name, value in row.items() if not any(part in name for part in left_out)
        }
        for row in rows
        if row["step"] > 0
    }


def check_traces(tormentor: Tormentor) -> list[str]:
    """A report for every death by a signal; set aside is what was damaged, and nothing else."""
    run, failures = tormentor.life.run, []
    reports = len(list((run / "errors").glob("crash_step_*.json")))
    if reports < tormentor.kills:
        failures.append(f"{tormentor.kills} kills left {reports} crash reports")
    quarantine = run / "checkpoints" / "quarantine"
    aside = {p.name.split("-")[0] for p in quarantine.iterdir()} if quarantine.is_dir() else set()
    if not aside <= tormentor.damaged:
        failures.append(f"healthy checkpoints were set aside: {aside - tormentor.damaged}")
    codes = set(tormentor.life.exit_codes) - {0, 1, 2, -signal.SIGKILL}
    return failures + [f"exit codes {sorted(codes)}"] * bool(codes)


def describe(tormentor: Tormentor, twin: Life, *, seconds: float, pace_s: float) -> dict[str, Any]:
    """What was done, and how much of the time went into steps that are part of the end.

    A loaded machine makes a start of seconds one of a minute, so beside the goodput by the clock
    stands the one that starts of their CPU time and steps of their pace would give.
    """
    life = tormentor.life
    timeline = life.timeline()
    kept = {entry[1]: number for number, entry in enumerate(timeline)}
    productive = restarts = starting_cpu = 0.0
    for number in kept.values():
        process, step, begin, end, _ = timeline[number]
        before = timeline[number - 1] if number else (0, 0, 0.0, 0.0, 0.0)
        productive += end - (before[3] if before[:2] == (process, step - 1) else begin)
    for before, after in zip([(0, 0, 0.0, 0.0, 0.0), *timeline], timeline, strict=False):
        if after[0] != before[0]:
            starting_cpu += after[4]
            restarts += after[2] - before[3] if before[0] else 0.0
    again, lives = len(timeline) - len(kept), len({entry[0] for entry in timeline})
    last = runs.metrics_rows(life.run)[-1]
    ideal = len(kept) * pace_s
    return {
        "faults": dict(sorted(tormentor.done.items())),
        "goodput": round((productive - tormentor.frozen_s) / seconds, 4),
        "goodput_if_no_process_waited_for_a_cpu": round(
            ideal / (ideal + again * pace_s + starting_cpu + tormentor.frozen_s), 4
        ),
        "pace_s": pace_s,
        "run_s": round(seconds, 1),
        "steps": last["step"],
        "steps_done_again": again,
        "steps_skipped": last["steps_skipped"],
        "processes": lives,
        "mean_restart_s": round(restarts / max(1, lives - 1), 2),
        "mean_restart_cpu_s": round(starting_cpu / max(1, lives), 2),
        "kills": tormentor.kills,
        "checkpoints_damaged": len(tormentor.damaged),
        "exit_codes": {str(code): n for code, n in sorted(life.exit_codes.items())},
        "twin_steps": twin.newest()[1],
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
