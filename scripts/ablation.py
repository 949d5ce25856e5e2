"""Runs of several arms side by side in one process: same data, same seeds, turn by turn.

Every arm of a seed is built at once and gets a few steps in turn, in an order that rotates, so that
a machine that slows down slows all arms alike. The global generators are put back at every turn, so
a run is to the bit what it would have been alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scripts.placebos import PLACEBOS
from training.build import build_trainer
from training.config.cli import parse_args
from training.runtime.clock import phase_columns
from training.runtime.rng_state import capture_rng_state, restore_rng_state
from training.sigma_trainer import SigmaTrainer

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(slots=True, kw_only=True, frozen=True)
class Arm:
    """A configuration under trial: what its flags add to the common ones.

    placebo: which one of scripts/placebos.py the built run is given; "" = none.
    """

    name: str
    flags: tuple[str, ...] = ()
    placebo: str = ""

    @classmethod
    def parse(cls, text: str) -> Arm:
        """`name: --flag value --switch`. ValueError without a name."""
        name, _, flags = text.partition(":")
        if not name.strip():
            raise ValueError(
                f"--arm takes name:flags, such as 'off:--no-ema-enabled', not {text!r}"
            )
        return cls(name=name.strip(), flags=tuple(flags.split()))


@dataclass(slots=True, kw_only=True, frozen=True)
class Outcome:
    """End of a run: validation bits per byte, steps, and seconds in steps by the chosen clock."""

    bpb: float
    steps: int
    seconds: float


class Lane:
    """One run of one arm, advanced a few steps at a time.

    times: seconds of every step by the chosen clock, and of its phases by the wall's.
    """

    def __init__(
        self, common: Sequence[str], arm: Arm, *, seed: int, steps: int, directory: Path
    ) -> None:
        own = directory / f"{arm.name}-{seed}-{steps}"
        # The last flag wins: an arm may not change where it writes, its seed or its length.
        flags = [
            *common, *arm.flags, "--seed", str(seed), "--steps", str(steps),
            "--output-dir", str(own), "--checkpoint-dir", str(own / "checkpoints"),
        ]  # fmt: skip
        self.steps = steps
        self.seconds = 0.0
        self.times: list[dict[str, float]] = []
        config = parse_args(flags)
        self.trainer: SigmaTrainer = build_trainer(config)
        if arm.placebo:
            PLACEBOS[arm.placebo](self.trainer)
        self._judges_average = config.generate.weights == "ema"
        self.trainer.services.recorder.open(metrics_offset=None)  # trials go back to its rows
        self.trainer.features.run("on_setup", replace(self.trainer.begin_step(), step=0))
        self._rng = capture_rng_state()

    @property
    def is_done(self) -> bool:
        return self.trainer.step >= self.steps

    def advance(self, count: int, *, clock: Callable[[], float]) -> None:
        """Up to `count` steps more. RuntimeError when one is refused for not being finite."""
        restore_rng_state(self._rng)
        start = clock()
        trainer, trials = self.trainer, self.trainer.services.trials
        end = min(self.steps, trainer.step + count)
        while trainer.step < end:
            if trials is not None and not trials.between_steps(trainer, lambda: False):
                continue  # rolled back: the run is at an earlier step now
            begun = clock()
            if trainer.attempt_step() is None:
                raise RuntimeError(f"step {trainer.step + 1} could not be made")
            self.times.append({"step": clock() - begun} | phase_columns(trainer.clock.seconds))
        self.seconds += clock() - start
        self._rng = capture_rng_state()

    def close(self) -> None:
        """End the run without a last save; its metrics files stay."""
        self.trainer.features.close()
        self.trainer.stream.close()
        self.trainer.services.recorder.close()

    def finish(self) -> Outcome:
        """What the run is worth; with `--weights ema`, what its average is worth."""
        if self._judges_average:
            shadow = self.trainer.features.state_dict()["ema"]["state"]["shadow"]
            self.trainer.model.load_state_dict(shadow, strict=False)
        result = self.trainer.services.evaluate(self.trainer.model)
        self.close()
        if result["eval_bpb"] is None:
            raise RuntimeError("there was no memory for the evaluation; lower --eval-tokens")
        return Outcome(bpb=result["eval_bpb"], steps=self.steps, seconds=self.seconds)


def run_side_by_side(
    common: Sequence[str],
    arms: Sequence[Arm],
    *,
    seed: int,
    steps: dict[str, int],
    directory: Path,
    clock: Callable[[], float],
    turn_steps: int = 5,
) -> dict[str, Outcome]:
    """Every arm trained for its number of steps on one seed; outcomes by arm name.

    ValueError as in `build_trainer` for flags that cannot be used.
    """
    lanes = {
        arm.name: Lane(common, arm, seed=seed, steps=steps[arm.name], directory=directory)
        for arm in arms
    }
    order = list(lanes)
    while not all(lane.is_done for lane in lanes.values()):
        for name in order:
            lanes[name].advance(turn_steps, clock=clock)
        order = [*order[1:], order[0]]
    return {name: lane.finish() for name, lane in lanes.items()}
