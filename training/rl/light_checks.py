"""Verdicts that need no process: exact for the answers they understand, silent about the rest.

Integers and polynomials have a normal form, so equality of canonical texts is a proof. A program
that is one `return` of plain arithmetic over its arguments is evaluated here, on hidden inputs of
its own, by an interpreter that knows a few operations on integers and lists, applies Python's own
to values of exactly these types, and gives up on everything else and on anything long or large.
It never calls what a program made, so there is nothing in it that a program could replace.
"""

from __future__ import annotations

import ast
import builtins
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from training.rl.answers import GYM_TEXT, candidate_program
from training.rl.polynomials import NotPolynomial, parse_polynomial
from training.rl.tasks import Task
from training.rl.verdict import PASSED, WRONG, CodeTask, draw_exam, values_equal

BANNED = "banned"
MAX_STEPS = 5000  # of one call
MAX_BITS = 2048
# Nothing that a task asks for needs these, and what needs them is after something else.
BANNED_NAMES = frozenset(
    "__import__ breakpoint compile delattr eval exec exit getattr globals input locals memoryview "
    "open quit setattr vars".split()
)
BANNED_MODULES = frozenset(
    "builtins ctypes gc importlib inspect io mmap multiprocessing os pathlib pickle posix resource "
    "shutil signal socket subprocess sys tempfile threading traceback types".split()
)
BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
COMPARISONS: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "abs": abs,
    "len": len,
    "list": list,
    "max": max,
    "min": min,
    "sorted": sorted,
    "sum": sum,
}


class NotUnderstood(Exception):
    """Something that is left to the strict stage."""


@dataclass(slots=True, kw_only=True, frozen=True)
class LightVerdict:
    passed: bool
    reason: str
    share_right: float = 0.0


def check_lightly(
    task: Task, completion: str, answer: str, *, rng: random.Random
) -> LightVerdict | None:
    """The verdict on a parsed completion, None where only the strict stage can tell.

    `answer` is what `extract_answer` made of the completion.
    """
    if task.code is not None:
        return _check_code(task.code, task, completion, rng=rng)
    if task.family == "symbolic":
        try:
            parse_polynomial(answer)
        except NotPolynomial:
            return None
    elif not GYM_TEXT.fullmatch(answer):
        return None
    right = answer == task.answer
    return LightVerdict(passed=right, reason=PASSED if right else WRONG)


def _check_code(
    code: CodeTask, task: Task, completion: str, *, rng: random.Random
) -> LightVerdict | None:
    program = candidate_program(completion, task) or ""
    tree = ast.parse(program)
    if is_banned(tree):
        return LightVerdict(passed=False, reason=BANNED)
    try:
        function = _returning_function(tree, code.function)
        exam, right = draw_exam(code, program, rng=rng), 0
        for case, expected in zip(exam.job.cases, exam.expected):
            found = call_lightly(function, case)
            right += values_equal(expected, found, rel_tol=code.rel_tol, abs_tol=code.abs_tol)
    except (NotUnderstood, RecursionError):
        return None
    passed = right == len(exam.expected)
    return LightVerdict(
        passed=passed, reason=PASSED if passed else WRONG, share_right=right / len(exam.expected)
    )


def is_banned(tree: ast.AST) -> bool:
    """Whether a program reaches for the machine or for Python's insides."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) if name in BANNED_NAMES or name.startswith("__"):
                return True
            case ast.Attribute(attr=name) if name.startswith("_"):
                return True
            case ast.Import(names=names):
                if any(alias.name.split(".")[0] in BANNED_MODULES for alias in names):
                    return True
            case ast.ImportFrom(module=module):
                if module is None or module.split(".")[0] in BANNED_MODULES:
                    return True
    return False


def _returning_function(tree: ast.Module, name: str) -> ast.FunctionDef:
    match tree.body:
        case [ast.FunctionDef(decorator_list=[], body=[ast.Return()]) as function]:
            plain = function.args
            extra = (plain.posonlyargs, plain.kwonlyargs, plain.defaults, plain.vararg, plain.kwarg)
            if function.name == name and not any(extra):
                return function
    raise NotUnderstood


@dataclass(slots=True, kw_only=True)
class _Frame:
    """Names with values, and the one name besides Python's own that means something else."""

    names: dict[str, Any]
    function: str
    steps: int = 0


