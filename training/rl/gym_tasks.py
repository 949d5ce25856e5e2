"""Tasks of reasoning-gym (1.0 of 2505.24760; package 0.1.25), for generators with one right answer.

Only generators are offered whose answer is one integer, or one line of text that its own scorer
wants exactly: then equality decides, here, and nothing a model wrote reaches a parser of theirs
(some of their scorers hand text to `sympify`, which evaluates it). Levels are those of the
generator's curriculum.
"""

from __future__ import annotations

import random
import re

INTEGER_GENERATORS = (
    *("basic_arithmetic", "chain_sum", "count_bits", "count_primes", "gcd", "gsm_symbolic", "lcm"),
    *("leg_counting", "letter_counting", "products", "simple_equations"),
)
TEXT_GENERATORS = ("base_conversion", "word_sequence_reversal")
GENERATORS = (*INTEGER_GENERATORS, *TEXT_GENERATORS)
GYM_LEVELS = 3
SEEDS = 2**31
MAX_DRAWS = 100
INTEGER = re.compile(r"[+-]?[0-9]{1,64}")
LINE = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,398}[\x21-\x7e])?")


def gym_levels(generator: str) -> int:
    """Levels are 1 to this; ValueError for a generator that is not offered here."""
    if generator not in GENERATORS:
        raise ValueError(
            f"no task family gym:{generator}: there are gym:{{{','.join(GENERATORS)}}}"
        )
    return GYM_LEVELS


def draw_gym(generator: str, *, level: int, rng: random.Random) -> tuple[str, str]:
    """Prompt and answer; RuntimeError names the package where it is missing."""
    try:
        from reasoning_gym.factory import (  # pyright: ignore[reportMissingImports]
            create_curriculum,
            create_dataset,
            has_curriculum,
        )
    except ImportError as error:
        raise RuntimeError(
            f"tasks gym:{generator} need the package reasoning-gym: pip install "
            "reasoning-gym==0.1.25, or leave them out of --ttrl-task-families"
        ) from error
    form = INTEGER if generator in INTEGER_GENERATORS else LINE
    for _ in range(MAX_DRAWS):
        settings = {"seed": rng.randrange(SEEDS), "size": 1}
        if has_curriculum(generator):
            curriculum = create_curriculum(generator)
            for _ in range(level - 1):
                curriculum.increment_global_level()
            config = curriculum.generate_configuration(settings)
            settings = {name: getattr(config, name) for name in config.__dataclass_fields__}
        item = create_dataset(generator, **settings)[0]
        answer = item["answer"]
        if isinstance(answer, str) and form.fullmatch(answer):
            canonical = str(int(answer)) if form is INTEGER else answer
            return f"{item['question'].strip()}\nAnswer:", canonical
    raise ValueError(f"gym:{generator} gave no answer on one line in {MAX_DRAWS} draws")
