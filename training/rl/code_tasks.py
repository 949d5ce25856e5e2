"""Code to be written: one expression, or the body of a small function; inputs are hidden.

The prompt says in words what is wanted, so that no part of it is an answer. A task is drawn with
its reference, its own solution and a way to draw arguments; expressions are evaluated here as trees
of tuples and written as Python by `expression_text`, two routes that tests hold against each other.

A near miss must not pass by luck. Each argument of an expression is drawn from a small or a wide
range: different formulas seldom agree there (Schwartz 1980 for polynomials), while `(x+y)//29` and
`(x+y)//30` hardly ever differ on small numbers alone. Quotients are tried where they are about to
change, and lists hold the numbers next to the constants.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from training.rl.verdict import CodeTask

VARIABLES = ("x", "y", "z")
VALUES = (2, 30)  # of constants, both ends included, and of half of the arguments
WIDE_VALUES = (2, 10**6)
NUM_CASES = 32  # their cost is nothing beside that of starting a process
BOUNDARY_TRIES = 64
NUM_PROBES, MIN_DISTINCT = 32, 8
EXPRESSION_LEVELS = 4
FUNCTION_LEVELS = 3
SIGN_WORDS = {"+": "plus", "-": "minus", "*": "times", "//": "divided by", "%": "mod"}

Tree = str | int | tuple[str, "Tree", "Tree"]


@dataclass(slots=True, kw_only=True, frozen=True)
class CodeDraw:
    """What a code task is made of; the solution is a completion of the prompt."""

    prompt: str
    code: CodeTask
    solution: str


def evaluate(tree: Tree, values: dict[str, int]) -> int:
    """The value of a tree; ZeroDivisionError as Python would raise it."""
    if isinstance(tree, str):
        return values[tree]
    if isinstance(tree, int):
        return tree
    sign, left, right = tree[0], evaluate(tree[1], values), evaluate(tree[2], values)
    if sign == "+":
        return left + right
    if sign == "-":
        return left - right
    if sign == "*":
        return left * right
    return left // right if sign == "//" else left % right


def expression_text(tree: Tree) -> str:
    """The tree as Python; every inner operation is in parentheses."""
    return _written(tree, signs={sign: sign for sign in SIGN_WORDS}, gap="")


def expression_words(tree: Tree) -> str:
    """The tree in words: "(x times y) plus 3"."""
    return _written(tree, signs=SIGN_WORDS, gap=" ")


def _written(tree: Tree, *, signs: dict[str, str], gap: str, outer: bool = True) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    left, right = (_written(part, signs=signs, gap=gap, outer=False) for part in tree[1:])
    text = f"{left}{gap}{signs[tree[0]]}{gap}{right}"
    return text if outer else f"({text})"


def _leaf(rng: random.Random) -> Tree:
    return rng.choice(VARIABLES) if rng.random() < 0.7 else rng.randint(*VALUES)


def _draw_tree(level: int, rng: random.Random) -> Tree:
    ring = ("+", "-", "*")
    if level == 1:
        return (rng.choice(ring), rng.choice(VARIABLES), _leaf(rng))
    if level == 2:
        inner = (rng.choice(ring), rng.choice(VARIABLES), _leaf(rng))
        left, right = (inner, _leaf(rng)) if rng.random() < 0.5 else (_leaf(rng), inner)
        return (rng.choice(ring), left, right)
    inner = (rng.choice(ring), rng.choice(VARIABLES), _leaf(rng))
    divisor: Tree = rng.choice((rng.choice(VARIABLES), rng.randint(*VALUES)))
    if level == 3:
        return (rng.choice(("//", "%")), inner, divisor)
    # ((x*y)+z)%(x+3) and its like
    outer = (rng.choice(("+", "-")), inner, _leaf(rng))
    return (rng.choice(("//", "%")), outer, ("+", rng.choice(VARIABLES), rng.randint(*VALUES)))


def _draw_values(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.randint(*rng.choice((VALUES, WIDE_VALUES))) for _ in VARIABLES)


def _argument_drawer(tree: Tree) -> Callable[[random.Random], tuple[int, ...]]:
    """Arguments; for half of them a quotient is next to a whole number, if one is soon found."""

    def draw(rng: random.Random) -> tuple[int, ...]:
        values = _draw_values(rng)
        if not isinstance(tree, tuple) or tree[0] != "//" or rng.random() < 0.5:
            return values
        for _ in range(BOUNDARY_TRIES):
            named: dict[str, int] = dict(zip(VARIABLES, values))
            divisor = evaluate(tree[2], named)
            if evaluate(tree[1], named) % divisor in (0, divisor - 1):
                break
            values = tuple(rng.randint(*VALUES) for _ in VARIABLES)
        return values

    return draw


def _varies(tree: Tree) -> bool:
    """Whether the tree has so many values, of small numbers too, that it is no hidden constant."""
    rng = random.Random(0)
    probes = ({name: rng.randint(*VALUES) for name in VARIABLES} for _ in range(NUM_PROBES))
    return len({evaluate(tree, values) for values in probes}) >= MIN_DISTINCT


def draw_expression(*, level: int, rng: random.Random) -> CodeDraw:
    """`return` what the comment says of x, y and z, which are 2 or more; divisors are positive."""
    while True:
        tree = _draw_tree(level, rng)
        if _varies(tree):
            break
    code = CodeTask(
        function="f",
        reference=lambda x, y, z: evaluate(tree, {"x": x, "y": y, "z": z}),
        draw=_argument_drawer(tree),
        num_cases=NUM_CASES,
    )
    prompt = f"def f(x, y, z): # {expression_words(tree)}\n    return"
    return CodeDraw(prompt=prompt, code=code, solution=f" {expression_text(tree)}\n")


@dataclass(slots=True, kw_only=True, frozen=True)
class Step:
    """A part of a function in words and in Python: `{}` stands for its input, `{c}` a constant."""

    words: str
    text: str
    apply: Callable[[Any, int], Any]


REDUCTIONS = (
    Step(words="the sum of {}", text="sum({})", apply=lambda x, _: sum(x)),
    Step(words="the largest of {}", text="max({})", apply=lambda x, _: max(x)),
    Step(words="the smallest of {}", text="min({})", apply=lambda x, _: min(x)),
    Step(words="{} in order", text="sorted({})", apply=lambda x, _: sorted(x)),
)
SAFE_REDUCTIONS = (REDUCTIONS[0], REDUCTIONS[3])  # a filter may leave nothing to compare
TAILS = (
    Step(words="{}, plus {c}", text="{}+{c}", apply=lambda x, c: x + c),
    Step(words="{}, times {c}", text="{}*{c}", apply=lambda x, c: x * c),
    Step(words="{}, minus {c}", text="{}-{c}", apply=lambda x, c: x - c),
)
MAPS = (
    Step(words="n plus {c}", text="n+{c}", apply=lambda n, c: n + c),
    Step(words="n times {c}", text="n*{c}", apply=lambda n, c: n * c),
    Step(words="n times n", text="n*n", apply=lambda n, _: n * n),
    Step(words="n mod {c}", text="n%{c}", apply=lambda n, c: n % c),
)
FILTERS = (
    Step(words="n over {c}", text="n>{c}", apply=lambda n, c: n > c),
    Step(words="n under {c}", text="n<{c}", apply=lambda n, c: n < c),
    Step(words="n no multiple of {c}", text="n%{c}", apply=lambda n, c: n % c),
)


FunctionDraw = tuple[str, str, Callable[[list[int]], Any], tuple[int, int]]


def _whole_list(rng: random.Random) -> FunctionDraw:
    reduction, tail = rng.choice(REDUCTIONS[:3]), rng.choice(TAILS)
    c = rng.randint(*VALUES)
    return (
        tail.words.format(reduction.words.format("x"), c=c),
        tail.text.format(reduction.text.format("x"), c=c),
        lambda x: tail.apply(reduction.apply(x, 0), c),
        (c, c),
    )


def _each_number(rng: random.Random) -> FunctionDraw:
    reduction, change, c = rng.choice(REDUCTIONS), rng.choice(MAPS), rng.randint(*VALUES)
    words, text = change.words.format(c=c), change.text.format(c=c)
    return (
        reduction.words.format(f"({words} for n in x)"),
        reduction.text.format(f"{text} for n in x"),
        lambda x: reduction.apply([change.apply(n, c) for n in x], 0),
        (c, c),
    )


def _some_numbers(rng: random.Random) -> FunctionDraw:
    reduction, change, keep = rng.choice(SAFE_REDUCTIONS), rng.choice(MAPS), rng.choice(FILTERS)
    c, limit = rng.randint(*VALUES), rng.randint(*VALUES)
    words = f"{change.words.format(c=c)} for n in x, only {keep.words.format(c=limit)}"
    text = f"{change.text.format(c=c)} for n in x if {keep.text.format(c=limit)}"
    return (
        reduction.words.format(f"({words})"),
        reduction.text.format(text),
        lambda x: reduction.apply([change.apply(n, c) for n in x if keep.apply(n, limit)], 0),
        (c, limit),
    )


def _list_drawer(c: int, limit: int) -> Callable[[random.Random], tuple[list[int]]]:
    def draw(rng: random.Random) -> tuple[list[int]]:
        numbers = [rng.randint(-50, 50) for _ in range(rng.randint(3, 6))]
        numbers += [limit + rng.choice((-1, 0, 1)) for _ in range(2)]
        numbers += [rng.choice((-limit, 0, 2 * limit)), rng.choice((-c, c, c + 1))]
        rng.shuffle(numbers)
        return (numbers,)

    return draw


def draw_function(*, level: int, rng: random.Random) -> CodeDraw:
    """The body of `f(x)`, x a list of 7 to 10 integers.

    Level 1 is a number of the whole list and a constant, 2 changes each number first, 3 leaves
    some of them out.
    """
    make = (_whole_list, _each_number, _some_numbers)[level - 1]
    while True:
        words, text, reference, constants = make(rng)
        draw = _list_drawer(*constants)
        probes = random.Random(0)
        if len({str(reference(*draw(probes))) for _ in range(NUM_PROBES)}) >= MIN_DISTINCT:
            break
    code = CodeTask(function="f", reference=reference, draw=draw, num_cases=NUM_CASES)
    return CodeDraw(prompt=f"# {words}\ndef f(x):\n", code=code, solution=f"    return {text}\n")
