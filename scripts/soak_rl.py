"""R13 to R15 through the verifier of a training run that is alive; writes a report.

`python -m scripts.soak_rl --runs 3000 --minutes 30 --report PATH` trains a tiny model with RL at
every step. What its verifier is given to judge is not what the model wrote but the attempts of R13
(300 that want out of the sandbox), the hacks, honest programs and hopeless tasks of R14 (950), and
R15's mixture for the rest; every sixteenth time the sandbox's own process is killed first. The
rewards go where rewards go. It fails when a verdict is wrong, an attempt gets out, a process is
left over, or the trainer does not end as it should with finite weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from scripts import soak_sandbox
from scripts.soak import code_version, machine_text
from scripts.soak_sandbox import processes_below, quantiles
from tests.integration.runs import metrics_rows, tiny_flags
from tests.training.rl import programs
from tests.training.rl.attempt_actions import CLASSES
from tests.training.rl.attempts import attempts_of
from tests.training.rl.scene import Scene
from training.build import build_trainer
from training.config.cli import parse_args
from training.rl.sandbox import Sandbox
from training.rl.sandbox_job import Job, Reply, SandboxLimits
from training.rl.tasks import Task
from training.rl.verdict import CodeTask
from training.rl.verifier import Judgement, Verifier

TASKS, GROUP = 4, 10
ALLOWED = {"processes": 0, "disk": SandboxLimits().scratch_bytes}
KILL_EVERY = 16
FLAGS = (
    "--ttrl-interval", "1", "--startup-meta-ramp-steps", "0", "--ttrl-tasks", str(TASKS),
    "--ttrl-group-size", str(GROUP), "--ttrl-max-new-tokens", "4", "--ttrl-top-k", "0",
    "--ttrl-task-families", "function", "--no-verifier-cascade-enabled",
    "--verifier-eval-every", "1000000", "--ttrl-refine-iters", "0", "--ttrl-budget-max", "1",
    "--no-ema-enabled", "--eval-interval", "0", "--sample-interval", "0",
    "--no-curriculum-enabled", "--save-interval", "20", "--max-checkpoints", "3",
)  # fmt: skip


@dataclass(slots=True, kw_only=True, frozen=True)
class Piece:
    """A program for a task, and whether it may pass. kind: honest, endless, or anything hostile."""

    suite: str
    kind: str
    code: CodeTask
    program: str
    fair: bool = False

    @property
    def task(self) -> Task:
        """The program stands in the prompt; what the model adds does nothing."""
        return Task(
            family="function",
            domain="code",
            level=1,
            prompt=f"{self.program}\nif True:\n",
            answer=None,
            code=self.code,
            solution="    pass\n",
        )


def attempts(scene: Scene) -> Iterator[Piece]:
    """R13. Each is told of the scene and can earn nothing."""
    for kind in CLASSES:
        for number, program in enumerate(attempts_of(kind)):
            told = scene.described(number)
            code = CodeTask(
                function="attempt",
                reference=lambda told: "nothing that an attempt returns",
                draw=lambda rng, told=told: (told,),
                num_cases=1,
            )
            yield Piece(suite="R13", kind=kind, code=code, program=program)


def rewards(rng: random.Random) -> Iterator[Piece]:
    """R14."""
    for name, code in programs.tasks().items():
        for hack in programs.HACKS:
            yield Piece(suite="R14", kind="hack", code=code, program=hack)
        for text in programs.honest_programs(name):
            yield Piece(suite="R14", kind="honest", code=code, program=text, fair=True)
    for code in programs.impossible_tasks(rng):
        for guess in programs.guesses():
            yield Piece(suite="R14", kind="hopeless", code=code, program=guess)


def mixture(rng: random.Random) -> Iterator[Piece]:
    """R15, for ever."""
    while True:
        for kinds, texts in soak_sandbox.batches(soak_sandbox.BATCH, rng):
            for kind, text in zip(kinds, texts, strict=True):
                fair = kind == "honest"
                yield Piece(suite="R15", kind=kind, code=soak_sandbox.TASK, program=text, fair=fair)


@dataclass(slots=True, kw_only=True)
class Siege:
    """What is to be judged, and what came of it."""

    scene: Scene
    wanted: int
    deadline: float
    stop_file: Path
    pieces: Iterator[Piece]
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    said: list[bytes] = field(default_factory=list)
    done: int = 0
    batches: int = 0
    most_processes: int = 0

    def take(self, count: int) -> list[Piece]:
        """The next pieces; the run is asked to stop when there are enough, or no time is left."""
        found = [next(self.pieces) for _ in range(count)]
        self.done += count
        self.batches += 1
        if self.done >= self.wanted or time.monotonic() > self.deadline:
            self.stop_file.touch()
        return found

    def look(self, pieces: Sequence[Piece], judged: Sequence[Judgement], *, limit_s: float) -> None:
        """Note what should not have been."""
        for piece, word, said in zip(pieces, judged, self.said, strict=True):
            self.counts[f"{piece.suite} {piece.kind} {word.reason}"] += 1
            if word.passed != piece.fair:
                self.faults.append(f"{piece.suite} {piece.kind} {word}: {piece.program[:300]!r}")
            if word.reason == "timeout":
                self.late.append(word.elapsed_s - limit_s)
            if piece.suite == "R13" and self._got_out(piece.kind, said.decode("ascii", "replace")):
                self.faults.append(f"R13 {piece.kind} got out: {said[:300]!r}")
        if traces := self.scene.traces():
            self.faults.append(f"traces on the host: {traces}")

    def _got_out(self, kind: str, said: str) -> bool:
        made = re.search(r"made (\d+)", said)
        canary = self.scene.canary
        claims = made is not None and int(made[1]) > ALLOWED.get(kind, 2**62)
        return claims or canary in said or canary.encode().hex() in said


class BesiegedVerifier(Verifier):
    """The trainer's verifier, which is given other programs than those that the model wrote."""

    siege: Siege

    def verify(
        self, tasks: Sequence[Task], completions: Sequence[str], *, rng: random.Random
    ) -> list[Judgement]:
        siege = self.siege
        pieces = siege.take(len(completions))
        if siege.batches % KILL_EVERY == 0 and self._sandbox is not None:
            for worker in self._sandbox._workers:
                pid = getattr(worker, "pid", None)
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    siege.counts["sandbox killed"] += 1
        siege.said.clear()
        own = [piece.task for piece in pieces]
        judged = super().verify(own, [task.solution for task in own], rng=rng)
        siege.look(pieces, judged, limit_s=self.limit_s)
        left = len(processes_below(os.getpid()))
        siege.most_processes = max(siege.most_processes, left)
        return judged

    def _open(self) -> Sandbox:
        sandbox = super()._open()
        run, said = sandbox.run, self.siege.said
        said.clear()  # of a sandbox that was lost

        def overheard(job: Job, *, limit_s: float) -> Reply:
            said.append(b"")
            reply = run(job, limit_s=limit_s)
            said[-1] = reply.data
            return reply

        sandbox.run = overheard
        return sandbox


