"""Forks children that save until they are killed, and checks what each of them left.

Run as a program by test_checkpoint_kill.py: one interpreter with torch loaded is the parent of all
children, so a trial costs a fork. Prints one JSON line with the counts; any breach is an error.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from tests.training.runtime.faults import (
    FailingOps,
    KillingOps,
    QuietOps,
    assert_is_example,
    contents,
    example,
    open_store,
    save_steps,
)


def save_forever(directory: Path, pipe: int) -> None:
    """A training loop without the training: reports a step once its save is acknowledged."""
    store = open_store(directory, ops=QuietOps(), keep=2)
    found = store.load_newest()
    step = 0 if found is None else found.step
    while True:
        step += 1
        store.save(step, *example(step))
        store.wait()
        os.write(pipe, step.to_bytes(8, "little"))


def newest_step(directory: Path) -> int:
    """The step a new process resumes; AssertionError if it is not exactly what was saved."""
    store = open_store(directory, keep=2)
    found = store.load_newest()
    store.close()
    assert store.quarantine_count == 0, "a kill left something that looks damaged"
    if found is None:
        return 0
    assert_is_example(found)
    return found.step


def run_child(body) -> tuple[int, int]:
    """Fork and run `body(pipe)`; process number and the reading end of its pipe."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            body(writing)
            status = 0
        except BaseException:  # a forked child must never return into the parent's stack
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    return child, reading


def kill_at_random_times(directory: Path, kills: int, seed: int) -> dict[str, int]:
    rng, acknowledged, saves = random.Random(seed), 0, 0
    for _ in range(kills):
        child, pipe = run_child(lambda writing: save_forever(directory, writing))
        # Some saves are waited for, so that a busy machine still reaches every part of the loop.
        steps = b"".join(os.read(pipe, 8) for _ in range(rng.randrange(4)))
        time.sleep(rng.uniform(0.002, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself"
        with os.fdopen(pipe, "rb") as reader:
            steps += reader.read()
        saves += len(steps) // 8
        if steps:
            acknowledged = int.from_bytes(steps[-8:], "little")
        step = newest_step(directory)
        assert step >= acknowledged, f"step {acknowledged} was acknowledged, {step} is newest"
        acknowledged = step
    return {"kills": kills, "saves": saves, "step": acknowledged}


def kill_around_every_operation(directory: Path) -> dict[str, int]:
    """Before and after every mutating operation of a save with retention, and of a quarantine."""
    return {
        "save": _kill_each(directory / "save", damage=False),
        "quarantine": _kill_each(directory / "quarantine", damage=True),
    }


def _kill_each(directory: Path, *, damage: bool) -> int:
    killed, operation, finished = 0, 0, False
    while not finished:
        for afterwards in (False, True):
            trial = directory / f"{operation}_{afterwards}"
            save_steps(trial, 1, 2, keep=2)
            if damage:
                (trial / "checkpoint_step_00000002" / "state.json").unlink()
            ops = KillingOps(operation, afterwards=afterwards)
            child, pipe = run_child(lambda _, t=trial, o=ops: _save_once(t, o))
            os.close(pipe)
            _, status = os.waitpid(child, 0)
            finished = not os.WIFSIGNALED(status)
            assert finished is False or os.WEXITSTATUS(status) == 0
            killed += not finished
            _check_survivor(trial, damage=damage)
        operation += 1
    return killed


def _save_once(directory: Path, ops: KillingOps) -> None:
    store = open_store(directory, ops=ops, keep=2)
    store.load_newest()
    store.save(3, *example(3), block=True)
    store.close()


def _check_survivor(directory: Path, *, damage: bool) -> None:
    store = open_store(directory, ops=FailingOps(-1, OSError()), keep=2)
    found = store.load_newest()
    assert found is not None and found.step >= (1 if damage else 2), contents(directory).keys()
    assert_is_example(found)
    assert store.quarantine_count <= damage
    store.save(9, *example(9), block=True)
    again = store.load_newest()
    assert again is not None and again.step == 9
    store.close()


if __name__ == "__main__":
    mode, target, amount, chosen_seed = sys.argv[1:]
    if mode == "random":
        result = kill_at_random_times(Path(target), int(amount), int(chosen_seed))
    else:
        result = kill_around_every_operation(Path(target))
    print(json.dumps(result))
