"""The token that lets one experiment at a time change how a run is trained.

Two controllers that move the learning rate at once would each credit itself with the other's
effect. Whoever ends an experiment stands last in line, so that experiments alternate; one that
nobody else waits for may begin again at once. What is no experiment but changes the run all the
same (rules, gates, merges) does so at a boundary: while no experiment runs, or in the step after
which one begins.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any


class ExperimentToken:
    """Held from the step after which an experiment begins to the step after which it ends."""

    def __init__(self) -> None:
        self.holder: str | None = None
        self._since = 0
        self._waiting: list[str] = []

    def take(self, name: str, *, step: int) -> bool:
        """Whether `name` holds the token now; if not, it stands in line from here on."""
        if self.holder == name:
            return True
        if name not in self._waiting:
            self._waiting.append(name)
        if self.holder is not None or self._waiting[0] != name:
            return False
        self._waiting.pop(0)
        self.holder, self._since = name, step
        return True

    def give_back(self, name: str) -> None:
        """End the experiment of `name`, or leave the line. RuntimeError for another's."""
        if self.holder == name:
            self.holder = None
        elif name in self._waiting:
            self._waiting.remove(name)
        else:
            raise RuntimeError(f"{name} gives back a token that {self.holder or 'nobody'} holds")

    def is_boundary(self, step: int) -> bool:
        """Whether a change after `step` touches no experiment under way."""
        return self.holder is None or self._since == step

    def state_dict(self) -> dict[str, Any]:
        return {"holder": self.holder, "since": self._since, "waiting": list(self._waiting)}

    def load_state_dict(self, state: dict[str, Any], *, claimants: Container[str]) -> None:
        """Restore; whoever is not among `claimants` any more neither holds it nor waits."""
        self.holder = state["holder"] if state["holder"] in claimants else None
        self._since = state["since"]
        self._waiting = [name for name in state["waiting"] if name in claimants]
