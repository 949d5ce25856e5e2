"""Hydra: one adapter per domain, taught by preferences, gated, and merged.

What each event does is a function of its seed, of the model's weights and of this object's state.
The model itself changes in one place only, a fold that was asked for.

    update   the next domain in turn: sample, judge, make pairs, one step of DPO
    gate     every domain: the present adapter against its best version on the same items
    merge    all domains: one adapter of the same rank, tried on every domain's items

Sources: LoRA 2106.09685; DPO 2305.18290; SamPO 2406.10957; TIES 2306.01708; DARE 2311.03099.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from model.adapters import Adapter, attached, fold
from training.hydra.domain import AdapterSettings, Domain
from training.hydra.dpo import DPOSettings, Pair, pair_gradients
from training.hydra.gate import Decision, GateSettings, Look, compare
from training.hydra.merge import (
    MergeSettings,
    domain_weights,
    factorise,
    merge_products,
)
from training.hydra.pairs import Candidates, make_pairs
from training.hydra.sources import Item, Source
from training.rl.candidates import Tokens
from training.rl.rollout import Rollout, sample

REPLAYED_PAIRS = 2  # per task
MAX_NORM = 1.0
EXAMINED_ROWS = 64  # prompts in one batch of a gate


@dataclass(slots=True, kw_only=True, frozen=True)
class HydraSettings:
    """tasks: per update. candidates: samples of each, plus a greedy one. placebo: "permuted" deals
    the two rewards of a pair out anew. fold: put an accepted merge into the model's weights."""

    tasks: int = 1
    candidates: int = 4
    max_new_tokens: int = 24
    temperature: float = 0.8
    top_k: int = 40
    gate_tasks: int = 200
    placebo: str = "none"
    fold: bool = False
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    dpo: DPOSettings = field(default_factory=DPOSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)


@dataclass(slots=True, kw_only=True)
class Update:
    """What an update did. applied: the adapter's weights changed."""

    applied: bool
    metrics: dict[str, float] = field(default_factory=dict)


