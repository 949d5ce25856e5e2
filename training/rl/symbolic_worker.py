"""The process that decides whether two formulas mean the same, so that it can be killed.

Computer algebra has no bound on time or memory: `9^9^9^9` is eight characters. One request at a
time comes over the pipe as JSON, one answer goes back. Text is read by a grammar of numbers, x and
operators; it is never evaluated as Python, which is what `sympify` and `parse_expr` do.

Engines: `sympy` (1.14), and `math-verify` (0.9) for LaTeX. The latter's own time limits rely on
SIGALRM, and where there is none they silently give no parse, so that every answer is wrong: here
they are off, and the engine must find 1/2 = 0.5 before it may decide anything.
"""

from __future__ import annotations

import ast
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

from training.rl.polynomials import NotPolynomial, written_out

MEMORY_BYTES = 2 * 2**30
READY = b"ready"
Compare = Callable[[str, str], bool]


def serve(connection: Connection, engine: str) -> None:
    """Answer requests until the pipe closes; the first message says READY or why not."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C in the terminal is for the parent
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        _limit_memory()
        compare = sympy_compare() if engine == "sympy" else math_verify_compare()
    except (ImportError, RuntimeError) as error:
        connection.send_bytes(str(error).encode("utf-8"))
        return
    connection.send_bytes(READY)
    while True:
        try:
            expected, actual = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(json.dumps(_decision(compare, expected, actual)).encode("ascii"))


def _decision(compare: Compare, expected: str, actual: str) -> str:
    try:
        return "passed" if compare(expected, actual) is True else "wrong"
    except MemoryError:
        return "oversize"
    except (ValueError, TypeError, ArithmeticError, SyntaxError, RecursionError, AttributeError):
        return "malformed"


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _limit_memory() -> None:
    if sys.platform == "win32":
        return  # the time limit stands alone there
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def sympy_compare() -> Compare:
    """Whether the difference of two rational functions of x vanishes."""
    import sympy

    x = sympy.Symbol("x")

    def formula(node: ast.expr):
        match node:
            case ast.Constant(value=int(number)) if not isinstance(number, bool):
                return sympy.Integer(number)
            case ast.Constant(value=float(number)):
                return sympy.Rational(str(number))
            case ast.Name(id="x"):
                return x
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -formula(inner)
            case ast.UnaryOp(op=ast.UAdd(), operand=inner):
                return formula(inner)
            case ast.BinOp(left=left, op=sign, right=right):
                return _combined(sign, formula(left), formula(right))
        raise NotPolynomial(f"{type(node).__name__} is no part of a formula")

    def compare(expected: str, actual: str) -> bool:
        sides = [
            formula(ast.parse(written_out(text), mode="eval").body) for text in (expected, actual)
        ]
        return bool(sympy.cancel(sides[0] - sides[1]) == 0)

    return compare


def _combined(sign: ast.operator, left, right):
    match sign:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.Pow():
            return left**right
    raise NotPolynomial(f"{type(sign).__name__} is no part of a formula")


def math_verify_compare() -> Compare:
    """math-verify without its time limits; RuntimeError if it cannot see that 1/2 is 0.5."""
    try:
        from math_verify import parse, verify  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            f"{error.name} is not installed: pip install math-verify==0.9.0, or leave out "
            "--verifier-symbolic-engine math-verify"
        ) from error
    # It warns at every call that time limits are off; here the process is killed instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)

    def read(text: str):
        power = text.replace("**", "^")  # LaTeX knows no other sign for it
        return parse(f"${power}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def compare(expected: str, actual: str) -> bool:
        gold, found = read(expected), read(actual)
        return bool(gold and found) and verify(gold, found, timeout_seconds=None)

    if not compare("1/2", "0.5") or compare("1/2", "0.6"):
        raise RuntimeError("math-verify does not work here: it cannot tell that 1/2 is 0.5")
    return compare
