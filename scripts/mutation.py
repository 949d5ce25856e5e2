"""Small faults for a module, one at a time: what can be changed in its syntax tree, and how.

A comparison turned, a condition negated, a call left out, a constant shifted, a return emptied.
Docstrings, annotations and messages stay. The operators are the sufficient set of Offutt et al.
1996; those that change nothing a test could see are named in equivalent_mutants.py.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from scripts.equivalent_mutants import EQUIVALENT

TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
SWAPPED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(slots=True, kw_only=True, frozen=True)
class Mutant:
    """A module with one change, and where the change is; `key` is another for other code."""

    module: str
    line: int
    what: str
    tree: ast.Module
    key: str
    text: str  # of the line

    @property
    def name(self) -> str:
        return f"{self.module}:{self.line} {self.what}"

    @property
    def equivalent(self) -> str:
        """Why no test can notice it, "" if one should."""
        return EQUIVALENT.get((self.module, self.text, self.what), "")


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """All mutants of a module's source; docstrings, annotations and messages stay."""
    tree, lines = ast.parse(source), source.splitlines()
    version = hashlib.sha256(ast.dump(without_docstrings(tree)).encode()).hexdigest()[:12]
    settings = {part for node in ast.walk(tree) for part in parts_that_say(node)}
    for number, node in enumerate(nodes_that_do(tree)):
        for choice, what in enumerate([] if node in settings else describe_changes(node)):
            changed = copy.deepcopy(tree)
            target = next(n for place, n in enumerate(nodes_that_do(changed)) if place == number)
            change(target, choice)
            line = getattr(node, "lineno", 0)
            yield Mutant(
                module=module,
                line=line,
                what=what,
                tree=ast.fix_missing_locations(changed),
                key=f"{module} {version} {number} {choice}",
                text=lines[line - 1].strip(),
            )


def nodes_that_do(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but docstrings, so that words about the code move no other node's place."""
    said = {
        part for node in ast.walk(tree) if has_docstring(node) for part in ast.walk(node.body[0])
    }
    return (node for node in ast.walk(tree) if node not in said)


def without_docstrings(tree: ast.Module) -> ast.Module:
    """A copy that stays the same when only what the program says of itself changes."""
    copied = copy.deepcopy(tree)
    for node in ast.walk(copied):
        if has_docstring(node):
            del node.body[0]
    return copied


def has_docstring(node: ast.AST) -> TypeGuard[ast.Module | ast.ClassDef | ast.FunctionDef]:
    return (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node) is not None
    )


def parts_that_say(node: ast.AST) -> Iterator[ast.AST]:
    """Decorators' settings and annotations, which say what something is and do nothing."""
    said = [*getattr(node, "decorator_list", ())]
    said += [getattr(node, "annotation", None), getattr(node, "returns", None)]
    for part in said:
        if part is not None:
            yield from ast.walk(part)


def describe_changes(node: ast.AST) -> list[str]:
    """What can be changed about a node, in the order in which `change` counts."""
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in TURNED:
            return [f"{type(operator).__name__} -> {TURNED[type(operator)].__name__}"]
        case ast.BinOp(op=operator) if type(operator) in SWAPPED and not is_text(node):
            return [f"{type(operator).__name__} -> {SWAPPED[type(operator)].__name__}"]
        case ast.BoolOp(op=ast.And()):
            return ["and -> or"]
        case ast.BoolOp(op=ast.Or()):
            return ["or -> and"]
        case ast.If() | ast.While():
            return [f"condition negated: {ast.unparse(node.test)}"]
        case ast.UnaryOp(op=ast.Not()):
            return ["not left out"]
        case ast.Constant(value=bool()):
            return [f"{node.value} -> {not node.value}"]
        case ast.Constant(value=int()):
            return [f"{node.value!r} plus 1"]
        case ast.Expr(value=ast.Call()):
            return [f"left out: {ast.unparse(node)}"]
        case ast.Raise(exc=ast.expr()) | ast.Continue() | ast.Break():
            return [f"left out: {ast.unparse(node)[:60]}"]
        case ast.Return(value=ast.expr() as value) if not is_nothing(value):
            return ["return None"]
    return []


def change(node: Any, choice: int) -> None:
    """Make change number `choice` of `describe_changes` in place."""
    match node:
        case ast.Compare():
            node.ops = [TURNED[type(node.ops[0])]()]
        case ast.BinOp():
            node.op = SWAPPED[type(node.op)]()
        case ast.BoolOp():
            node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        case ast.If() | ast.While():
            node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
        case ast.UnaryOp():
            node.op, node.operand = ast.Not(), ast.UnaryOp(op=ast.Not(), operand=node.operand)
        case ast.Constant(value=bool()):
            node.value = not node.value
        case ast.Constant(value=int(value)):
            node.value = value + 1
        case ast.Return():
            node.value = ast.Constant(value=None)
        case ast.Expr() | ast.Raise() | ast.Continue() | ast.Break():
            leave_out(node)


def leave_out(statement: Any) -> None:
    statement.__class__, statement._fields = ast.Pass, ()


def is_text(node: ast.BinOp) -> bool:
    """Whether a sum or product visibly is one of text, where changing the operator only raises
    TypeError."""
    return any(isinstance(part, ast.JoinedStr) for part in (node.left, node.right)) or any(
        isinstance(part, ast.Constant) and isinstance(part.value, str | bytes)
        for part in (node.left, node.right)
    )


def is_nothing(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None
