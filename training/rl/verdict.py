"""Whether an untrusted program solves a task: decided here, from values, in the parent.

The program runs elsewhere and may have forged everything it sent. So nothing that it can choose
counts: not its exit code, not what it printed, not a word like "passed". It is given inputs drawn
for this verdict alone, and each value it returns is compared with the reference's: type identity
first, at every depth, then value. All that can go wrong is a fail, never a pass and never an
exception: malformed, missing, surplus and oversized replies included.
"""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from training.rl.sandbox import Sandbox
from training.rl.sandbox_child import decode, encode
from training.rl.sandbox_job import ENDED, PROGRAM_LIMIT_CHARS, Job, Reply

PASSED, WRONG, RAISED, MALFORMED = "passed", "wrong", "raised", "malformed"
DRAWS = 16
LENGTH_FACTOR = 4  # the encodings of two floats that are nearly equal differ by a factor of 3
SHORT_LINE_BYTES = 256


@dataclass(slots=True, kw_only=True, frozen=True)
class CodeTask:
    """A function to be written: its name, the reference, and how to draw arguments for it.

    `num_cases` calls decide one verdict. The tolerances apply to finite floats only; both zero
    means exact.
    """

    function: str
    reference: Callable[..., Any]
    draw: Callable[[random.Random], tuple[Any, ...]]
    num_cases: int = 8
    rel_tol: float = 0.0
    abs_tol: float = 0.0


@dataclass(slots=True, kw_only=True, frozen=True)
class Verdict:
    """`reason` is passed, wrong, raised, malformed, timeout or oversize."""

    passed: bool
    reason: str
    num_right: int
    num_cases: int
    elapsed_s: float


def values_equal(expected: Any, actual: Any, *, rel_tol: float = 0.0, abs_tol: float = 0.0) -> bool:
    """Same type at every depth, then same value; both arguments are plain values.

    NaN equals NaN and nothing else; an infinity equals itself and nothing else, whatever the
    tolerances; 0.0 equals -0.0. Keys of dicts and members of sets are compared exactly.
    """
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, float):
        if not (math.isfinite(expected) and math.isfinite(actual)):
            return expected == actual or (math.isnan(expected) and math.isnan(actual))
        return math.isclose(expected, actual, rel_tol=rel_tol, abs_tol=abs_tol)
    if isinstance(expected, complex):
        parts = ((expected.real, actual.real), (expected.imag, actual.imag))
        return all(values_equal(*pair, rel_tol=rel_tol, abs_tol=abs_tol) for pair in parts)
    if isinstance(expected, list | tuple):
        return len(expected) == len(actual) and all(
            values_equal(*pair, rel_tol=rel_tol, abs_tol=abs_tol) for pair in zip(expected, actual)
        )
    if isinstance(expected, set | frozenset):
        return set(map(_exact, expected)) == set(map(_exact, actual))
    if isinstance(expected, dict):
        others = {_exact(key): value for key, value in actual.items()}
        return len(expected) == len(others) and all(
            _exact(key) in others
            and values_equal(value, others[_exact(key)], rel_tol=rel_tol, abs_tol=abs_tol)
            for key, value in expected.items()
        )
    return expected == actual


def _exact(value: Any) -> Hashable:
    """Something that is equal for two hashable plain values only if `values_equal` holds."""
    if isinstance(value, tuple):
        return (tuple, tuple(map(_exact, value)))
    if isinstance(value, frozenset):
        return (frozenset, frozenset(map(_exact, value)))
    if isinstance(value, float):
        return (float, "nan" if math.isnan(value) else (value + 0.0).hex())
    if isinstance(value, complex):
        return (complex, _exact(value.real), _exact(value.imag))
    return (type(value), value)


@dataclass(slots=True, kw_only=True, frozen=True)
class Exam:
    """The inputs of one verdict, which travel, and the expected values, which never do."""

    job: Job
    expected: tuple[Any, ...]


