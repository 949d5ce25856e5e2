"""A learned guess at which completions pass: p(pass) from what is known before verifying.

Features: the model's own mean log-probability, length, whether an answer could be read, task level,
and whether it is code. A logistic regression ranks, isotonic regression (pool adjacent violators,
Ayer et al. 1955) on the half it did not see makes ranks into probabilities. It is fitted on
completions that were all verified strictly, never on those it let through itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training.rl.tasks import Task

MIN_LABELLED = 64
RIDGE = 1e-2
NEWTON_STEPS = 30
MISSING_LOG_PROB = -20.0


def gate_features(
    task: Task, completion: str, *, parsed: bool, mean_log_prob: float
) -> tuple[float, ...]:
    """What the gate looks at; a log-probability that is not finite counts as very unlikely."""
    known = mean_log_prob if math.isfinite(mean_log_prob) else MISSING_LOG_PROB
    return (
        max(known, MISSING_LOG_PROB),
        math.log1p(len(completion)),
        float(parsed),
        float(task.level),
        float(task.code is not None),
    )


def isotonic(scores: Sequence[float], passed: Sequence[bool]) -> tuple[list[float], list[float]]:
    """Least-squares rising step function: where each step begins, and its height.

    Equal scores share one step.
    """
    order = np.argsort(np.asarray(scores, dtype=np.float64), kind="stable")
    blocks: list[list[float]] = []  # first score, sum, count
    for place in order:
        score, label = float(scores[place]), float(passed[place])
        if blocks and blocks[-1][0] == score:
            blocks[-1][1] += label
            blocks[-1][2] += 1
        else:
            blocks.append([score, label, 1.0])
    merged: list[list[float]] = []
    for block in blocks:
        merged.append(list(block))
        while len(merged) > 1 and merged[-2][1] * merged[-1][2] >= merged[-1][1] * merged[-2][2]:
            last = merged.pop()
            merged[-1][1] += last[1]
            merged[-1][2] += last[2]
    return [block[0] for block in merged], [block[1] / block[2] for block in merged]


@dataclass(slots=True, kw_only=True, frozen=True)
class Gate:
    """Fitted weights (the last one is the constant) and the steps of the calibration."""

    center: list[float]
    scale: list[float]
    weights: list[float]
    starts: list[float]
    heights: list[float]

    def scores(self, features: Sequence[Sequence[float]]) -> list[float]:
        """The log-odds by which completions are ranked."""
        if not features:
            return []
        return (_design(features, self.center, self.scale) @ np.asarray(self.weights)).tolist()

    def probabilities(self, features: Sequence[Sequence[float]]) -> list[float]:
        """Calibrated p(pass); below the first step that of the first step."""
        places = np.searchsorted(np.asarray(self.starts), self.scores(features), side="right") - 1
        return [self.heights[max(int(place), 0)] for place in places]

    def state(self) -> dict[str, Any]:
        """Plain lists by field, as the constructor takes them."""
        return {name: list(getattr(self, name)) for name in Gate.__slots__}


def _design(
    features: Sequence[Sequence[float]], center: Sequence[float], scale: Sequence[float]
) -> np.ndarray:
    table = (np.asarray(features, dtype=np.float64) - np.asarray(center)) / np.asarray(scale)
    return np.hstack([table, np.ones((len(features), 1))])  # (N, F + 1)


def fit_gate(features: Sequence[Sequence[float]], passed: Sequence[bool]) -> Gate | None:
    """The gate of a labelled set, or None if it is too small or all of one kind.

    Even places fit the ranking, odd ones calibrate it.
    """
    halves = [
        ([list(row) for row in features[start::2]], [bool(flag) for flag in passed[start::2]])
        for start in (0, 1)
    ]
    if len(passed) < MIN_LABELLED or any(len(set(flags)) < 2 for _, flags in halves):
        return None
    table = np.asarray(halves[0][0], dtype=np.float64)
    center = table.mean(axis=0).tolist()
    scale = np.where(table.std(axis=0) > 1e-9, table.std(axis=0), 1.0).tolist()
    weights = _logistic(_design(halves[0][0], center, scale), halves[0][1])
    ranks = (_design(halves[1][0], center, scale) @ weights).tolist()
    starts, heights = isotonic(ranks, halves[1][1])
    return Gate(
        center=center, scale=scale, weights=weights.tolist(), starts=starts, heights=heights
    )


def _logistic(design: np.ndarray, passed: Sequence[bool]) -> np.ndarray:
    """Ridge logistic regression by damped Newton steps; the constant is not penalised."""
    labels = np.asarray(passed, dtype=np.float64)
    penalty = np.full(design.shape[1], RIDGE * len(labels))
    penalty[-1] = 1e-6
    weights = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        chance = 1.0 / (1.0 + np.exp(-np.clip(design @ weights, -30, 30)))
        gradient = design.T @ (labels - chance) - penalty * weights
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        weights = weights + step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-9:
            break
    return weights
