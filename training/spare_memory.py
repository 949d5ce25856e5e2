"""What a run does beside training must not end it: an evaluation or a sample that finds no memory.

Training has its own answer to short memory (micro_batch.py); an evaluation needs more at once than
a step and nothing depends on it, so it is done with fewer rows, and left out where one is too much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from training.runtime.memory_guard import clear_caches, is_out_of_memory

Result = TypeVar("Result")


def within_memory(
    work: Callable[[int], Result], *, rows: int, what: str, say: Callable[[str], object]
) -> Result | None:
    """`work(rows)`, with half the rows whenever memory runs out; None when one is too much.

    Any other error is raised. `say` is told what was done, `what` is the subject of that sentence.
    """
    while True:
        try:
            return work(rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only here are the failed attempt's tensors free: the traceback held them.
        clear_caches()
        if rows == 1:
            say(f"{what}: out of memory, left out; training goes on")
            return None
        rows //= 2
        say(f"{what}: out of memory, again with {rows} rows at a time")
