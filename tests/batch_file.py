"""Runs a batch file of cmd.exe step by step, with programs played by the test.

Only what the project's batch file uses: set, if, goto, echo, cd, exit and labels. Whatever is no
built-in is a program: it is recorded as it stands after expansion, and `answer` says its exit code.
An unknown construct is an error, so that the test cannot pass by overlooking a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MOST_LINES = 500
VARIABLE = re.compile(r"%~dp0|%(\w+)%")
BUILT_IN = re.compile(r"(@echo off|rem\b|setlocal\b|cd /d\b|pause\b)", re.IGNORECASE)
CONDITION = re.compile(
    r'if (not )?(?:(defined) (\w+)|(exist) (?:"([^"]+)"|(\S+))|(-?\d+) (equ|neq) (-?\d+)) (.+)',
    re.IGNORECASE,
)


@dataclass(slots=True, kw_only=True)
class BatchRun:
    """What a batch file did: programs it ran, lines it said, variables and exit code at its end."""

    programs: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    exit_code: int | None = None


def run_batch(
    text: str,
    *,
    answer: Callable[[str], int],
    exists: Callable[[str], bool],
    variables: dict[str, str],
) -> BatchRun:
    """Interpret `text`; ValueError for a construct it does not know or a label that is missing."""
    lines = text.splitlines()
    labels = {line[1:].strip(): i for i, line in enumerate(lines) if line.startswith(":")}
    run = BatchRun(variables={"CD": r"C:\sigma", "errorlevel": "0", **variables})
    position = 0
    for _ in range(MOST_LINES):
        if run.exit_code is not None:
            return run
        if position >= len(lines):
            raise ValueError("ran past the end")
        line = lines[position].strip()
        position += 1
        if line and not line.startswith(":"):
            target = execute(expand(line, run.variables), run, answer=answer, exists=exists)
            if target is not None:
                if target not in labels:
                    raise ValueError(f"no label :{target}")
                position = labels[target]
    raise ValueError("does not end")


def expand(line: str, variables: dict[str, str]) -> str:
    """`%NAME%` by its value (names know no case), `%~dp0` by the file's folder."""
    known = {name.lower(): value for name, value in variables.items()}

    def value_of(match: re.Match[str]) -> str:
        return known.get(match[1].lower(), "") if match[1] else "C:\\sigma\\"

    return line if line.lower().startswith("rem ") else VARIABLE.sub(value_of, line)


def execute(
    line: str, run: BatchRun, *, answer: Callable[[str], int], exists: Callable[[str], bool]
) -> str | None:
    """Do one line; returns the label to go on at."""
    word = line.split()[0].lower()
    if match := CONDITION.fullmatch(line):
        inverted, defined, name, exist, quoted, bare, left, how, right, rest = match.groups()
        if defined:
            holds = bool(run.variables.get(name))
        elif exist:
            holds = exists(quoted or bare)
        else:
            holds = (left == right) is (how.lower() == "equ")
        wanted = holds is not bool(inverted)
        return execute(rest, run, answer=answer, exists=exists) if wanted else None
    if match := re.fullmatch(r'set "(\w+)=(.*)"', line):
        run.variables[match[1]] = match[2]
    elif match := re.fullmatch(r"goto (\w+)", line):
        return match[1]
    elif match := re.fullmatch(r"exit /b (\d+)", line):
        run.exit_code = int(match[1])
    elif word == "echo":
        run.said.append(line[5:].removesuffix(" 1>&2"))
    elif word in ("set", "if", "goto", "exit", "for") or "(" in word or "&" in word:
        raise ValueError(f"not understood: {line}")
    elif not BUILT_IN.match(line):
        run.programs.append(line)
        run.variables["errorlevel"] = str(answer(line))
    return None
