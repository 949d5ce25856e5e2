"""Ten thousand verdicts on honest and adversarial completions; writes a report.

`python -m scripts.soak_verdicts --verdicts 10000 --seed 0 --report PATH`. Every other round goes
through the cascade instead of the strict verifier alone. A completion is honest if it is the task's
own solution in one of several dresses, and must pass; everything else is written so that it cannot
be right, and must fail. Exit code 1 after a false accept, a false reject or a process left over.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.soak import code_version, machine_text
from scripts.soak_sandbox import HOSTILE, processes_below
from training.rl.cascade import VerifierCascade
from training.rl.tasks import LEVELS, Task, draw_task
from training.rl.verifier import Judgement, Verifier

LIMIT_MS, ENDLESS_LIMIT_MS = 60_000, 400
INTEGERS = ("add", "subtract", "multiply")
CODE = ("expression", "function")
# Kinds of one round and how many of each: (families, honest, adversarial).
ROUND = ((INTEGERS, 70, 203), (("symbolic",), 4, 14), (CODE, 2, 6))
ENDLESS_PER_ROUND = 1
# A formula that never ends costs the start of a new worker, which imports a whole algebra system.
ENDLESS_FORMULA_EVERY = 16
ROUND_SIZE = sum(honest + hostile for _, honest, hostile in ROUND) + ENDLESS_PER_ROUND
SCRIPTS = (0x0660, 0x06F0, 0x0966, 0xFF10, 0x1D7CE)  # where other scripts keep their zero


def foreign_digits(text: str, rng: random.Random) -> str:
    zero = rng.choice(SCRIPTS)
    return "".join(chr(zero + int(sign)) if sign in "0123456789" else sign for sign in text)


def wrong_number(task: Task, rng: random.Random) -> str:
    return str(int(task.answer or 0) + rng.choice((-1, 1)) * rng.randint(1, 10))


TEXT_ATTACKS: tuple[Callable[[Task, random.Random], str], ...] = (
    lambda task, rng: "",
    lambda task, rng: task.prompt,
    lambda task, rng: f"{task.prompt}{task.answer}",
    lambda task, rng: f"{task.answer} {task.answer}",
    lambda task, rng: f"{task.answer}, {task.answer}1",
    lambda task, rng: f"{task.answer};",
    lambda task, rng: f"maybe {task.answer}",
    lambda task, rng: f"\n{task.answer}",
    lambda task, rng: f"{task.answer}\x0b",
    lambda task, rng: f"\u00a0{task.answer}\u2003",
    lambda task, rng: f"{task.answer}\x00",
    lambda task, rng: f"{task.answer}\r0",
    lambda task, rng: f"{task.answer}" + "0" * 10_000,
    lambda task, rng: "9" * rng.choice((65, 4300, 5000, 10**5)),
    lambda task, rng: f"Answer: Answer: {task.answer}",
    lambda task, rng: f"print({task.answer})",
    lambda task, rng: "passed",
    lambda task, rng: '{"passed": true}',
    lambda task, rng: "True",
    lambda task, rng: "__import__('os')._exit(0)",
    lambda task, rng: "\ud800" + str(task.answer),
    lambda task, rng: "(" * rng.choice((100, 5000)),
    lambda task, rng: "oo" if rng.random() < 0.5 else "nan",
)
INTEGER_ATTACKS: tuple[Callable[[Task, random.Random], str], ...] = (
    wrong_number,
    wrong_number,
    wrong_number,
    lambda task, rng: foreign_digits(task.answer or "", rng),
    lambda task, rng: f"{task.answer}.0",
    lambda task, rng: f"{task.answer}e0",
    lambda task, rng: hex(int(task.answer or 0)),
    lambda task, rng: f"{task.answer}_0",
    lambda task, rng: f"- {task.answer}",
    lambda task, rng: f"--{task.answer}",
    lambda task, rng: f"{task.answer}+0",
)
SYMBOLIC_ATTACKS: tuple[Callable[[Task, random.Random], str], ...] = (
    lambda task, rng: f"{task.answer}+1",
    lambda task, rng: f"{task.answer}+x",
    lambda task, rng: f"-{task.answer}-1",
    lambda task, rng: f"({task.answer})",
    lambda task, rng: task.prompt.removesuffix(" = ").partition(" ")[2],
    lambda task, rng: f"{task.answer}+x/0",
    lambda task, rng: f"{task.answer}+0*x/0",
    lambda task, rng: "x/x",
    lambda task, rng: f"{task.answer}=0",
)
EXPRESSION_ATTACKS = (
    *(
        "",
        " ",
        " None",
        " x, y",
        " [x]",
        " float(x)",
        " True",
        " 'passed'",
        " exit(0)",
        " f(x, y, z)",
    ),
    *(" __import__('os')._exit(0)", " [0] * 10 ** 11", " print('22') or 0", " x +"),
    " type('I', (int,), {'__eq__': lambda s, o: True, '__hash__': int.__hash__})(1)",
    *(" next(iter(()))", " lambda: x", " (yield x)", " 1 / 0", " globals()", " float('nan')"),
)
DRESSES = ("{}", "Answer: {}", " {} ", "{}\r\n", "{}\n{}", "{}\nno more\n")
ENDLESS = {
    "symbolic": ("9^9^9^9", "x^9^9^9-x^8^9^9", "9^9^9/9^9^9"),
    "expression": (
        " 9 ** 9 ** 9 ** 9",
        " any(iter(int, 1))",
        " [*iter(int, 1)]",
        " sum(1 for _ in iter(int, 1))",
    ),
    "function": (
        "    while True: pass\n",
        "    import os\n    while True: os.fork()\n",
        "    import time\n    time.sleep(3600)\n",
        "    try:\n        while True: pass\n    except BaseException:\n        return f(x)\n",
        "    a = []\n    while True: a.append(bytes(2 ** 20))\n",
    ),
}


def hostile_body(rng: random.Random) -> str:
    """A hostile program as the body of a function."""
    lines = rng.choice([program for program in HOSTILE if program]).split("\n")
    return "\n".join(f"    {line}" for line in lines) + "\n"


def honest_text(task: Task, rng: random.Random) -> str:
    if task.code is not None:
        tail = rng.choice(("", "  # done", "\n\nprint('more')\n"))
        return task.solution.rstrip("\n") + tail
    answer = task.answer or ""
    if task.family in INTEGERS and rng.random() < 0.2:
        answer = f"{int(answer):+04d}"
    return rng.choice(DRESSES).format(answer, "another line")


def hostile_text(task: Task, rng: random.Random) -> str:
    if task.family == "expression":
        return rng.choice((*EXPRESSION_ATTACKS, task.prompt, f"{task.solution.strip()} + 1"))
    if task.family == "function":
        wrong = f"{task.solution.rstrip()} and None"
        return rng.choice(("", task.prompt, wrong, *(hostile_body(rng) for _ in range(7))))
    own = INTEGER_ATTACKS if task.family in INTEGERS else SYMBOLIC_ATTACKS
    return rng.choice((*own, *TEXT_ATTACKS))(task, rng)


@dataclass(slots=True, kw_only=True)
class Tally:
    """What came of all verdicts; `wrong` holds the first twenty that should not have been."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(
        self, tasks: list[Task], texts: list[str], honest: list[bool], found: list[Judgement]
    ) -> None:
        """Count verdicts by family, stage and reason; ValueError unless all four lists are equally
        long."""
        for task, text, fair, judgement in zip(tasks, texts, honest, found, strict=True):
            kind = "honest" if fair else "adversarial"
            self.counts[f"{kind} {task.family}"] += 1
            self.counts[f"stage {judgement.stage}"] += 1
            self.counts[f"reason {judgement.reason}"] += 1
            if judgement.passed != fair:
                self.counts["false rejects" if fair else "false accepts"] += 1
                if len(self.wrong) < 20:
                    self.wrong.append(f"{task.prompt!r} {text[:200]!r}: {judgement.reason}")


