"""The mix of objectives: floor, best arm found, placebo, one scale of losses, exact state."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import pytest
import torch

from training.rl.auto_mix import MAX_SCALE, AutoMix, balanced_loss, heuristic_shares
from training.rl.objectives import ClipSettings, policy_loss

MODES = ("igrpo", "dispo", "gspo", "cispo")
GAINS = {"igrpo": 0.3, "dispo": 0.0, "gspo": 0.9, "cispo": 0.5}  # true mean gain of each arm
NOISE = 0.6  # standard deviation of one tick's gain
FLOOR = 0.1


def make_mix(**changes) -> AutoMix:
    return AutoMix(MODES, **({"main": "cispo", "floor": FLOOR} | changes))


def simulate(
    seed: int, *, ticks: int, credited: Callable[[random.Random, str, float], float]
) -> tuple[AutoMix, float]:
    """A run on simulated arms; the mix and the mean expected gain of its second half's blends."""
    rng, mix, total = random.Random(seed), make_mix(), 0.0
    for tick in range(ticks):
        arm = mix.draw(rng)
        assert min(mix.weights().values()) >= FLOOR - 1e-12
        assert sum(mix.weights().values()) == pytest.approx(1.0)
        if tick >= ticks // 2:
            total += sum(share * GAINS[mode] for mode, share in mix.weights().items())
        gain = GAINS[arm] + rng.gauss(0.0, NOISE)
        mix.observe(credited(rng, arm, gain))
    return mix, total / (ticks - ticks // 2)


def honest(rng: random.Random, arm: str, gain: float) -> float:
    return gain


def shuffled(rng: random.Random, arm: str, gain: float) -> float:
    """The placebo: a gain of the same distribution, of an arm drawn at random."""
    return GAINS[rng.choice(MODES)] + rng.gauss(0.0, NOISE)


def test_it_finds_the_best_arm_and_shuffled_rewards_find_nothing():
    """20 seeds of 400 ticks; uniform mixing gains 0.425, the best with this floor 0.7."""
    uniform = sum(GAINS.values()) / len(GAINS)
    runs = [simulate(seed, ticks=400, credited=honest) for seed in range(20)]
    placebos = [simulate(seed, ticks=400, credited=shuffled) for seed in range(20)]
    found = [max(mix.weights(), key=mix.weights().__getitem__) for mix, _ in runs]
    assert found.count("gspo") >= 18
    gains = torch.tensor([gain for _, gain in runs]) - uniform
    nothing = torch.tensor([gain for _, gain in placebos]) - uniform
    assert gains.mean() - 3 * gains.std() / 20**0.5 > 0.1
    assert abs(nothing.mean()) < 3 * nothing.std() / 20**0.5
    best = sum(FLOOR * gain for gain in GAINS.values()) + (1 - 4 * FLOOR) * max(GAINS.values())
    assert gains.mean() > 0.5 * (best - uniform)


def test_it_follows_when_another_arm_becomes_the_best():
    rng, mix = random.Random(0), make_mix()
    for tick in range(1200):
        gains = GAINS if tick < 400 else GAINS | {"gspo": 0.0, "dispo": 0.9}
        arm = mix.draw(rng)
        mix.observe(gains[arm] + rng.gauss(0.0, 0.3))
    assert max(mix.weights(), key=mix.weights().__getitem__) == "dispo"


def test_gains_that_are_all_equal_move_nothing():
    rng, mix = random.Random(0), make_mix()
    before = mix.weights()
    for _ in range(100):
        mix.draw(rng)
        assert mix.observe(0.25) == 0.5
    assert mix.weights() == before


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_gains_does_not_matter(scale):
    outcomes = []
    for factor in (1.0, scale):
        rng, mix = random.Random(3), make_mix()
        for _ in range(100):
            arm = mix.draw(rng)
            mix.observe(factor * (GAINS[arm] + rng.gauss(0.0, NOISE)))
        outcomes.append(mix.weights())
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-6)


def test_arms_are_drawn_by_their_weights():
    rng, mix = random.Random(0), make_mix()
    mix.start(mean_reward=0.1, variance=0.05, diversity=0.9)
    counts = dict.fromkeys(MODES, 0)
    for _ in range(20_000):
        counts[mix.draw(rng)] += 1
    for mode, weight in mix.weights().items():
        assert counts[mode] / 20_000 == pytest.approx(weight, abs=0.015)


def test_the_start_follows_the_heuristic_above_the_floor():
    """Low rewards call for exploring (dispo), high ones for exploiting (cispo)."""
    shares = heuristic_shares(mean_reward=0.5, variance=0.2, diversity=0.6)
    raw = {"cispo": 0.33, "igrpo": 0.22, "dispo": 0.3275, "gspo": 0.525}
    assert shares == pytest.approx({k: v / sum(raw.values()) for k, v in raw.items()})
    for reward, best in ((0.02, "dispo"), (0.98, "cispo")):
        mix = make_mix()
        assert set(mix.weights().values()) == {0.25}
        mix.start(mean_reward=reward, variance=0.02, diversity=1.0)
        weights = mix.weights()
        assert max(weights, key=weights.__getitem__) == best
        expected = heuristic_shares(mean_reward=reward, variance=0.02, diversity=1.0)
        assert weights == pytest.approx({m: 0.1 + 0.6 * s for m, s in expected.items()})
        mix.start(mean_reward=0.5, variance=0.2, diversity=0.0)
        assert mix.weights() == weights


def test_a_blend_is_half_weights_half_arm():
    mix = make_mix()
    blend = mix.blend("gspo")
    assert blend == {"igrpo": 0.125, "dispo": 0.125, "gspo": 0.625, "cispo": 0.125}


