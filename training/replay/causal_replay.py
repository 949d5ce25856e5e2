"""Randomised replay: draw an item, flip a coin, and see over the next steps what it was worth.

With heads the item is trained on, with tails it is recorded as a control and nothing is replaced.
The outcome of either is how far the loss on one fixed probe batch falls over the next steps,

    Y = sum over j = 1..H of decay^(j-1) * (L_(t+j-1) - L_(t+j)),

L_t being the loss before the step of the coin. Windows overlap; the coins are independent, so one
window's effect is noise in another and no bias. Uplift modelling by experiment; how priorities use
it is priority.py's, how it is estimated uplift.py's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from training.replay.buffer import ReplayBuffer, ReplayItem, make_item
from training.replay.priority import (
    PriorityWeights,
    base_priorities,
    importance_weights,
    probabilities,
)
from training.replay.uplift import UpliftEstimator
from training.rl.passed import Passed


@dataclass(slots=True, kw_only=True, frozen=True)
class ReplaySettings:
    """propensity: chance of heads. horizon, decay: of the outcome. beta: decay of estimates.

    least_confidence: of what is admitted. is_shuffled: placebo, clusters get each other's uplift.
    """

    propensity: float = 0.5
    alpha: float = 0.20
    beta: float = 0.95
    weights: PriorityWeights = field(default_factory=PriorityWeights)
    horizon: int = 6
    decay: float = 0.90
    least_confidence: float = 0.20
    is_shuffled: bool = False


@dataclass(slots=True, kw_only=True, frozen=True)
class Coin:
    """weight: importance of the item's loss."""

    item: ReplayItem
    heads: bool
    weight: float


@dataclass(slots=True, kw_only=True)
class Window:
    """A coin whose outcome is being added up. propensity, baseline: as they were when it fell."""

    cluster: str
    heads: bool
    propensity: float
    baseline: float
    outcome: float = 0.0
    age: int = 0


class CausalReplay:
    """The buffer, the coins of a run and what is known of their effect."""

    def __init__(self, settings: ReplaySettings, buffer: ReplayBuffer) -> None:
        self.settings = settings
        self.buffer = buffer
        self.uplift = UpliftEstimator(beta=settings.beta)
        self.loss: float | None = None  # of the probe, after the last step
        self.used = self.controls = 0
        self.step_gain = self.horizon_gain = math.nan
        self._windows: list[Window] = []
        self._base: list[float] | None = None  # priorities of the buffer as it is

    def admit(self, passed: Iterable[Passed], *, step: int, bias: float = 1.0) -> None:
        """Keep completions of this step that passed with a confidence of `least / bias`."""
        least = self.settings.least_confidence / bias
        self.buffer.expire(step)
        for found in passed:
            if found.confidence >= least:
                item = make_item(
                    found.task,
                    prompt=found.prompt,
                    completion=found.completion,
                    text=found.text,
                    step=step,
                    share=found.share,
                    mean_log_prob=found.mean_log_prob,
                )
                self.buffer.admit(item)
        self._base = None

    def flip(self, *, seed: int, row_tokens: int) -> Coin | None:
        """The coin of a step: a function of `seed` and of what is known; changes nothing.

        None when no item is shorter than a row.
        """
        chances, places = self._chances(seed=seed, row_tokens=row_tokens)
        if not places:
            return None
        rng = random.Random(seed)
        chosen = rng.choices(range(len(places)), weights=chances)[0]
        return Coin(
            item=self.buffer.items[places[chosen]],
            heads=rng.random() < self.settings.propensity,
            weight=importance_weights(chances)[chosen],
        )

    def _chances(self, *, seed: int, row_tokens: int) -> tuple[list[float], list[int]]:
        """Probability of every item that fits, and its place in the buffer."""
        items = self.buffer.items
        if self._base is None:
            self._base = base_priorities(items, self.settings.weights)
        places = [n for n, item in enumerate(items) if len(item.tokens) < row_tokens]
        if not places:
            return [], []
        clusters = [items[place].cluster for place in places]
        known = self.uplift.sample(clusters, seed=seed, shuffled=self.settings.is_shuffled)
        chances = probabilities(
            [self._base[place] for place in places],
            [known[cluster] for cluster in clusters],
            alpha=self.settings.alpha,
            scale=self.uplift.scale,
        )
        return chances, places

    def finish_step(self, loss: float, *, coin: Coin | None) -> None:
        """The probe loss after a step, and the coin that was flipped before it."""
        if coin is not None:
            self.used += coin.heads
            self.controls += not coin.heads
            window = Window(
                cluster=coin.item.cluster,
                heads=coin.heads,
                propensity=self.settings.propensity,
                baseline=self.uplift.baseline,
            )
            self._windows.append(window)
        if self.loss is None or not math.isfinite(loss):
            self._windows.clear()  # a gap: what they were worth can no longer be told
            self.loss = loss if math.isfinite(loss) else None
            return
        self.step_gain = self.loss - loss
        self.loss = loss
        for window in self._windows:
            window.outcome += self.settings.decay**window.age * self.step_gain
            window.age += 1
        for window in self._windows:
            if window.age == self.settings.horizon:
                self._close(window)
        self._windows = [own for own in self._windows if own.age < self.settings.horizon]

    def _close(self, window: Window) -> None:
        self.horizon_gain = window.outcome
        self.uplift.observe(
            window.cluster,
            window.outcome,
            heads=window.heads,
            propensity=window.propensity,
            baseline=window.baseline,
        )

    def metrics(self) -> dict[str, float]:
        """The columns `replay_*`; `trusted` counts clusters whose interval leaves out 0."""
        known = self.uplift.clusters.values()
        means = [own.mean for own in known]
        return {
            "ttrl_buffer_size": float(len(self.buffer)),
            "causal_replay_used": float(self.used),
            "causal_replay_controls": float(self.controls),
            "causal_replay_step_gain": self.step_gain,
            "causal_replay_gain_ema": self.uplift.baseline,
            "causal_replay_horizon_gain": self.horizon_gain,
            "causal_replay_pending_windows": float(len(self._windows)),
            "causal_replay_uplift_best": max(means, default=math.nan),
            "causal_replay_uplift_worst": min(means, default=math.nan),
            "causal_replay_trusted": float(sum(own.is_trusted for own in known)),
            "causal_replay_propensity": self.settings.propensity,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later coins and columns, in plain JSON values."""
        return {
            "buffer": self.buffer.state_dict(),
            "uplift": self.uplift.state_dict(),
            "windows": [asdict(window) for window in self._windows],
            "loss": self.loss,
            "counts": [self.used, self.controls],
            "gains": [self.step_gain, self.horizon_gain],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace buffer, estimates and open coins by the saved ones; the settings stay."""
        self.buffer.load_state_dict(state["buffer"])
        self.uplift.load_state_dict(state["uplift"])
        self._windows = [Window(**saved) for saved in state["windows"]]
        self.loss = state["loss"]
        self.used, self.controls = state["counts"]
        self.step_gain, self.horizon_gain = state["gains"]
        self._base = None