def draw_exam(task: CodeTask, program: str, *, rng: random.Random) -> Exam:
    """Fresh inputs for one verdict on `program`, and what the reference returns for them.

    ValueError, a mistake in the task, when the reference's values are not plain, or when they are
    all the same after many draws: then a program that returns a constant would pass.
    """
    if task.num_cases < 1:
        raise ValueError(f"task {task.function}: num_cases must be at least 1")
    for _ in range(DRAWS):
        cases = tuple(task.draw(rng) for _ in range(task.num_cases))
        # The reference may change its arguments; the program gets them as they were drawn.
        expected = tuple(task.reference(*copy.deepcopy(case)) for case in cases)
        _require_plain(task, expected)
        if task.num_cases == 1 or not all(values_equal(expected[0], one) for one in expected):
            job = Job(program=program, function=task.function, cases=cases)
            return Exam(job=job, expected=expected)
    raise ValueError(
        f"task {task.function}: its reference returns a constant, which proves nothing"
    )


def _require_plain(task: CodeTask, expected: tuple[Any, ...]) -> None:
    try:
        decode(encode(expected))
    except (TypeError, ValueError) as error:
        raise ValueError(f"task {task.function}: its reference returned {error}") from error


def decide(task: CodeTask, exam: Exam, reply: Reply) -> Verdict:
    """The verdict on a reply, whatever is in it; raises nothing that a program could provoke.

    A program passes if it ended in time and gave one right value for each case, in order, and
    nothing else.
    """
    lines = reply.lines()
    num_right, reason = 0, PASSED
    for number, expected in enumerate(exam.expected):
        found = _judge_line(task, expected, lines[number]) if number < len(lines) else MALFORMED
        num_right += found == PASSED
        if reason == PASSED:
            reason = found
    if reply.outcome != ENDED:
        reason = reply.outcome
    elif reason == PASSED and (len(lines) != len(exam.expected) or reply.data[-1:] != b"\n"):
        reason = MALFORMED
    return Verdict(
        passed=reason == PASSED,
        reason=reason,
        num_right=num_right,
        num_cases=len(exam.expected),
        elapsed_s=reply.elapsed_s,
    )


def _judge_line(task: CodeTask, expected: Any, line: bytes) -> str:
    """What one line is worth. Its decoder, not the program, makes every object that is compared."""
    try:
        # What is right is not much longer than the reference's; longer is not even parsed, or a
        # reply made of colliding hashes could keep the parent busy for minutes.
        if len(line) > LENGTH_FACTOR * len(json.dumps(encode(expected))) + SHORT_LINE_BYTES:
            return WRONG
        message = json.loads(line)
        if type(message) is not dict or len(message) != 1:
            return MALFORMED
        if "error" in message:
            return RAISED
        if "value" not in message:
            return MALFORMED
        actual = decode(message["value"])
        right = values_equal(expected, actual, rel_tol=task.rel_tol, abs_tol=task.abs_tol)
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        return MALFORMED  # each of these can be provoked by a forged line; nothing else can
    return PASSED if right else WRONG


def _refused(task: CodeTask, program: str) -> Verdict | None:
    """The verdict on a program that needs no run, None if it needs one."""
    if program.strip() and len(program) <= PROGRAM_LIMIT_CHARS:
        return None
    return Verdict(
        passed=False, reason=MALFORMED, num_right=0, num_cases=task.num_cases, elapsed_s=0.0
    )


def judge(
    program: str, *, task: CodeTask, sandbox: Sandbox, rng: random.Random, limit_s: float
) -> Verdict:
    """One verdict: fresh inputs from `rng`, one isolated run of at most `limit_s` seconds.

    ValueError for a mistake in the task; SandboxFailure if no program could be run at all.
    """
    return judge_many([(task, program)], sandbox=sandbox, rng=rng, limit_s=limit_s)[0]


def judge_many(
    entries: Iterable[tuple[CodeTask, str]],
    *,
    sandbox: Sandbox,
    rng: random.Random,
    limit_s: float,
) -> list[Verdict]:
    """A verdict for each task and program, in their order; the sandbox's workers share the runs.

    All inputs are drawn before anything runs, so the draws do not depend on the runs' timing.
    """
    pairs = list(entries)
    verdicts = [_refused(task, program) for task, program in pairs]
    waiting = [number for number, verdict in enumerate(verdicts) if verdict is None]
    exams = [draw_exam(*pairs[number], rng=rng) for number in waiting]
    replies = sandbox.run_many([exam.job for exam in exams], limit_s=limit_s)
    for number, exam, reply in zip(waiting, exams, replies):
        verdicts[number] = decide(pairs[number][0], exam, reply)
    return [verdict for verdict in verdicts if verdict is not None]
