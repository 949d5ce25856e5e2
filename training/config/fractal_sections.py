"""Settings of Fractal NAS."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag


@dataclass(slots=True, kw_only=True)
class FractalConfig:
    interval_steps: int = flag(
        0, "Steps between trials of scan tiles, for the runs that follow; 0 = none.", minimum=0
    )
    ucb_c: float = flag(1.3, "Exploration constant of UCB1.", minimum=0.0)
    arch_search: bool = flag(
        False,
        "Search for an architecture instead of training; --steps of a three-block network are its "
        "budget of compute.",
    )
    genome: str = flag(
        "",
        "Network to train, in place of --n-layers and the ratios, as a search writes it down: "
        "letters from the inside out, such as 'mamba width x2 | attention'.",
    )