def call_lightly(function: ast.FunctionDef, arguments: tuple[Any, ...]) -> Any:
    """What the function returns; None, which no task asks for, where Python would raise.

    NotUnderstood for anything but integers, lists of them, and the operations known here.
    """
    parameters = [argument.arg for argument in function.args.args]
    statement = function.body[0]
    if len(parameters) != len(arguments) or not isinstance(statement, ast.Return):
        raise NotUnderstood
    if statement.value is None:
        return None
    frame = _Frame(names=dict(zip(parameters, arguments)), function=function.name)
    try:
        return _checked(_value(statement.value, frame))
    except (ZeroDivisionError, TypeError, ValueError, NameError):
        return None


def _checked(value: Any) -> Any:
    """NotUnderstood unless the value is a plain one of moderate size."""
    if type(value) is int:
        if value.bit_length() > MAX_BITS:
            raise NotUnderstood
    elif type(value) is not bool and type(value) is not list:
        raise NotUnderstood
    return value


def _number(value: Any) -> int:
    if type(value) is not int and type(value) is not bool:
        raise NotUnderstood
    return value


def _value(node: ast.expr, frame: _Frame) -> Any:
    frame.steps += 1
    if frame.steps > MAX_STEPS:
        raise NotUnderstood
    match node:
        case ast.Constant(value=value) if type(value) is int or type(value) is bool:
            return _checked(value)
        case ast.Name(id=name):
            return _named(name, frame)
        case ast.UnaryOp(op=sign, operand=inner) if type(sign) in UNARY:
            value = _value(inner, frame)
            return UNARY[type(sign)](value if isinstance(sign, ast.Not) else _number(value))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in BINARY:
            pair = _number(_value(left, frame)), _number(_value(right, frame))
            return _checked(BINARY[type(sign)](*pair))
        case ast.Compare(left=first, ops=signs, comparators=others):
            return _comparison(first, signs, others, frame)
        case ast.BoolOp(op=sign, values=parts):
            return _either_or_both(isinstance(sign, ast.Or), parts, frame)
        case ast.IfExp(test=test, body=body, orelse=other):
            return _value(body if _value(test, frame) else other, frame)
        case ast.ListComp(elt=element, generators=[generator]):
            return list(_elements(element, generator, frame))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]):
            return _called(name, inner, frame)
    raise NotUnderstood


def _named(name: str, frame: _Frame) -> Any:
    if name in frame.names:
        return frame.names[name]
    if name == frame.function or name.startswith("__") or hasattr(builtins, name):
        raise NotUnderstood
    raise NameError(name)


def _comparison(
    first: ast.expr, signs: list[ast.cmpop], others: list[ast.expr], frame: _Frame
) -> bool:
    left = _number(_value(first, frame))
    for sign, other in zip(signs, others):
        right = _number(_value(other, frame))
        if type(sign) not in COMPARISONS:
            raise NotUnderstood
        if not COMPARISONS[type(sign)](left, right):
            return False
        left = right
    return True


def _either_or_both(either: bool, parts: list[ast.expr], frame: _Frame) -> Any:
    value: Any = None
    for part in parts:
        value = _value(part, frame)
        if bool(value) is either:
            break
    return value


def _elements(element: ast.expr, generator: ast.comprehension, frame: _Frame) -> Iterator[Any]:
    numbers, target = _value(generator.iter, frame), generator.target
    if type(numbers) is not list or not isinstance(target, ast.Name) or generator.is_async:
        raise NotUnderstood
    inner = _Frame(names=dict(frame.names), function=frame.function)
    for number in numbers:
        inner.names[target.id] = number
        inner.steps = frame.steps
        if all(_value(condition, inner) for condition in generator.ifs):
            yield _number(_value(element, inner))
        frame.steps = inner.steps


def _called(name: str, inner: ast.expr, frame: _Frame) -> Any:
    if name not in FUNCTIONS or name in frame.names:
        raise NotUnderstood
    if isinstance(inner, ast.GeneratorExp):
        if len(inner.generators) != 1 or name in ("abs", "len"):
            raise NotUnderstood
        value: Any = list(_elements(inner.elt, inner.generators[0], frame))
    else:
        value = _value(inner, frame)
    if name == "abs":
        return abs(_number(value))
    if type(value) is not list or any(type(item) not in (int, bool) for item in value):
        raise NotUnderstood
    return _checked(FUNCTIONS[name](value))
