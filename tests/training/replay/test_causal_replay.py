"""Coins, windows and admission, without a trainer."""

import math
import random

import pytest

from tests.training.replay.test_buffer import REFERENCES
from tests.training.rl.small_learner import OddBytes, seeds, small_learner
from training.replay.buffer import ReplayBuffer
from training.replay.causal_replay import CausalReplay, Coin, ReplaySettings
from training.rl.passed import Passed
from training.rl.tasks import TaskSampler

HEADS = Coin(item=REFERENCES[0], heads=True, weight=1.0)


def replay_of(*, items=REFERENCES, **settings):
    buffer = ReplayBuffer(capacity=64)
    for item in items:
        buffer.admit(item)
    return CausalReplay(ReplaySettings(**settings), buffer)


def flips(replay, *, row_tokens, count):
    """Coins of many seeds, none of which is missing."""
    coins = [replay.flip(seed=seed, row_tokens=row_tokens) for seed in range(count)]
    assert None not in coins
    return [coin for coin in coins if coin is not None]


def teach(replay, *, good, bad):
    """Windows after which one cluster is known to help and another to harm."""
    for number in range(60):
        heads = number % 2 == 0
        for cluster, effect in ((good, 1.0), (bad, -1.0)):
            outcome = effect * heads + 0.1 * (number % 3)
            replay.uplift.observe(cluster, outcome, heads=heads, propensity=0.5, baseline=0.0)


def test_a_coin_is_a_function_of_its_seed_and_falls_as_often_as_it_should():
    replay = replay_of(propensity=0.3)
    coins = flips(replay, row_tokens=1000, count=2000)
    assert coins == flips(replay, row_tokens=1000, count=2000)
    assert sum(coin.heads for coin in coins) / 2000 == pytest.approx(0.3, abs=0.04)
    assert len({coin.item.digest for coin in coins}) == len(REFERENCES)
    assert max(coin.weight for coin in coins) == pytest.approx(1.0)


def test_items_that_fill_a_row_are_not_drawn():
    replay = replay_of()
    sizes = sorted({len(item.tokens) for item in REFERENCES})
    drawn = flips(replay, row_tokens=sizes[1], count=50)
    assert {len(coin.item.tokens) for coin in drawn} == {sizes[0]}
    assert replay.flip(seed=1, row_tokens=sizes[0]) is None


def test_what_helped_is_drawn_more_often_and_alpha_says_how_much():
    shares = {}
    for alpha, shuffled in ((0.0, False), (0.5, False), (0.5, True)):
        replay = replay_of(alpha=alpha, is_shuffled=shuffled)
        clusters = sorted({item.cluster for item in REFERENCES})
        good, bad = clusters[0], clusters[1]
        teach(replay, good=good, bad=bad)
        chances = dict.fromkeys(clusters, 0.0)
        for seed in range(40):
            found, places = replay._chances(seed=seed, row_tokens=1000)
            for chance, place in zip(found, places, strict=True):
                chances[replay.buffer.items[place].cluster] += chance / 40
        shares[alpha, shuffled] = chances[good], chances[bad]
    plain, turned, dealt = shares.values()
    assert turned[0] > 1.2 * plain[0] and turned[1] < 0.8 * plain[1]
    assert dealt == pytest.approx(plain, rel=0.15)  # the placebo knows nothing


def test_an_outcome_is_the_decayed_fall_of_the_probe_loss_from_before_the_step():
    replay = replay_of(horizon=3, decay=0.5)
    losses = [5.0, 4.0, 3.5, 3.0, 2.0]
    replay.finish_step(losses[0], coin=None)
    replay.finish_step(losses[1], coin=HEADS)
    for loss in losses[2:4]:
        assert math.isnan(replay.horizon_gain)
        replay.finish_step(loss, coin=None)
    assert replay.horizon_gain == 1.0 + 0.5 * 0.5 + 0.25 * 0.5
    own = replay.uplift.clusters[HEADS.item.cluster]
    assert own.mean == 2.0 * replay.horizon_gain  # the baseline was 0, the propensity one half
    assert replay.metrics()["causal_replay_pending_windows"] == 0.0
    replay.finish_step(losses[4], coin=None)
    assert replay.step_gain == 1.0 and own.count == 1


def test_a_probe_that_is_not_finite_drops_the_open_windows():
    replay = replay_of(horizon=2)
    for loss in (5.0, 4.0, math.nan, 3.0, 2.0, 1.0):
        coin = HEADS if loss == 4.0 else None
        replay.finish_step(loss, coin=coin)
    assert replay.uplift.clusters == {} and replay.loss == 1.0


def passed(task, *, confidence=1.0, text="7\n"):
    return Passed(
        task=task,
        prompt=[0, 5],
        completion=[6, 7],
        text=text,
        share=0.25,
        confidence=confidence,
        mean_log_prob=-0.5,
    )


def test_admission_asks_for_confidence_and_the_bias_lowers_it():
    sampler = TaskSampler(("multiply",), seed=4)
    tasks = list({task.prompt: task for task in (sampler.draw() for _ in range(20))}.values())[:4]
    found = [passed(t, confidence=c) for t, c in zip(tasks, (0.15, 0.2, 0.25, 0.4), strict=True)]
    sizes = []
    for bias in (1.0, 2.0, 0.6):
        replay = replay_of(items=(), least_confidence=0.20)
        replay.admit(found, step=3, bias=bias)
        sizes.append(len(replay.buffer))
    assert sizes == [3, 4, 1]
    newest = replay.buffer.items[-1]
    assert (newest.step, newest.share, newest.mean_log_prob) == (3, 0.25, -0.5)
    assert newest.cluster.endswith("/rare")


def test_a_tick_hands_over_what_passed_and_nothing_else():
    verifier = OddBytes()
    learner = small_learner(verifier=verifier)
    seen = 0
    for seed in seeds(6):
        made = learner.tick(seed=seed)
        for found in made.passed:
            seen += 1
            assert verifier.passes(found.text)
            assert learner.maker.prompt_of(found.task) == found.prompt
            said = learner.maker.tokenizer.decode(found.completion)
            assert said.startswith(found.text) and len(said) <= len(found.text) + 1
            assert 0.0 < found.share <= 1.0 and 0.0 <= found.confidence <= 1.0
            assert found.mean_log_prob is not None and found.mean_log_prob < 0.0
    assert seen > 6


def test_the_state_is_exact():
    replay, again = replay_of(), replay_of(items=REFERENCES[:3])
    draw = random.Random(1)

    def advance(own, loss, seed):
        coin = own.flip(seed=seed, row_tokens=100) if own.loss is not None else None
        own.finish_step(loss, coin=coin)

    for number in range(40):
        advance(replay, 5.0 - 0.1 * number + draw.random(), number)
    again.load_state_dict(replay.state_dict())
    for number in range(40, 60):
        loss = draw.random()
        advance(replay, loss, number)
        advance(again, loss, number)
    assert repr(again.state_dict()) == repr(replay.state_dict())
    assert repr(again.metrics()) == repr(replay.metrics())
