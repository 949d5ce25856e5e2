"""Antithetic search for a better policy of the run, by trials that are part of the training itself.

A policy is a point theta: one number per knob, 0 where the run began, and the knob's factor is
`1 + reach * tanh(theta)`, always over the base value. One quadruple tries theta + s eps twice and
theta - s eps twice, in an order (+--+ or -++-) in which a linear trend cancels; a trial's score is
by how much the loss of one probe batch fell in it. Evolution strategies 1703.03864, with the +-1
directions of SPSA (Spall 1992).

The step. `0.12 * rank-normalised(S+ - S-) * eps / s` per quadruple, taken to the letter, walks at
random by ten times the policy's whole reach in 100 quadruples without any signal, and so do its
milder readings. So the differences of the last quadruples are taken together: signed ranks of them
all, times their directions, are votes for a gradient; theta moves by 0.12 times their mean, shrunk
by t^4 / (t^4 + 3^4), t being the mean over its standard error. Without signal that is next to
nothing, with one it is next to the whole mean.

Trials are as short as the interval, so what is found is what helps at once; a lower learning rate
often does, by less noise, and costs later (short-horizon bias, 1803.02021).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

GAIN = 0.12
FURTHEST = 2.0  # of a knob's theta: 96 % of its reach, from where it can come back
WINDOW = 32  # quadruples whose differences are ranked together
DOUBTED, BELIEVED = 3.0, 3.3  # standard errors of the mean vote: from nothing to all of it
LEAST_BELIEF = 0.01
SUCCESS_RATE = 0.7  # above it changes may grow; a coin agrees in half of all cases
ORDERS = ((1, -1, -1, 1), (-1, 1, 1, -1))
REACH = {"lr": 0.15, "ttrl_interval": 0.35, "ttrl_budget": 0.5, "replay_bias": 0.4}


@dataclass(slots=True, kw_only=True, frozen=True)
class ImproverSettings:
    """Size of the perturbations and its adaptation."""

    sigma: float = 0.25
    sigma_min: float = 0.02
    sigma_max: float = 0.30
    is_adaptive: bool = True
    beta: float = 0.90
    gain_up: float = 1.06
    gain_down: float = 0.94
    is_shuffled: bool = False


class SelfImprover:
    """theta over named knobs, and the quadruple under way.

    Call `begin` with the loss before the first trial, then `end_trial` after each of the four;
    `factors` is what to train with meanwhile.
    """

    def __init__(self, settings: ImproverSettings, *, knobs: Sequence[str]) -> None:
        if not knobs:
            raise ValueError("a policy needs at least one knob")
        self.settings = settings
        self.knobs = tuple(knobs)
        self.theta = [0.0] * len(self.knobs)
        self.sigma = settings.sigma
        self.success = SUCCESS_RATE
        self.num_quadruples = 0
        self.reward_plus = self.reward_minus = 0.0
        self._window: list[tuple[float, list[float]]] = []  # difference / 2 s, direction
        self._direction: list[float] = []
        self._order: tuple[int, ...] = ()
        self._losses: list[float] = []

    @property
    def is_running(self) -> bool:
        return bool(self._order)

    @property
    def factors(self) -> dict[str, float]:
        """The factor of every knob now: of the trial under way, or of theta itself."""
        sign = self._order[len(self._losses) - 1] if self.is_running else 0
        steps = [sign * self.sigma * part for part in self._direction] or [0.0] * len(self.theta)
        return {
            name: 1.0 + REACH[name] * math.tanh(place + step)
            for name, place, step in zip(self.knobs, self.theta, steps, strict=True)
        }

    def begin(self, loss: float, *, generator: torch.Generator) -> None:
        """Draw direction and order of a quadruple; `loss`: of its probe batch, before it."""
        size = len(self.knobs) + 1
        *signs, order = torch.randint(2, (size,), generator=generator).tolist()
        self._direction = [2.0 * sign - 1.0 for sign in signs]
        self._order = ORDERS[order]
        self._losses = [loss]

    def end_trial(self, loss: float, *, generator: torch.Generator) -> bool:
        """Take the probe loss after a trial; whether the quadruple is over.

        RuntimeError when no quadruple runs.
        """
        if not self.is_running:
            raise RuntimeError("no quadruple is under way")
        self._losses.append(loss)
        if len(self._losses) <= len(self._order):
            return False
        scores = [before - after for before, after in zip(self._losses, self._losses[1:])]
        if self.settings.is_shuffled:
            scores = [scores[i] for i in torch.randperm(len(scores), generator=generator).tolist()]
        self.reward_plus, self.reward_minus = (
            sum(score for score, sign in zip(scores, self._order) if sign == side) / 2.0
            for side in (1, -1)
        )
        difference = (self.reward_plus - self.reward_minus) / 2.0
        self.num_quadruples += 1
        self._order = ()
        if math.isfinite(difference):
            self._learn(difference)
        return True

    def _learn(self, difference: float) -> None:
        """Move theta and adapt sigma by one more difference."""
        self._adapt(difference)
        self._window = [*self._window, (difference / self.sigma, self._direction)][-WINDOW:]
        mean, trust = vote(self._window)
        self.theta = [
            min(FURTHEST, max(-FURTHEST, place + GAIN * share * part))
            for place, share, part in zip(self.theta, trust, mean, strict=True)
        ]

    def _adapt(self, difference: float) -> None:
        """Success is a difference in the direction in which those before it pointed."""
        own = self.settings
        if not own.is_adaptive or not self._window:
            return
        mean, _ = vote(self._window)
        expected = sum(a * b for a, b in zip(mean, self._direction, strict=True))
        self.success = own.beta * self.success + (1.0 - own.beta) * (difference * expected > 0.0)
        factor = own.gain_up if self.success > SUCCESS_RATE else own.gain_down
        self.sigma = min(own.sigma_max, max(own.sigma_min, self.sigma * factor))

    def state_dict(self) -> dict[str, Any]:
        """Everything, also of a quadruple under way."""
        return {
            "knobs": list(self.knobs),
            "theta": list(self.theta),
            "sigma": [self.sigma, self.success],
            "num_quadruples": self.num_quadruples,
            "rewards": [self.reward_plus, self.reward_minus],
            "window": [[value, list(direction)] for value, direction in self._window],
            "quadruple": [list(self._direction), list(self._order), list(self._losses)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; a run that has other knobs now starts its search afresh."""
        if tuple(state["knobs"]) != self.knobs:
            return
        self.theta = list(state["theta"])
        self.sigma, self.success = state["sigma"]
        self.num_quadruples = state["num_quadruples"]
        self.reward_plus, self.reward_minus = state["rewards"]
        self._window = [(value, list(direction)) for value, direction in state["window"]]
        direction, order, losses = state["quadruple"]
        self._direction, self._order, self._losses = list(direction), tuple(order), list(losses)


