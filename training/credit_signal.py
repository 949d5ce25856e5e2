"""The signal that is logged beside the credit: loss gain and speed gain, centred. Decides nothing.

It stands apart from the credit so that speed has no way into a factor; a test over the imports
keeps it so.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class CreditSignal:
    """w_loss * loss gain + w_speed * speed gain, clipped, and its deviation from its average.

    The loss gain is the fall of the loss of one probe batch by one update, in nats; the speed gain
    is the average time of a step over that of the last one, less 1.
    """

    loss_weight: float
    speed_weight: float
    beta: float
    clip: float
    now: Callable[[], float] = time.perf_counter
    speed_gain: float = 0.0
    value: float = 0.0
    centred: float = 0.0
    _centre: float = 0.0
    _last: float | None = None
    _mean_seconds: float | None = None

    def tick(self) -> None:
        """A step is over."""
        now = self.now()
        if self._last is not None:
            seconds = max(now - self._last, 1e-9)
            mean = seconds if self._mean_seconds is None else self._mean_seconds
            self.speed_gain = mean / seconds - 1.0
            self._mean_seconds = self.beta * mean + (1.0 - self.beta) * seconds
        self._last = now

    def observe(self, loss_gain: float) -> None:
        """A probe is over."""
        signal = self.loss_weight * loss_gain + self.speed_weight * self.speed_gain
        self.value = min(self.clip, max(-self.clip, signal))
        self.centred = self.value - self._centre
        self._centre += (1.0 - self.beta) * self.centred

    def state_dict(self) -> dict[str, float]:
        """What the next signals are compared with; the speed is measured anew."""
        return {"value": self.value, "centred": self.centred, "centre": self._centre}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.centred, self._centre = (
            state["value"], state["centred"], state["centre"]
        )  # fmt: skip
