"""Which objective to follow: a bandit over the objectives, and one scale for their losses.

EXP3 with a floor: w = floor + (1 - K floor) softmax(S). Each tick draws an arm m ~ w and trains on
the blend v = w / 2 + onehot(m) / 2; what the tick gained on held-out tasks per 1,000 generated
tokens becomes the arm's reward and moves S_m by lr (r - 1/2) / w_m. Tokens stand for seconds, so
that a run can be repeated.

Decisions. (1) Gains have no natural scale: r is where a gain lies between the 10th and the 90th
percentile of the last 64, cut to [0, 1]. (2) 1/2 is subtracted before the division by w: the
expected move of every arm shifts by the same amount, which softmax does not see, but gains that are
all equal then move nothing and a rare arm's draw moves it less. (3) Losses are brought to one scale
by their gradient in the log-probabilities, where all of them meet; no scale exceeds 10, so a loss
of which the clip has left little does not blow the rest up.

Sources: EXP3 (Auer et al. 2002); GradNorm 1711.02257.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WINDOW = 64  # gains that the percentiles are taken from
FEWEST_GAINS = 4
LOW_PERCENTILE, HIGH_PERCENTILE = 0.1, 0.9
MAX_SCALE = 10.0
_EPS = 1e-12


class AutoMix:
    """Weights of the objectives `modes`; `main` is the one whose gradient sets the scale."""

    def __init__(self, modes: Sequence[str], *, main: str, floor: float, lr: float = 0.1) -> None:
        if main not in modes or len(set(modes)) != len(modes):
            raise ValueError(f"--sigma-rl-mode {main} must be one of {', '.join(modes)}")
        if not 0.0 <= floor * len(modes) <= 1.0:
            raise ValueError(
                f"--sigma-rl-auto-mix-floor must lie between 0 and 1/{len(modes)} "
                f"for {len(modes)} objectives"
            )
        self.modes = tuple(modes)
        self.main = main
        self.floor = floor
        self.lr = lr
        self.started = False
        self._scores = [0.0] * len(modes)
        self._gains: deque[float] = deque(maxlen=WINDOW)
        self._arm: int | None = None  # drawn, its gain not yet known
        self._last_arm = -1
        self._reward = 0.5

    def start(self, *, mean_reward: float, variance: float, diversity: float) -> None:
        """Initial weights from the first group's rewards in [0, 1] and its diversity in [0, 1].

        Before it, weights are equal. Only the first call counts.
        """
        if self.started:
            return
        self.started = True
        shares = heuristic_shares(mean_reward=mean_reward, variance=variance, diversity=diversity)
        self._scores = [math.log(max(shares.get(mode, 0.0), 1e-6)) for mode in self.modes]

    def weights(self) -> dict[str, float]:
        """The probability of every arm: at least the floor, together 1."""
        highest = max(self._scores)
        shares = [math.exp(score - highest) for score in self._scores]
        free = (1.0 - self.floor * len(shares)) / sum(shares)
        return {mode: self.floor + free * share for mode, share in zip(self.modes, shares)}

    def draw(self, rng: random.Random) -> str:
        """The arm of this tick; takes one number from rng."""
        point, total = rng.random(), 0.0
        arm = self.modes[-1]
        for mode, weight in self.weights().items():
            total += weight
            if point < total:
                arm = mode
                break
        self._arm = self._last_arm = self.modes.index(arm)
        return arm

    def blend(self, arm: str) -> dict[str, float]:
        """Share of every objective in the tick's loss: half the weights, half the drawn arm."""
        return {mode: 0.5 * w + 0.5 * (mode == arm) for mode, w in self.weights().items()}

    def observe(self, gain: float) -> float:
        """Credit the drawn arm with the tick's gain in held-out pass rate per 1,000 tokens.

        Returns its reward in [0, 1]. Once per draw: RuntimeError without one.
        """
        if self._arm is None:
            raise RuntimeError("a gain belongs to a drawn objective: call draw first")
        self._gains.append(float(gain))
        self._reward = self._scaled(float(gain))
        weight = self.weights()[self.modes[self._arm]]
        self._scores[self._arm] += self.lr * (self._reward - 0.5) / max(weight, _EPS)
        highest = max(self._scores)
        self._scores = [score - highest for score in self._scores]
        self._arm = None
        return self._reward

    def _scaled(self, gain: float) -> float:
        if len(self._gains) < FEWEST_GAINS:
            return 0.5
        ordered = sorted(self._gains)
        low, high = (_quantile(ordered, share) for share in (LOW_PERCENTILE, HIGH_PERCENTILE))
        if high <= low:
            return 0.5
        return min(1.0, max(0.0, (gain - low) / (high - low)))

    def metrics(self) -> dict[str, float]:
        """Weights, the arm drawn last (its number among modes; -1 none), its reward, entropy."""
        weights = self.weights()
        entropy = -sum(w * math.log(w) for w in weights.values() if w > 0.0)
        result = {f"sigma_rl_mix_w_{mode}": weight for mode, weight in weights.items()}
        result["sigma_rl_mix_arm"] = float(self._last_arm)
        return result | {"sigma_rl_mix_reward": self._reward, "sigma_rl_mix_entropy": entropy}

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later weights, as plain numbers."""
        return {
            "modes": list(self.modes),
            "scores": list(self._scores),
            "gains": list(self._gains),
            "arm": self._arm,
            "last_arm": self._last_arm,
            "reward": self._reward,
            "started": self.started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """ValueError if the state is one of other objectives."""
        if tuple(state["modes"]) != self.modes:
            raise ValueError(f"the mix was kept for {state['modes']}, not {list(self.modes)}")
        self._scores = [float(score) for score in state["scores"]]
        self._gains = deque((float(gain) for gain in state["gains"]), maxlen=WINDOW)
        self._arm = state["arm"]
        self._last_arm = int(state["last_arm"])
        self._reward = float(state["reward"])
        self.started = bool(state["started"])


def heuristic_shares(*, mean_reward: float, variance: float, diversity: float) -> dict[str, float]:
    """Starting shares of the four objectives, together 1: exploit, explore or hold still."""
    exploit = mean_reward * (1.0 - variance)
    explore = (1.0 - mean_reward) + 0.75 * variance
    stable = 1.0 - abs(2.0 * mean_reward - 1.0) + 0.5 * variance
    shares = {
        "cispo": 0.15 + 0.45 * exploit,
        "igrpo": 0.10 + 0.30 * exploit,
        "dispo": 0.10 + 0.35 * explore,
        "gspo": 0.10 + 0.35 * stable + 0.10 * (1.0 - diversity),
    }
    total = sum(shares.values())
    return {mode: share / total for mode, share in shares.items()}


def balanced_loss(
    losses: Mapping[str, Tensor],
    *,
    log_probs: Mapping[str, Sequence[Tensor]],
    blend: Mapping[str, float],
    main: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_m v_m L_m n_main / n_m, with gradient, and the norms n_m = ||d L_m / d log pi|| (0-d).

    log_probs: for every loss the tensors of log-probabilities that it was computed from. Where the
    main objective has no gradient this tick, the mean norm of those that have one takes its place.
    """
    norms: dict[str, Tensor] = {}
    for mode, loss in losses.items():
        sources = list(log_probs[mode])
        grads = torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True)
        squares = [grad.double().square().sum() for grad in grads if grad is not None]
        norms[mode] = torch.stack(squares).sum().sqrt()
    stacked = torch.stack(list(norms.values()))
    reference = stacked.sum() / (stacked > 0).sum().clamp_min(1)
    if main in norms:
        reference = torch.where(norms[main] > 0, norms[main], reference)
    total = torch.stack(
        [
            loss * (blend[mode] * (reference / (norms[mode] + _EPS)).clamp_max(MAX_SCALE)).to(loss)
            for mode, loss in losses.items()
        ]
    ).sum()
    return total, norms


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between the neighbours in a sorted sequence."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
