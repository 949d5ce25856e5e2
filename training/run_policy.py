"""What a run's controllers may change between steps: named knobs, by factors, through one function.

Every controller has a factor of its own on a knob, 1 where it never spoke. A knob's value is its
base times the product of the factors, held within the knob's bounds, so that nothing accumulates
from one controller to the next: `lr = schedule(step) * clip(rule * policy, 0.5, 1.8)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.arbitration import ExperimentToken

LR = "lr"
TTRL_INTERVAL = "ttrl_interval"
TTRL_BUDGET = "ttrl_budget"
REPLAY_BIAS = "replay_bias"  # divides the confidence that replay asks of a completion


@dataclass(slots=True, kw_only=True, frozen=True)
class Proposal:
    """A change of one controller's factor on one knob, to hold from the next step on.

    what: the knob. by: the controller. old, new: its factor. reason: one line. seed: of the random
    draw behind it, 0 where there is none.
    """

    what: str
    by: str
    old: float
    new: float
    reason: str
    seed: int = 0


@dataclass(slots=True, kw_only=True, frozen=True)
class Knob:
    """Bounds of the product of all factors."""

    lowest: float
    highest: float


class RunPolicy:
    """The knobs of a run and every controller's factors; also has the token of experiments.

    A knob exists where the run has what it turns: without reinforcement learning there is no
    interval between its ticks.
    """

    def __init__(self, knobs: dict[str, Knob] | None = None) -> None:
        self.knobs = dict(knobs or {})
        self.token = ExperimentToken()
        self._factors: dict[str, dict[str, float]] = {}
        self._controllers: set[str] = set()

    def enroll(self, controller: str) -> None:
        """Say at set-up that a controller is part of this run: of others nothing is restored."""
        self._controllers.add(controller)

    def present(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that this run has, in their order."""
        return tuple(name for name in names if name in self.knobs)

    def factor(self, name: str, *, by: str) -> float:
        """What controller `by` asks of a knob; 1 where it never spoke, or where there is no such
        knob."""
        return self._factors.get(name, {}).get(by, 1.0)

    def multiplier(self, name: str) -> float:
        """The product of all factors on a knob within its bounds; 1 for a knob there is not."""
        knob, factors = self.knobs.get(name), self._factors.get(name)
        if knob is None or not factors:
            return 1.0
        product = math.prod(factors[by] for by in sorted(factors))
        return min(knob.highest, max(knob.lowest, product))

    def propose(
        self, name: str, new: float, *, by: str, reason: str, seed: int = 0
    ) -> Proposal | None:
        """The proposal that takes the factor of `by` on a knob to `new`; None if it is there."""
        old = self.factor(name, by=by)
        if new == old:
            return None
        return Proposal(what=name, by=by, old=old, new=new, reason=reason, seed=seed)

    def apply(self, proposal: Proposal) -> bool:
        """Make the change; whether the knob's value is another one now. To be called between steps.

        ValueError for an unknown knob, for a factor that is not positive and finite, and when the
        factor is not what the proposal was made for.
        """
        name, by = proposal.what, proposal.by
        if name not in self.knobs:
            raise ValueError(f"this run has no {name} to change")
        if not (math.isfinite(proposal.new) and proposal.new > 0.0):
            raise ValueError(f"a factor on {name} must be positive and finite: {proposal.new}")
        if self.factor(name, by=by) != proposal.old:
            raise ValueError(f"{by} proposes to change {name} from a factor it does not have")
        before = self.multiplier(name)
        self._factors.setdefault(name, {})[by] = proposal.new
        return self.multiplier(name) != before

    def state_dict(self) -> dict[str, Any]:
        """Factors that are not 1, and the token."""
        moved = {
            name: {by: factor for by, factor in sorted(factors.items()) if factor != 1.0}
            for name, factors in self._factors.items()
        }
        return {"factors": moved, "token": self.token.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what concerns knobs and controllers that this run has."""
        mine = self._controllers
        self._factors = {
            name: {by: factor for by, factor in factors.items() if by in mine}
            for name, factors in state["factors"].items()
            if name in self.knobs
        }
        self.token.load_state_dict(state["token"], claimants=mine)
