"""When something that comes every so many steps is due, and when it may happen."""

from __future__ import annotations


class EventClock:
    """Due at every multiple of `interval` steps, 0 = never; waits where it is not allowed to act.

    Each event has a clock of its own: one that stood inside another's branch would come at common
    multiples only. `waiting` is the whole state.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.waiting = False

    def is_due(self, step: int, *, allowed: bool = True) -> bool:
        """Whether the event happens after `step`; asked once after every step."""
        self.waiting = self.waiting or (self.interval > 0 and step % self.interval == 0)
        due = self.waiting and allowed
        self.waiting = self.waiting and not due
        return due