def drawn(family: str, rng: random.Random) -> Task:
    """A task at a level that is drawn evenly from those that the family has."""
    return draw_task(family, level=rng.randint(1, LEVELS[family]), rng=rng)


def round_of(rng: random.Random) -> tuple[list[Task], list[str], list[bool]]:
    """Everything of one round but what never ends."""
    rows = []
    for families, num_honest, num_hostile in ROUND:
        for number in range(num_honest + num_hostile):
            task, fair = drawn(rng.choice(families), rng), number < num_honest
            rows.append((task, (honest_text if fair else hostile_text)(task, rng), fair))
    rng.shuffle(rows)
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def soak(*, verdicts: int, seed: int, num_workers: int, minutes: float) -> dict[str, Any]:
    """Run until there are as many verdicts or the time is up; the report."""
    rng, begun, tally, done, left_over = random.Random(seed), time.monotonic(), Tally(), 0, 0
    strict = Verifier(code=True, timeout_ms=LIMIT_MS, num_workers=num_workers)
    hurried = Verifier(code=True, timeout_ms=ENDLESS_LIMIT_MS, num_workers=1)
    cascade, most = VerifierCascade(strict), 0
    try:
        while done < verdicts and time.monotonic() - begun < 60 * minutes:
            tasks, texts, honest = round_of(rng)
            if (done // ROUND_SIZE) % 2:
                silent = [-1.0] * len(tasks)
                found = cascade.verify(tasks, texts, rng=rng, mean_log_probs=silent)
            else:
                found = strict.verify(tasks, texts, rng=rng)
            tally.add(tasks, texts, honest, found)
            kinds = ("symbolic",) if (done // ROUND_SIZE) % ENDLESS_FORMULA_EVERY == 0 else CODE
            slow = [drawn(rng.choice(kinds), rng) for _ in range(ENDLESS_PER_ROUND)]
            endless = [rng.choice(ENDLESS[task.family]) for task in slow]
            found = hurried.verify(slow, endless, rng=rng)
            tally.add(slow, endless, [False] * len(slow), found)
            done += len(tasks) + len(slow)
            print(f"{done} verdicts, {time.monotonic() - begun:.0f} s", flush=True)
            processes = len(processes_below(os.getpid()))
            # Zygotes, workers of symbolic mathematics and the tracker of them.
            most = max(most, processes)
            left_over += processes > 2 * num_workers + 3
    finally:
        strict.close()
        hurried.close()
    return {
        "what": "strict verifier and cascade in turns; honest must pass, adversarial must fail",
        "verdicts": done,
        "verdicts_asked": verdicts,
        "seed": seed,
        "false_accepts": tally.counts.pop("false accepts", 0),
        "false_rejects": tally.counts.pop("false rejects", 0),
        "wrong": tally.wrong,
        "rounds_with_processes_left_over": left_over,
        "most_processes_after_a_round": most,
        "processes_after_closing": len(processes_below(os.getpid())),
        "counts": dict(sorted(tally.counts.items())),
        "seconds": round(time.monotonic() - begun, 1),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "code": code_version(),
        "machine": machine_text(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--verdicts", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--report", type=Path, required=True)
    options = parser.parse_args()
    report = soak(
        verdicts=options.verdicts,
        seed=options.seed,
        num_workers=options.workers,
        minutes=options.minutes,
    )
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return int(bool(report["false_accepts"] or report["false_rejects"]))


if __name__ == "__main__":
    sys.exit(main())
