"""Circuit breaker: how long a failing source is left alone (Nygard, Release It!, 2007).

After `threshold` failures in a row a source is not asked again before a pause, which doubles with
every further failure up to a bound; the one attempt after a pause decides. Pauses only delay: what
a source delivers does not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
RETRY_S = 0.1  # between the failures below the threshold


@dataclass(slots=True, kw_only=True)
class CircuitBreaker:
    """trips: how often the circuit opened."""

    threshold: int = 3
    failures: int = 0
    trips: int = 0
    _closed_at: float = 0.0

    def wait_s(self, now: float) -> float:
        """Seconds before the source may be asked again; 0 = now."""
        return max(0.0, self._closed_at - now)

    @property
    def is_open(self) -> bool:
        return self.failures >= self.threshold

    def fail(self, now: float) -> None:
        """Count a failure at `now`, in seconds of any steady clock: the one that `wait_s` is asked
        with."""
        self.failures += 1
        if not self.is_open:
            self._closed_at = now + RETRY_S
            return
        self.trips += 1
        doubled = FIRST_PAUSE_S * 2.0 ** min(32, self.failures - self.threshold)
        self._closed_at = now + min(LONGEST_PAUSE_S, doubled)

    def succeed(self) -> None:
        """Close the circuit at once, however long the pause would have been; `trips` stays."""
        self.failures = 0
        self._closed_at = 0.0
