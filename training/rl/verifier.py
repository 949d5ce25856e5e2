"""The strict verifier: the verdict on every completion, and nothing that a completion can choose.

Integers are compared as integers, polynomials by a computer algebra system in a process that can
be killed, programs run in the sandbox and what they returned is compared here.
Whatever goes wrong over a completion is a fail. If the sandbox itself is lost it is
opened once more; if it stays lost for every program, the run is told instead of learning from
rewards that nobody earned.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from training.rl.answers import answer_span, candidate_program, extract_answer
from training.rl.sandbox import Sandbox, open_sandbox
from training.rl.sandbox_job import TIMEOUT, SandboxFailure, SandboxUnavailable
from training.rl.symbolic import LOST, SYMPY, SymbolicPool
from training.rl.tasks import Task
from training.rl.verdict import PASSED, WRONG, CodeTask, Verdict, judge, judge_many

UNPARSED, EMPTY = "unparsed", "empty"
STRICT = "strict"
WITHOUT_CODE = "--no-verifier-code-enabled trains without code tasks"


@dataclass(slots=True, kw_only=True, frozen=True)
class Judgement:
    """`answer` is the canonical text, None if unparsed; `stage` says who decided.

    `share_right` is the share of hidden inputs for which a program returned the right value.
    """

    passed: bool
    parsed: bool
    answer: str | None
    reason: str
    stage: str
    elapsed_s: float
    share_right: float = 0.0


class Verifier:
    """Judges completions; one of its methods may run at a time.

    code: whether programs are run; then a sandbox is opened and tried now, and RuntimeError says
    why where this machine has none. timeout_ms: limit of one verdict. engine: what compares
    formulas (symbolic.ENGINES); one that may be missing is tried now, RuntimeError if it is.
    """

    def __init__(
        self, *, code: bool, timeout_ms: int, num_workers: int = 1, engine: str = SYMPY
    ) -> None:
        if timeout_ms < 1:
            raise ValueError(f"--verifier-timeout-ms {timeout_ms}: must be at least 1")
        self.limit_s = timeout_ms / 1000
        self._num_workers = num_workers
        self._sandbox: Sandbox | None = None
        self._symbolic = SymbolicPool(num_workers=num_workers, limit_s=self.limit_s, engine=engine)
        try:
            if engine != SYMPY:
                self._symbolic.try_engine()
            if code:
                self._sandbox = self._open()
        except BaseException:
            self.close()
            raise
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0

    def verify(
        self, tasks: Sequence[Task], completions: Sequence[str], *, rng: random.Random
    ) -> list[Judgement]:
        """A judgement for each completion of each task, in order; hidden inputs come from `rng`.

        ValueError if the two differ in length or a code task comes without `code`.
        """
        judgements = self.judge(tasks, completions, rng=rng)
        self.record(tasks, judgements)
        return judgements

    def judge(
        self, tasks: Sequence[Task], completions: Sequence[str], *, rng: random.Random
    ) -> list[Judgement]:
        """`verify` without a trace in the metrics: for whoever has the last word elsewhere."""
        pairs = list(zip(tasks, completions, strict=True))
        found: dict[int, Judgement] = {}
        programs = [number for number, (task, _) in enumerate(pairs) if task.code is not None]
        symbolic = [number for number, (task, _) in enumerate(pairs) if task.family == "symbolic"]
        found.update(zip(programs, self._judge_programs([pairs[n] for n in programs], rng=rng)))
        found.update(zip(symbolic, self._judge_symbolic([pairs[n] for n in symbolic])))
        for number, (task, completion) in enumerate(pairs):
            if number not in found:
                found[number] = _judge_text(task, completion)
        return [found[number] for number in range(len(pairs))]

    def record(self, tasks: Sequence[Task], judgements: Sequence[Judgement]) -> None:
        """Count final judgements into the metrics."""
        for task, judgement in zip(tasks, judgements, strict=True):
            names = ["verdicts", task.domain]
            names += ["passed", f"{task.domain}_passed"] if judgement.passed else []
            names += ["unparsed"] if not judgement.parsed else []
            names += ["timeouts"] if judgement.reason == TIMEOUT else []
            self._counts.update(names)
            self._seconds += judgement.elapsed_s

    def take_metrics(self) -> dict[str, float]:
        """`verifier_*` of all verdicts since the last call; a rate of none is not a number."""
        counts, verdicts = self._counts, self._counts["verdicts"]

        def rate(part: str, whole: str) -> float:
            return counts[part] / counts[whole] if counts[whole] else math.nan

        metrics = {
            "verifier_pass_rate": rate("passed", "verdicts"),
            "verifier_math_pass": rate("math_passed", "math"),
            "verifier_code_pass": rate("code_passed", "code"),
            "verifier_unparsed_rate": rate("unparsed", "verdicts"),
            "verifier_timeouts": float(counts["timeouts"]),
            "verifier_latency_ms": 1000 * self._seconds / verdicts if verdicts else math.nan,
        }
        self._counts, self._seconds = Counter(), 0.0
        return metrics

    def close(self) -> None:
        """End every process that was started."""
        self._symbolic.close()
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def _open(self) -> Sandbox:
        try:
            return open_sandbox(num_workers=self._num_workers)
        except SandboxUnavailable as error:
            raise RuntimeError(f"{error}; {WITHOUT_CODE}") from error

    def _judge_programs(
        self, pairs: list[tuple[Task, str]], *, rng: random.Random
    ) -> list[Judgement]:
        if not pairs:
            return []
        if self._sandbox is None:
            raise ValueError(f"a code task without a sandbox: {WITHOUT_CODE}")
        entries = [
            (task.code, candidate_program(text, task) or "")
            for task, text in pairs
            if task.code is not None
        ]
        limit_s = self.limit_s
        try:
            verdicts = judge_many(entries, sandbox=self._sandbox, rng=rng, limit_s=limit_s)
        except SandboxFailure:
            self._sandbox.close()
            self._sandbox = self._open()
            verdicts = self._judge_again(entries, sandbox=self._sandbox, rng=rng)
        return [
            Judgement(
                passed=verdict.passed,
                parsed=(answer := extract_answer(text, task)) is not None,
                answer=answer,
                reason=verdict.reason if program else EMPTY,
                stage=STRICT,
                elapsed_s=verdict.elapsed_s,
                share_right=verdict.num_right / verdict.num_cases,
            )
            for (task, text), (_, program), verdict in zip(pairs, entries, verdicts)
        ]

    def _judge_again(
        self, entries: list[tuple[CodeTask, str]], *, sandbox: Sandbox, rng: random.Random
    ) -> list[Verdict]:
        """Each program by itself in a new sandbox; SandboxFailure if none could be judged."""
        verdicts, failure = [], None
        for task, program in entries:
            try:
                verdicts.append(
                    judge(program, task=task, sandbox=sandbox, rng=rng, limit_s=self.limit_s)
                )
            except SandboxFailure as error:
                failure = error
                verdicts.append(
                    Verdict(
                        passed=False,
                        reason=LOST,
                        num_right=0,
                        num_cases=task.num_cases,
                        elapsed_s=0.0,
                    )
                )
        if failure is not None and all(verdict.reason == LOST for verdict in verdicts):
            raise failure
        return verdicts

    def _judge_symbolic(self, pairs: list[tuple[Task, str]]) -> list[Judgement]:
        answers = [extract_answer(text, task) for task, text in pairs]
        parsed = [number for number, answer in enumerate(answers) if answer is not None]
        questions = [(pairs[n][0].answer or "", answer_span(pairs[n][1])) for n in parsed]
        comparisons = dict(zip(parsed, self._symbolic.compare_many(questions)))
        judgements = []
        for number, answer in enumerate(answers):
            found = comparisons.get(number)
            reason = UNPARSED if found is None else found.reason
            judgements.append(
                Judgement(
                    passed=reason == PASSED,
                    parsed=answer is not None,
                    answer=answer,
                    reason=reason,
                    stage=STRICT,
                    elapsed_s=0.0 if found is None else found.elapsed_s,
                )
            )
        return judgements


def _judge_text(task: Task, completion: str) -> Judgement:
    """Equality of canonical texts, which for integers is equality of integers."""
    begun = time.perf_counter()
    answer = extract_answer(completion, task)
    reason = UNPARSED if answer is None else PASSED if answer == task.answer else WRONG
    return Judgement(
        passed=reason == PASSED,
        parsed=answer is not None,
        answer=answer,
        reason=reason,
        stage=STRICT,
        elapsed_s=time.perf_counter() - begun,
    )
