"""Typed changes of a training under way: what may be changed, and between which bounds.

An overlay lies over the configuration and replaces nothing in it; without one, a run is what its
flags say. A field stands here only if the trainer follows it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(slots=True, kw_only=True, frozen=True)
class OverlayField:
    """Bounds of one number; `default` changes nothing. Distances are measured in its logarithm."""

    default: float
    minimum: float
    maximum: float

    def to_unit(self, value: float) -> float:
        """Place between the bounds, in [0, 1]."""
        low, high = math.log(self.minimum), math.log(self.maximum)
        return (math.log(value) - low) / (high - low)

    def from_unit(self, place: float) -> float:
        low, high = math.log(self.minimum), math.log(self.maximum)
        return min(self.maximum, max(self.minimum, math.exp(low + place * (high - low))))


SCHEMA = {
    # Times the scheduled rate, beside what other controllers make of it.
    "lr_factor": OverlayField(default=1.0, minimum=0.25, maximum=4.0),
    # Times what `--ttrl-interval` and the budget of updates per tick are without it.
    "ttrl_interval": OverlayField(default=1.0, minimum=0.5, maximum=2.0),
    "ttrl_budget": OverlayField(default=1.0, minimum=0.5, maximum=2.0),
    # Divides the confidence that replay asks of what it keeps.
    "replay_bias": OverlayField(default=1.0, minimum=0.5, maximum=2.0),
}


@dataclass(slots=True, kw_only=True, frozen=True)
class Overlay:
    """A value for every field of SCHEMA. ValueError outside the bounds."""

    lr_factor: float = SCHEMA["lr_factor"].default
    ttrl_interval: float = SCHEMA["ttrl_interval"].default
    ttrl_budget: float = SCHEMA["ttrl_budget"].default
    replay_bias: float = SCHEMA["replay_bias"].default

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            bounds = SCHEMA[name]
            if not bounds.minimum <= value <= bounds.maximum:
                raise ValueError(
                    f"overlay {name} {value:g} is not in [{bounds.minimum:g}, {bounds.maximum:g}]"
                )

    @property
    def point(self) -> tuple[float, ...]:
        """Coordinates in the unit cube, in the order of SCHEMA."""
        return tuple(SCHEMA[name].to_unit(value) for name, value in asdict(self).items())

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Overlay:
        """ValueError for a field that is unknown or out of bounds; missing ones are the default."""
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"overlay fields {sorted(unknown)} are unknown")
        return cls(**{name: float(value) for name, value in values.items()})

    def __str__(self) -> str:
        moved = {name: v for name, v in asdict(self).items() if v != SCHEMA[name].default}
        return ", ".join(f"{name} {value:.4g}" for name, value in moved.items()) or "no change"


NEUTRAL = Overlay()


def draw_overlay(rng: random.Random, *, names: Sequence[str]) -> Overlay:
    """Any overlay of these fields within the bounds, uniform in the logarithm of each."""
    return Overlay(**{name: SCHEMA[name].from_unit(rng.random()) for name in names})


def distance(first: Overlay, second: Overlay) -> float:
    """Between two overlays in the unit cube."""
    return math.dist(first.point, second.point)


@dataclass(slots=True, kw_only=True, frozen=True)
class Proposal:
    """A change that is to be tried before it is kept.

    what: the kind of change. old, new: what holds now and what would. reason: one line. seed: of
    whatever is random in the trial.
    """

    what: str
    old: Overlay
    new: Overlay
    reason: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `from_dict` takes them."""
        return {
            "what": self.what,
            "old": self.old.to_dict(),
            "new": self.new.to_dict(),
            "reason": self.reason,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Proposal:
        """ValueError where an overlay in it is outside the bounds of today's SCHEMA."""
        return cls(
            what=values["what"],
            old=Overlay.from_dict(values["old"]),
            new=Overlay.from_dict(values["new"]),
            reason=values["reason"],
            seed=values["seed"],
        )
