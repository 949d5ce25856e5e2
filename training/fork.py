"""A second arm of a run: train a while from the present state, look at the result, and undo it all.

The arm runs first and the run itself goes on afterwards, over the same batches and random numbers.
So what the fork needs in memory it needs for the arm's few steps only, a checkpoint never holds it,
and the steps of the other arm are the run's own, recorded, saved and stopped like all others. The
stream must be able to go back to an earlier position.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from training.micro_batch import StepRows
from training.nonfinite import Verdict
from training.runtime.clock import PhaseClock
from training.runtime.memory_guard import is_out_of_memory

MAX_OVERFLOWS = 8  # of the loss scale, in one arm


class ArmEnd(Enum):
    """STOPPED: the run was asked to end meanwhile. Only FINISHED has scores that mean something."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    NO_MEMORY = "no memory"
    STOPPED = "stopped"


@dataclass(slots=True, kw_only=True)
class Arm:
    """What became of an arm. start, end: scores before and after its steps, by the caller's score.

    grad_norms: before clipping, of every step.
    """

    outcome: ArmEnd
    start: float = 0.0
    end: float = 0.0
    grad_norms: list[float]


class ArmDiverged(RuntimeError):
    """A loss, gradient or weight of an arm is not finite."""


class ArmGuard:
    """Stands in for the run's guard: what is not finite ends the arm instead of the run."""

    def judge(self, *, finite: bool, step: int, position: dict[str, Any]) -> Verdict:
        return self.judge_state(finite=finite, step=step)

    def judge_state(self, *, finite: bool, step: int) -> Verdict:
        if not finite:
            raise ArmDiverged(f"step {step} of the arm is not finite")
        return Verdict.APPLY


def run_arm(
    trainer: Any,  # the SigmaTrainer, between two steps
    *,
    steps: int,
    score: Callable[[Any], float],
    seed: int | None = None,
    keep: tuple[str, ...] = (),
    should_stop: Callable[[], bool] = lambda: False,
) -> Arm:
    """Train `steps` steps from here, score the model before and after, and put everything back.

    seed: gives the arm random numbers of its own; None = those the run will use. keep: features
    whose state is not part of the fork.
    """
    try:
        saved = copy_state(trainer.state_dict())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return Arm(outcome=ArmEnd.NO_MEMORY, grad_norms=[])
    for name in keep:
        saved["features"].pop(name, None)
    arm = copy.copy(trainer)
    # What a step writes to besides model, optimizer, stream and features.
    arm.guard, arm.rows = ArmGuard(), StepRows(trainer.stream)
    arm.clock = PhaseClock(trainer.device)
    result = _train(arm, steps=steps, score=score, seed=seed, should_stop=should_stop)
    # Only here are the tensors of a step that failed free: the traceback held them.
    trainer.optimizer.zero_grad()
    trainer.model.discard_step()
    trainer.load_state_dict(saved, keep_position=True)
    trainer.stream.load_state_dict(saved["run"]["stream"])
    return result


def _train(
    arm: Any,
    *,
    steps: int,
    score: Callable[[Any], float],
    seed: int | None,
    should_stop: Callable[[], bool],
) -> Arm:
    result = Arm(outcome=ArmEnd.FINISHED, grad_norms=[])
    end, overflows = arm.step + steps, 0
    try:
        result.start = score(arm.model)
        if seed is not None:
            torch.manual_seed(seed)
        while arm.step < end:
            if should_stop():
                result.outcome = ArmEnd.STOPPED
                return result
            ctx = arm.train_step()
            arm.rows.clear()
            arm.services.watchdog.beat(arm.step)
            if ctx is None:
                overflows += 1
                if overflows > MAX_OVERFLOWS:
                    raise ArmDiverged("the loss scale of the arm keeps overflowing")
                continue
            result.grad_norms.append(float(ctx.grad_norm))
        result.end = score(arm.model)
    except ArmDiverged:
        result.outcome = ArmEnd.DIVERGED
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        result.outcome = ArmEnd.NO_MEMORY
    return result


def remember_run(trainer: Any, *, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything needed to come back to this step, in host memory; features in `leave` left out."""
    state = copy_state(trainer.state_dict())
    for name in leave:
        state["features"].pop(name, None)
    return {"step": trainer.step, "state": state}


def return_to(trainer: Any, remembered: dict[str, Any]) -> None:
    """Back to the step that was remembered: weights, data, records and all, to the bit."""
    state, services = remembered["state"], trainer.services
    trainer.optimizer.zero_grad()
    trainer.model.discard_step()
    trainer.load_state_dict(state)
    trainer.step = remembered["step"]
    services.recorder.rewind(state["run"]["recorder"], step=trainer.step)
    services.audit.load_state_dict(state["run"]["audit"], step=trainer.step, model=trainer.model)


def copy_state(value: Any) -> Any:
    """A nested state with every tensor copied to host memory; shares nothing that can change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copy_state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_state(item) for item in value)
    return value


def hash_state(trainer: Any) -> str:
    """sha256 of all weights, buffers and moments, by name."""
    digest = hashlib.sha256()

    def add(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{name}.{key}", value[key])
        else:
            digest.update(f"{name}={value!r}".encode())

    add("model", trainer.model.state_dict())
    add("optimizer", trainer.optimizer.state_dict())
    return digest.hexdigest()