class Hydra:
    """The adapters of one model. `sources`: what each domain practises on, by name."""

    def __init__(
        self,
        model: Any,
        tokenizer: Tokens,
        sources: Mapping[str, Source],
        settings: HydraSettings,
        *,
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.sources = dict(sources)
        self.stop_ids = (tokenizer.end_id, *tokenizer.encode("\n"))
        self._autocast, self._seed = autocast, seed
        self.domains = {
            name: Domain(
                model,
                settings.adapter,
                gate=settings.gate,
                seed=random.Random(f"{seed} {name}").getrandbits(62),
            )
            for name in self.sources
        }
        self.merged: dict[str, Any] | None = None  # factors of adapter_hydra_merge
        self.counts = {"updates": 0, "skipped": 0, "rollbacks": 0, "merges": 0}
        self._items: dict[str, list[Item]] = {}

    def gate_items(self, name: str) -> list[Item]:
        """The fixed items of a domain's gate. ValueError when its source has not enough."""
        if name not in self._items:
            wanted = self.settings.gate_tasks
            found = self.sources[name].gate_items(wanted)
            if len(found) < wanted:
                raise ValueError(
                    f"--hydra-gate-tasks {wanted}: {name} has only {len(found)} items for its gate"
                )
            self._items[name] = found
        return self._items[name]

    def update(self, *, seed: int) -> Update:
        """One step of DPO on the next domain; none where no pair has a margin."""
        names = list(self.domains)
        number = self.counts["updates"] % len(names)
        self.counts["updates"] += 1
        name, rng = names[number], random.Random(seed)
        domain, source = self.domains[name], self.sources[name]
        made = self._candidates(source, domain, rng)
        source.observe(made.spread, made.rewards)
        new = make_pairs(made, rng=rng, placebo=self.settings.placebo)
        count = min(REPLAYED_PAIRS * self.settings.tasks, len(domain.pairs))
        pairs = new + rng.sample(domain.pairs, count)
        domain.remember(new)
        applied, loss = self.train_on(domain, pairs, seed=rng.getrandbits(62))
        self.counts["skipped"] += not applied
        return Update(
            applied=applied,
            metrics={
                "hydra_domain_id": float(number),
                "hydra_loss": loss,
                "hydra_train_pairs": float(len(pairs)),
                "hydra_pair_reward_pos": _mean([pair.reward_chosen for pair in pairs]),
                "hydra_pair_reward_neg": _mean([pair.reward_rejected for pair in pairs]),
                "hydra_pair_margin": _mean([pair.margin for pair in pairs]),
                "hydra_candidate_pass_rate": _mean([float(r == 1.0) for r in made.rewards]),
            },
        )

    def _candidates(self, source: Source, domain: Domain, rng: random.Random) -> Candidates:
        """Samples and a greedy completion of new items, by the domain's adapter, with rewards."""
        own = self.settings
        items = [source.draw() for _ in range(own.tasks)]
        prompts = [self._prompt_of(item) for item in items]
        device = self.model.embed.weight.device
        generator = torch.Generator(device).manual_seed(rng.getrandbits(62))
        repeated = [prompt for prompt in prompts for _ in range(own.candidates)]
        with attached(self.model, domain.adapter):
            drawn = self._write(repeated, temperature=own.temperature, generator=generator)
            greedy = self._write(prompts, temperature=0.0, generator=generator)
        said, texts, spread = [], [], []
        rows = (drawn.token_rows(), greedy.token_rows())
        written = (self._texts(drawn), self._texts(greedy))
        for number, item in enumerate(items):
            part = slice(number * own.candidates, (number + 1) * own.candidates)
            said += [*rows[0][part], rows[1][number]]
            texts += [*written[0][part], written[1][number]]
            spread += [item] * (own.candidates + 1)
        return Candidates(
            items=items,
            prompts=prompts,
            said=said,
            spread=spread,
            rewards=source.rewards(spread, texts, rng=rng),
            solutions=[self.tokenizer.encode(item.solution) for item in items],
        )

    def train_on(self, domain: Domain, pairs: Sequence[Pair], *, seed: int) -> tuple[bool, float]:
        """Whether the adapter changed, and the loss on the pairs (not a number without any)."""
        if not pairs:
            return False, math.nan
        before = domain.adapter.digest()
        loss = pair_gradients(
            self.model,
            domain.adapter,
            pairs,
            self.settings.dpo,
            generator=torch.Generator().manual_seed(seed),
            pad_id=self.tokenizer.end_id,
            autocast=self._autocast,
        )
        norm = float(nn.utils.clip_grad_norm_(domain.parameters(), MAX_NORM))
        if math.isfinite(norm):
            domain.optimizer.step()
        domain.optimizer.zero_grad()
        applied = domain.adapter.digest() != before
        domain.version += applied
        return applied, loss

    def gate(self) -> dict[str, Look]:
        """Look at every domain that has changed since its best version, and do what follows."""
        looks = {}
        for name, domain in self.domains.items():
            if domain.version == domain.best.number:
                continue
            current = self.examine(name, domain.adapter)
            look = domain.gate.look(current, self.examine(name, domain.best_adapter()))
            if look.decision is Decision.ROLL_BACK:
                domain.roll_back()
                self.counts["rollbacks"] += 1
            elif look.decision is Decision.PROMOTE:
                domain.keep_as_best()
            looks[name] = look
        return looks

    def examine(self, name: str, adapter: Adapter | None) -> list[bool]:
        """Which gate items of a domain the likeliest completion passes, with an adapter or none."""
        items, texts = self.gate_items(name), []
        generator = torch.Generator(self.model.embed.weight.device)
        with attached(self.model, adapter):
            for first in range(0, len(items), EXAMINED_ROWS):
                part = items[first : first + EXAMINED_ROWS]
                prompts = [self._prompt_of(item) for item in part]
                texts += self._texts(self._write(prompts, temperature=0.0, generator=generator))
        rng = random.Random(f"{self._seed} {name} gate")
        return [reward == 1.0 for reward in self.sources[name].rewards(items, texts, rng=rng)]

    def merge(self, *, seed: int) -> dict[str, Any]:
        """One adapter from all; the record of it, in plain values (see `_record`)."""
        base = {name: self.examine(name, None) for name in self.domains}
        own = {name: self.examine(name, d.adapter) for name, d in self.domains.items()}
        deltas = {name: -compare(own[name], base[name]).drop for name in self.domains}
        weights = domain_weights(deltas)
        merged = merge_products(
            [domain.adapter.products() for domain in self.domains.values()],
            list(weights.values()),
            self.settings.merge,
            generator=torch.Generator().manual_seed(seed),
        )
        before = {name: domain.adapter.digest() for name, domain in self.domains.items()}
        adapter, shares = self.factorised(merged.products)
        self.merged = adapter.state_dict()
        looks = {name: compare(self.examine(name, adapter), base[name]) for name in self.domains}
        folded = self.settings.fold and self._is_sound(looks) and self._fold(adapter, base)
        if folded:
            self.merged = None  # it is in the weights now
        self.counts["merges"] += 1
        return {
            "domains": list(self.domains),
            "score_base": {name: _share(passed) for name, passed in base.items()},
            "score_deltas": deltas,
            "weights": weights,
            "method": self.settings.merge.method,
            "density": self.settings.merge.density,
            "sign_conflict_fraction": merged.conflicts,
            "norm_kept_by_rank": min(shares.values()),
            "adapter_sha256_before": before,
            "adapter_sha256_after": adapter.digest(),
            "gate": {
                name: {"score": look.score, "drop": look.drop, "p_value": look.p_value}
                for name, look in looks.items()
            },
            "folded": folded,
        }

    def factorised(self, products: Mapping[str, torch.Tensor]) -> tuple[Adapter, dict[str, float]]:
        """The products as an adapter, and the share of each one's squared norm that it holds."""
        adapter = next(iter(self.domains.values())).best_adapter()
        shares = {}
        with torch.no_grad():
            for name, layer in adapter.layers.items():
                rank = layer.down.shape[0]
                down, up, shares[name] = factorise(products[name], rank=rank, scale=layer.scale)
                layer.down.copy_(down)
                layer.up.copy_(up)
        return adapter, shares

    def _is_sound(self, looks: Mapping[str, Look]) -> bool:
        """Whether the domains gained in sum and none lost beyond the threshold or beyond chance."""
        own = self.settings.gate
        alpha = own.alpha / len(looks)
        drops = [look.drop for look in looks.values()]
        is_lost = any(look.drop > 0.0 and look.p_value <= alpha for look in looks.values())
        return sum(drops) < 0.0 and max(drops) <= own.threshold and not is_lost

    def _fold(self, adapter: Adapter, base: Mapping[str, list[bool]]) -> bool:
        """Add the merged products to the weights and begin the adapters anew; whether that stands.

        Rounded weights are not those plus the product, so the folded model is looked at as well.
        """
        weights = {
            name: value.clone()
            for name, value in self.model.state_dict().items()
            if name.removesuffix(".weight") in adapter.layers
        }
        fold(self.model, adapter.products())
        looks = {name: compare(self.examine(name, None), base[name]) for name in self.domains}
        if not self._is_sound(looks):
            self.model.load_state_dict(weights, strict=False)
            return False
        for domain in self.domains.values():
            domain.begin_anew()
        return True

    def _prompt_of(self, item: Item) -> list[int]:
        return [self.tokenizer.end_id, *self.tokenizer.encode(item.prompt)]

    def _write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        temperature: float,
        generator: torch.Generator,
    ) -> Rollout:
        own = self.settings
        with self._autocast():
            return sample(
                self.model,
                prompts,
                max_new_tokens=own.max_new_tokens,
                temperature=temperature,
                top_k=own.top_k if temperature else 0,
                generator=generator,
                stop_ids=self.stop_ids,
                pad_id=self.tokenizer.end_id,
            )

    def _texts(self, rollout: Rollout) -> list[str]:
        return rollout.texts(self.tokenizer, stop_ids=self.stop_ids)

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later events, besides the weights and the next seeds."""
        return {
            "domains": {name: domain.state_dict() for name, domain in self.domains.items()},
            "sources": {name: source.state_dict() for name, source in self.sources.items()},
            "merged": dict(self.merged or {}),
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """A domain that is new begins as at a start; one that is gone is forgotten."""
        for name, domain in self.domains.items():
            if name in state["domains"]:
                domain.load_state_dict(state["domains"][name])
                self.sources[name].load_state_dict(state["sources"][name])
        self.merged = {k: v.clone() for k, v in state["merged"].items()} or None
        self.counts = dict(state["counts"])

    def close(self) -> None:
        """Close the sources, whose verifiers hold processes; adapters stay usable."""
        for source in self.sources.values():
            source.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _share(passed: Sequence[bool]) -> float:
    return sum(passed) / len(passed)