def test_state_is_exact():
    """Through JSON, between a draw and its gain, with every later number the same."""
    rng, mix = random.Random(1), make_mix()
    mix.start(mean_reward=0.2, variance=0.1, diversity=0.5)
    for _ in range(90):
        arm = mix.draw(rng)
        mix.observe(GAINS[arm] + rng.gauss(0.0, NOISE))
    mix.draw(rng)
    other = make_mix()
    other.load_state_dict(json.loads(json.dumps(mix.state_dict())))
    other_rng = random.Random()
    other_rng.setstate(rng.getstate())
    for _ in range(50):
        gains = [r.gauss(0.3, NOISE) for r in (rng, other_rng)]
        assert mix.observe(gains[0]) == other.observe(gains[1])
        assert mix.weights() == other.weights() and mix.metrics() == other.metrics()
        assert mix.draw(rng) == other.draw(other_rng)
    with pytest.raises(ValueError, match="kept for"):
        AutoMix(MODES[:2], main="igrpo", floor=0.1).load_state_dict(mix.state_dict())


def test_metrics_name_weights_arm_reward_and_entropy():
    mix = make_mix()
    assert mix.metrics()["sigma_rl_mix_arm"] == -1.0
    arm = mix.draw(random.Random(0))
    found = mix.metrics()
    assert found["sigma_rl_mix_arm"] == MODES.index(arm)
    assert set(found) == {
        *(f"sigma_rl_mix_w_{mode}" for mode in MODES),
        "sigma_rl_mix_arm",
        "sigma_rl_mix_reward",
        "sigma_rl_mix_entropy",
    }
    assert found["sigma_rl_mix_entropy"] == pytest.approx(1.3863, abs=1e-4)
    mix.observe(1.0)
    assert mix.metrics()["sigma_rl_mix_arm"] == MODES.index(arm)


def test_a_gain_without_a_draw_is_a_fault():
    with pytest.raises(RuntimeError, match="draw first"):
        make_mix().observe(0.1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"floor": 0.3}, "--sigma-rl-auto-mix-floor"),
        ({"floor": -0.1}, "--sigma-rl-auto-mix-floor"),
        ({"main": "ppo"}, "--sigma-rl-mode"),
    ],
)
def test_a_wrong_setting_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        make_mix(**changes)


def losses_of(log_probs: torch.Tensor, scale: dict[str, float]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    old = log_probs.detach() + 0.1 * torch.randn(log_probs.shape, generator=generator)
    advantages = torch.randn(len(old), generator=generator)
    mask = torch.ones(old.shape, dtype=torch.bool)
    return {
        mode: factor
        * policy_loss(
            mode,
            log_probs=log_probs,
            old_log_probs=old,
            advantages=advantages,
            mask=mask,
            clip=ClipSettings(eps=0.5, dispo=(0.5, 0.5, 0.5, 0.5)),
        ).loss
        for mode, factor in scale.items()
    }


def test_every_loss_enters_with_the_main_ones_gradient_norm():
    """A loss five times smaller or eight times larger acts alike; only the blend decides."""
    shape = (6, 4)
    gradients = []
    for scale in (dict.fromkeys(MODES, 1.0), dict(zip(MODES, (0.2, 8.0, 4.0, 1.0)))):
        log_probs = torch.full(shape, -1.0, requires_grad=True)
        losses = losses_of(log_probs, scale)
        blend = dict(zip(MODES, (0.1, 0.2, 0.3, 0.4)))
        total, norms = balanced_loss(
            losses, log_probs={mode: [log_probs] for mode in MODES}, blend=blend, main="cispo"
        )
        total.backward()
        gradients.append(log_probs.grad)
        expected = torch.zeros(shape)
        for mode, loss in losses_of(log_probs, scale).items():
            (one,) = torch.autograd.grad(loss, log_probs)
            torch.testing.assert_close(norms[mode].float(), one.norm())
            expected += blend[mode] * one / one.norm() * norms["cispo"].float()
        torch.testing.assert_close(log_probs.grad, expected)
    torch.testing.assert_close(*gradients)


def test_a_loss_without_gradient_is_left_out_and_a_tiny_one_stays_bounded():
    log_probs = torch.full((6, 4), -1.0, requires_grad=True)
    losses = losses_of(log_probs, {"cispo": 1.0, "gspo": 1e-4, "dispo": 0.0})
    blend = {"cispo": 0.5, "gspo": 0.3, "dispo": 0.2}
    sources = {mode: [log_probs] for mode in blend}
    total, norms = balanced_loss(losses, log_probs=sources, blend=blend, main="cispo")
    (found,) = torch.autograd.grad(total, log_probs, retain_graph=True)
    (main,) = torch.autograd.grad(losses["cispo"], log_probs, retain_graph=True)
    (tiny,) = torch.autograd.grad(losses["gspo"], log_probs, retain_graph=True)
    torch.testing.assert_close(found, 0.5 * main + 0.3 * MAX_SCALE * tiny)
    # Without a main gradient the others' mean norm sets the scale, and nothing is lost.
    losses = losses_of(log_probs, {"cispo": 0.0, "gspo": 1.0, "dispo": 0.0})
    total, norms = balanced_loss(losses, log_probs=sources, blend=blend, main="cispo")
    (found,) = torch.autograd.grad(total, log_probs)
    torch.testing.assert_close(found.norm(), 0.3 * norms["gspo"].float())
    losses = losses_of(log_probs, dict.fromkeys(blend, 0.0))
    total, _ = balanced_loss(losses, log_probs=sources, blend=blend, main="cispo")
    (found,) = torch.autograd.grad(total, log_probs)
    assert not found.any()
