"""The search on planted landscapes: against random search, against a placebo, stopped anywhere."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics

import pytest

from evolution.fractal_nas import (
    Candidate,
    Cost,
    FractalSearch,
    SearchSettings,
    dominates,
    pareto_front,
)
from evolution.genome import KEEP, Genome, Letter, Mutation
from tests.evolution.landscape import BASE, Landscape

BUDGET = 6e11
SEEDS = range(5)


def make_search(seed: int, *, inherit: bool = True, **landscape) -> FractalSearch:
    settings = SearchSettings(budget=BUDGET, seed=seed, inherit=inherit)
    return FractalSearch(settings, BASE, Landscape(seed, **landscape))


def finished(seed: int, **options) -> FractalSearch:
    search = make_search(seed, **options)
    while not search.finished:
        search.advance()
    return search


def quality(search: FractalSearch) -> float:
    """The loss that the genome found would end at, which the search has never seen."""
    return search._nursery.floor(search.best().genome)  # type: ignore[attr-defined]


def test_it_beats_random_search_at_equal_compute_on_every_seed():
    for seed in SEEDS:
        ours, theirs = finished(seed), finished(seed, inherit=False)
        assert ours.spent == pytest.approx(BUDGET) == pytest.approx(theirs.spent)
        assert ours.trials == theirs.trials
        assert ours.best().loss < theirs.best().loss
        assert quality(ours) <= quality(theirs)


def test_mutations_lead_to_better_genomes_even_where_nothing_is_inherited():
    pairs = [
        (quality(finished(seed, inherits=False)), quality(finished(seed, inherit=False)))
        for seed in range(20)
    ]
    gains = [theirs - ours for ours, theirs in pairs]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    assert statistics.fmean(gains) > 2.0 * error


def test_where_parents_say_nothing_it_is_no_better_than_random():
    """The placebo: floors drawn for each genome alone, nothing inherited."""
    gains = [
        quality(finished(seed, inherit=False, placebo=True))
        - quality(finished(seed, placebo=True, inherits=False))
        for seed in range(40)
    ]
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    assert statistics.fmean(gains) < 2.0 * error


def test_a_stopped_search_ends_as_an_unbroken_one():
    whole = finished(3)
    expected = json.dumps(whole.state_dict())
    search = make_search(3)
    landscape = search._nursery
    while not search.finished:
        search.advance()
        state = json.loads(json.dumps(search.state_dict()))
        search = FractalSearch(search.settings, BASE, landscape)
        search.load_state_dict(state)
    assert json.dumps(search.state_dict()) == expected


def test_another_searchs_state_is_refused():
    state = finished(1).state_dict()
    with pytest.raises(ValueError, match="other settings"):
        make_search(2).load_state_dict(state)


def test_every_rung_costs_the_same_and_halves_the_cohort():
    search = make_search(0)
    sizes, spent = [], []
    for _ in range(2 * 15):
        if search.rung_closed:
            sizes.append(len(search.cohort) or search.settings.cohort)
            spent.append(search.spent)
        search.advance()
    assert sizes == [8, 4, 2, 1, 8, 4, 2, 1]
    steps = [after - before for before, after in itertools.pairwise(spent)]
    assert steps == pytest.approx([BUDGET / 24] * len(steps))


def test_a_later_cohort_holds_the_best_as_it_is_and_no_genome_twice():
    search = make_search(0)
    while search.generation < 3:
        search.advance()
    best = search.best()
    search.advance()
    cohort = [search.archive[number] for number in search.cohort]
    assert (cohort[0].parent, cohort[0].mutation.what) == (best.number, KEEP)
    assert cohort[0].genome == best.genome
    genomes = [candidate.genome for candidate in cohort]
    assert len(set(genomes)) == len(genomes) == 8
    for candidate in cohort[1:]:
        parent = search.archive[candidate.parent]
        assert candidate.genome == parent.genome.mutated(candidate.mutation) != parent.genome
    alive = set(search._nursery.living)  # type: ignore[attr-defined]
    assert alive == set(search.cohort) | set(search.population)
    assert len(search.population) <= search.settings.population + 1


def test_a_loss_that_is_not_finite_ends_a_candidate():
    search = make_search(0)
    train = search._nursery.train
    broken = {0, 1, 2}

    def failing(number: int, *, flops: float):
        loss, spent = train(number, flops=flops)
        return (math.nan if number in broken else loss), spent

    search._nursery.train = failing  # type: ignore[method-assign]
    while not search.finished:
        search.advance()
    assert all(search.archive[number].trials == 1 for number in broken)
    assert math.isfinite(search.best().loss)


def test_the_pareto_front_is_what_brute_force_finds():
    rng = random.Random(0)
    mutation, genome = Mutation(what=KEEP), Genome(scales=(Letter(kind="mamba"),))
    candidates = [
        Candidate(
            number=number,
            generation=0,
            genome=genome,
            mutation=mutation,
            loss=math.inf if number % 17 == 0 else float(rng.randint(1, 9)),
            cost=Cost(flops=rng.randint(1, 9), bytes=rng.randint(1, 9)),
        )
        for number in range(120)
    ]
    front = pareto_front(candidates)
    points = {(c.loss, c.cost.bytes, c.cost.flops) for c in front}
    assert len(points) == len(front) > 1
    for candidate in candidates:
        point = (candidate.loss, candidate.cost.bytes, candidate.cost.flops)
        beaten = any(dominates(other, candidate) for other in candidates)
        assert (point in points) == (math.isfinite(candidate.loss) and not beaten)


@pytest.mark.parametrize("cohort", [0, 1, 3, 6])
def test_a_cohort_that_cannot_be_halved_is_refused(cohort):
    settings = SearchSettings(budget=1.0, seed=0, cohort=cohort)
    with pytest.raises(ValueError, match="power of two"):
        FractalSearch(settings, BASE, Landscape(0))
