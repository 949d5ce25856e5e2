"""Sums, differences and products, from one digit up to three.

Small models need tasks that they sometimes solve: with three-digit operands alone the reward of an
untrained model is the same for all its completions, and there is nothing to learn from.
"""

from __future__ import annotations

import random

# Digits of the two operands at level 1, 2, ...
OPERAND_DIGITS = ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3))
SIGNS = {"add": "+", "subtract": "-", "multiply": "*"}


def _operand(digits: int, rng: random.Random) -> int:
    return rng.randrange(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def draw_arithmetic(family: str, *, level: int, rng: random.Random) -> tuple[str, str]:
    """Prompt and answer, such as "17+5=" and "22".

    Differences are never negative below the last level.
    """
    first, second = (_operand(digits, rng) for digits in OPERAND_DIGITS[level - 1])
    if family == "subtract" and level < len(OPERAND_DIGITS):
        first, second = max(first, second), min(first, second)
    result = {"add": first + second, "subtract": first - second, "multiply": first * second}
    return f"{first}{SIGNS[family]}{second}=", str(result[family])
