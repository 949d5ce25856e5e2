"""Updates, gates and merges on a tiny model: pairs, placebo, drills, exact state, folds."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from model.adapters import attached
from tests.model.test_adapters import digest_of
from tests.training.hydra.test_sources import task_source, text_source
from tests.training.rl.small_learner import TOKENIZER, AllPass, AsciiFirst, OddBytes, small_model
from training.hydra.domain import DROPPED_PAIRS, AdapterSettings
from training.hydra.dpo import as_rollout
from training.hydra.gate import Decision, compare
from training.hydra.learner import Hydra, HydraSettings
from training.hydra.pairs import Candidates, make_pairs
from training.hydra.sources import Item
from training.rl.rollout import completion_log_probs

SETTINGS = HydraSettings(
    tasks=4,
    max_new_tokens=3,
    temperature=1.0,
    top_k=0,
    gate_tasks=24,
    adapter=AdapterSettings(rank=4, alpha=8.0, lr=1e-2),
)


def make_hydra(model=None, *, verifier=None, domains=("math", "text"), **settings):
    sources = {"math": task_source(verifier=verifier or OddBytes()), "text": text_source()}
    return Hydra(
        model or small_model(),
        TOKENIZER,
        {name: sources[name] for name in domains},
        replace(SETTINGS, **settings),
        seed=3,
    )


def run(hydra, count, *, first=0):
    return [hydra.update(seed=100 + number) for number in range(first, first + count)]


def candidates(rewards, *, solution_reward=1.0):
    """Of two items, three candidates each, that say 1, 2, 3 and 4, 5, 6; the solution is 9."""
    items = [Item(prompt=p, solution="s", solution_reward=solution_reward, task=None) for p in "ab"]
    return Candidates(
        items=items,
        prompts=[[1], [2]],
        said=[[n] for n in range(1, 7)],
        spread=[item for item in items for _ in range(3)],
        rewards=rewards,
        solutions=[[9], [9]],
    )


def pairs_of(made, **options):
    return [
        (pair.prompt[0], pair.chosen[0], pair.rejected[0], round(pair.margin, 9))
        for pair in make_pairs(made, rng=random.Random(0), **options)
    ]


def test_the_best_is_preferred_to_the_worst_and_the_solution_to_a_failure():
    assert pairs_of(candidates([0, 1, 0, 1, 0, 0])) == [
        (1, 2, 1, 1.0), (1, 9, 1, 1.0), (2, 4, 5, 1.0), (2, 9, 5, 1.0)
    ]  # fmt: skip
    assert pairs_of(candidates([0, 0, 0, 0.1, 0.2, 0.1], solution_reward=0.2)) == [
        (1, 9, 1, 0.2), (2, 5, 4, 0.1), (2, 9, 4, 0.1)
    ]  # fmt: skip
    assert pairs_of(candidates([1] * 6)) == []


def test_the_placebo_has_the_same_pairs_either_way_round():
    made = candidates([0, 1, 0, 0, 0, 0])
    counts = Counter(
        (pair.chosen[0], pair.rejected[0])
        for seed in range(200)
        for pair in make_pairs(made, rng=random.Random(seed), placebo="permuted")
    )
    assert set(counts) == {(2, 1), (1, 2), (9, 1), (1, 9), (9, 4), (4, 9)}
    assert all(60 < count < 140 for count in counts.values())  # 5 standard deviations


def test_domains_take_turns_and_only_their_own_adapter_changes():
    hydra = make_hydra()
    before = {name: domain.adapter.digest() for name, domain in hydra.domains.items()}
    digest = digest_of(hydra.model)
    first = hydra.update(seed=1)
    assert first.applied and first.metrics["hydra_domain_id"] == 0.0
    assert hydra.domains["math"].adapter.digest() != before["math"]
    assert hydra.domains["text"].adapter.digest() == before["text"]
    second = hydra.update(seed=2)
    assert second.metrics["hydra_domain_id"] == 1.0
    assert hydra.domains["text"].adapter.digest() != before["text"]
    assert digest_of(hydra.model) == digest
    assert first.metrics["hydra_pair_margin"] > 0.0 and first.metrics["hydra_train_pairs"] >= 4


def test_equal_rewards_train_nothing(monkeypatch):
    hydra = make_hydra(verifier=AllPass(), domains=("math",))
    before = hydra.domains["math"].adapter.digest()
    update = hydra.update(seed=1)
    assert not update.applied and update.metrics["hydra_train_pairs"] == 0.0
    assert hydra.domains["math"].adapter.digest() == before
    assert hydra.domains["math"].version == 0 and hydra.counts["skipped"] == 1


def test_steps_on_the_same_pairs_make_the_chosen_ones_likelier():
    """Against the model without an adapter, in nearly all pairs; swapped pairs the other way."""
    shares = {}
    for placebo in (False, True):
        hydra = make_hydra(able_model(8.0), domains=("math",), tasks=8)
        domain = hydra.domains["math"]
        run(hydra, 1)
        pairs = list(domain.pairs)
        trained = [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]
        losses = [
            hydra.train_on(domain, trained if placebo else pairs, seed=n)[1] for n in range(25)
        ]
        assert losses[-1] < 0.5 < losses[0]
        shares[placebo] = share_preferred(hydra, pairs)
    assert shares[False] > 0.9 and shares[True] < 0.1


def able_model(size: float = 20.0):
    """One whose head tells tokens apart, so that an adapter has something to turn."""
    model = small_model()
    with torch.no_grad():
        model.embed.weight.mul_(size)
    return model


@torch.no_grad()
def share_preferred(hydra, pairs):
    """Share of the pairs whose chosen half gained more log-probability than the other."""
    rollout = as_rollout(pairs, device=torch.device("cpu"), pad_id=TOKENIZER.end_id)
    before, _ = completion_log_probs(hydra.model, rollout)
    with attached(hydra.model, hydra.domains["math"].adapter):
        after, _ = completion_log_probs(hydra.model, rollout)
    gains = (after - before).sum(1).view(2, -1)
    return float((gains[0] > gains[1]).double().mean())


def test_earlier_pairs_come_again():
    hydra = make_hydra(domains=("math",))
    counts = [update.metrics["hydra_train_pairs"] for update in run(hydra, 3)]
    assert len(hydra.domains["math"].pairs) == counts[0] + counts[1] + counts[2] - 16 >= 9


def test_a_forced_regression_is_undone_to_the_exact_hash():
    """Drill: spoil an adapter that was good, and the next gate restores factors and moments."""
    hydra = make_hydra(able_model(), verifier=AsciiFirst(), domains=("math",), gate_tasks=60)
    domain = hydra.domains["math"]
    run(hydra, 3)
    domain.keep_as_best()
    promoted = (domain.adapter.digest(), moments_of(domain), domain.version)
    run(hydra, 2, first=3)
    pairs = list(domain.pairs)
    with torch.no_grad():
        for layer in domain.adapter.layers.values():
            layer.up.normal_(std=30.0, generator=torch.Generator().manual_seed(1))
    assert domain.adapter.digest() != promoted[0]
    look = hydra.gate()["math"]
    assert look.decision is Decision.ROLL_BACK and look.drop > 0.1
    assert (domain.adapter.digest(), moments_of(domain), domain.version) == promoted
    assert domain.pairs == pairs[:-DROPPED_PAIRS] and hydra.counts["rollbacks"] == 1
    assert hydra.gate() == {}  # what has not changed since is not looked at again


def moments_of(domain):
    return {
        (name, key): value.tolist()
        for name, state in domain.optimizer.state_dict().items()
        for key, value in state.items()
    }


@pytest.mark.parametrize("at", [1, 2, 5])
def test_restored_from_its_state_it_goes_on_to_the_bit(at):
    def finish(hydra, start):
        run(hydra, 6 - start, first=start)
        hydra.gate()
        record = hydra.merge(seed=5)
        return record, {n: (d.adapter.digest(), moments_of(d)) for n, d in hydra.domains.items()}

    whole = make_hydra()
    run(whole, at)
    state = whole.state_dict()
    expected = finish(whole, at)
    again = make_hydra()
    run(again, 1)  # has a state of its own, of which nothing may be left
    again.load_state_dict(state)
    assert finish(again, at) == expected


def test_a_merge_is_one_adapter_of_the_same_rank_with_weights_by_gain():
    hydra = make_hydra()
    run(hydra, 4)
    record = hydra.merge(seed=5)
    assert hydra.merged is not None
    assert all(v.shape[0] == 4 for n, v in hydra.merged.items() if n.endswith(".down"))
    assert set(record["weights"]) == {"math", "text"}
    assert 0.0 < record["sign_conflict_fraction"] < 1.0
    assert 0.0 < record["norm_kept_by_rank"] <= 1.0
    assert record["folded"] is False


@pytest.mark.parametrize(
    ("gained", "lost", "is_sound"),
    [
        ({"math": 12}, {"text": 2}, True),
        ({}, {}, False),  # nothing is shown
        ({"math": 4}, {"math": 12}, False),  # p = 0.077: not beyond chance, and lost all the same
        ({"math": 12}, {"text": 3}, False),  # 0.015, over the threshold of 0.01
    ],
)
def test_a_fold_needs_a_gain_and_no_domain_that_lost(gained, lost, is_sound):
    def look(name):
        base = [True] * 100 + [False] * 100
        now = list(base)
        now[: lost.get(name, 0)] = [False] * lost.get(name, 0)
        now[100 : 100 + gained.get(name, 0)] = [True] * gained.get(name, 0)
        return compare(now, base)

    assert make_hydra()._is_sound({name: look(name) for name in ("math", "text")}) is is_sound


def test_a_fold_that_costs_a_domain_is_taken_back_to_the_bit(monkeypatch):
    hydra = make_hydra(fold=True)
    run(hydra, 4)
    before = digest_of(hydra.model)
    sound = iter([True, False])
    monkeypatch.setattr(Hydra, "_is_sound", lambda self, looks: next(sound))
    adapters = {name: domain.adapter.digest() for name, domain in hydra.domains.items()}
    assert hydra.merge(seed=5)["folded"] is False
    assert digest_of(hydra.model) == before
    assert {n: d.adapter.digest() for n, d in hydra.domains.items()} == adapters
    monkeypatch.undo()
    monkeypatch.setattr(Hydra, "_is_sound", lambda self, looks: True)
    assert hydra.merge(seed=5)["folded"] is True
    assert digest_of(hydra.model) != before
    assert all(not d.adapter.products()[n].any() for d in hydra.domains.values()
               for n in d.adapter.layers)  # fmt: skip


def test_a_gate_without_enough_items_is_refused():
    with pytest.raises(ValueError, match="--hydra-gate-tasks 2000: text has only"):
        make_hydra(domains=("text",), gate_tasks=2000).gate_items("text")
