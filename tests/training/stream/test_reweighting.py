"""Factors against planted sources: noise, a hard one that can be learned, one that is known."""

import math

import numpy as np
import pytest
import torch

from training.stream.reweighting import SourceFactors

NOISE, HARD, EASY = 1, 2, 3


def losses_at(step, generator, *, weights):
    """Loss curves of three kinds of text; what a source teaches depends on how often it comes.

    Noise stays at its entropy, the easy source is at its floor soon, the hard one falls slowly.
    """
    jitter = generator.normal(0.0, 0.02, 3)
    return {
        NOISE: 8.0 + jitter[0],
        HARD: 2.0 + 5.0 * math.exp(-weights[HARD] / 400.0) + jitter[1],
        EASY: 1.5 + 3.0 * math.exp(-weights[EASY] / 30.0) + jitter[2],
    }


def play(signal, *, seed=0, updates=60, shuffled=False, reference=None):
    """Factors after each update of a run in which exposure follows the factors."""
    generator = np.random.default_rng(seed)
    shuffle = torch.Generator().manual_seed(seed) if shuffled else None
    factors = SourceFactors(signal=signal)
    current = dict.fromkeys((NOISE, HARD, EASY), 1.0)
    exposure = dict.fromkeys(current, 0.0)
    history = []
    for step in range(updates):
        for _ in range(8):
            total = sum(current.values())
            for source, factor in current.items():
                exposure[source] += factor / total
            for source, loss in losses_at(step, generator, weights=exposure).items():
                factors.observe(source, loss, reference=(reference or {}).get(source))
        current = dict(factors.update(shuffle=shuffle))
        history.append(current)
    return history


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("signal", ["progress", "excess"])
def test_noise_does_not_take_over_and_a_hard_learnable_source_gains(signal, seed):
    reference = {NOISE: 8.0, HARD: 2.0, EASY: 1.5}
    late = play(signal, seed=seed, reference=reference)[-20:]
    mean = {source: np.mean([row[source] for row in late]) for source in (NOISE, HARD, EASY)}
    assert mean[HARD] > 1.6
    assert mean[NOISE] < 0.8 and mean[EASY] < 0.95


def test_raw_loss_rewards_noise():
    """Negative control, and what `raw` is: monotone in the loss."""
    late = play("raw")[-1]
    assert late[NOISE] > late[HARD] > late[EASY]
    assert late[NOISE] > 1.5


@pytest.mark.parametrize("signal", ["progress", "excess"])
def test_shuffled_signals_gain_nothing(signal):
    """Placebo: over seeds no source is preferred by more than chance, and the hard one no more
    than the noise."""
    reference = {NOISE: 8.0, HARD: 2.0, EASY: 1.5}
    gains = []
    for seed in range(12):
        late = play(signal, seed=seed, shuffled=True, reference=reference)[-20:]
        gains.append(np.mean([row[HARD] - row[NOISE] for row in late]))
    real = play(signal, seed=0, reference=reference)[-20:]
    effect = np.mean([row[HARD] - row[NOISE] for row in real])
    error = np.std(gains, ddof=1) / math.sqrt(len(gains))
    assert abs(np.mean(gains)) < 3 * error + 0.05
    assert effect > np.mean(gains) + 5 * error


def test_one_update_is_the_formula():
    factors = SourceFactors(signal="raw", smoothing=0.9, least=0.5, most=3.0)
    for source, loss in ((1, 1.0), (2, 2.0), (3, 30.0)):
        factors.observe(source, loss)
    expected = {1: 0.9 + 0.1 * 0.5, 2: 0.9 + 0.1 * 0.5, 3: 0.9 + 0.1 * 30 / 11}
    assert factors.update() == {key: pytest.approx(value) for key, value in expected.items()}


@pytest.mark.parametrize("signal", ["progress", "excess", "raw"])
def test_factors_stay_within_the_clamps(signal):
    generator = np.random.default_rng(4)
    factors = SourceFactors(signal=signal, smoothing=0.0, least=0.5, most=3.0)
    for _ in range(200):
        for source in range(5):
            factors.observe(
                source, float(generator.uniform(0, 20)), reference=float(generator.uniform(0, 20))
            )
        assert all(0.5 <= value <= 3.0 for value in factors.update().values())


def test_without_any_signal_the_asked_weights_return():
    factors = SourceFactors(signal="progress", smoothing=0.5)
    assert factors.update() == {}
    for _ in range(50):
        factors.observe(1, 2.0)
        factors.observe(2, 2.0)
    factors.update()
    assert all(value == pytest.approx(1.0) for value in factors.update().values())


def test_the_state_continues_the_factors():
    first, second = SourceFactors(), SourceFactors()
    generator = np.random.default_rng(1)
    values = generator.uniform(1, 5, (60, 2)).tolist()
    for number, (a, b) in enumerate(values):
        for target in (first, second):
            target.observe(1, a)
            target.observe(2, b)
        if number % 10 == 9:
            first.update(), second.update()
            restored = SourceFactors()
            restored.load_state_dict(second.state_dict())
            second = restored
    assert first.factors == second.factors and first.signals == second.signals


@pytest.mark.parametrize("signal", ["progress", "excess", "raw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_leave_no_trace(signal, bad):
    factors, sound = SourceFactors(signal=signal), SourceFactors(signal=signal)
    for loss in (3.0, 2.0, 1.5):
        for source in (1, 2):
            factors.observe(source, bad, reference=1.0)
            for target in (factors, sound):
                target.observe(source, loss * source, reference=1.0)
    factors.observe(3, bad)
    assert factors.update() == sound.update() and factors.losses == sound.losses
    factors.observe(1, 1.0, reference=bad)
    assert all(math.isfinite(value) for value in factors.update().values())
