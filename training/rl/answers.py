"""What a completion answers, read from the completion alone: one canonical text, or nothing.

The prompt is no argument of anything here, so an echo of it or a number in it can never be taken
for an answer. An answer is the first line, optionally after `Answer:`; anything else beside it
makes it unparsed. Only ASCII counts: `int` and `str.isdigit` know the digits of fifty scripts.
"""

from __future__ import annotations

import ast
import re
import warnings

from training.rl.polynomials import NotPolynomial, is_expanded, parse_polynomial, polynomial_text
from training.rl.tasks import GYM, Task

CODE_LIMIT_CHARS = 4000
EXPRESSION_LIMIT_CHARS = 400
BLANKS = " \t\r"
INTEGER = re.compile(r"[+-]?[0-9]{1,64}")
SYMBOLIC = re.compile(r"[0-9x+\-*/^. ]{1,200}")
GYM_TEXT = re.compile(r"[\x20-\x7e]{1,400}")


def answer_span(completion: str) -> str:
    """The first line without blanks around it and without a leading `Answer:`."""
    line = completion.partition("\n")[0].strip(BLANKS)
    return line.removeprefix("Answer:").strip(BLANKS)


def extract_answer(completion: str, task: Task) -> str | None:
    """Canonical text of the answer; None where there is none in the form that the task wants.

    Of code it is the normalised source, so that equal texts are the same program.
    """
    if task.code is not None:
        return _canonical_code(completion, task)
    span = answer_span(completion)
    if task.family == "symbolic":
        return _canonical_symbolic(span)
    if task.family.startswith(GYM) and not INTEGER.fullmatch(task.answer or ""):
        return span if GYM_TEXT.fullmatch(span) else None
    return canonical_integer(span)


def canonical_integer(text: str) -> str | None:
    """ "+007" -> "7"; None unless `text` is one signed integer of at most 64 ASCII digits."""
    return str(int(text)) if INTEGER.fullmatch(text) else None


def _canonical_symbolic(span: str) -> str | None:
    if not SYMBOLIC.fullmatch(span) or not is_expanded(span):
        return None
    try:
        return polynomial_text(parse_polynomial(span))
    except NotPolynomial:
        return span  # for the strict stage to decide


def candidate_program(completion: str, task: Task) -> str | None:
    """The program to be run for a completion; None where nothing was written, or far too much.

    Whether it is any good is not decided here.
    """
    if task.family == "expression":
        line = re.split(r"[\r\n]", completion, maxsplit=1)[0].strip(BLANKS)
        if not line or len(line) > EXPRESSION_LIMIT_CHARS:
            return None
        return f"{task.prompt} {line}\n"
    body = _indented_part(completion)
    if not body.strip() or len(body) > CODE_LIMIT_CHARS:
        return None
    return f"{task.prompt}{body}\n"


def _indented_part(completion: str) -> str:
    """Lines up to the first that is not part of the function's body."""
    lines: list[str] = []
    for line in completion.replace("\r\n", "\n").split("\n"):
        if line.strip(BLANKS) and line[0] not in BLANKS:
            break
        lines.append(line.rstrip(BLANKS))
    return "\n".join(lines).rstrip("\n")


def _canonical_code(completion: str, task: Task) -> str | None:
    """The program without its comments and layout, if it is one."""
    program = candidate_program(completion, task)
    if program is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.unparse(ast.parse(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None
