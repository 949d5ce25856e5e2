"""The adapter of one domain with everything that follows it: optimizer, best version, pairs."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.adapters import Adapter
from training.fork import copy_state
from training.hydra.dpo import Pair
from training.hydra.gate import GateSettings, PairedGate
from training.optim.adamw import AdamW
from training.optimizer import OptimizerSet

BETAS = (0.9, 0.999)
MAX_PAIRS = 256
DROPPED_PAIRS = 8  # the newest, when a version is undone


@dataclass(slots=True, kw_only=True, frozen=True)
class AdapterSettings:
    """An adapter adds B A alpha / rank to a weight; lr: of its AdamW."""

    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-4


@dataclass(slots=True, kw_only=True)
class Version:
    """A version of an adapter: its number, and factors and moments that nothing shares."""

    number: int
    factors: dict[str, Tensor]
    moments: dict[str, Any]


class Domain:
    """One domain's adapter. `version` counts its steps; undoing one brings its number back too."""

    def __init__(
        self, model: Any, settings: AdapterSettings, *, gate: GateSettings, seed: int
    ) -> None:
        self._model, self._settings, self._seed = model, settings, seed
        self.gate = PairedGate(gate)
        self.pairs: list[Pair] = []
        self.version = 0
        self.begin_anew()

    def begin_anew(self) -> None:
        """An adapter that adds nothing, with a fresh optimizer; it is the best version."""
        own = self._settings
        generator = torch.Generator().manual_seed(self._seed)
        self.adapter = Adapter.create(
            self._model, rank=own.rank, alpha=own.alpha, generator=generator
        )
        named = list(self.adapter.named_parameters())
        group = {
            "params": [value for _, value in named],
            "param_names": [name for name, _ in named],
        }
        self.optimizer = OptimizerSet([AdamW([group], lr=own.lr, betas=BETAS, weight_decay=0.0)])
        self.keep_as_best()
        self.gate.num_looks = 0

    def parameters(self) -> list[Tensor]:
        """The factors of the present adapter, which `begin_anew` replaces by others."""
        return [value for _, value in self.adapter.named_parameters()]

    def keep_as_best(self) -> None:
        """Make the present version the one that `roll_back` returns to."""
        self.best = self.snapshot()

    def snapshot(self) -> Version:
        """A copy of factors and moments, for `restore`."""
        return Version(
            number=self.version,
            factors=self.adapter.state_dict(),
            moments=copy.deepcopy(self.optimizer.state_dict()),
        )

    def restore(self, version: Version) -> None:
        """Back to a version: factors, moments and number, to the bit."""
        self.adapter.load_state_dict(version.factors)
        self.optimizer.load_state_dict(copy.deepcopy(version.moments))
        self.version = version.number

    def roll_back(self) -> None:
        """Back to the best version, without the pairs that led away from it last."""
        self.restore(self.best)
        del self.pairs[-DROPPED_PAIRS:]

    def best_adapter(self) -> Adapter:
        """The best version as an adapter of its own."""
        adapter = copy.deepcopy(self.adapter)
        adapter.load_state_dict(self.best.factors)
        return adapter

    def remember(self, pairs: list[Pair]) -> None:
        """Add preference pairs; of more than MAX_PAIRS the oldest are dropped."""
        self.pairs = (self.pairs + pairs)[-MAX_PAIRS:]

    def state_dict(self) -> dict[str, Any]:
        """Present and best version, the gate's looks, and the pairs as plain lists."""
        return {
            "now": _written(self.snapshot()),
            "best": _written(self.best),
            "looks": self.gate.num_looks,
            "pairs": [
                [list(p.prompt), list(p.chosen), list(p.rejected), p.reward_chosen,
                 p.reward_rejected]
                for p in self.pairs
            ],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError for adapters of another network or rank."""
        self.restore(_read(state["now"]))
        self.best = _read(state["best"])
        self.gate.num_looks = state["looks"]
        self.pairs = [
            Pair(
                prompt=tuple(prompt),
                chosen=tuple(chosen),
                rejected=tuple(rejected),
                reward_chosen=won,
                reward_rejected=lost,
            )
            for prompt, chosen, rejected, won, lost in state["pairs"]
        ]


def _written(version: Version) -> dict[str, Any]:
    return {"number": version.number, "factors": version.factors, "moments": version.moments}


def _read(state: dict[str, Any]) -> Version:
    own = copy_state(state)  # what was loaded is not ours to change
    return Version(number=own["number"], factors=own["factors"], moments=own["moments"])