def soak(
    folder: Path, *, runs: int, seed: int, minutes: float, limit_ms: int, suites: Sequence[str]
) -> dict[str, Any]:
    """Train under siege; the report."""
    rng, begun = random.Random(seed), time.monotonic()
    others = len(processes_below(os.getpid()))  # of whoever called
    (folder / "scene").mkdir(parents=True)
    scene, run = Scene(folder / "scene"), folder / "run"
    own = {"R13": attempts(scene), "R14": rewards(rng), "R15": mixture(rng)}
    siege = Siege(
        scene=scene,
        wanted=runs,
        deadline=begun + 60 * minutes,
        stop_file=run / "STOP",
        pieces=itertools.chain(*(own[suite] for suite in suites), mixture(rng)),
    )
    steps = math.ceil(runs / (TASKS * GROUP))
    flags = tiny_flags(run, *FLAGS, "--steps", str(steps), "--seed", str(seed))
    besieged = type("BesiegedVerifier", (BesiegedVerifier,), {"siege": siege})
    with mock.patch("training.build_rl.Verifier", besieged):
        trainer = build_trainer(parse_args([*flags, "--verifier-timeout-ms", str(limit_ms)]))
    before = len(processes_below(os.getpid()))
    trainer.fit()
    scene.close()
    rows = metrics_rows(run)[1:]
    finite = all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())
    left = len(processes_below(os.getpid())) - others
    faults = siege.faults if finite else [*siege.faults, "weights are not finite"]
    if siege.most_processes > before:
        faults.append(f"{siege.most_processes - before} processes were left over after a batch")
    if left:
        faults.append(f"{left} processes are left over at the end")
    if not rows[-1]["feature_sigma_rl_effective_calls"]:
        faults.append("no reward moved a weight")
    return {
        "suite": "R13 to R15 through the verifier of a running trainer",
        "programs": siege.done,
        "programs_asked": runs,
        "seed": seed,
        "limit_ms": limit_ms,
        "faults": faults,
        "outcomes": dict(sorted(siege.counts.items())),
        "kill_latency_ms": quantiles(siege.late) if siege.late else None,
        "timeouts": len(siege.late),
        "trainer": {
            "steps": int(rows[-1]["step"]),
            "rl_updates": int(rows[-1]["feature_sigma_rl_effective_calls"]),
            "last_loss": rows[-1]["train_loss"],
        },
        "processes_after_closing": left,
        "seconds": round(time.monotonic() - begun, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "code": code_version(),
        "machine": machine_text(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=10_000, help="programs, 1,250 of R13 and R14")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--limit-ms", type=int, default=5000, help="of one verdict")
    parser.add_argument("--suites", default="R13,R14,R15", help="in this order; then R15")
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sigma_soak_") as folder:
        report = soak(
            Path(folder),
            runs=options.runs,
            seed=options.seed,
            minutes=options.minutes,
            limit_ms=options.limit_ms,
            suites=options.suites.split(","),
        )
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return int(bool(report["faults"]))


if __name__ == "__main__":
    sys.exit(main())
