"""Settings of Fractal NAS (MECHANISMS 7.1)."""

from __future__ import annotations

from dataclasses import dataclass

from training.config.fields import flag


@dataclass(slots=True, kw_only=True)
class FractalConfig:
    arch_search: bool = flag(
        False,
        "Search for an architecture instead of training; --steps of a three-block network are its "
        "budget of compute.",
    )