def vote(window: Sequence[tuple[float, Sequence[float]]]) -> tuple[list[float], list[float]]:
    """Mean vote per knob, in [-1, 1], and how far each is to be believed, in [0, 1]."""
    ranks = signed_ranks([difference for difference, _ in window])
    size, count = len(window[0][1]), len(window)
    columns = [
        [rank * direction[n] for rank, (_, direction) in zip(ranks, window, strict=True)]
        for n in range(size)
    ]
    mean = [sum(column) / count for column in columns]
    trust = [belief(column) for column in columns]
    return mean, trust


def signed_ranks(values: Sequence[float]) -> list[float]:
    """Every value's sign times the rank of its size over the mean rank; 0 stays 0.

    Only order counts, so that one wild score weighs no more than any largest one. With all signs
    alike the mean is 1.
    """
    sizes = sorted(abs(value) for value in values)
    middle = (len(values) + 1) / 2.0
    # Equals share the mean of their ranks.
    ranks = {size: (bisect_left(sizes, size) + 1 + bisect_right(sizes, size)) / 2 for size in sizes}
    return [math.copysign(ranks[abs(value)] / middle, value) if value else 0.0 for value in values]


def belief(votes: Sequence[float]) -> float:
    """LEAST_BELIEF to 1, by how many standard errors the sum of `votes` is off 0.

    The error is that of votes whose signs are drawn at random, as in Wilcoxon's signed-rank test.
    """
    error = math.sqrt(sum(value * value for value in votes))
    if error == 0.0:
        return 0.0
    excess = (abs(sum(votes)) / error - DOUBTED) / (BELIEVED - DOUBTED)
    return LEAST_BELIEF + (1.0 - LEAST_BELIEF) * min(1.0, max(0.0, excess))
