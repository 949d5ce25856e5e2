"""Polynomials in x with integer coefficients: tasks about them, and their exact comparison.

A polynomial is a dict from power to coefficient without zeros. Text is read by a grammar of its
own, a few operators over numbers and x; nothing that a model wrote is ever evaluated as code. Two
texts mean the same polynomial exactly if their dicts are equal, so this comparison is a proof.
"""

from __future__ import annotations

import ast
import random
import re

SYMBOLIC_LEVELS = 4
LENGTH_LIMIT = 200
POWER_LIMIT = 16
COEFFICIENT_LIMIT = 10**30
ALLOWED = re.compile(r"[0-9x+\-*/^(). ]+")
PRODUCT_WITHOUT_SIGN = re.compile(r"([0-9)])(?= *[x(])|(x)(?= *\()")

Polynomial = dict[int, int]


class NotPolynomial(ValueError):
    """The text is none, or a larger one than is compared here."""


def add(left: Polynomial, right: Polynomial, *, factor: int = 1) -> Polynomial:
    """left + factor * right."""
    powers = left.keys() | right.keys()
    total = {power: left.get(power, 0) + factor * right.get(power, 0) for power in powers}
    return {power: value for power, value in total.items() if value}


def multiply(left: Polynomial, right: Polynomial) -> Polynomial:
    """NotPolynomial where powers or coefficients grow beyond the limits."""
    product: Polynomial = {}
    for power, value in left.items():
        product = add(product, {power + other: value * count for other, count in right.items()})
    if any(power > POWER_LIMIT for power in product):
        raise NotPolynomial(f"a power above {POWER_LIMIT}")
    if any(abs(value) > COEFFICIENT_LIMIT for value in product.values()):
        raise NotPolynomial("a coefficient is too large")
    return product


def derivative(polynomial: Polynomial) -> Polynomial:
    """By x; a constant gives {}, the polynomial 0."""
    return {power - 1: power * value for power, value in polynomial.items() if power}


def polynomial_text(polynomial: Polynomial) -> str:
    """Falling powers, as in "3*x^2-x+4"."""
    terms = []
    for power in sorted(polynomial, reverse=True):
        value = polynomial[power]
        letters = "" if power == 0 else "x" if power == 1 else f"x^{power}"
        size = str(abs(value)) if abs(value) != 1 or not letters else ""
        terms.append(
            ("-" if value < 0 else "+") + "*".join(part for part in (size, letters) if part)
        )
    return "".join(terms).removeprefix("+") or "0"


def written_out(text: str) -> str:
    """`text` as Python writes products and powers; NotPolynomial for foreign characters."""
    if len(text) > LENGTH_LIMIT or not ALLOWED.fullmatch(text):
        raise NotPolynomial("too long, or characters that no formula in x has")
    return PRODUCT_WITHOUT_SIGN.sub(r"\1\2*", text).replace("^", "**").strip()


def parse_polynomial(text: str) -> Polynomial:
    """The polynomial that `text` writes with + - * ^ and parentheses, or NotPolynomial."""
    try:
        return _value_of(ast.parse(written_out(text), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise NotPolynomial(str(error)) from error


def _value_of(node: ast.expr) -> Polynomial:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return add({}, {0: number})
        case ast.Name(id="x"):
            return {1: 1}
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return add({}, _value_of(inner), factor=-1)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _value_of(inner)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return add(_value_of(left), _value_of(right))
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return add(_value_of(left), _value_of(right), factor=-1)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return multiply(_value_of(left), _value_of(right))
        case ast.BinOp(left=base, op=ast.Pow(), right=ast.Constant(value=int(power))):
            return _power(_value_of(base), power)
    raise NotPolynomial(f"{type(node).__name__} is no part of a polynomial")


def _power(base: Polynomial, power: int) -> Polynomial:
    if power > POWER_LIMIT:
        raise NotPolynomial(f"a power above {POWER_LIMIT}")
    result: Polynomial = {0: 1}
    for _ in range(power):
        result = multiply(result, base)
    return result


def is_expanded(text: str) -> bool:
    """Whether nothing is left to multiply out: a sum of terms without parentheses."""
    return "(" not in text and ")" not in text


def draw_symbolic(*, level: int, rng: random.Random) -> tuple[str, str]:
    """Prompt and answer: derivatives at odd levels, products to expand at even ones.

    The text of the question is never an answer: a polynomial with a power of x differs from its
    derivative, and a product that is merely repeated is not expanded.
    """
    is_hard = level > 2
    if level % 2:
        powers = rng.sample(range(1, 6), 3 if is_hard else 1)
        question = {power: rng.choice((-1, 1)) * rng.randint(1, 9) for power in (0, *powers)}
        return f"d/dx {polynomial_text(question)} = ", polynomial_text(derivative(question))
    leading = (rng.randint(2, 9), rng.randint(2, 9)) if is_hard else (1, 1)
    factors = [{1: value, 0: rng.choice((-1, 1)) * rng.randint(1, 9)} for value in leading]
    written = "*".join(f"({polynomial_text(factor)})" for factor in factors)
    return f"expand {written} = ", polynomial_text(multiply(*factors))
